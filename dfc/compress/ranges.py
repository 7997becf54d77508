"""Ranges of activations for 8-bit integers: what is seen in a histogram, and how it is clipped.

Every range contains 0, which padding and ReLU need exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from dfc.counting import counted
from dfc.errors import DfcError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Floats = NDArray[np.float64]

BINS = 4096  # at most; at least half of them cover what was seen
LEVELS = 256
MASKED = -9.9e3  # what masks add to a score, -1e4 to finfo.min, lies below


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, 0 among them."""

    low: float
    high: float

    def joined(self, other: Range) -> Range:
        return Range(min(self.low, other.low), max(self.high, other.high))

    def within(self, low: float, high: float) -> Range:
        return Range(max(self.low, min(low, 0.0)), min(self.high, max(high, 0.0)))

    def affine(self) -> tuple[float, int]:
        """Scale and zero point of u8. A range without width has the scale 1."""
        import numpy

        scale = float(numpy.float32((self.high - self.low) / (LEVELS - 1)))
        if scale < float(numpy.finfo(numpy.float32).tiny):
            return 1.0, 0
        return scale, min(max(round(-self.low / scale), 0), LEVELS - 1)


# softmax and sigmoid end just below 1: 1/256 loses nothing, and 0 stays 0
UNIT = Range(0.0, (LEVELS - 1) / LEVELS)


