"""Compute each thing once."""

from __future__ import annotations

from dataclasses import dataclass

from dfc.ir.graph import Graph, Node
from dfc.rewrite.pass_ import Context, Pass


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
                graph.replace(node, twin)
                merged += 1
        return merged
