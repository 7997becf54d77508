"""Partitioning: the ladder from exact and fast to general, with a bound that says how good it is.

chain      every tensor goes to the next node: cuts, exact
ideals     few convex cuts: dynamic programming over all of them, exact
orders     the best cuts of several topological orders, with the bound of
milp       a linear program that starts below the best order's value, where it is not too large
looped     stages that share devices: even ones, then cuts moved, then the linear program
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from dfc.counting import counted
from dfc.errors import DfcError
from dfc.planning.cuts import cut_chain, is_chain
from dfc.planning.ideals import all_ideals, best_chain, prefixes
from dfc.planning.looped import best_looped
from dfc.planning.milp import solve_milp
from dfc.planning.orders import promising_orders
from dfc.planning.problem import Partition, Problem, value_of

_IDEALS = 1200  # pairs of them fit in vectors of a few MB
_LINEAR = 8000  # nodes times stages: beyond, the linear program finds nothing in any time
_ORDERED = 1500  # cuts: pairs of them are vectors of 18 MB


@dataclass(frozen=True)
class Effort:
    """How long to try: seconds for the linear program, and the gap that is good enough."""

    seconds: float = 15.0
    gap: float = 0.01


def partition(problem: Problem, effort: Effort = Effort()) -> Partition:
    """The partition with the smallest value that is found, and a proved bound.

    Raises:  DfcError N030, N031 for an impossible problem; N060 (status 6) when nothing fits.
    """
    problem.check()
    found = _solved(problem, effort)
    if not _is_strained(problem, found):
        return found
    stage = _solved(problem.with_slowest_links(), effort).stage
    value = value_of(problem, stage)
    return replace(found, stage=stage, value=value) if value < found.value else found


def _is_strained(problem: Problem, found: Partition) -> bool:
    """Whether links that no solver sees, between stages that are no neighbours, make it worse."""
    without = value_of(replace(problem, wire=None), found.stage)
    return found.value > without * (1 + 1e-9)


def _solved(problem: Problem, effort: Effort) -> Partition:
    if problem.looped:
        quick = Effort(1.0, gap=float("inf"))  # even stages are evened out afterwards
        even = best_looped(problem, lambda p: partition(p, quick), effort.seconds, effort.gap)
        return _or_refuse(problem, even)
    if is_chain(problem):
        return _or_refuse(problem, cut_chain(problem))
    ideals = all_ideals(problem, _IDEALS) if problem.n < _IDEALS else None
    if ideals is not None:
        return _or_refuse(problem, best_chain(problem, ideals, complete=True))
    best = _of_orders(problem)
    if best is not None and (best.gap <= effort.gap or problem.n * problem.stages > _LINEAR):
        return best
    most = best.value if best else float("inf")
    found, bound = solve_milp(problem, effort.seconds, effort.gap / 2, most)
    candidates = [c for c in (best, found) if c is not None]
    chosen = min(candidates, key=lambda c: c.value, default=None)
    if chosen is None:
        return _or_refuse(problem, None)
    proved = min(max(bound, chosen.bound), chosen.value)
    return replace(chosen, bound=proved)


def _of_orders(problem: Problem) -> Partition | None:
    orders = promising_orders(problem)
    while len(orders) > 1 and len(orders) * problem.n > _ORDERED:
        orders.pop()
    ideals = prefixes(orders)
    if len(ideals) > _ORDERED:
        ideals = _cheapest(problem, orders[0])
    return best_chain(problem, ideals, complete=False)


def _cheapest(problem: Problem, order: Sequence[int]) -> list[int]:
    """Of the prefixes of one order those that the fewest bytes leave: where one would cut."""
    at = {v: i for i, v in enumerate(order)}
    crossing = [0.0] * (len(order) + 1)
    for t in problem.tensors:
        crossing[at[t.producer] + 1] += t.bytes
        crossing[max(at[v] for v in t.readers) + 1] -= t.bytes
    crossing = list(accumulate(crossing))
    inner = sorted(range(1, len(order)), key=lambda i: crossing[i])[: _ORDERED - 2]
    whole = prefixes([order])
    return [whole[i] for i in sorted((0, *inner, len(order)))]


def _or_refuse(problem: Problem, found: Partition | None) -> Partition:
    if found is not None:
        return found
    need = float((problem.weights + problem.activations).sum()) + sum(b for b, _ in problem.tied)
    have = sum({d: s.memory for d, s in zip(problem.shares, problem.slots, strict=True)}.values())
    stages = counted(problem.stages, "stage")
    message = f"no partition into {stages} fits the devices' memory and operators"
    if need > have:
        message = f"the model needs {need:.4g} bytes, the devices have {have:.4g}"
    raise DfcError("N060", message, help="more or larger devices, or fewer bits", status=6)
