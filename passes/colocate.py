"""Say which parts of the model share a stage, for a `partition` that follows."""

from __future__ import annotations

from dataclasses import dataclass

from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.lang.selectors import Selector
from dfc.rewrite.pass_ import EXACT, Context, Pass

TOGETHER = "together"  # selectors among the context's products


@dataclass(frozen=True)
class Colocate(Pass):
    """`colocate "embed", "head"`: `partition` puts all nodes of these parts in one stage.

    What lies between them is there as well, since stages follow each other.

    Needs:    parts that have nodes.
    Ensures:  a `partition` behind it keeps them together, or says why it cannot.
    Keeps:    the graph.
    Raises:   DfcError Q021 for parts that have no nodes.
    """

    name = "colocate"
    numerics = EXACT
    phrases = {"": "select"}  # noqa: RUF012
    not_after = serves = ("partition",)

    select: Selector

    def run(self, graph: Graph, ctx: Context) -> int:
        nodes = self.select.nodes_left(graph)
        if not nodes:
            raise DfcError("Q021", f"`{self.select}` finds nothing that could be kept together")
        for node in nodes:
            ctx.decided(node, "colocated", f"with all of `{self.select}`")
        ctx.products[TOGETHER] = (*ctx.products.get(TOGETHER, ()), self.select)
        return 0
