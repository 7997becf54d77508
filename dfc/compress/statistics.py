"""How much worse a compressed model is than the original, and how sure that is.

Both models see the same items, so that scores are compared item by item: what both get right or
wrong says nothing. `paired` takes one score for each item, `pooled` a sum and a weight for each
(word errors and words, log-likelihood and tokens), which are drawn again whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from dfc.counting import counted
from dfc.errors import DfcError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

CONFIDENCE = 0.95  # of one-sided bounds
FEW = 10  # fewer disagreements than this are counted exactly
RESAMPLES = 2000
_Z = 1.6448536269514722  # the normal quantile of CONFIDENCE
_POWER = 6.182557  # (z(0.95) + z(0.8))^2: a true drop is found in 4 of 5 tries

Verdict = Literal["accept", "reject", "undecided"]


@dataclass(frozen=True)
class Paired:
    """What two models made of the same items.

    Units:  those of a score; a positive `drop` is worse. `lower` and `upper` are one-sided 95 %
            bounds of it. `variance` is what one item adds to the drop's: se^2 = variance / n.
    """

    n: int
    before: float
    after: float
    drop: float
    se: float
    lower: float
    upper: float
    agreement: float  # the share of items with the same score
    variance: float
    method: str  # "exact", "normal", "student", "bootstrap"
    lost: int | None = None  # b: right before, wrong after; None where scores are no 0 and 1
    won: int | None = None  # c: the reverse

    def verdict(self, limit: float) -> Verdict:
        """Whether the true drop is within a limit: proved, disproved, or neither."""
        if self.upper <= limit:
            return "accept"
        return "reject" if self.lower > limit else "undecided"

    def needed(self, limit: float, drop: float | None = None) -> int | None:
        """How many items would tell a true drop from a limit, in 4 of 5 tries; None: no number can.

        `drop` is the true one, by default what was seen. Where no two scores differ, the rule of
        three says how many items can show that fewer than the limit do.
        """
        distance = limit - (self.drop if drop is None else drop)
        if distance <= 0:
            return None
        if not self.variance:
            return math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-min(distance, 1 - 1e-12)))
        return math.ceil(_POWER * self.variance / distance**2)

    def __str__(self) -> str:
        n, agree = f"{self.n:,}".replace(",", " "), f"{self.agreement:.1%}".replace("%", " %")
        if self.lost is not None:
            drop, bound = f"{100 * self.drop:.2f} pp", f"{100 * self.upper:.2f} pp"
        else:
            drop, bound = f"{self.drop:.4g}", f"{self.upper:.4g}"
        return f"drop {drop}, 95 % bound {bound}, n={n}, agree {agree}"


def paired(before: Any, after: Any, *, higher_is_better: bool = True) -> Paired:
    """Compare one score for each item: 0 and 1, or any numbers.

    Needs:   the same items in the same order, at least two.
    Source:  0 and 1: drop d = (b - c) / n, se = sqrt(b + c - (b - c)^2 / n) / n, d + 1.645 se.
             Fewer than ten disagreements: M. P. Fay, K. Lumbard, Confidence intervals for
             difference in proportions for matched pairs compatible with exact McNemar's or sign
             tests, Statistics in Medicine 40 (2021), which gives about 3 / n when there are none.
             Other numbers: Student's t of the differences.
    Raises:  DfcError D070 for scores that do not fit together, D071 for scores that are no numbers.
    """
    import numpy as np

    x, y = _scores(before, 1, "before"), _scores(after, 1, "after")
    _fit(x, y)
    n, mean = len(x), (float(x.mean()), float(y.mean()))
    worse = (x - y) if higher_is_better else (y - x)
    agreement = float((x == y).mean())
    drop, variance = float(worse.mean()), float(worse.var())
    if set(np.unique(x)) | set(np.unique(y)) <= {0.0, 1.0}:
        lost, won = int((worse > 0).sum()), int((worse < 0).sum())
        se = math.sqrt(variance / n)
        low, high, method = drop - _Z * se, drop + _Z * se, "normal"
        if lost + won < FEW:
            low, high = -exact_bound(won, lost, n), exact_bound(lost, won, n)
            method = "exact"
        return Paired(n, *mean, drop, se, low, high, agreement, variance, method, lost, won)
    se, margin = _student(worse, x, y)
    return Paired(
        n, *mean, drop, se, drop - margin, drop + margin, agreement, variance, "student"
    )  # fmt: skip


def _student(worse: Floats, x: Floats, y: Floats) -> tuple[float, float]:
    """The standard error of a mean of differences, and how far its bound is away.

    Equal scores throughout are bounded like 0 and 1 over the range that was seen.
    """
    from scipy import stats

    n = len(worse)
    se = float(worse.std(ddof=1)) / math.sqrt(n)
    if se:
        return se, float(stats.t.ppf(CONFIDENCE, n - 1)) * se
    span = float(max(x.max(), y.max()) - min(x.min(), y.min()))
    return se, span * (1 - (1 - CONFIDENCE) ** (1 / n))


@lru_cache(1024)
def exact_bound(lost: int, won: int, n: int, confidence: float = CONFIDENCE) -> float:
    """The upper bound of the drop when few items change: `lost` get worse, `won` better, of n.

    The share of items that change and the share of those that get worse have exact confidence
    distributions of their own, beta ones; the bound is a quantile of what they make together.
    """
    import numpy as np
    from scipy import optimize, stats

    some = lost + won
    grid = (np.arange(1000) + 0.5) / 1000
    worse = stats.beta.ppf(grid, lost + 1, won) if won else np.ones(1)
    factor = 2 * worse - 1  # of those that change: +1 when all get worse
    more = stats.beta(some + 1, n - some) if some < n else None
    less = stats.beta(some, n - some + 1) if some else None

    def below(bound: float) -> float:
        """How sure it is that the drop is at most `bound`."""
        up, down = factor > 0, factor < 0
        total = float((factor == 0).sum()) * (bound >= 0)
        if up.any():
            ratio = bound / factor[up]
            total += float((more.cdf(ratio) if more else ratio >= 1).sum())
        if down.any():
            ratio = bound / factor[down]  # a share of at least this
            total += float((less.sf(ratio) if less else ratio <= 0).sum())
        return total / len(factor) - confidence

    return float(optimize.brentq(below, -1.0, 1.0, xtol=1e-9))


def pooled(
    before: Any, after: Any, *, higher_is_better: bool = False, seed: int = 0
) -> Paired:  # fmt: skip
    """Compare ratios of sums: rows of (sum, weight), one for each clip, document, sentence.

    The bootstrap draws whole rows, because what lies inside one hangs together.
    Raises:  DfcError D070, D071; D070 for a weight that is not positive in sum.
    """
    import numpy as np

    x, y = _scores(before, 2, "before"), _scores(after, 2, "after")
    _fit(x, y)
    if min(x[:, 1].min(), y[:, 1].min()) < 0 or min(x[:, 1].sum(), y[:, 1].sum()) <= 0:
        raise DfcError("D070", "the weights of scores are to be positive", status=2)
    sign = 1 if higher_is_better else -1
    drops = np.sort(_resampled(x, y, seed) * sign)
    first, last = (float(t[:, 0].sum() / t[:, 1].sum()) for t in (x, y))
    se = float(drops.std())
    low, high = (float(np.quantile(drops, q)) for q in (1 - CONFIDENCE, CONFIDENCE))
    same = float((x == y).all(axis=1).mean())
    if same == 1.0:
        high = _unseen(x)
        low = -high
    return Paired(
        len(x),
        first,
        last,
        sign * (first - last) + 0.0,
        se,
        low,
        high,
        same,
        se**2 * len(x),
        "bootstrap",
    )


def _unseen(x: Floats) -> float:
    """How far a ratio may be off though no row differs: as many rows as may be unlike those that
    were seen, each by the range that was seen, or by one."""
    weights = x[:, 1]
    ratios = x[weights > 0, 0] / weights[weights > 0]
    span = max(float(ratios.max() - ratios.min()), 1 / float(weights.mean()))
    return span * float(1 - (1 - CONFIDENCE) ** (1 / len(x)))


def _resampled(x: Floats, y: Floats, seed: int) -> Floats:
    """Differences of the ratios, each of rows drawn with replacement, the same for both."""
    import numpy as np

    random = np.random.default_rng(seed)
    n = len(x)
    found = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        times = np.bincount(random.integers(0, n, n), minlength=n).astype(np.float64)
        (a, wa), (b, wb) = times @ x, times @ y
        found[i] = (a / wa if wa else 0.0) - (b / wb if wb else 0.0)
    return found


def perplexity_ratio(before: Any, after: Any, *, seed: int = 0) -> tuple[float, float, float]:
    """How many times as large the perplexity is, with its 95 % bounds: ratio, lower, upper.

    Takes rows of (negative log-likelihood, tokens), one for each document.
    """
    found = pooled(before, after, seed=seed)
    return math.exp(found.drop), math.exp(found.lower), math.exp(found.upper)


@dataclass(frozen=True)
class Closeness:
    """How alike the rows of two results are: cosines, and the share with the same largest entry."""

    n: int
    mean: float
    low: float  # the 1 % quantile
    same: float

    def __str__(self) -> str:
        return f"cosine {self.mean:.5f} (1 %: {self.low:.5f}), same {self.same:.1%}, n={self.n}"


def closeness(before: Any, after: Any) -> Closeness:
    """Cosines row by row, and how often both rows are largest at one place.

    Needs:  two matrices of one shape. A row of zeros is like another one, and like nothing else.
    """
    import numpy as np

    x, y = _scores(before, 2, "before"), _scores(after, 2, "after")
    _fit(x, y)
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    both = (x == 0).all(axis=1) & (y == 0).all(axis=1)
    cosines = np.where(lengths > 0, (x * y).sum(axis=1) / np.where(lengths > 0, lengths, 1), both)
    same = float((x.argmax(axis=1) == y.argmax(axis=1)).mean())
    return Closeness(len(x), float(cosines.mean()), float(np.quantile(cosines, 0.01)), same)


def agreement(before: Any, after: Any) -> float:
    """The share of decisions that stay: labels, or any values that can be told apart.

    Raises:  DfcError D070 when there are not equally many.
    """
    import numpy as np

    x, y = np.asarray(before), np.asarray(after)
    if x.shape != y.shape or not x.size:
        raise DfcError("D070", f"decisions of {x.shape} and {y.shape} do not fit together")
    return float((x == y).mean())


def _scores(values: Any, rank: int, what: str) -> Floats:
    import numpy as np

    found = np.asarray(values, dtype=np.float64)
    if found.ndim != rank or found.size == 0:
        shape = list(found.shape)
        wanted = "one score for each item" if rank == 1 else "a row for each item"
        raise DfcError("D070", f"scores {what}: {wanted} is wanted, got {shape}", status=2)
    bad = np.flatnonzero(~np.isfinite(found).reshape(len(found), -1).all(axis=1))
    if len(bad):
        raise DfcError("D071", f"scores {what}: item {int(bad[0])} is {found[bad[0]]}", status=2)
    return found


def _fit(x: Floats, y: Floats) -> None:
    if x.shape != y.shape:
        raise DfcError(
            "D070",
            f"scores of {counted(len(x), 'item')} before and {len(y)} after do not fit together",
        )  # fmt: skip
    if len(x) < 2:
        raise DfcError("D070", "one item says nothing of how sure a difference is", status=2)
