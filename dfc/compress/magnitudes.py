"""How large values become while data runs through a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dfc.compress.calibrate import batches_of, observe
from dfc.ir.graph import Graph, Value
from dfc.ir.types import TensorType
from dfc.rewrite.pass_ import Context

if TYPE_CHECKING:
    from torch import Tensor


class Magnitude:
    """The largest finite |x|: infinities are what masks are made of, and fit into any type."""

    def __init__(self) -> None:
        self.largest = 0.0

    def update(self, x: Tensor) -> None:
        import torch

        if x.numel():
            size = float(torch.where(x.isfinite(), x.abs(), 0.0).max())
            self.largest = max(self.largest, size)

    def state(self) -> dict[str, Tensor]:
        import torch

        return {"largest": torch.tensor(self.largest, dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.largest = float(state["largest"])


def largest_magnitudes(
    graph: Graph, ctx: Context, data: str | None
) -> tuple[Mapping[Value, float], str]:
    """The largest |x| of every float value, and in words where it was seen.

    Runs the data that is named, else the examples; without either, nothing is known.
    Raises:  DfcError D for data that does not fit.
    """
    known = all(p.data is not None for p in graph.parameters.values())
    if not known or (data is None and not ctx.examples):
        return {}, ""
    given: Iterable[Any] = batches_of(ctx, data, graph) if data else ctx.examples
    values = [*graph.inputs, *(r for n in graph.nodes for r in n.results)]
    seen = {v: Magnitude() for v in values if _is_float(v)}
    observe(graph, given, seen, ctx, "largest magnitudes")
    where = f"on {data}" if data else "on the example"
    return {v: m.largest for v, m in seen.items()}, where


def _is_float(v: Value) -> bool:
    return isinstance(v.type, TensorType) and v.type.dtype.is_float
