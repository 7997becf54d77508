"""Where something breaks, in as few tries as a halving needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


class NotBroken(Exception):
    """Nothing that was tried is broken."""


def first_bad(good: int, bad: int, is_bad: Callable[[int], bool]) -> int:
    """A number between the two that is bad while the one before it is good.

    Needs:   `good` is good and `bad` is bad; neither is tried again.
    Ensures: where badness stays once it is there, it is the first bad one; elsewhere, one of those
             at which it begins.
    Cost:    log2(bad - good) tries.
    """
    while bad - good > 1:
        middle = (good + bad) // 2
        if is_bad(middle):
            bad = middle
        else:
            good = middle
    return bad


def bad_bound(good: int, is_bad: Callable[[int], bool], most: int = 1 << 20) -> tuple[int, int]:
    """A good and a bad number by doubling the distance, where nobody knows how many there are.

    Raises:  NotBroken when none up to `most` is bad.
    """
    step = 1
    while good < most:
        if is_bad(good + step):
            return good, good + step
        good += step
        step *= 2
    raise NotBroken


@dataclass(frozen=True)
class Border:
    """Where something turns bad. `between` counts those from `good` to `bad` that nobody knows."""

    good: int
    bad: int
    between: int


def find_border(good: int, bad: int, is_bad: Callable[[int], bool | None]) -> Border:
    """As `first_bad`, with a test that may not be able to tell: then its neighbours are tried.

    Cost:  log2(bad - good) tries, and one for each that cannot be told.
    """
    unknown: set[int] = set()
    while True:
        left = [n for n in range(good + 1, bad) if n not in unknown]
        if not left:
            return Border(good, bad, bad - good - 1)
        middle = min(left, key=lambda n: abs(2 * n - good - bad))
        verdict = is_bad(middle)
        if verdict is None:
            unknown.add(middle)
        elif verdict:
            bad = middle
        else:
            good = middle
