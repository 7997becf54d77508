"""Compute each thing once."""

from __future__ import annotations

from dataclasses import dataclass

from dfc.ir.graph import Graph, Node
from dfc.rewrite.pass_ import KEPT, Context, Pass


@dataclass(frozen=True)
class CommonSubexpressions(Pass):
    """Merge pure nodes that apply the same op to the same values.

    Needs:    a valid graph.
    Ensures:  no two pure nodes of one graph share op, attributes, inputs and stage.
    Keeps:    inputs, outputs, impure nodes and their order; the earliest twin survives.
    Cost:     one walk; memory linear in distinct nodes.
    """

    name = "cse"
    limit: int | None = None  # merge at most this many nodes; bisects a miscompile

    def run(self, graph: Graph, ctx: Context) -> int:
        first: dict[tuple[object, ...], Node] = {}
        merged = 0
        for node in graph.nodes:
            for inner in node.graphs:
                left = None if self.limit is None else self.limit - merged
                merged += CommonSubexpressions(left).run(inner, ctx)
            if node.graphs or node.binds or not node.results or not node.pure:
                continue
            key = (node.op, node.attributes, node.stage, *node.inputs)
            twin = first.setdefault(key, node)
            if twin is not node and merged != self.limit:
                ctx.decided(node, "merged", "computes the same", twin.results[0])
                graph.replace(node, twin)
                merged += 1
        if ctx.asked:
            _kept(graph, ctx, self.limit)
        return merged


def _kept(graph: Graph, ctx: Context, limit: int | None) -> None:
    """Why nodes that look alike are not merged."""
    first: dict[tuple[object, ...], Node] = {}
    for node in graph.nodes:
        twin = first.setdefault((node.op, node.attributes, *node.inputs), node)
        if twin is node or not node.results or node.op in _QUIET:
            continue
        other = f"%{twin.results[0].name}"
        if node.graphs:
            reason = f"has graphs inside, as {other} has"
        elif node.binds:
            reason = f"binds a size of its own, as {other} does"
        elif not node.pure:
            reason = f"looks like {other}, but is random or has an effect"
        elif node.stage != twin.stage:
            reason = f"is like {other}, but in stage {node.stage}, not {twin.stage}"
        else:
            reason = f"is like {other}; the limit of {limit} is reached"
        ctx.decided(node, KEPT, reason)


_QUIET = frozenset({"aten._assert_scalar.default", "aten._assert_async.msg"})
