"""Scales that make rounding finer where activations are large; folded, results stay."""

from __future__ import annotations

import pytest
import torch

from dfc.compress.awq import clipped, search_scale
from dfc.compress.gptq import gptq
from dfc.compress.grid import Grid, round_to_nearest
from dfc.compress.hessian import Hessian

GRID = Grid(4, 32)


def with_outliers(n: int = 24, k: int = 128) -> tuple[torch.Tensor, Hessian]:
    """Weights, and inputs of which a few channels are much larger: as in language models."""
    g = torch.Generator().manual_seed(0)
    size = torch.ones(k)
    size[torch.randperm(k, generator=g)[:6]] = 30.0
    hessian = Hessian(k)
    hessian.update(torch.randn(400, k, generator=g) * size)
    return torch.randn(n, k, generator=g) * 0.1, hessian


def test_the_search_finds_what_plain_enumeration_finds() -> None:
    w, hessian = with_outliers()
    made = search_scale([w[:10], w[10:]], hessian, GRID)
    size, losses = hessian.mean_magnitude.float(), {}
    for i in range(20):
        s = size ** (i / 20)
        s = s / (s.max() * s.min()).sqrt()
        losses[i / 20] = hessian.loss(round_to_nearest(w * s, GRID).weight / s - w)
    assert made.alpha == min(losses, key=losses.__getitem__) > 0
    assert made.error == pytest.approx(min(losses.values()), rel=1e-4)
    assert made.plain == pytest.approx(losses[0.0], rel=1e-4)
    assert made.error < 0.5 * made.plain


def test_inputs_of_one_size_need_no_scale() -> None:
    hessian = Hessian(64)
    hessian.update(torch.eye(64).repeat(3, 1))
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    made = search_scale([w], hessian, GRID)
    assert made.alpha == 0 and torch.equal(made.scale, torch.ones(64))


@pytest.mark.parametrize("grid", [GRID, Grid(4, 32, False), Grid(4, None), Grid(8, 64)], ids=str)
def test_clipping_never_costs_more(grid: Grid) -> None:
    w, hessian = with_outliers()
    plain = hessian.loss(round_to_nearest(w, grid).weight - w)
    shrunk = hessian.loss(clipped(w, hessian, grid).weight - w)
    assert shrunk < plain * 1.02
    if grid.bits == 4:
        assert shrunk < 0.9 * plain


def test_scaled_and_clipped_is_best() -> None:
    w, hessian = with_outliers()
    scale = search_scale([w], hessian, GRID).scale
    both = hessian.loss(clipped(w, hessian, GRID, scale).weight / scale - w)
    scaled = hessian.loss(round_to_nearest(w * scale, GRID).weight / scale - w)
    shrunk = hessian.loss(clipped(w, hessian, GRID).weight - w)
    assert both < scaled and both < shrunk
    assert gptq(w, hessian, GRID)[0].codes.shape == (24, 128)