class Histogram:
    """Counts what it sees in bins of a width that is a power of two, as many bins as are needed.

    Values that masks have moved away, and -inf, are left out.
    Ensures:  the counts do not depend on how the values were cut into batches.
    Raises:   DfcError D090 for NaN or infinity.
    """

    def __init__(self, name: str) -> None:
        import torch

        self.name = name
        self.low = math.inf
        self.high = -math.inf
        self.exponent = -126  # of the bins' width
        self.first = 0  # the number of the first bin, which begins at first * 2**exponent
        self.counts = torch.zeros(0, dtype=torch.int64)

    def update(self, x: Tensor) -> None:
        import torch

        x = x.reshape(-1)
        if not x.numel():
            return
        low, high = (float(b) for b in torch.aminmax(x))
        if low <= MASKED:
            x = x[x > MASKED]
            if not x.numel():
                return
            low, high = (float(b) for b in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = int((~torch.isfinite(x)).sum())
            what = counted(bad, "number that is", "numbers that are")
            message = f"calibration gives {what} NaN or infinite in {self.name}"
            raise DfcError("D090", message, help="leave this layer out, or look at its input")
        self._cover(low, high)
        numbers = torch.floor(x * 2.0**-self.exponent).to(torch.int32) - self.first
        self.counts += torch.bincount(numbers, minlength=len(self.counts))

    def _cover(self, low: float, high: float) -> None:
        """Let the bins reach from the least to the greatest value seen."""
        import torch

        self.low, self.high = min(self.low, low), max(self.high, high)
        exponent = self.exponent
        while self._bins(exponent)[1] - self._bins(exponent)[0] >= BINS:
            exponent += 1
        first, last = self._bins(exponent)
        counts = torch.zeros(last - first + 1, dtype=torch.int64)
        if len(self.counts):
            old = torch.arange(len(self.counts)) + self.first
            counts.index_add_(0, (old >> (exponent - self.exponent)) - first, self.counts)
        self.exponent, self.first, self.counts = exponent, first, counts

    def _bins(self, exponent: int) -> tuple[int, int]:
        """The numbers of the first and the last bin at a width."""
        return math.floor(self.low * 2.0**-exponent), math.floor(self.high * 2.0**-exponent)

    def state(self) -> dict[str, Tensor]:
        import torch

        numbers = [self.exponent, self.first]
        return {
            "bounds": torch.tensor([self.low, self.high], dtype=torch.float64),
            "bins": torch.tensor(numbers),
            "counts": self.counts,
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.low, self.high = (float(x) for x in state["bounds"])
        self.exponent, self.first = (int(x) for x in state["bins"])
        self.counts = state["counts"].clone()

    # What the ranges are made of

    @property
    def whole(self) -> Range:
        """From the least to the greatest value; just 0 where nothing was seen."""
        if not len(self.counts):
            return Range(0.0, 0.0)
        return Range(min(self.low, 0.0), max(self.high, 0.0))

    def centres(self) -> Tensor:
        """The middle of each bin."""
        import torch

        numbers = torch.arange(len(self.counts), dtype=torch.float64) + self.first
        return (numbers + 0.5) * 2.0**self.exponent

    def without_zeros(self) -> Tensor:
        """The counts, in the bin of 0 no more than in the fuller one beside it."""
        counts, at = self.counts.clone(), -self.first
        beside = [int(counts[i]) for i in (at - 1, at + 1) if 0 <= i < len(counts)]
        if 0 <= at < len(counts) and beside:
            counts[at] = min(int(counts[at]), max(beside))
        return counts if counts.any() else self.counts

    def quantile(self, q: float) -> float:
        """The value below which a part `q` of what was seen lies, to a bin's width."""
        import torch

        reached = torch.cumsum(self.counts, 0) >= q * int(self.counts.sum())
        at = int(torch.nonzero(reached)[0])
        edge = self.first + at + (1 if q > 0.5 else 0)
        return min(max(edge * 2.0**self.exponent, self.low), self.high)


def minmax(seen: Histogram) -> Range:
    """All of it."""
    return seen.whole


def percentile(seen: Histogram, part: float = 0.9999) -> Range:
    """All but the outermost ten-thousandth at either end."""
    if not len(seen.counts):
        return seen.whole
    return seen.whole.within(seen.quantile(1 - part), seen.quantile(part))


def mse(seen: Histogram) -> Range:
    """The range whose rounding and clipping together make the least mean square error."""
    return _best(seen, _square_error)


def entropy(seen: Histogram) -> Range:
    """The range that keeps the distribution closest to what was seen, by relative entropy.

    Zeros, which every range has exactly, count no more than what lies beside them: else the many
    of a ReLU make it best to clip nearly all other numbers.
    Source:  8-bit inference with TensorRT (Migacz, GTC 2017), here for ranges with two ends.
    """
    return _best(seen, _relative_entropy, seen.without_zeros())


def _best(
    seen: Histogram, loss: Callable[[Floats, Floats, Range], float], counts: Tensor | None = None
) -> Range:
    """The best of ranges whose ends are drawn in by steps, the high end first, then the low one.

    Why:  numpy, which takes a third of torch's time for so few numbers; what the first round tried
          is not tried again.
    """
    import torch

    if not len(seen.counts):
        return seen.whole
    values = seen.centres().numpy()
    shares = (seen.counts if counts is None else counts).double().numpy()
    shares /= shares.sum()
    steps = [float(f) for f in torch.linspace(1.0, 0.2, 81, dtype=torch.float64)]
    tried = cache(lambda r: loss(values, shares, r))
    best = seen.whole
    for _ in range(2):
        highs = [Range(best.low, seen.whole.high * f) for f in steps]
        best = min(highs, key=tried) if best.high else best
        lows = [Range(seen.whole.low * f, best.high) for f in steps]
        best = min(lows, key=tried) if best.low else best
    return best


def _codes(values: Floats, range: Range) -> tuple[Floats, float, int]:
    import numpy as np

    scale, zero = range.affine()
    return np.clip(np.rint(values / scale) + zero, 0, LEVELS - 1), scale, zero


def _square_error(values: Floats, shares: Floats, range: Range) -> float:
    codes, scale, zero = _codes(values, range)
    return float((shares * (values - (codes - zero) * scale) ** 2).sum())


def _relative_entropy(values: Floats, shares: Floats, range: Range) -> float:
    """Of what was seen, clipped into the range, against what 256 levels can tell of it.

    Needs:  values in rising order.
    """
    import numpy as np

    first = int(np.searchsorted(values, range.low, "left"))
    end = int(np.searchsorted(values, range.high, "right"))
    if first == end:
        return math.inf
    clipped = shares[first:end].copy()
    filled = clipped > 0
    levels = _codes(values[first:end], range)[0].astype(np.int64)
    mass = np.bincount(levels, clipped, LEVELS)
    count = np.bincount(levels, filled, LEVELS)
    spread = np.where(filled, (mass / np.maximum(count, 1))[levels], 0.0)
    spread /= max(spread.sum(), 1e-30)
    clipped[0] += shares[:first].sum()
    clipped[-1] += shares[end:].sum()
    told = clipped > 0
    clipped, spread = clipped[told], np.maximum(spread[told], 1e-12)
    return float((clipped * np.log(clipped / spread)).sum())


RANGES: Mapping[str, Callable[[Histogram], Range]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}
