"""Drop what nothing reads."""

from __future__ import annotations

from dataclasses import dataclass

from dfc.ir.graph import Graph, Node
from dfc.rewrite.pass_ import KEPT, Context, Pass


@dataclass(frozen=True)
class DeadCodeElimination(Pass):
    """Drop nodes without effect whose results nobody reads, and parameters that nothing uses.

    Needs:    a valid graph.
    Ensures:  every node has an effect, or a reader, or binds a size that is used.
    Keeps:    inputs, outputs, mutated parameters, random ops (their order is the random stream).
    Cost:     one walk backwards.
    """

    name = "dce"

    def run(self, graph: Graph, ctx: Context) -> int:
        dropped = _sweep(graph, ctx)
        targets = {m.target for m in graph.mutations}
        for p in list(graph.parameters.values()):
            if not p.use_count and p not in targets:
                ctx.decided(p, "dropped", "nothing reads it")
                graph.drop_parameter(p.name)
                dropped += 1
        return dropped


def _sweep(graph: Graph, ctx: Context) -> int:
    needed: set[str] = set()
    for v in graph.outputs:
        needed |= v.type.symbols
    dropped = 0
    needed |= _tree_symbols(graph)
    for node in graph.reversed_nodes:
        used = any(r.use_count for r in node.results)
        if used or node.effect or any(b.symbol in needed for b in node.binds):
            if not used:
                ctx.decided(node, KEPT, "nothing reads it, but " + _use(node))
            needed |= node.symbols
            for r in node.results:
                needed |= r.type.symbols
            for inner in node.graphs:
                dropped += _sweep(inner, ctx)
                needed |= _all_symbols(inner)
            continue
        ctx.decided(node, "dropped", "nothing reads it")
        graph.erase(node)
        dropped += 1
    return dropped


def _use(node: Node) -> str:
    if node.effect:
        return "it has an effect, or is random: its place in the order counts"
    return f"it says how large `{node.binds[0].symbol}` is"


def _tree_symbols(graph: Graph) -> frozenset[str]:
    """Sizes that the output structure returns."""
    from dfc.ir.expr import symbols
    from dfc.ir.tree import Const, Leaf, Tree, children

    found: frozenset[str] = frozenset()
    pending: list[Tree] = [graph.output_tree]
    while pending:
        tree = pending.pop()
        if isinstance(tree, Const):
            found |= symbols(tree.value)
        elif not isinstance(tree, Leaf):
            pending.extend(children(tree))
    return found


def _all_symbols(graph: Graph) -> set[str]:
    found: set[str] = set()
    for node in graph.walk():
        found |= node.symbols
        for r in node.results:
            found |= r.type.symbols
    return found
