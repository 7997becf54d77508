"""Which values to keep so that cheap operators make the wanted ones again: the fewest bytes.

That is a minimal cut: what separates the wanted values from those that only products, convolutions
and attention make. Every value is an edge of its bytes, a cheap operator an edge that is never cut.
Source: arXiv 2205.05198 (selective recomputation), the min-cut of PyTorch's AOTAutograd.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.types import TensorType
from dfc.planning.cost import bytes_of
from dfc.planning.kinds import KINDS, VIEWS

_CHEAP = frozenset(["norm", "reduce", "gather", "math"])
_TYPICAL = 64  # what a dynamic size is taken as, within its range


def fewest_kept(
    wanted: Collection[Value],
    free: Collection[Value],
    sizes: Mapping[str, int],
    within: Collection[Node] | None = None,
) -> frozenset[Value]:
    """Values of the least bytes from which cheap operators make all that is wanted again.

    `free` are the graph's inputs that need not be kept; the others are kept where they are read,
    and so is what nodes make that are not `within`, where those are given.
    Cost:    a maximal flow, over what the wanted values depend on.
    """
    import networkx as nx

    flow: nx.DiGraph = nx.DiGraph()
    flow.add_nodes_from(("from", "to"))
    todo, seen = list(wanted), set(wanted)
    for v in wanted:
        flow.add_edge((v, 1), "to")  # an edge without a capacity is never cut
    while todo:
        value = todo.pop()
        flow.add_edge((value, 0), (value, 1), capacity=_held(value, sizes))
        node = value.node
        if node is None or not (is_cheap(node) and (within is None or node in within)):
            if value not in free and not isinstance(value, Parameter):
                flow.add_edge("from", (value, 0))
            continue
        for read in node.operands:
            flow.add_edge((read, 1), (value, 0))
            if read not in seen:
                seen.add(read)
                todo.append(read)
    _, (before, _) = nx.minimum_cut(flow, "from", "to")
    return frozenset(v for v in seen if (v, 0) in before and (v, 1) not in before)


def is_cheap(node: Node) -> bool:
    """Whether running the operator again takes about as long as moving its operands."""
    name = node.op.split(".")[1] if node.op.startswith("aten.") else ""
    if name == "dropout":
        return True  # its mask is drawn again
    if node.graphs or not node.pure or not name:
        return False
    return name in VIEWS or KINDS.get(name) in _CHEAP or _is_pointwise(node)


def typical_sizes(graph: Graph) -> Mapping[str, int]:
    """A number for each dynamic size."""
    return {
        name: max(low, min(_TYPICAL, _TYPICAL if high is None else high))
        for name, (low, high) in graph.ranges.items()
    }


def _held(value: Value, sizes: Mapping[str, int]) -> int:
    """The bytes that keeping a value holds: of a view, those of what it shows."""
    value = shown(value)
    if not isinstance(value.type, TensorType):
        return 0
    return max(1, int(bytes_of(value, sizes)))


def shown(value: Value) -> Value:
    """What a view shows, another value itself."""
    while (node := value.node) is not None and _is_view(node):
        value = next(v for v in node.operands)
    return value


def _is_view(node: Node) -> bool:
    return node.op.startswith("aten.") and node.op.split(".")[1] in VIEWS


def _is_pointwise(node: Node) -> bool:
    import torch

    overload = getattr(node.info, "overload", None)
    return overload is not None and torch.Tag.pointwise in overload.tags
