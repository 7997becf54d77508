"""Recomputation in programs: which actions there are, when they run, and the memory they hold."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from dfc.errors import DfcError
from dfc.planning.actions import FULL, SELECTIVE, Kind, Program, parse_program
from dfc.planning.auto import auto, fitting
from dfc.planning.check import check
from dfc.planning.recompute import in_ways, needed, recomputing
from dfc.planning.schedules import SCHEDULES, schedule
from dfc.planning.simulate import Costs, in_flight, peaks, simulate
from dfc.runtime.pipeline.programs import Programs

NAMES = ("gpipe", "1f1b", "zb1p", "interleaved", "breadth_first", "interleaved_zb", "zb_v",
         "dualpipe_v")  # fmt: skip


@pytest.mark.parametrize("name", ["1f1b", "auto"])
def test_the_quicker_way_that_fits_is_taken(name: str) -> None:
    c = Costs([3, 3], [3, 3], [0, 0], activations=[10, 10], taken=[1, 1], remake=[1, 1],
              kept=[4, 4], remade=[6, 6])  # fmt: skip
    for room, ways in ((20, {}), (14, {0: SELECTIVE}), (12, {0: FULL})):
        found = Programs(name, 2, 4, 1, None, room).of(4, lambda: c)
        assert found.ways == ways
        assert max(peaks(found, c)) <= room
    with pytest.raises(DfcError, match="N062"):
        Programs(name, 2, 4, 1, None, 9).of(4, lambda: c)


def test_stages_of_one_rank_may_recompute_in_different_ways() -> None:
    """Where neither way alone is the cheapest that fits."""
    plain = schedule("breadth_first", 1, 4, 2)
    c = Costs([9, 2], [9, 2], [9, 2], activations=[20, 20], taken=[0, 0], remake=[1, 1],
              kept=[12, 12], remade=[8, 8])  # fmt: skip
    both = (FULL, SELECTIVE)
    assert needed(plain, c, [160], both) == {}
    assert needed(plain, c, [139], both) == {1: SELECTIVE}
    assert needed(plain, c, [90], both) == {0: SELECTIVE, 1: FULL}
    assert needed(plain, c, [90]) == {0: FULL}
    found = fitting(plain, c, [90])
    assert found.program.ways == {0: SELECTIVE, 1: FULL} and max(found.peaks) <= 90


def program(name: str, p: int = 3, m: int = 6) -> Program:
    return schedule(name, p, m)


def costs(n: int, rng: random.Random) -> Costs:
    def some() -> list[int]:
        return [rng.randint(1, 9) for _ in range(n)]

    return Costs(some(), some(), some(), activations=some(), taken=[rng.randint(0, 2)] * n,
                 kept=some(), remade=some())  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_recomputing_programs_are_whole_and_read_back(name: str) -> None:
    plain = program(name)
    mixed = dict(enumerate([FULL, SELECTIVE] * plain.stages))
    for stages in ((), (0,), range(plain.stages)):
        ways = {s: mixed[s] for s in stages}
        assert in_ways(plain, ways).ways == ways
        assert parse_program(str(in_ways(plain, ways))).ways == ways
        check(in_ways(plain, ways), costs(plain.stages, random.Random(0)))
        found = recomputing(plain, stages)
        assert found.recomputes == set(stages)
        assert len(found) == len(plain) + 6 * len(stages)
        check(found, costs(plain.stages, random.Random(0)))
        assert parse_program(str(found)) == found
        assert recomputing(found, stages) == found
        assert in_flight(found) == in_flight(plain)


def test_programs_that_recompute_wrongly_are_refused() -> None:
    cases = {
        "0: F(0,0) R(0,0) F(0,1) B(0,0) B(0,1)\n": "R\\(0,1\\) is missing",
        "0: F(0,0) B(0,0) R(0,0)\n": "B\\(0,0\\) before R\\(0,0\\)",
        "0: R(0,0) F(0,0) B(0,0)\n": "R\\(0,0\\) before F\\(0,0\\)",
        "0: F(0,0) R(0,0) R(0,0) B(0,0)\n": "R\\(0,0\\) is there 2 times",
        "0: F(0,0) B(0,0) S(0,0)\n": "B\\(0,0\\) before S\\(0,0\\)",
        "0: F(0,0) R(0,0) F(0,1) B(0,0) S(0,1) B(0,1)\n": "S\\(0,0\\) is missing",
    }
    for text, message in cases.items():
        with pytest.raises(DfcError, match=message):
            check(parse_program(text), Costs([1], [1], [1]))


def test_recomputing_waits_for_no_gradient() -> None:
    """Two ranks: the first has time for R while the last is in its B, so that R costs a step one
    forward of the last rank for each microbatch, and the first's none."""
    plain = Costs([3, 3], [3, 3], [3, 3], activations=[10, 10], taken=[1, 1])
    for m in (2, 5):
        before = simulate(program("1f1b", 2, m), plain)
        after = simulate(recomputing(program("1f1b", 2, m), (0, 1)), plain)
        # Balanced ranks: F + B becomes F + R + B, and what fills and empties grows by no R at all.
        assert before.makespan == 9 * (m + 1)
        assert after.makespan == 12 * m + 9
        assert after.sync_bubble == before.sync_bubble == 9


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_what_replaying_the_actions_counts(name: str) -> None:
    rng = random.Random(name)
    for _ in range(5):
        plain = program(name)
        c = costs(plain.stages, rng)
        some = [s for s in range(plain.stages) if rng.random() < 0.5]
        found = in_ways(plain, {s: rng.choice((FULL, SELECTIVE)) for s in some})
        assert peaks(found, c) == replayed(found, c) == simulate(found, c).peaks


