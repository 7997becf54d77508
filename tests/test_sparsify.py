"""Weights that become 0: how many, which, and what the others do about it."""

from __future__ import annotations

import itertools

import pytest
import torch

from dfc.compress.hessian import Hessian
from dfc.compress.sparse import Sparsity, magnitude, sparsegpt, wanda
from tests.test_gptq import layer

HALF, PAIRS, QUADS = Sparsity(0.5), Sparsity(zeros=2, of=4), Sparsity(zeros=4, of=8)


def zeros_of_each(w: torch.Tensor, of: int) -> set[int]:
    return set((w.reshape(-1, of) == 0).sum(dim=1).tolist())


@pytest.mark.parametrize("sparsity", [HALF, Sparsity(0.3), Sparsity(0.0), PAIRS, QUADS], ids=str)
def test_exactly_so_many_become_0(sparsity: Sparsity) -> None:
    w, hessian = layer(12, 160)
    found = {
        "magnitude": magnitude(w, sparsity),
        "wanda": wanda(w, hessian, sparsity),
        "sparsegpt": sparsegpt(w, hessian, sparsity)[0],
    }
    for name, sparse in found.items():
        share = 0.5 if sparsity.of else sparsity.ratio
        assert int((sparse == 0).sum()) == round(share * w.numel()), name
        if sparsity.of:
            assert zeros_of_each(sparse, sparsity.of) == {sparsity.zeros}, name
    for name in ("magnitude", "wanda"):
        kept = found[name] != 0
        assert torch.equal(found[name][kept], w[kept]), name


@pytest.mark.parametrize("sparsity", [HALF, PAIRS, QUADS], ids=str)
def test_each_method_hurts_less_than_the_one_before(sparsity: Sparsity) -> None:
    g = torch.Generator().manual_seed(0)
    size = torch.rand(160, generator=g) * 3 + 0.1  # inputs of differing size
    x = (torch.randn(400, 160, generator=g) @ torch.randn(160, 160, generator=g)) * size
    hessian = Hessian(160)
    hessian.update(x)
    w = torch.randn(12, 160, generator=g)
    by_size = hessian.loss(magnitude(w, sparsity) - w)
    by_input = hessian.loss(wanda(w, hessian, sparsity) - w)
    compensated = hessian.loss(sparsegpt(w, hessian, sparsity)[0] - w)
    assert compensated < by_input < by_size


def test_wanda_is_best_where_inputs_are_independent() -> None:
    """With a diagonal Hessian the score is the loss itself: no other choice is better."""
    hessian = Hessian(6)
    hessian.update(torch.diag(torch.tensor([3.0, 1.0, 0.5, 2.0, 0.1, 1.0])))
    w = torch.randn(1, 6, generator=torch.Generator().manual_seed(3))
    choices = itertools.combinations(range(6), 3)
    losses = [hessian.loss(-w * torch.isin(torch.arange(6), torch.tensor(c))) for c in choices]
    assert hessian.loss(wanda(w, hessian, HALF) - w) == pytest.approx(min(losses))


def test_sparsegpt_compensates_as_least_squares_would() -> None:
    """With one weight per row to remove, what is left is close to the refit on the others."""
    w, hessian = layer(5, 16, tokens=200)
    sparse, _ = sparsegpt(w, hessian, Sparsity(1 / 16), damping=1e-6)
    for row, before in zip(sparse.double(), w.double(), strict=True):
        kept = (row != 0).nonzero().flatten()
        h = hessian.sum
        best = torch.linalg.solve(h[kept][:, kept], h[kept] @ before)
        refit = torch.zeros(16, dtype=torch.float64)
        refit[kept] = best
        loss, least = (hessian.loss((r - before)[None].float()) for r in (row, refit))
        masked = hessian.loss(((row != 0) * before - before)[None].float())
        assert least <= loss * (1 + 1e-4) and loss <= masked * (1 + 1e-4)


def test_dead_inputs_are_the_first_to_go() -> None:
    w, _ = layer(4, 32)
    x = torch.randn(100, 32, generator=torch.Generator().manual_seed(1))
    x[:, [3, 17]] = 0
    hessian = Hessian(32)
    hessian.update(x)
    for sparse in (wanda(w, hessian, HALF), sparsegpt(w, hessian, HALF)[0]):
        assert not sparse[:, [3, 17]].any()
