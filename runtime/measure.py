"""Measuring runners side by side: alternating, after warm-up; and which of two is faster.

`compare` decides beyond noise: paired runs, the median of their ratios, and an interval for it that
holds for noise of any shape.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import fmean, median
from typing import Any

from dfc.planning.engine import Runner

CONFIDENCE = 0.99
MARGIN = 0.01  # a difference of less than 1 % is none
_LOOKS = tuple(12 * 2**i for i in range(8))  # after how many pairs a decision may fall
_QUIET_S = 0.03  # threads that wait busily give up sooner; PyTorch's take about 0.01 s
_LONG_S = 0.1  # a run that is no different for threads asleep when it begins
_SLOW_S = 1.0  # a run of which each counts, the second warm-up too
_PATIENCE_S = 10.0  # for each runner: then so many runs do as still outvote one that was disturbed
_FEWEST = 3
_SAMPLE_S = 1e-3  # short runs are timed several at once, so that the clock does not matter


@dataclass(frozen=True)
class Timing:
    """How long one call takes.

    Units:  milliseconds; the spread is the distance between the quartiles.
    """

    p50_ms: float
    spread_ms: float
    runs: int
    p95_ms: float = 0.0
    p99_ms: float = 0.0
    mean_ms: float = 0.0


@dataclass(frozen=True)
class Interval:
    """The median of ratios, and between which bounds it lies with the confidence asked for."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Two runners measured against each other; ratios are time after over time before.

    Units:    before_ms and after_ms are medians.
    verdict:  "faster" or "slower": the interval leaves out 1, and the difference is not trifling;
              "same": a difference that matters is ruled out; "undecided": time ran out.
    """

    ratio: float
    low: float
    high: float
    runs: int
    verdict: str
    before_ms: float = 0.0
    after_ms: float = 0.0

    def __str__(self) -> str:
        """As people say it: how many times as fast."""
        if not math.isfinite(self.high) or self.low <= 0:
            return f"{1 / self.ratio:.2f}x as fast, {self.runs} runs"
        bounds = f"{1 / self.high:.2f}..{1 / self.low:.2f}"
        return f"{1 / self.ratio:.2f}x as fast ({bounds}), {self.runs} runs"


def measure(
    runners: Mapping[str, Runner],
    inputs: Sequence[Any],
    *,
    seconds: float = 1.0,
    least: int = 5,
    most: int = 200,
) -> dict[str, Timing]:
    """Time runners on the same inputs, alternating, so that noise hits all of them alike.

    `seconds` bounds the time for each runner; at least `least` runs are made, three where so many
    take long. Each timed run begins when the threads of the runner before it sleep, and after a run
    of its own that is not timed and has ended, on the device too.
    """
    warm: dict[str, float] = {}
    for name, run in runners.items():
        _sample(run, inputs, 1, time.perf_counter)
        warm[name] = _sample(run, inputs, 1, time.perf_counter)
    times = {name: [t] if min(warm.values()) > _SLOW_S else [] for name, t in warm.items()}
    start = time.perf_counter() - sum(map(sum, times.values()))
    while True:
        for name, run in runners.items():
            if len(runners) > 1:
                wait_until_quiet()
                if warm[name] <= _LONG_S:  # as in calls one after the other: threads awake
                    _sample(run, inputs, 1, time.perf_counter)
            times[name].append(_sample(run, inputs, 1, time.perf_counter))
        done = min(map(len, times.values()))
        spent = (time.perf_counter() - start) / len(runners)
        enough = least if spent < _PATIENCE_S else min(least, _FEWEST)
        if done >= most or (done >= enough and spent > seconds):
            return {name: timing([1e3 * t for t in times[name]]) for name in runners}


def wait_until_quiet() -> None:
    """Wait until no thread of this process works: pools keep waiting busily after a run.

    Why:  PyTorch's threads do so for 10 ms, OpenVINO's for one, and would be charged to whoever
          runs next on their core.
    """
    end = time.perf_counter() + _QUIET_S
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(1e-3)
        if time.process_time() - before < 2e-4:
            return


def compare(
    before: Runner,
    after: Runner,
    inputs: Sequence[Any],
    *,
    question: str = "faster",
    margin: float = MARGIN,
    seconds: float = 2.0,
    apart: bool = False,
    clock: Callable[[], float] | None = None,
) -> Comparison:
    """Whether `after` is faster, slower, or either, than `before`, beyond noise.

    Pairs of runs alternate in their order; with `apart`, for runners with threads of their own,
    each sample begins when those of the other sleep. Measuring stops as soon as the question is
    answered, or after `seconds` (ten times that until there are pairs enough to say anything).
    """
    clock = clock or time.perf_counter
    for run in (before, after):
        _sample(run, inputs, 1, clock)
    start = clock()
    warm = [_sample(run, inputs, 1, clock) for run in (before, after)]
    is_slow = min(warm) > _SLOW_S
    first, second = ([t] if is_slow else [] for t in warm)
    count = 1 if is_slow else _calls_per_sample(before, inputs, clock)
    start = start if is_slow else clock()
    while True:
        pair = [(before, first), (after, second)]
        for run, times in pair if len(first) % 2 == 0 else reversed(pair):
            if apart:
                wait_until_quiet()
                if not is_slow:
                    _sample(run, inputs, count, clock)
            times.append(_sample(run, inputs, count, clock))
        spent = clock() - start
        late = spent > seconds * (1 if len(first) >= _LOOKS[0] else 10)
        if len(first) in _LOOKS or late:
            found = judge_pairs(first, second, margin)
            if late or _answered(question, found, margin) or len(first) == _LOOKS[-1]:
                return found


def _calls_per_sample(run: Runner, inputs: Sequence[Any], clock: Callable[[], float]) -> int:
    once = max(_sample(run, inputs, 1, clock), 1e-7)
    return max(1, min(50, round(_SAMPLE_S / once)))


def _sample(run: Runner, inputs: Sequence[Any], count: int, clock: Callable[[], float]) -> float:
    begin = clock()
    for _ in range(count):
        run(inputs)
    _synchronize(inputs)
    return (clock() - begin) / count


def judge_pairs(
    before: Sequence[float], after: Sequence[float], margin: float = MARGIN
) -> Comparison:
    """The verdict on times that were taken in pairs."""
    # A look at the data at each of _LOOKS is a chance to be wrong: all of them share one in 100.
    confidence = 1 - (1 - CONFIDENCE) / len(_LOOKS)
    found = ratio_interval(before, after, confidence)
    if found.high < 1 and found.ratio <= 1 - margin:
        verdict = "faster"
    elif found.low > 1 and found.ratio >= 1 + margin:
        verdict = "slower"
    elif found.low > 1 - margin and found.high < 1 + margin:
        verdict = "same"
    else:
        verdict = "undecided"
    medians = median(before) * 1e3, median(after) * 1e3
    return Comparison(found.ratio, found.low, found.high, len(before), verdict, *medians)


def _answered(question: str, found: Comparison, margin: float) -> bool:
    if question == "faster":
        return found.verdict == "faster" or found.low > 1 - margin
    if question == "slower":
        return found.verdict == "slower" or found.high < 1 + margin
    return found.verdict != "undecided"


def ratio_interval(
    before: Sequence[float], after: Sequence[float], confidence: float = CONFIDENCE
) -> Interval:
    """The median of after/before over pairs, with the interval that the sign test gives.

    Nothing is assumed of the noise but that pairs are alike; too few pairs give (0, inf).
    Source:  Hollander and Wolfe, Nonparametric Statistical Methods, 3.6.
    """
    ratios = sorted(b / a for a, b in zip(before, after, strict=True))
    n = len(ratios)
    # Whole numbers: of a thousand pairs there are more patterns of signs than a float can count.
    allowed = int(Fraction((1 - confidence) / 2) * 2**n)
    below = 0  # how many of the 2**n patterns leave fewer than k ratios on one side
    k, ways = 0, 1  # ways: n over k
    while k < n // 2 and below + ways <= allowed:
        below += ways
        ways = ways * (n - k) // (k + 1)
        k += 1
    low, high = (ratios[k - 1], ratios[n - k]) if k else (0.0, math.inf)
    return Interval(median(ratios), low, high)


def _synchronize(inputs: Sequence[Any]) -> None:
    """Wait for the devices that the inputs are on."""
    import torch

    for device in {x.device for x in inputs if isinstance(x, torch.Tensor) and x.is_cuda}:
        torch.cuda.synchronize(device)


def timing(times: Sequence[float]) -> Timing:
    """Times in milliseconds, summed up."""
    ordered = sorted(times)
    n = len(ordered)

    def at(share: float) -> float:
        """The smallest time that is not exceeded in this share of the runs."""
        return ordered[min(n - 1, math.ceil(share * n) - 1)]

    spread = ordered[(3 * n) // 4] - ordered[n // 4]
    return Timing(median(ordered), spread, n, at(0.95), at(0.99), fmean(ordered))
