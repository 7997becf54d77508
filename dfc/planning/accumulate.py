"""Gradients that are added up in the graph, each where it is made.

What is made from one microbatch goes into the sum over the earlier ones: the sum is an input of the
graph, and the new sum an output. An engine that may write over the old one (`Donating`) keeps no
gradient at all.

Why:  a gradient has the size of its weight. Kept until all are made, it has left the cache when it
      is added, and its memory is asked for anew each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from dfc.ir.graph import Graph, Node, Value
from dfc.ops.symbolic import identifier

# Products that can add what they make to something: without memory of their own.
_ADDING = {"aten.mm.default": "aten.addmm.default", "aten.bmm.default": "aten.baddbmm.default"}


def accumulate(
    graph: Graph, gradients: Mapping[str, Value]
) -> tuple[dict[str, Value], dict[str, Value]]:
    """Add each weight's gradient to a sum; the sums so far, which are new inputs, and the new ones.

    Keeps:   the graph's outputs, which the caller sets.
    """
    sums = {
        name: graph.add_input(graph.fresh_name(identifier(f"sum_{name}")), g.type)
        for name, g in gradients.items()
    }
    nodes = list(graph.nodes)
    following: dict[Node | None, Node] = dict(pairwise(nodes))
    found = {}
    for name, gradient in gradients.items():
        if not _is_product(gradient):
            found[name] = _add(graph, sums[name], gradient, name, following.get(gradient.node))
    for name, gradient in gradients.items():  # these nodes go: no other may stand before them then
        if name not in found:
            found[name] = _add_product(graph, sums[name], gradient, name)
    return sums, {name: found[name] for name in gradients}


def _is_product(gradient: Value) -> bool:
    """Whether it is one that nobody but the caller reads, and only once."""
    return gradient.node is not None and gradient.node.op in _ADDING and gradient.use_count == 1


def _add(graph: Graph, total: Value, gradient: Value, name: str, before: Node | None) -> Value:
    return graph.add(
        "aten.add.Tensor", [total, gradient], {"alpha": 1}, types=[gradient.type],
        names=[identifier(f"grad_{name}")], before=before,
        loc=gradient.node.loc if gradient.node else None,
    ).result  # fmt: skip


def _add_product(graph: Graph, total: Value, gradient: Value, name: str) -> Value:
    node = gradient.node
    assert node is not None
    added = graph.add(
        _ADDING[node.op], [total, *node.inputs], {"beta": 1, "alpha": 1}, types=[gradient.type],
        names=[identifier(f"grad_{name}")], before=node, loc=node.loc,
    )  # fmt: skip
    graph.replace(node, added)
    return added.result
