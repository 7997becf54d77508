"""`auto` against every known schedule that fits, its bound, and all orders of tiny cases."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import permutations, product

import pytest

from dfc.errors import DfcError
from dfc.planning.actions import JOINED, Kind, Program, of_rows
from dfc.planning.auto import _neighbours, _try, auto, list_schedule, lower_bound
from dfc.planning.check import check
from dfc.planning.schedules import SCHEDULES, schedule, why_not
from dfc.planning.simulate import Costs, Link, simulate

KNOWN = [n for n, s in SCHEDULES.items() if s.trains and s.chunks == "1"]


def drawn(rng: random.Random) -> tuple[int, int, Costs, list[float]]:
    """Unequal times, unbalanced ranks, latency, caps: a point of the grid."""
    p, m = rng.randint(1, 6), rng.randint(1, 12)
    f, i, w = ([rng.randint(1, 9) for _ in range(p)] for _ in range(3))
    if rng.random() < 0.4:
        f, i, w = [f[0]] * p, [i[0]] * p, [w[0]] * p
    costs = Costs(f, i, w, Link(rng.choice([0, 0, 1, 4])), activations=[1] * p)
    caps = [float(rng.choice([p, p, 2 * p, m])) for _ in range(p)] if rng.random() < 0.6 else []
    return p, m, costs, caps


def compare(seeds: range) -> list[float]:
    """auto / 1F1B at each point, where 1F1B fits; asserts that no known schedule is better."""
    ratios = []
    for seed in seeds:
        p, m, costs, caps = drawn(random.Random(seed))
        known = {n: simulate(schedule(n, p, m), costs) for n in KNOWN
                 if why_not(SCHEDULES[n], p, m, 1) is None}  # fmt: skip
        fit = {n: s for n, s in known.items()
               if not caps or all(x <= c for x, c in zip(s.peaks, caps, strict=True))}  # fmt: skip
        if not fit:
            continue
        found = auto(p, m, costs, caps)
        assert all(found.simulation.makespan <= s.makespan for s in fit.values()), seed
        assert found.simulation.makespan >= found.bound and found.gap >= 0
        assert not caps or all(x <= c for x, c in zip(found.simulation.peaks, caps, strict=True))
        check(found.program, costs, caps, slots=m)
        if "1f1b" in fit:
            ratios.append(float(found.simulation.makespan / fit["1f1b"].makespan))
    return ratios


def test_it_is_never_worse_than_a_known_schedule_that_fits() -> None:
    ratios = compare(range(40))
    assert len(ratios) > 25 and sorted(ratios)[len(ratios) // 2] < 1


@pytest.mark.slow
def test_the_grid_of_a_thousand_points() -> None:
    ratios = compare(range(1000))
    assert len(ratios) == 1000 and sorted(ratios)[500] <= 0.9


def test_the_same_costs_give_the_same_program() -> None:
    p, m, costs, caps = drawn(random.Random(7))
    assert auto(p, m, costs, caps).program == auto(p, m, costs, caps).program


def test_more_memory_is_never_slower() -> None:
    costs = Costs([2, 3, 2, 4], [3, 2, 2, 3], [1, 2, 1, 1], Link(2), activations=[1] * 4)
    times = [auto(4, 8, costs, [float(cap)] * 4).simulation.makespan for cap in (4, 5, 6, 8)]
    assert times == sorted(times, reverse=True)


def test_joined_actions_are_moved_together() -> None:
    """The best known program has some, and ranks that wait: a third action was joined to two."""
    costs = Costs(
        *([8, 1, 10, 10, 1, 14] for _ in range(3)), Link(6, Fraction(1, 6)),
        edges=[(0, 1, 6), (1, 2, 3), (1, 3, 3), (2, 3, 3), (3, 4, 6), (4, 5, 3)],
    )  # fmt: skip
    v = (0, 1, 2, 2, 1, 0)
    start = simulate(schedule("dualpipe_v", 3, 8), costs)
    assert any((rows[:, 0] & JOINED).any() for rows in start.program.ranks)
    tried = list(_neighbours(start))
    assert tried
    for program in tried:
        for rows in program.ranks:
            joined = (rows[:, 0] & JOINED) != 0
            assert not (joined[:-1] & joined[1:]).any()
        _try(program, costs)  # a deadlock at worst
    assert auto(3, 8, costs, placement=v).simulation.makespan <= start.makespan


def test_when_nothing_fits_it_says_what_would() -> None:
    costs = Costs([1] * 3, [1] * 3, [1] * 3, activations=[10] * 3)
    with pytest.raises(DfcError, match=r"N062.*the smallest holds 10 bytes") as e:
        auto(3, 6, costs, [5.0] * 3)
    assert e.value.status == 6


def test_a_list_schedule_holds_no_more_than_it_may() -> None:
    costs = Costs([2, 1, 3], [1, 2, 2], [2, 1, 1], activations=[1] * 3)
    for held, taper in product((1, 2, 3, 5), (False, True)):
        program = list_schedule(3, 7, costs, held, 0.5, taper)
        check(program, costs)
        assert max(simulate(program, costs).peaks) <= held


def every_order(m: int) -> list[list[tuple[int, int]]]:
    """All orders of one rank's actions in which F, I and W of a microbatch follow each other."""
    actions = [(kind, b) for kind in (Kind.F, Kind.I, Kind.W) for b in range(m)]
    found = []
    for order in permutations(actions):
        at = {a: i for i, a in enumerate(order)}
        if all(at[Kind.F, b] < at[Kind.I, b] < at[Kind.W, b] for b in range(m)) and all(
            at[k, b] < at[k, b + 1] for k in (Kind.F, Kind.I, Kind.W) for b in range(m - 1)
        ):
            found.append(list(order))
    return found


def test_tiny_cases_against_all_orders() -> None:
    """Two ranks, two microbatches: how often the best of all orders is found."""
    orders, best_found = every_order(2), 0
    cases = 12
    for seed in range(cases):
        rng = random.Random(seed)
        costs = Costs(*([rng.randint(1, 5) for _ in range(2)] for _ in range(3)), link=Link(1))
        best = None
        for a, b in product(orders, repeat=2):
            rows = [[(int(k), r, mb) for k, mb in order] for r, order in enumerate((a, b))]
            program: Program = of_rows("all", rows, [0, 1])
            try:
                span = simulate(program, costs).makespan
            except DfcError:
                continue
            best = span if best is None else min(best, span)
        assert best is not None and best >= lower_bound(2, 2, costs)
        found = auto(2, 2, costs).simulation.makespan
        assert found >= best
        best_found += found == best
    assert best_found >= cases - 1
