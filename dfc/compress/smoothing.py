"""Scales that move the difficulty of rounding from activations into weights.

Source:  SmoothQuant, Xiao et al., arXiv 2211.10438, equation 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dfc.errors import DfcError

if TYPE_CHECKING:
    from torch import Tensor


class Peaks:
    """The largest |x| of each channel, the last dimension; an observer of calibration."""

    def __init__(self) -> None:
        self.peaks: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """One batch.

        Raises:  DfcError D090 for NaN or infinite activations.
        """
        import torch

        rows = x.reshape(-1, x.shape[-1])
        if not len(rows):
            return
        peaks = rows.abs().amax(dim=0).float()
        if not bool(torch.isfinite(peaks).all()):
            raise DfcError("D090", "calibration gives NaN or infinite activations there")
        self.peaks = peaks if self.peaks is None else torch.maximum(self.peaks, peaks)

    def state(self) -> dict[str, Tensor]:
        return {} if self.peaks is None else {"peaks": self.peaks}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.peaks = state.get("peaks")


def smoothing(peaks: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """`max|x|^alpha / max|w|^(1 - alpha)` for each channel; 1 where one of them is 0.

    Needs:  weights [*, channels] of all layers that read the channels.
    """
    import torch

    x = peaks.double()
    w = torch.stack([t.abs().amax(dim=0) for t in weights]).amax(dim=0).double()
    scale = x**alpha / w ** (1 - alpha)
    return torch.where((x > 0) & (w > 0), scale, torch.ones_like(scale))
