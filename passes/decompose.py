"""Write declared ops in terms of ATen's."""

from __future__ import annotations

from dataclasses import dataclass

from dfc.ir.graph import Graph
from dfc.ops.builder import decomposable, decompose
from dfc.rewrite.pass_ import KEPT, Context, Pass, Quota, close


@dataclass(frozen=True)
class Decompose(Pass):
    """Replace declared ops, dfc's and the user's, by what they are made of.

    Needs:    a valid graph.
    Ensures:  no declared op that can be decomposed is left, or none of those in `ops`.
    Keeps:    value names, stages and source lines; ops without a decomposition.
    Cost:     one walk; types of the new nodes are inferred.
    """

    name = "decompose"
    numerics = close(1e-6)  # the same arithmetic in several kernels: each may round its own way
    ops: tuple[str, ...] = ()  # names such as `linear_w4`; none: every declared op
    limit: int | None = None  # decompose at most this many; bisects a miscompile
    skip: tuple[int, ...] = ()  # by number, those that are left as they are

    def run(self, graph: Graph, ctx: Context) -> int:
        quota = Quota(self.limit, self.skip)
        self._graph(graph, ctx, quota)
        return quota.done

    def _graph(self, graph: Graph, ctx: Context, quota: Quota) -> None:
        for node in graph.nodes:
            for inner in node.graphs:
                self._graph(inner, ctx, quota)
            wanted = not self.ops or node.op.removeprefix("dfc.") in self.ops
            if not wanted or not decomposable(node.op):
                if not node.op.startswith(("aten.", "torch.")):
                    why = "is not among `ops`" if not wanted else "says nothing of how it is made"
                    ctx.decided(node, KEPT, f"{node.op} {why}")
                continue
            if not quota.allows(node):
                continue
            ctx.decided(node, "decomposed", f"{node.op} is written in other ops")
            made = decompose(node)
            names = [r.name for r in node.results]
            graph.replace(node, made)
            for value, name in zip(made, names, strict=True):
                graph.rename(value, name)
