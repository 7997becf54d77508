"""The search for ranges: in pieces and in place, to the bit what its definition gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dfc.compress.grid import SHRINKS, Grid, on_grid
from dfc.compress.rtn import round_weight
from dfc.ir.types import DTYPES

GRIDS = [Grid(4, 32), Grid(4, 32, False), Grid(3, 32), Grid(4, None), Grid(4, None, False)]


def by_definition(w: Tensor, grid: Grid, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """The first share of the full range with the least error, each share over all weights."""
    errors, found = [], []
    for shrink in SHRINKS:
        if grid.symmetric:
            scale = shrink * w.abs().amax(1) / grid.high
            zero = torch.zeros_like(scale)
        else:
            low, high = shrink * w.amin(1).clamp(max=0), shrink * w.amax(1).clamp(min=0)
            scale = (high - low) / grid.high
            zero = torch.round(-low / torch.where(scale == 0, 1, scale))
        scale = torch.where(scale == 0, 1, scale)
        codes = (torch.round(w / scale[:, None]) + zero[:, None]).clamp(grid.low, grid.high)
        change = (codes - zero[:, None]) * scale[:, None] - w
        if importance is None:
            weighted = change
        else:
            weighted = change * importance if importance.dim() == 1 else change @ importance
        errors.append((weighted * change).sum(1))
        found.append(torch.stack([scale, zero]))
    best = torch.stack(errors).argmin(0)
    scale, zero = torch.stack(found)[best, :, torch.arange(len(w))].T
    return scale, zero


def weights(n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Of both signs, of one, with an outlier, zeros; many pieces of 32 columns."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(0), dtype=dtype)
    w[1::5] = w[1::5].abs()
    w[2::5] = -w[2::5].abs()
    w[3::5, 0] *= 20
    w[4::25] = 0
    return w


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", ["plain", "columns", "hessian"])
def test_a_search_is_its_definition(grid: Grid, kind: str, dtype: torch.dtype) -> None:
    w, importance = weights(2500, 32, dtype), None
    random = torch.Generator().manual_seed(1)
    if kind == "columns":
        importance = torch.rand(32, generator=random, dtype=dtype)
    elif kind == "hessian":
        x = torch.randn(99, 32, generator=random, dtype=dtype)
        importance = x.T @ x
    before = w.clone()
    scale, zero = grid.search(w, importance)
    assert torch.equal(w, before)
    wanted = by_definition(w, grid, importance)
    assert torch.equal(scale, wanted[0]) and torch.equal(zero, wanted[1])
    assert len(scale.unique()) > 1000


@pytest.mark.parametrize("k", [96, 80, 33], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_each_group_of_a_matrix_is_searched_by_itself(k: int, symmetric: bool) -> None:
    w, grid = weights(700, k, torch.float32), Grid(4, 32, symmetric)
    found = round_weight(w, grid, DTYPES["f32"])
    parts = [by_definition(p.contiguous(), grid, None) for p in torch.split(w, 32, dim=1)]
    scale, zero = (torch.stack(t, 1) for t in zip(*parts, strict=True))
    stored = found.scale.float()
    torch.testing.assert_close(stored, scale, rtol=1e-3, atol=0)
    for g, part in enumerate(torch.split(w, 32, dim=1)):
        codes = torch.round(part / stored[:, g : g + 1]) + zero[:, g : g + 1]
        assert torch.equal(found.codes[:, g * 32 :][:, :32], codes.clamp(grid.low, grid.high).int())


def test_weights_that_want_gradients_are_rounded() -> None:
    w = weights(2500, 32, torch.float32).requires_grad_()
    scale, zero = Grid(4, 32).search(w)
    assert not scale.requires_grad and scale.shape == zero.shape == (2500,)


def test_no_rows() -> None:
    found = on_grid(torch.zeros(0, 32), Grid(4, 32), torch.ones(0, 1), torch.zeros(0, 1))
    assert found.codes.shape == (0, 32)
