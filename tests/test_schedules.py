"""Schedules against their formulas, exactly, and against torch's own action lists."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import product
from typing import Any

import pytest

from dfc.errors import DfcError
from dfc.planning.actions import Kind, Program, parse_program
from dfc.planning.schedules import SCHEDULES, schedule, why_not
from dfc.planning.simulate import Costs, Link, simulate

SMALL = [(p, m) for p in range(1, 6) for m in (1, 2, 3, 4, 6, 9)]


def balanced(p: int, v: int, f: int, i: int, w: int, c: int = 0, a: int = 0) -> Costs:
    """F, I, W of one whole rank; each of v chunks takes its part of them."""
    n = p * v
    return Costs(
        [Fraction(f, v)] * n, [Fraction(i, v)] * n, [Fraction(w, v)] * n,
        Link(c), activations=[a] * n,
    )  # fmt: skip


def rounds(p: int, m: int) -> int:
    return max(1, m // p)


@pytest.mark.parametrize(("f", "i", "w"), [(1, 1, 1), (2, 3, 1), (1, 2, 5), (3, 1, 2)])
def test_gpipe_and_1f1b_waste_what_the_formulas_say(f: int, i: int, w: int) -> None:
    for p, m in SMALL:
        for name in ("gpipe", "1f1b"):
            found = simulate(schedule(name, p, m), balanced(p, 1, f, i, w, a=10))
            assert found.sync_bubble == (p - 1) * (f + i + w)
            assert found.span_bubble == found.sync_bubble
            kept = [m if name == "gpipe" else min(m, p - r) for r in range(p)]
            assert found.peaks == tuple(10 * k for k in kept)
            assert found.bubble == pytest.approx((p - 1) / (m + p - 1))


def test_forward_only_is_the_sum_and_the_longest_stage() -> None:
    rng = random.Random(0)
    for p, m in SMALL:
        for c in (0, 3):
            t = [rng.randint(1, 9) for _ in range(p)]
            found = simulate(schedule("forward", p, m), Costs(t, link=Link(c)))
            assert found.makespan == sum(t) + (m - 1) * max(t) + (p - 1) * c


def test_gpipe_with_unequal_stages_and_latency() -> None:
    rng = random.Random(1)
    for p, m in SMALL:
        for c in (0, 1, 4):
            f, i, w = ([rng.randint(1, 9) for _ in range(p)] for _ in range(3))
            b = [x + y for x, y in zip(i, w, strict=True)]
            found = simulate(schedule("gpipe", p, m), Costs(f, i, w, Link(c)))
            expected = sum(f) + sum(b) + (m - 1) * (max(f) + max(b)) + 2 * (p - 1) * c
            assert found.makespan == expected


@pytest.mark.parametrize("v", [1, 2, 3, 4])
def test_interleaved_and_breadth_first(v: int) -> None:
    for p, m in SMALL:
        for f, i, w in ((1, 1, 1), (2, 1, 4)):
            bubble = (p - 1 + (v - 1) * max(0, p - m)) * Fraction(f + i + w, v)
            if m % rounds(p, m) == 0:
                found = simulate(schedule("interleaved", p, m, v), balanced(p, v, f, i, w, a=12))
                assert found.sync_bubble == bubble
                per = m // rounds(p, m)
                peak = [min(m * v, (v - 1) * per + 2 * (p - 1 - r) + 1) for r in range(p)]
                assert found.peaks == tuple(12 * k for k in peak)
            found = simulate(schedule("breadth_first", p, m, v), balanced(p, v, f, i, w, a=12))
            assert found.sync_bubble == bubble and found.peaks == (12 * m * v,) * p


def test_zb1p_fills_the_bubble_with_weights() -> None:
    for p in range(1, 6):
        for m in (p, p + 1, 2 * p + 1):
            for f, i, w in product((1, 3, 5), repeat=3):
                found = simulate(schedule("zb1p", p, m), balanced(p, 1, f, i, w, a=1))
                assert found.sync_bubble == (p - 1) * max(f, i, f + i - w)
                assert found.span_bubble == (p - 1) * max(i, f + i - w)
                assert found.peaks == (min(m, p),) * p


def test_interleaved_zero_bubble() -> None:
    for (p, m), v in product(SMALL, (2, 3)):
        if m % rounds(p, m):
            continue
        per = m // rounds(p, m)
        for f, i, w in ((1, 1, 1), (1, 5, 3), (5, 1, 3), (3, 1, 5), (5, 5, 1)):
            found = simulate(schedule("interleaved_zb", p, m, v), balanced(p, v, f, i, w, a=1))
            assert found.peaks == (min(m * v, (v - 1) * per + p),) * p
            if m >= p:
                assert found.sync_bubble == (p - 1) * Fraction(max(f, i, f + i - w), v)
                assert found.span_bubble == (p - 1) * Fraction(max(i, f + i - w), v)


def test_zb_v_has_half_a_forward_of_bubble_where_all_times_are_equal() -> None:
    for p in range(1, 6):
        for m in range(1, 13):
            found = simulate(schedule("zb_v", p, m), balanced(p, 2, 2, 2, 2, a=1))
            assert all(peak <= 2 * p for peak in found.peaks)
            assert found.sync_bubble >= (p - 1) * Fraction(2, 2)
            if m >= 2 * p:
                assert found.sync_bubble == p - 1 and found.span_bubble == 0


def test_dualpipe_v_keeps_what_its_authors_say() -> None:
    for p in range(2, 6):
        for m in (2 * p, 3 * p):
            found = simulate(schedule("dualpipe_v", p, m), balanced(p, 2, 2, 1, 1, a=1))
            assert max(found.peaks) == 2 * p + 1  # of chunks, two a rank


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"forward", "dualpipe_v", "zb_v"}))
def test_no_synchronous_plan_beats_the_bounds(name: str) -> None:
    """LB1, LB2 and LB3 for stage s on rank s, and the upper bound of 1F1B."""
    if SCHEDULES[name].chunks == "any":
        return
    rng = random.Random(2)
    for (p, m), c in product(SMALL, (0, 2, 7)):
        f, i, w = ([rng.randint(1, 9) for _ in range(p)] for _ in range(3))
        b = [x + y for x, y in zip(i, w, strict=True)]
        found = simulate(schedule(name, p, m), Costs(f, i, w, Link(c))).makespan
        ranks = range(p)
        lb1 = max(sum(f[:r]) + r * c + m * (f[r] + b[r]) for r in ranks)
        lb2 = max(sum(f[:r]) + sum(i[:r]) + 2 * r * c + m * (f[r] + i[r]) + w[0] for r in ranks)
        assert found >= max(lb1, lb2)
        if name != "zb1p":
            lb3 = max(sum(f[:r]) + sum(b[:r]) + 2 * r * c + m * (f[r] + b[r]) for r in ranks)
            assert found >= lb3
        if name == "1f1b":
            most = sum(f) + sum(b) + (m - 1) * (max(f) + max(b) + 2 * c) + 2 * (p - 1) * c
            assert found <= most


def test_waves_and_lanes_one_by_one_give_the_same_times(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    for name, shape in SCHEDULES.items():
        v = 1 if shape.chunks == "1" else 2
        p, m, n = 4, 8, 4 * v
        f, i, w, a = ([rng.randint(1, 9) for _ in range(n)] for _ in range(4))
        edges = [(s, s + 1, rng.randint(1, 5)) for s in range(n - 1)] + [(0, n - 1, 3)]
        costs = Costs(f, i, w, Link(1, Fraction(1, 3)), edges=edges, activations=a)
        found = []
        for wide in (0, 10**9):
            monkeypatch.setattr("dfc.planning.lanes._WIDE", wide)
            found.append(simulate(schedule(name, p, m, v), costs))
        assert found[0].start.tolist() == found[1].start.tolist()
        assert found[0].makespan == found[1].makespan and found[0].busy == found[1].busy


def test_bytes_take_time_on_their_link_one_after_another() -> None:
    """A slow link is the bottleneck: the pipeline runs at its pace."""
    costs = Costs([1, 1], link=Link(2, 3), edges=[(0, 1, 5)])
    found = simulate(schedule("forward", 2, 4), costs)
    assert found.makespan == 1 + 4 * 15 + 2 + 1


def test_fractions_stay_exact_and_floats_agree() -> None:
    third = Fraction(1, 3)
    exact = simulate(schedule("1f1b", 3, 7), Costs([third] * 3, [third] * 3, [third] * 3))
    near = simulate(schedule("1f1b", 3, 7), Costs([1 / 3] * 3, [1 / 3] * 3, [1 / 3] * 3))
    assert exact.makespan == 9 and near.makespan == pytest.approx(9, rel=1e-9)


@pytest.mark.slow
def test_the_formulas_hold_for_a_thousand_ranks() -> None:
    p = m = 1024
    found = simulate(schedule("1f1b", p, m), balanced(p, 1, 2, 3, 1, a=1))
    assert found.sync_bubble == (p - 1) * 6 and found.peaks == tuple(range(p, 0, -1))
    found = simulate(schedule("zb1p", p, m), balanced(p, 1, 2, 3, 1, a=1))
    assert found.sync_bubble == (p - 1) * 4


def torchs(name: str, p: int, m: int, v: int) -> list[list[str]]:
    """What torch.distributed.pipelining would run, without its processes."""
    from torch.distributed.pipelining import schedules as torch_schedules

    classes = {
        "interleaved": "ScheduleInterleaved1F1B", "breadth_first": "ScheduleLoopedBFS",
        "interleaved_zb": "ScheduleInterleavedZeroBubble", "zb_v": "ScheduleZBVZeroBubble",
        "dualpipe_v": "ScheduleDualPipeV",
    }  # fmt: skip
    cls = getattr(torch_schedules, classes[name])
    made: Any = object.__new__(cls)
    made.pp_group_size, made.n_local_stages, made._n_microbatches = p, v, m
    made._num_stages = made.num_stages = p * v
    made._stages = [None] * v
    made.number_of_rounds = rounds(p, m)
    made.microbatches_per_round = m // rounds(p, m)
    found = []
    for rank in range(p):
        made.rank = rank
        actions = [a for a in made._calculate_single_rank_operations(rank) if a is not None]
        found.append([text for a in actions for text in _texts(a)])
    return found


def _texts(action: Any) -> list[str]:
    if action.sub_actions:
        return [t for a in action.sub_actions for t in _texts(a)]
    names = {"FORWARD": "F", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W", "FULL_BACKWARD": "B"}
    kind = names[action.computation_type.name]
    return [f"{kind}({action.stage_index},{action.microbatch_index})"]


@pytest.mark.parametrize("name", ["interleaved", "breadth_first", "zb_v", "dualpipe_v"])
def test_the_lists_are_those_of_torch(name: str) -> None:
    for p, m in product((1, 2, 3, 4), (4, 8, 12)):
        v = 2
        if why_not(SCHEDULES[name], p, m, v):
            continue
        own = schedule(name, p, m, v)
        lists = [[str(a) for a in own.actions(r)] for r in range(p)]
        assert lists == torchs(name, p, m, v), (name, p, m)


def test_text_gives_the_program_back() -> None:
    for name, shape in SCHEDULES.items():
        made = schedule(name, 2, 4, 1 if shape.chunks == "1" else 2)
        assert parse_program(str(made), name) == made


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0: F(0,0) G(0,1)", "<string>:1: cannot read `G(0,1)`"),
        ("1: F(0,0)", "expected the actions of rank 0"),
        ("0: F(0,0)&", "nothing follows the last `&`"),
        ("0: F(0,0)\n1: F(0,1)", "stage 0 is on rank 0 and rank 1"),
        ("0: F(1,0)", "no rank has stage 0"),
    ],
)
def test_what_is_no_program_is_told(text: str, message: str) -> None:
    with pytest.raises(DfcError, match=r"N01\d") as e:
        parse_program(text)
    assert message in str(e.value)


def test_an_unknown_schedule_or_impossible_numbers() -> None:
    with pytest.raises(DfcError, match="did you mean `1f1b`"):
        schedule("1f1", 2, 2)
    with pytest.raises(DfcError, match="5 microbatches are not 2 equal rounds"):
        schedule("interleaved", 2, 5)
    with pytest.raises(DfcError, match="needs 8 microbatches"):
        schedule("dualpipe_v", 4, 7)


def test_a_program_that_waits_for_itself_is_told_what_waits_for_what() -> None:
    swapped = parse_program("0: B(0,0) F(0,0)\n1: F(1,0) B(1,0)\n")
    with pytest.raises(DfcError, match=r"N020.*rank 0 in B\(0,0\) waits for"):
        simulate(swapped, Costs([1, 1], [1, 1], [1, 1]))


def test_a_program_counts_what_it_has() -> None:
    made: Program = schedule("1f1b", 2, 3)
    assert len(made) == 12 and made.trains and not schedule("forward", 2, 3).trains
    assert [a.kind for a in made.actions(1)] == [Kind.F, Kind.B] * 3
