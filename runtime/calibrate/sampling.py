"""Timing many small things fairly: in turns, by a quantile, with the spread told."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

_SAMPLE_S = 3e-4  # what one sample takes at least: long beside the clock, short beside a preemption
_WAITED_S = 3e-3  # the same on a device that is waited for: long beside the wait
_MOST_CALLS = 100
_LEAST_ROUNDS = 5  # fewer have no quartiles
_QUIET = 0.1  # the quantile that is taken of what other work on the machine can only lengthen


@dataclass(frozen=True)
class Reading:
    """A measured value, and how far its quartiles are apart, as a share of the value.

    What is smaller than `least` was not told from nothing.
    """

    value: float
    spread: float
    samples: int
    least: float = 0.0

    @property
    def is_seen(self) -> bool:
        return self.value >= self.least

    def at(self, value: float) -> Reading:
        """Another value that is as sure: what hides a difference is not larger for a larger one."""
        spread = self.least / value if self.least and value else self.spread
        return replace(self, value=value, spread=spread)

    def per(self, work: float) -> Reading:
        """A rate: so much work in the seconds that were read."""
        return Reading(work / self.value, self.spread, self.samples)

    def minus(self, seconds: float) -> Reading:
        """What is left, a tenth at least; what varied is a larger share of it."""
        left = max(self.value - seconds, self.value / 10)
        return Reading(left, self.spread * self.value / left, self.samples)

    def beyond(self, seconds: float, count: float) -> Reading:
        """What each of so many things takes beyond these seconds of all, which may be nothing: what
        varied, or a hundredth, hides as much."""
        left = max(self.value - seconds, 0.0) / count
        least = max(self.spread, 0.01) * self.value / count
        spread = least / left if left else 0.0
        return Reading(left, spread, self.samples, least)


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
    wait: Callable[[], None] | None = None,
) -> dict[str, Reading]:
    """Seconds of one call of each, `quiet`: all are sampled once a round, so that noise hits them
    alike.

    Rounds end after `rounds`, or after `seconds` once five were made. Each sample follows a call
    that is not timed, so that caches are as between calls one after the other. A device that calls
    leave work to is waited for by `wait`, at the end of a sample: a call takes as long as it keeps
    the host or the device busy, whichever is longer.
    """
    counts = {}
    for name, run in runs.items():
        say(f"warming up: {name}")
        counts[name] = _calls(run, wait)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for i in range(rounds):
        if i >= _LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
        say(f"measuring: round {i + 1} of {rounds} at most")
        for name, run in runs.items():
            taken[name].append(_sample(run, counts[name], wait))
    return {name: quiet(times) for name, times in taken.items()}


def _calls(run: Callable[[], None], wait: Callable[[], None] | None) -> int:
    run()
    once = min(_sample(run, 1, wait), _sample(run, 1, wait))
    wanted = _SAMPLE_S if wait is None else _WAITED_S
    return max(1, min(_MOST_CALLS, round(wanted / max(once, 1e-7))))


def _sample(run: Callable[[], None], count: int, wait: Callable[[], None] | None) -> float:
    run()
    if wait is not None:
        wait()
    begin = time.perf_counter()
    for _ in range(count):
        run()
    if wait is not None:
        wait()
    return (time.perf_counter() - begin) / count
