"""Round to nearest: each weight by itself, with ranges that the weights alone decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dfc.compress.grid import Grid, Rounded, on_grid
from dfc.compress.weights import storable
from dfc.ir.graph import Graph, Parameter
from dfc.ir.types import DType
from dfc.rewrite.pass_ import Context

if TYPE_CHECKING:
    from torch import Tensor

    from dfc.compress.weighted import Weighted


def encode(
    graph: Graph, layers: Sequence[Weighted], grid: Grid, ctx: Context, data: str | None
) -> Mapping[Parameter, Rounded]:
    """The weights of layers [N, K] on the grid, each range with the least squared error."""
    found = {}
    for done, layer in enumerate(layers):
        found[layer.weight] = round_weight(matrix_of(layer), grid, layer.weight.tensor_type.dtype)
        ctx.progress(done + 1, len(layers))
    return found


def matrix_of(layer: Weighted) -> Tensor:
    """The weight as [outputs, inputs], in float32 or wider; experts one below the other."""
    assert layer.weight.data is not None
    w = layer.weight.data.tensor()
    if layer.is_experts:
        w = (w if layer.rows else w.transpose(1, 2)).reshape(layer.shape)
        return w.double() if w.dtype.itemsize > 4 else w.float()
    w = w.reshape(layer.shape) if layer.rows else w.T
    return w.double() if w.dtype.itemsize > 4 else w.float()


def round_weight(w: Tensor, grid: Grid, dtype: DType) -> Rounded:
    """A matrix on the grid, for scales as they will be stored beside weights of a dtype."""
    scale, zero = _ranges(w, grid)
    return on_grid(w, grid, storable(scale, dtype).to(w.dtype), zero)


def nearest(w: Tensor, grid: Grid) -> Rounded:
    """A matrix on the grid, for scales in the matrix's own type."""
    return on_grid(w, grid, *_ranges(w, grid))


def _ranges(w: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero [N, G]: all groups of equal width at once, as rows of their own."""
    import torch

    (n, k), width = w.shape, grid.width(w.shape[1])
    whole = k // width * width
    # at 8 bits the full range is within a few per cent of the best
    fit = grid.search if grid.bits < 8 else grid.fit
    scale, zero = (t.reshape(n, -1) for t in fit(w[:, :whole].reshape(-1, width)))
    if whole < k:
        rest = fit(w[:, whole:])
        scale, zero = (torch.column_stack(t) for t in zip((scale, zero), rest, strict=True))
    return scale, zero