def replayed(found: Program, c: Costs) -> tuple[int, ...]:
    most = []
    for rank in range(len(found.ranks)):
        held: dict[tuple[int, int], int] = {}
        peak = 0
        for kind, stage, b, _ in found.actions(rank):
            way = found.ways.get(stage)
            if kind == Kind.F:
                first = {None: c.activations, FULL: c.taken, SELECTIVE: c.kept}[way]
                held[stage, b] = first[stage]
            if kind == Kind.S:
                held[stage, b] += c.remade[stage]
            if kind == Kind.R:
                held[stage, b] += c.activations[stage]
            peak = max(peak, sum(held.values()))
            if kind in (Kind.W, Kind.B):
                del held[stage, b]
        assert not held
        most.append(peak)
    return tuple(most)


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb_v", "zb1p"])
def test_stages_that_must_recompute_are_the_cheapest_of_all_sets(name: str) -> None:
    rng = random.Random(name)
    fitting = 0
    for _ in range(12):
        plain = program(name, 2, 4)
        c = costs(plain.stages, rng)
        whole = peaks(plain, c)
        least = peaks(recomputing(plain, range(plain.stages)), c)
        caps = [rng.uniform(0.97 * min(x, y), 1.05 * y) for x, y in zip(least, whole, strict=True)]
        able = _fitting(plain, c, caps)
        best = min(((sum(c.forward[s] for s in x), len(x)) for x in able), default=None)
        if best is None:
            with pytest.raises(DfcError, match="whatever recomputes"):
                needed(plain, c, caps)
            continue
        some = needed(plain, c, caps)
        assert (sum(c.forward[s] for s in some), len(some)) == best
        assert all(a <= b for a, b in zip(peaks(recomputing(plain, some), c), caps, strict=True))
        fitting += 1
    assert fitting > 2


def _fitting(plain: Program, c: Costs, caps: Sequence[float]) -> Any:
    for mask in range(1 << plain.stages):
        some = [s for s in range(plain.stages) if mask >> s & 1]
        held = peaks(recomputing(plain, some), c)
        if all(a <= b for a, b in zip(held, caps, strict=True)):
            yield some


def test_a_step_is_no_longer_with_more_memory() -> None:
    """The frontier of time and memory, over what `auto` finds with stages that may recompute."""
    c = Costs([2, 3, 2], [2, 3, 3], [2, 2, 2], activations=[20, 20, 20], taken=[0, 4, 4])
    times = []
    for cap in range(24, 140, 4):
        try:
            found = auto(3, 6, c, [cap] * 3, recompute=None)
        except DfcError as e:
            assert e.code == "N062" and not times
            continue
        assert max(found.simulation.peaks) <= cap
        times.append(found.simulation.makespan)
    assert times == sorted(times, reverse=True) and len(set(times)) > 2
    known = [s.name for s in SCHEDULES.values() if s.trains and s.chunks == "1"]
    best = min(simulate(program(name), c).makespan for name in known)
    assert times[-1] <= best
