"""Comparisons that hold always or never, whatever is measured."""

from __future__ import annotations

import math
from dataclasses import replace

from dfc.lang.units import Amount
from dfc.recipe import plan as p

Range = tuple[float, float]  # from, to; both may be reached
EVERYTHING: Range = (-math.inf, math.inf)


def verdict(test: p.Test) -> tuple[str, str] | None:
    """`always` or `never`, and why; None when it depends on what is measured."""
    if not any(True for _ in test.quantities()):
        return _word(test.evaluate(lambda q: 0.0)), "nothing in it is measured"
    if test.left == test.right:
        return _word(test.op in ("<=", ">=", "==")), "both sides are the same"
    order = _percentiles(test)
    if order is not None and _never(test.op, *order):
        return "never", "a lower percentile is never above a higher one"
    if order is not None and _always(test.op, *order):
        return "always", "a lower percentile is never above a higher one"
    left, right = range_of(test.left), range_of(test.right)
    names = ", ".join(dict.fromkeys(f"`{q.name}`" for q in test.quantities()))
    why = f"{names} is never below 0"
    if _never(test.op, left, right):
        return "never", why
    return ("always", why) if _always(test.op, left, right) else None


def range_of(term: p.Term) -> Range:
    """What a term can be: what dfc measures is at least 0, a user's metric anything."""
    if isinstance(term, Amount):
        return (term.value, term.value)
    if isinstance(term, p.Quantity):
        return (0.0, math.inf) if term.name in p.QUANTITIES else EVERYTHING
    (a, b), (c, d) = range_of(term.left), range_of(term.right)
    if term.op == "+":
        return (a + c, b + d)
    if term.op == "-":
        return (a - d, b - c)
    if term.op == "/":
        if c <= 0.0 <= d:
            return (0.0, math.inf) if a >= 0.0 and c >= 0.0 else EVERYTHING
        c, d = 1 / d, 1 / c
    ends = [_times(x, y) for x in (a, b) for y in (c, d)]
    return (min(ends), max(ends))


def _times(x: float, y: float) -> float:
    return 0.0 if 0.0 in (x, y) else x * y


def _never(op: str, left: Range, right: Range) -> bool:
    (a, b), (c, d) = left, right
    return {
        "<": a >= d, "<=": a > d, ">": b <= c, ">=": b < c,
        "==": b < c or d < a, "!=": a == b == c == d,
    }[op]  # fmt: skip


def _always(op: str, left: Range, right: Range) -> bool:
    opposite = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}[op]
    return _never(opposite, left, right)


def _percentiles(test: p.Test) -> tuple[Range, Range] | None:
    """`latency(p50)` beside `latency(p95)`: ranges that touch, in their order."""
    left, right = test.left, test.right
    if not (isinstance(left, p.Quantity) and isinstance(right, p.Quantity)):
        return None
    if replace(left, detail="") != replace(right, detail="") or left.name != "latency":
        return None
    at = [p.PERCENTILES.index(q.detail or p.PERCENTILES[0]) for q in (left, right)]
    ranges = ((0.0, 1.0), (1.0, 2.0))
    return ranges if at[0] < at[1] else (ranges[1], ranges[0]) if at[0] > at[1] else None


def _word(holds: bool) -> str:
    return "always" if holds else "never"
