"""Which weights of a linear layer become 0: by size, by size and input, or with compensation.

Source:  magnitude; Wanda, Sun et al., arXiv 2306.11695: |w_ij| * ||x_j||, compared within a row;
         SparseGPT, Frantar and Alistarh, arXiv 2301.00774: w^2 / U_jj^2 within a block of columns,
         and the columns that follow make good what is lost; then, as in ALPS, Meng et al., arXiv
         2406.07831, the weights that stay are solved for once more, all of a row together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.compress.hessian import DAMPING, Factor, Hessian, factor
from dfc.compress.sweep import BLOCK, sweep

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS, CLOSE, TINY = 40, 1e-4, 1e-30  # of conjugate gradients


@dataclass(frozen=True)
class Sparsity:
    """How many weights become 0: a share of them, or `zeros` of every `of` neighbours in a row."""

    ratio: float = 0.5
    zeros: int = 0
    of: int = 0  # 0: no pattern

    def __str__(self) -> str:
        return f"{self.of - self.zeros}:{self.of}" if self.of else f"{self.ratio:.0%}"


def magnitude(weight: Tensor, sparsity: Sparsity) -> Tensor:
    """The weights, the smallest of them 0: of the whole layer, or of each pattern."""
    scores = weight.abs().float()
    if sparsity.of:
        return weight.masked_fill(_pattern(scores, sparsity), 0)
    return weight.masked_fill(_least(scores.reshape(1, -1), sparsity.ratio).view_as(scores), 0)


def wanda(weight: Tensor, hessian: Hessian, sparsity: Sparsity) -> Tensor:
    """The weights, 0 where |w| * ||x|| is least in its row."""
    scores = weight.abs().float() * hessian.norm.float()
    least = _pattern(scores, sparsity) if sparsity.of else _least(scores, sparsity.ratio)
    return weight.masked_fill(least, 0)


def sparsegpt(
    weight: Tensor, hessian: Hessian, sparsity: Sparsity, damping: float = DAMPING
) -> tuple[Tensor, Factor]:
    """The weights, some 0 and the others changed so that the layer's output stays close.

    The sweep decides which are 0. It changes only the columns that follow, so that what it leaves
    is not the best for its own zeros: `settled` finds that.
    Raises:  DfcError D091, D092.
    """
    found = factor(hessian, damping)
    alive = weight.masked_fill(hessian.dead, 0)
    return settled(alive, sweep(alive, found, _Zeros(sparsity)), hessian, found.damping), found


def settled(weight: Tensor, sparse: Tensor, hessian: Hessian, damping: float) -> Tensor:
    """The weights with the zeros of `sparse` whose output is nearest to that of `weight`.

    Least squares for each row, all rows at once, by conjugate gradients from `sparse` on.
    Ensures: zeros stay; the loss is no larger than that of `sparse`, up to rounding.
    Cost:    outputs * inputs^2 multiplications for each of at most 40 rounds.
    """
    import torch

    h = hessian.sum.float()
    h += torch.eye(len(h)) * (damping * h.diagonal().mean())
    free, scale = sparse != 0, h.diagonal().clamp_min(TINY)
    found = sparse.float()
    left = ((weight.float() - found) @ h) * free
    step = left / scale
    size = start = (left * step).sum(dim=1, keepdim=True)
    for _ in range(ROUNDS):
        if bool((size <= CLOSE * start).all()):
            break
        bent = (step @ h) * free
        along = size / (step * bent).sum(dim=1, keepdim=True).clamp_min(TINY)
        found = found + along * step
        left = left - along * bent
        size, before = (left * left / scale).sum(dim=1, keepdim=True), size
        step = left / scale + (size / before.clamp_min(TINY)) * step
    return found.to(sparse.dtype)


class _Zeros:
    """Columns with some weights 0; which, is decided when their block or pattern is reached."""

    def __init__(self, sparsity: Sparsity) -> None:
        self.sparsity = sparsity
        self.zero: Tensor  # bool[columns of the block or pattern, N]
        self.start = 0
        self.pivots: Tensor

    def enter(self, start: int, block: Tensor, pivots: Tensor) -> None:
        self.pivots = pivots
        if not self.sparsity.of:
            scores = (block / pivots[:, None]).square()
            self.start = start
            self.zero = _least(scores.reshape(1, -1), self.sparsity.ratio).view_as(scores)

    def column(self, j: int, i: int, block: Tensor) -> Tensor:
        of = self.sparsity.of
        if of and j % of == 0:
            scores = (block[i : i + of] / self.pivots[i : i + of, None]).square()
            self.start = j
            self.zero = _pattern(scores.T, self.sparsity).T
        return block[i].masked_fill(self.zero[j - self.start], 0)


def _least(scores: Tensor, ratio: float) -> Tensor:
    """True for the share of each row with the least scores: exactly so many."""
    import torch

    count = round(ratio * scores.shape[1])
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    if count:
        chosen.scatter_(1, scores.topk(count, dim=1, largest=False).indices, True)
    return chosen


def _pattern(scores: Tensor, sparsity: Sparsity) -> Tensor:
    """True for the least of every few neighbours in a row."""
    shaped = scores.reshape(-1, sparsity.of)
    return _least(shaped, sparsity.zeros / sparsity.of).view_as(scores)


assert BLOCK % 8 == 0  # no pattern lies across two blocks
