"""A graph cut into blocks: runs of nodes, each with the weights that it reads.

A block is what is streamed at once: the weights of its first reader until those of its last one. A
weight is read where a view of it is read. Blocks are as large as the weights that most bytes are
in, so that slots are small and copies large.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from dfc.ir.graph import Graph, Node, Parameter
from dfc.ir.types import TensorType
from dfc.planning.kinds import KINDS

if TYPE_CHECKING:
    from dfc.emit.kernels import KernelCall

    Calls = Mapping[Node, KernelCall]

SMALL = 1 << 18  # bytes of weights that stay: more is not worth a copy, where others are larger
_SHARE = 16  # of the largest weight, which is small as well
# Operators whose results never share memory with a weight.
_READERS = ("matmul", "conv", "norm", "reduce", "math")


@dataclass(eq=False)
class Block:
    """Nodes in order; `weights` are what is large of what they read, `last` the last to read it."""

    nodes: list[Node] = field(default_factory=list)
    weights: list[Parameter] = field(default_factory=list)
    first: Node | None = None
    last: Node | None = None

    @property
    def bytes(self) -> int:
        return sum(weight_bytes(p) for p in self.weights)

    @property
    def name(self) -> str:
        """What its weights have in common: `layers.3.mlp`, or the only one's name."""
        names = [p.name.split(".") for p in self.weights]
        common = []
        for parts in zip(*names, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        return ".".join(common) or (self.weights[0].name if self.weights else "")


def weight_bytes(p: Parameter) -> int:
    """Bytes of a weight; sizes of weights are numbers."""
    t = p.type
    size = t.nbytes if isinstance(t, TensorType) else 0
    return size if isinstance(size, int) else 0


class Cut(NamedTuple):
    """A graph in blocks; `stay` are weights that are in none: small ones, and what callers see.

    `calls` are what runs in place of nodes, with weights of its own.
    """

    graph: Graph
    blocks: list[Block]
    stay: list[Parameter]
    calls: Calls


def cut(graph: Graph, calls: Calls = MappingProxyType({})) -> Cut:
    """All nodes in blocks, and where their weights are."""
    users = _users(graph, calls)
    blocks = _blocks(graph, users)
    inside = {p for b in blocks for p in b.weights}
    return Cut(graph, blocks, [p for p in users if p not in inside], calls)


def _users(graph: Graph, calls: Calls) -> dict[Parameter, list[Node]]:
    """The readers of every weight that has some, with what reads in place of nodes."""
    found: dict[Parameter, list[Node]] = {}
    for p in graph.parameters.values():
        users = [u for u in p.users if u not in calls or p in calls[u].operands]
        if users:
            found[p] = users
    for node, call in calls.items():
        for x in call.operands:
            if isinstance(x, Parameter) and node not in found.setdefault(x, []):
                found[x].append(node)
    return found


def _blocks(graph: Graph, users: Mapping[Parameter, Sequence[Node]]) -> list[Block]:
    order = {node: i for i, node in enumerate(graph.nodes)}
    nodes = list(order)
    spans = _spans(graph, users, order)
    grain = _grain([weight_bytes(p) for p in spans])
    tied = _tied(spans)
    starts: dict[int, list[Parameter]] = {}
    for p, ranges in spans.items():
        for first, _ in ranges:
            starts.setdefault(first, []).append(p)
    return _grouped(nodes, starts, spans, grain, tied)


def _grouped(
    nodes: Sequence[Node],
    starts: dict[int, list[Parameter]],
    spans: dict[Parameter, list[tuple[int, int]]],
    grain: int,
    tied: Collection[Parameter],
) -> list[Block]:
    """Greedily: weights that are read across each other, and small neighbours, together."""
    found = [Block()]
    until = -1  # the last node that reads what the block has
    for i, node in enumerate(nodes):
        fresh = [p for p in starts.get(i, ()) if p not in found[-1].weights or i > until]
        if fresh:
            size = sum(weight_bytes(p) for p in fresh)
            alone = any(p in tied for p in [*fresh, *found[-1].weights])
            full = found[-1].bytes + size > grain or alone
            if found[-1].weights and i > until and full:
                found.append(Block())
            block = found[-1]
            block.weights += [p for p in fresh if p not in block.weights]
            block.first = block.first or node
            reads = [b for p in fresh for a, b in spans[p] if a == i]
            until = max(until, *reads)
        found[-1].nodes.append(node)
        if found[-1].weights and i <= until:
            found[-1].last = node
    return found


def _spans(
    graph: Graph, users: Mapping[Parameter, Sequence[Node]], order: dict[Node, int]
) -> dict[Parameter, list[tuple[int, int]]]:
    """Of each large weight the ranges of nodes that need it, one for each of its users."""
    least = min(SMALL, max(map(weight_bytes, users), default=0) // _SHARE)
    found = {}
    for p, nodes in users.items():
        if weight_bytes(p) > least:
            ranges = _ranges(nodes, graph, order)
            if ranges:
                found[p] = ranges
    return found


def _ranges(users: Sequence[Node], graph: Graph, order: dict[Node, int]) -> list[tuple[int, int]]:
    """From each user to the last reader of what may show a weight; none where a result may."""
    found = []
    for user in users:
        last, todo, seen = user, [user], {user}
        while todo:
            node = todo.pop()
            if node is graph.result or node not in order:
                return []
            if order[node] > order[last]:
                last = node
            if not _reads(node):
                more = [u for r in node.results for u in r.users if u not in seen]
                seen.update(more)
                todo += more
        found.append((order[user], order[last]))
    return sorted(found)


def _reads(node: Node) -> bool:
    """Whether the results of a node are memory of their own for sure."""
    if node.graphs:
        return False
    if node.op.startswith("dfc."):
        return True
    name = node.op.split(".")[1]
    if name == "einsum":
        return False  # it may only turn what it is given
    return name in ("embedding", "scaled_dot_product_attention") or KINDS.get(name) in _READERS


def _tied(spans: dict[Parameter, list[tuple[int, int]]]) -> set[Parameter]:
    """Weights with several users, which are far from each other."""
    return {p for p, ranges in spans.items() if len(ranges) > 1}


def _grain(sizes: Sequence[int]) -> int:
    """The size of the weights up to which half of all bytes are.

    Why:  a table with most of a small model's bytes would make one block of all the layers: what
          alone is more than a quarter does not count, where there are others.
    """
    usual = [s for s in sizes if s <= sum(sizes) / 4] or list(sizes)
    half, sofar = sum(usual) / 2, 0
    for size in sorted(usual):
        sofar += size
        if sofar >= half:
            return size
    return 0
