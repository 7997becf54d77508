"""Holes of a plan: every combination of their choices, and the plan with one of them filled in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from dfc.lang.wording import value_text
from dfc.recipe.plan import Hole, PassStep, Plan, PlanStep, WhenStep

Chosen = Mapping[str, Any]


def combinations(plan: Plan) -> Iterator[Chosen]:
    """Each way to fill the holes: the first choices, then changes of one hole, then the others.

    Why:  when the budget ends the search early, every choice of every hole was seen beside the
          first choices of the others.
    """
    holes = list(dict.fromkeys(plan.holes))
    for picks in _near_first([len(h.choices) for h in holes]):
        yield {h.name: h.choices[p] for h, p in zip(holes, picks, strict=True)}


def _near_first(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    none = (0,) * len(sizes)
    yield none
    for at, size in enumerate(sizes):
        for pick in range(1, size):
            yield (*none[:at], pick, *none[at + 1 :])
    for picks in product(*map(range, sizes)):
        if sum(p > 0 for p in picks) > 1:
            yield picks


def count(plan: Plan) -> int:
    total = 1
    for hole in dict.fromkeys(plan.holes):
        total *= len(hole.choices)
    return total


def fill(plan: Plan, chosen: Chosen) -> Plan:
    """The plan as it was carried out: a value for each hole."""
    return replace(plan, steps=_filled(plan.steps, chosen))


def chosen_text(chosen: Chosen) -> dict[str, str]:
    return {name: value_text(value) for name, value in chosen.items()}


def _filled(steps: Sequence[PlanStep], chosen: Chosen) -> tuple[PlanStep, ...]:
    made: list[PlanStep] = []
    for x in steps:
        if isinstance(x, PassStep) and x.holes:
            options = {
                k: chosen.get(v.name, v.choices[0]) if isinstance(v, Hole) else v
                for k, v in x.options.items()
            }
            made.append(replace(x, options=options))
        elif isinstance(x, WhenStep):
            then, otherwise = _filled(x.then, chosen), _filled(x.otherwise, chosen)
            made.append(replace(x, then=then, otherwise=otherwise))
        else:
            made.append(x)
    return tuple(made)
