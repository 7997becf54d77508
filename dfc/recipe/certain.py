"""Requirements on metrics, judged by how sure a difference is: `top1 >= baseline - 0.5pp`.

Where a metric gives a score for each item, the result and the original are compared item by item. A
requirement is met when it holds at the bound of the drop, missed when it fails at the other bound,
and in between nothing is claimed: more items would decide it, and the report says how many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dfc.compress.statistics import Paired, paired
from dfc.recipe.metrics import Measured, UserMetric
from dfc.recipe.plan import BASELINE, BEFORE, Lookup, Quantity, Test

_REFERENCE = (BASELINE, BEFORE)


@dataclass(frozen=True)
class Judged:
    """What can be said of a requirement, and in words how sure it is."""

    verdict: str  # "accept", "reject" or "undecided"
    words: str


def pair_of(test: Test) -> tuple[Quantity, Quantity] | None:
    """The metric of the version in question and the same one of the reference, if it is those."""
    found = list(dict.fromkeys(test.quantities()))
    if len(found) != 2 or found[0].name != found[1].name:
        return None
    reference = [q for q in found if q.version in _REFERENCE]
    others = [q for q in found if q not in reference]
    return (others[0], reference[0]) if len(others) == len(reference) == 1 else None


def judge(
    test: Test, metric: UserMetric, pair: tuple[Quantity, Quantity], after: Measured,
    before: Measured,
) -> Judged | None:  # fmt: skip
    """A requirement with the bounds of the difference; None where there are no items to pair."""
    compared = metric.compared(before, after)
    if compared is None:
        return None
    holds = _holds(test, metric, pair, before)
    if holds(compared.upper):
        return Judged("accept", str(compared))
    if not holds(compared.lower):
        return Judged("reject", str(compared))
    return Judged("undecided", f"{compared}: {_more(compared, holds)}")


def hopeless(test: Test, metric: UserMetric, before: Measured) -> int | None:
    """How many items a requirement needs at least when too few are there to ever show it.

    None when a result that is right and wrong just where the original is would show it.
    """
    pair = pair_of(test)
    if pair is None or before.items is None or before.items.ndim != 1 or len(before.items) < 2:
        return None
    best = paired(before.items, before.items)
    holds = _holds(test, metric, pair, before)
    if holds(best.upper) or not holds(0.0) or best.lost is None:
        return None
    return best.needed(_limit(holds, 0.0, 1.0))


def _holds(
    test: Test, metric: UserMetric, pair: tuple[Quantity, Quantity], before: Measured
) -> Callable[[float], bool]:
    """Whether the requirement holds for a drop."""
    sign = 1 if metric.declared.higher_is_better else -1

    def holds(drop: float) -> bool:
        values = {pair[0]: before.value - sign * drop, pair[1]: before.value}
        lookup: Lookup = values.__getitem__
        return test.evaluate(lookup)

    return holds


def _limit(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The largest drop for which it holds."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _more(compared: Paired, holds: Callable[[float], bool]) -> str:
    """Why nothing can be said, and with how many items it could."""
    limit = _limit(holds, compared.lower, compared.upper)
    shown = f"{100 * limit:.2f} pp" if compared.lost is not None else f"{limit:.4g}"
    n = f"{compared.n:,}".replace(",", " ")
    words = f"{n} items cannot tell it from the limit of {shown}"
    needed = compared.needed(limit) or compared.needed(limit, drop=0.0)
    if needed is None:
        return words
    true = "this drop" if compared.drop < limit else "no drop at all"
    count = f"{needed:,}".replace(",", " ")
    return f"{words}; {count} could, if the truth is {true}"
