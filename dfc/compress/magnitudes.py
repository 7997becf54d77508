"""How large values become while data runs through a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dfc.ir.graph import Graph, Node, Value
from dfc.ir.interpret import interpret
from dfc.rewrite.pass_ import Context


def largest_magnitudes(
    graph: Graph, ctx: Context, data: str | None
) -> tuple[Mapping[Value, float], str]:
    """The largest |x| of every float value, and in words where it was seen.

    Runs the data that is named, else the examples; without either, nothing is known.
    """
    if data is None and any(p.data is None for p in graph.parameters.values()):
        return {}, ""
    batches: Iterable[Sequence[Any]] = ctx.examples
    where = f"on {data}" if data else "on the example"
    seen: dict[Value, float] = {}
    for v, size in zip(graph.inputs, _inputs(graph, batches), strict=True):
        seen[v] = size

    def observe(node: Node, results: Sequence[Any]) -> None:
        if node.graph is graph:
            for v, x in zip(node.results, results, strict=True):
                seen[v] = max(seen.get(v, 0.0), _largest(x))

    for inputs in batches:
        interpret(graph, inputs, observe=observe)
    return seen, where


def _inputs(graph: Graph, batches: Iterable[Sequence[Any]]) -> list[float]:
    found = [0.0] * len(graph.inputs)
    for inputs in batches:
        found = [max(a, _largest(x)) for a, x in zip(found, inputs, strict=True)]
    return found


def _largest(x: Any) -> float:
    """The largest finite |x|: infinities are what masks are made of, and fit into any type."""
    import torch

    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or not x.numel():
        return 0.0
    return float(torch.where(x.isfinite(), x.abs(), 0.0).max())
