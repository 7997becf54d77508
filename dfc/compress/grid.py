"""The values that a few bits can stand for: one scale, perhaps a zero point, for each group.

A group is some neighbours in a row of a linear layer's weights, or the whole row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.compress.integers import pair_scales

if TYPE_CHECKING:
    from torch import Tensor

SHRINKS = tuple(1 - i / 40 for i in range(21))  # shares of the full range that a search tries


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
        """Scale and zero [N] for weights [N, width]: of the full range, or of the share of it with
        the least weighted squared error. `importance` is a number for each column, or the Hessian
        of the columns [width, width].
        """
        if importance is None:
            return self._ranged(w, 1.0)
        import torch

        best, kept = torch.full((w.shape[0],), torch.inf), self._ranged(w, 1.0)
        for shrink in SHRINKS:
            scale, zero = self._ranged(w, shrink)
            change = self.value(self.code(w, scale, zero), scale, zero) - w
            weighted = change * importance if importance.dim() == 1 else change @ importance
            error = (weighted * change).sum(dim=1)
            better = error < best
            best = torch.where(better, error, best)
            kept = (torch.where(better, scale, kept[0]), torch.where(better, zero, kept[1]))
        return kept

    def _ranged(self, w: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
        import torch

        if self.symmetric:
            scale = shrink * w.abs().amax(dim=1) / self.high
            if self.pairs:
                scale = torch.maximum(scale, pair_scales(w).to(scale.dtype))
            zero = torch.zeros_like(scale)
        else:
            least = shrink * w.amin(dim=1).clamp(max=0)
            most = shrink * w.amax(dim=1).clamp(min=0)
            scale = (most - least) / (self.high - self.low)
            zero = torch.round(-least / torch.where(scale == 0, 1.0, scale))
        return torch.where(scale == 0, torch.ones_like(scale), scale), zero

    def code(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest codes, as floats: [N, width] or [N]."""
        import torch

        if w.dim() == 2:
            scale, zero = scale[:, None], zero[:, None]
        return (torch.round(w / scale) + zero).clamp(self.low, self.high)

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
    wide = [t.repeat_interleave(width, dim=1)[:, :k] for t in (scale, zero)]
    codes = (torch.round(w / wide[0]) + wide[1]).clamp(grid.low, grid.high)
    return Rounded(grid, codes.to(torch.int32), scale, None if grid.symmetric else zero)


def round_to_nearest(w: Tensor, grid: Grid) -> Rounded:
    """The plain method: each weight to the nearest value, ranges from the weights alone."""
    w = w.float()
    return on_grid(w, grid, *grid.fit_groups(w))


def rounded_state(name: str, found: Rounded) -> dict[str, Tensor]:
    """Codes, scales and zeros as tensors by name, to be read back by `rounded_of`."""
    parts = {f"{name}/codes": found.codes, f"{name}/scale": found.scale}
    return parts if found.zero is None else {**parts, f"{name}/zero": found.zero}


def rounded_of(name: str, grid: Grid, state: Mapping[str, Tensor]) -> Rounded:
    codes, scale = state[f"{name}/codes"], state[f"{name}/scale"]
    return Rounded(grid, codes, scale, state.get(f"{name}/zero"))
