"""Timing many small things fairly: in turns, by a quantile, with the spread told."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

_SAMPLE_S = 3e-4  # what one sample takes at least: long beside the clock, short beside a preemption
_MOST_CALLS = 100
_QUIET = 0.1  # the quantile that is taken of what other work on the machine can only lengthen


@dataclass(frozen=True)
class Reading:
    """A measured value, and how far its quartiles are apart, as a share of the median."""

    value: float
    spread: float
    samples: int

    def per(self, work: float) -> Reading:
        """A rate: so much work in the seconds that were read."""
        return Reading(work / self.value, self.spread, self.samples)


def reading(values: Sequence[float], at: float = 0.5) -> Reading:
    """A quantile of samples, the median by default, and their spread.

    Needs:  one sample at least.
    """
    ordered = sorted(values)
    n = len(ordered)
    middle = median(ordered)
    apart = ordered[(3 * n) // 4] - ordered[n // 4]
    value = middle if at == 0.5 else ordered[int(at * n)]
    return Reading(value, apart / middle if middle else 0.0, n)


def quiet(values: Sequence[float]) -> Reading:
    """The lowest tenth: what it takes when little else happens on the machine.

    Why:  a preemption lengthens long samples and misses most short ones, so that medians of short
          samples promise more than medians of long ones keep.
    """
    return reading(values, _QUIET)


def sample_all(
    runs: Mapping[str, Callable[[], None]],
    *,
    rounds: int,
    seconds: float,
    say: Callable[[str], None] = lambda what: None,
) -> dict[str, Reading]:
    """Seconds of one call of each, `quiet`: all are sampled once a round, so that noise hits them
    alike.

    Rounds end after `rounds`, or after `seconds` once three were made. Each sample follows a call
    that is not timed, so that caches are as between calls one after the other.
    """
    counts = {}
    for name, run in runs.items():
        say(f"warming up: {name}")
        counts[name] = _calls(run)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for i in range(rounds):
        if i >= 3 and time.perf_counter() - start > seconds:
            break
        say(f"measuring: round {i + 1} of {rounds} at most")
        for name, run in runs.items():
            taken[name].append(_sample(run, counts[name]))
    return {name: quiet(times) for name, times in taken.items()}


def _calls(run: Callable[[], None]) -> int:
    run()
    once = min(_sample(run, 1), _sample(run, 1))
    return max(1, min(_MOST_CALLS, round(_SAMPLE_S / max(once, 1e-7))))


def _sample(run: Callable[[], None], count: int) -> float:
    run()
    begin = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - begin) / count
