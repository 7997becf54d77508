"""Where a graph changes to 16 bits and back: the fewest bytes through casts, by a minimum cut.

Nodes that gain stand on one side, nodes that must stay in f32, inputs and outputs on the other;
those that take any type go where the casts between both sides move the least.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dfc.ir.expr import evaluate, symbols
from dfc.ir.graph import Graph, Node, Value
from dfc.ir.op import Precision
from dfc.ir.types import DTYPES, TensorType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

F32, HALVES = DTYPES["f32"], (DTYPES["f16"], DTYPES["bf16"])
_USUAL_SIZE = 64  # of a dynamic dimension, where its range allows it
_CAST_BYTES = 6  # for each element: 4 on one side, 2 on the other
_ENDLESS = 1 << 30  # int32 holds the sum of one such edge and all others
_SOURCE, _SINK = 0, 1


def is_f32(v: Value) -> bool:
    return isinstance(v.type, TensorType) and v.type.dtype == F32


def takes_part(node: Node) -> bool:
    """Whether a node reads or makes f32 tensors."""
    return any(map(is_f32, node.operands)) or any(map(is_f32, node.results))


def is_cast_up(v: Value) -> bool:
    """Whether a value is a 16-bit one, made f32: casting it down again loses nothing."""
    node = v.node
    if node is None or node.op != "aten._to_copy.default" or not is_f32(v):
        return False
    (source,) = node.operands
    return isinstance(source.type, TensorType) and source.type.dtype in HALVES


def choose_half(graph: Graph, wishes: Mapping[Node, Precision]) -> set[Node]:
    """The nodes that run in 16 bits.

    Ensures:  those that wish "half" do, those that wish "f32" do not; casts between both move as
              few bytes as can be, and where two ways move the same, more nodes stay in f32.
    Cost:     one maximum flow over the nodes and values of the graph.
    """
    if "half" not in wishes.values():
        return set()
    network = _Network(graph, wishes)
    side = network.source_side()
    return {node for node, at in network.places.items() if at in side}


class _Network:
    """Nodes as places, values as edges that cost what a cast of them moves."""

    def __init__(self, graph: Graph, wishes: Mapping[Node, Precision]) -> None:
        self.places: dict[Node, int] = {}
        self.edges: dict[tuple[int, int], int] = {}
        self.count = 2
        self.ranges = graph.ranges
        for node, wish in wishes.items():
            self.places[node] = self._place()
            if wish != "follow":
                pinned = (_SOURCE, self.places[node]) if wish == "half" else None
                self._endless(*(pinned or (self.places[node], _SINK)))
        for node in wishes:
            for v in node.results:
                self._value(v)
        for v in graph.inputs:
            self._value(v)

    def _place(self) -> int:
        self.count += 1
        return self.count - 1

    def _endless(self, a: int, b: int) -> None:
        self.edges[a, b] = _ENDLESS

    def _value(self, v: Value) -> None:
        """One cast up serves all readers in f32, one cast down all in 16 bits."""
        if not is_f32(v) or not v.users:
            return
        maker = self.places.get(v.node, _SINK) if v.node else _SINK
        readers = sorted({self.places.get(u, _SINK) for u in v.users})
        cost = _CAST_BYTES * self._elements(v)
        if maker != _SINK:
            up = self._place()
            self.edges[maker, up] = cost
            for reader in readers:
                self._endless(up, reader)
        if not is_cast_up(v):
            down = self._place()
            self.edges[down, maker] = cost
            for reader in readers:
                if reader != _SINK:
                    self._endless(reader, down)

    def _elements(self, v: Value) -> int:
        numel = v.tensor_type.numel
        usual = {name: self._usual(name) for name in symbols(numel)}
        found = evaluate(numel, usual)
        assert isinstance(found, int), numel
        return max(found, 1)

    def _usual(self, symbol: str) -> int:
        low, high = self.ranges.get(symbol, (0, None))
        usual = max(_USUAL_SIZE, low)
        return usual if high is None else min(usual, high)

    def source_side(self) -> set[int]:
        """The places that are reached when the cheapest cut is taken: as few as can be."""
        import numpy as np
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import breadth_first_order, maximum_flow

        ends = np.array([*self.edges], dtype=np.int32)
        shape = (self.count, self.count)
        capacity = csr_array((self._capacities(), (ends[:, 0], ends[:, 1])), shape=shape)
        flow = maximum_flow(capacity, _SOURCE, _SINK).flow
        left = capacity - flow
        left.data = np.maximum(left.data, 0)
        left.eliminate_zeros()
        reached = breadth_first_order(left, _SOURCE, return_predecessors=False)
        return set(reached.tolist())

    def _capacities(self) -> NDArray[np.int32]:
        """Costs as 32-bit numbers whose sum is below that of an edge that is never cut."""
        import numpy as np

        costs = np.array([*self.edges.values()], dtype=np.float64)
        finite = costs < _ENDLESS
        total = costs[finite].sum()
        scale = min(1.0, (_ENDLESS / 4) / total) if total else 1.0
        scaled = np.where(finite, np.maximum(costs * scale, 1), _ENDLESS)
        return scaled.astype(np.int32)
