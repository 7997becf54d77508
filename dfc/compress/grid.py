"""The values that a few bits can stand for: one scale, perhaps a zero point, for each group.

A group is some neighbours in a row of a linear layer's weights, or the whole row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.compress.integers import pair_scales

if TYPE_CHECKING:
    from torch import Tensor

SHRINKS = tuple(1 - i / 40 for i in range(21))  # shares of the full range that a search tries
_PIECE = 32_000  # weights that are searched at once: two copies stay in a core's cache, and each op
#                  in its own thread (PyTorch divides ops of 32 768 numbers and more)
_MOST_THREADS = 8  # what is Python of a step is done by one of them at a time


@dataclass(frozen=True)
class Grid:
    """`(code - zero) * scale`; symmetric grids have no zero point and codes around 0.

    C1:  symmetric codes lie in [-2^(bits-1), 2^(bits-1) - 1] and their range is fitted to
         2^(bits-1) - 1; asymmetric ones lie in [0, 2^bits - 1], and 0.0 is one of the values.
    """

    bits: int = 4
    group: int | None = 64  # None: one scale for each row
    symmetric: bool = True
    pairs: bool = False  # symmetric: no two neighbours add up to more than 16-bit sums hold

    def __str__(self) -> str:
        per = f"groups of {self.group}" if self.group else "rows"
        pairs = ", pairs" if self.pairs else ""
        return f"int{self.bits}, {per}, {'symmetric' if self.symmetric else 'asymmetric'}{pairs}"

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def high(self) -> int:
        return self.low + (1 << self.bits) - 1

    def width(self, inputs: int) -> int:
        return self.group or inputs

    def fit(self, w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and zero [N] for weights [N, width]: of the full range, or those of `search`."""
        if importance is None:
            return self._ranged(*self._ends(w), 1.0)
        return self.search(w, importance)

    def search(self, w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and zero [N] for the share of the full range with the least squared error, which
        `importance` weighs: a number for each column, or the Hessian of the columns [width, width].

        Cost:  seven passes over the weights for each share, in pieces that stay in a cache.
        """
        import torch

        if importance is not None and importance.dim() == 2:
            return self._searched(w, importance)  # a product of matrices takes all threads itself
        pieces = torch.split(w.detach(), max(_PIECE // w.shape[1], 1))
        if len(pieces) == 1:
            return self._searched(w, importance)
        with ThreadPoolExecutor(min(torch.get_num_threads(), _MOST_THREADS)) as pool:
            found = list(pool.map(lambda piece: self._searched(piece, importance), pieces))
        scale, zero = (torch.cat(parts) for parts in zip(*found, strict=True))
        return scale, zero

    def _searched(self, w: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        import torch

        w = w.contiguous()
        scales, zeros = self._ranged(*self._ends(w), torch.tensor(SHRINKS, dtype=w.dtype)[:, None])
        errors, change = torch.empty_like(scales), torch.empty_like(w)
        for scale, zero, error in zip(scales[..., None], zeros[..., None], errors, strict=True):
            self.nearest(w, scale, zero, out=change)
            if not self.symmetric:
                change.sub_(zero)
            change.mul_(scale).sub_(w)
            torch.sum(_squared(change, importance), dim=1, out=error)
        best = errors.argmin(dim=0, keepdim=True)  # the first of several
        return scales.gather(0, best)[0], zeros.gather(0, best)[0]

    def _ends(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """What the full range is made of: the lowest and the highest of each row [N]; of symmetric
        grids the largest size, and the finest scale that there may be.
        """
        import torch

        least, most = w.amin(dim=1), w.amax(dim=1)
        if not self.symmetric:
            return least.clamp(max=0), most.clamp(min=0)
        most = torch.maximum(most, -least)
        return pair_scales(w).to(w.dtype) if self.pairs else torch.zeros_like(most), most

    def _ranged(self, least: Tensor, most: Tensor, shrink: Tensor | float) -> tuple[Tensor, Tensor]:
        """Scale and zero for a share of the full range; or [shares, N] for [shares, 1]."""
        import torch

        if self.symmetric:
            scale = torch.maximum(shrink * most / self.high, least)
            zero = torch.zeros_like(scale)
        else:
            low, high = shrink * least, shrink * most
            scale = (high - low) / (self.high - self.low)
            zero = torch.round(-low / torch.where(scale == 0, 1.0, scale))
        return torch.where(scale == 0, torch.ones_like(scale), scale), zero

    def nearest(self, w: Tensor, scale: Tensor, zero: Tensor, out: Tensor | None = None) -> Tensor:
        """The nearest codes, as floats; scale and zero are of a shape that goes with w's."""
        import torch

        codes = torch.div(w, scale, out=out).round_()
        return (codes if self.symmetric else codes.add_(zero)).clamp_(self.low, self.high)

    def code(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest codes of [N, width] or [N], for a scale and zero of [N]."""
        if w.dim() == 2:
            scale, zero = scale[:, None], zero[:, None]
        return self.nearest(w, scale, zero)

    def value(self, code: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        if code.dim() == 2:
            scale, zero = scale[:, None], zero[:, None]
        return (code - zero) * scale

    def fit_groups(self, w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and zero [N, groups] for a whole layer [N, K]; the last group may be shorter."""
        import torch

        width, found = self.width(w.shape[1]), []
        for start in range(0, w.shape[1], width):
            part = slice(start, start + width)
            some = None if importance is None else importance[part]
            if some is not None and some.dim() == 2:
                some = some[:, part]
            found.append(self.fit(w[:, start : start + width], some))
        scales, zeros = zip(*found, strict=True)
        return torch.stack(scales, dim=1), torch.stack(zeros, dim=1)


def _squared(change: Tensor, importance: Tensor | None) -> Tensor:
    """Squared errors, weighed, in the place of the errors where that is possible."""
    if importance is None:
        return change.square_()
    weighted = change * importance if importance.dim() == 1 else change @ importance
    return weighted.mul_(change)


@dataclass(frozen=True)
class Rounded:
    """A layer's weights on a grid: codes i32[N, K], scale and zero [N, groups]."""

    grid: Grid
    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    @property
    def weight(self) -> Tensor:
        """What the codes stand for, in the scale's dtype."""
        width = self.grid.width(self.codes.shape[1])
        k = self.codes.shape[1]
        codes = self.codes.to(self.scale.dtype)
        if self.zero is not None:
            codes = codes - self.zero.repeat_interleave(width, dim=1)[:, :k]
        return codes * self.scale.repeat_interleave(width, dim=1)[:, :k]


def on_grid(w: Tensor, grid: Grid, scale: Tensor, zero: Tensor) -> Rounded:
    """Weights rounded to the nearest values of a grid with these scales and zeros [N, groups]."""
    import torch

    width, k = grid.width(w.shape[1]), w.shape[1]
    codes = torch.empty(w.shape, dtype=torch.int32)
    rows = max(_PIECE // max(k, 1), 1)
    parts = (torch.split(t, rows) for t in (w, codes, scale, zero))
    for part, to, *per_group in zip(*parts, strict=True):
        wide = (t.repeat_interleave(width, dim=1)[:, :k] for t in per_group)
        to.copy_(grid.nearest(part, *wide))
    return Rounded(grid, codes, scale, None if grid.symmetric else zero)


def round_to_nearest(w: Tensor, grid: Grid) -> Rounded:
    """The plain method: each weight to the nearest value, ranges from the weights alone."""
    w = w.float()
    return on_grid(w, grid, *grid.fit_groups(w))


def below_one_another(parts: Sequence[Rounded]) -> Rounded:
    """The rows of several weights on one grid."""
    import torch

    codes, scale = torch.cat([p.codes for p in parts]), torch.cat([p.scale for p in parts])
    zeros = [p.zero for p in parts if p.zero is not None]
    return Rounded(parts[0].grid, codes, scale, torch.cat(zeros) if zeros else None)


def rounded_state(name: str, found: Rounded) -> dict[str, Tensor]:
    """Codes, scales and zeros as tensors by name, to be read back by `rounded_of`."""
    parts = {f"{name}/codes": found.codes, f"{name}/scale": found.scale}
    return parts if found.zero is None else {**parts, f"{name}/zero": found.zero}


def rounded_of(name: str, grid: Grid, state: Mapping[str, Tensor]) -> Rounded:
    codes, scale = state[f"{name}/codes"], state[f"{name}/scale"]
    return Rounded(grid, codes, scale, state.get(f"{name}/zero"))
