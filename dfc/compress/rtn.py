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

_CHUNK = 1 << 22  # weights whose ranges are searched at once: what fits in a cache


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
    """A matrix on the grid, for scales as they will be stored beside weights of a dtype.

    Rows are searched in pieces: memory stays that of a few of them.
    """
    import torch

    rows = max(_CHUNK // max(w.shape[1], 1), 1)
    parts = [_ranges(part, grid) for part in torch.split(w, rows)]
    scale, zero = (torch.cat(p) for p in zip(*parts, strict=True))
    return on_grid(w, grid, storable(scale, dtype).to(w.dtype), zero)


def _ranges(w: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero [N, G]: all groups of equal width at once, as rows of their own."""
    import torch

    (n, k), width = w.shape, grid.width(w.shape[1])
    whole = k // width * width
    search = grid.bits < 8  # at 8 bits the full range is within a few per cent of the best
    importance = torch.ones(width, dtype=w.dtype) if search else None
    scale, zero = grid.fit(w[:, :whole].reshape(-1, width), importance)
    scale, zero = scale.reshape(n, -1), zero.reshape(n, -1)
    if whole < k:
        rest = torch.ones(k - whole, dtype=w.dtype) if search else None
        more = grid.fit(w[:, whole:], rest)
        scale = torch.cat([scale, more[0][:, None]], dim=1)
        zero = torch.cat([zero, more[1][:, None]], dim=1)
    return scale, zero
