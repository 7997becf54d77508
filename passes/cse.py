"""Compute each thing once."""

from __future__ import annotations

from dataclasses import dataclass

from dfc.ir.graph import Graph, Node
from dfc.rewrite.pass_ import KEPT, Context, Pass, Quota


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

    skip: tuple[int, ...] = ()  # merges by number that are left out: those found to be wrong

    def run(self, graph: Graph, ctx: Context) -> int:
        quota = Quota(self.limit, self.skip)
        _merge(graph, ctx, quota)
        return quota.done


def _merge(graph: Graph, ctx: Context, quota: Quota) -> None:
    first: dict[tuple[object, ...], Node] = {}
    for node in graph.nodes:
        for inner in node.graphs:
            _merge(inner, ctx, quota)
        if node.graphs or node.binds or not node.results or not node.pure:
            continue
        key = (node.op, node.attributes, node.stage, *node.inputs)
        twin = first.setdefault(key, node)
        if twin is not node and quota.allows(node):
            ctx.decided(node, "merged", "computes the same", twin.results[0])
            graph.replace(node, twin)
    if ctx.asked:
        _kept(graph, ctx, quota.limit)


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
