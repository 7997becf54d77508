"""Optimal brain surgery on a linear layer, input by input: what one loses, the next make good.

Each column of the weights is changed (rounded, or set to 0) in turn, and its error is passed on to
the columns that come later, in the way that keeps the layer's output closest.

Source:  Frantar et al., GPTQ, arXiv 2210.17323, algorithm 1; SparseGPT, arXiv 2301.00774.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from dfc.compress.hessian import Factor

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128  # columns whose errors are passed on among themselves first


class Change(Protocol):
    """What becomes of a column. Columns are rows here: a block is [columns, N]."""

    def enter(self, start: int, block: Tensor, pivots: Tensor) -> None:
        """A block begins at column `start`; `pivots` are the factor's diagonal there."""

    def column(self, j: int, i: int, block: Tensor) -> Tensor:
        """Column j of the weights, i of the block: what stands there from now on, [N]."""


def sweep(weight: Tensor, factor: Factor, change: Change, block: int = BLOCK) -> Tensor:
    """The changed weights [N, K], columns in the factor's order put back where they were.

    Cost:  N K^2 multiplications and K small steps.
    """
    import torch

    upper, order = factor.upper, factor.order
    left = weight.float().T[order].contiguous()  # [K, N]: a column lies together
    done = torch.empty_like(left)
    for start in range(0, len(left), block):
        end = min(start + block, len(left))
        part, u = left[start:end], upper[start:end, start:end]
        errors = torch.empty_like(part)
        change.enter(start, part, u.diagonal())
        for i in range(end - start):
            done[start + i] = change.column(start + i, i, part)
            errors[i] = (part[i] - done[start + i]) / u[i, i]
            part[i + 1 :].addr_(u[i, i + 1 :], errors[i], alpha=-1)
        left[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    back = torch.empty_like(done)
    back[order] = done
    return back.T.contiguous().to(weight.dtype)
