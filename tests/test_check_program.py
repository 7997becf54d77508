"""Programs are checked before they run: whole, ordered, within memory, without deadlock."""

from __future__ import annotations

import pytest

from dfc.errors import DfcError
from dfc.planning.actions import parse_program
from dfc.planning.check import check
from dfc.planning.schedules import SCHEDULES, schedule
from dfc.planning.simulate import Costs, Link, simulate


def costs(stages: int, *, trains: bool = True, kept: int = 10) -> Costs:
    times = [1] * stages
    return Costs(times, times if trains else (), times if trains else (),
                 activations=[kept] * stages)  # fmt: skip


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_passes(name: str) -> None:
    shape = SCHEDULES[name]
    for p, m in ((1, 2), (2, 4), (4, 8)):
        v = 1 if shape.chunks == "1" else 2
        check(schedule(name, p, m, v), costs(p * v, trains=shape.trains))


def test_actions_that_are_missing_or_twice_are_all_told() -> None:
    program = parse_program("0: F(0,0) F(0,0) B(0,0)\n1: F(1,0) F(1,1) B(1,0) B(1,1)\n")
    with pytest.raises(DfcError) as e:
        check(program, costs(2))
    told = str(e.value)
    assert "F(0,0) is there 2 times" in told and "F(0,1) is missing" in told
    assert "I(0,1) is missing" in told and "W(0,1) is missing" in told


def test_a_backward_before_its_forward_on_one_rank() -> None:
    program = parse_program("0: F(0,0) W(0,0) I(0,0)\n")
    with pytest.raises(DfcError, match=r"N023.*rank 0 has W\(0,0\) before I\(0,0\)"):
        check(program, costs(1))


def test_ranks_that_wait_for_each_other() -> None:
    """Each rank begins with what needs the other's second action."""
    program = parse_program("0: F(0,1) B(0,1) F(0,0) B(0,0)\n1: F(1,0) B(1,0) F(1,1) B(1,1)\n")
    with pytest.raises(DfcError, match=r"N020.*waits for"):
        check(program, costs(2))


def test_too_few_slots_stop_what_runs_with_more() -> None:
    """Stage 1 starts with the microbatch that is sent last: the others need places to wait."""
    text = "0: F(0,0) F(0,1) F(0,2)\n1: F(1,2) F(1,0) F(1,1)\n"
    check(parse_program(text), costs(2, trains=False), slots=3)
    with pytest.raises(DfcError, match="N020"):
        check(parse_program(text), costs(2, trains=False), slots=2)


def test_memory_above_the_cap_is_found_before_the_run() -> None:
    check(schedule("1f1b", 4, 8), costs(4), caps=[40] * 4)
    with pytest.raises(DfcError, match=r"N061.*rank 0 would hold 80 bytes of 40") as e:
        check(schedule("gpipe", 4, 8), costs(4), caps=[40] * 4)
    assert e.value.status == 6


def test_a_full_slot_makes_its_sender_wait() -> None:
    """The link is fast, the reader slow: transfers go as slots get free."""
    slow = Costs([1, 10], link=Link(0, 1), edges=[(0, 1, 1)], slots=1)
    free = Costs([1, 10], link=Link(0, 1), edges=[(0, 1, 1)])
    held, loose = (simulate(schedule("forward", 2, 4), c) for c in (slow, free))
    assert loose.makespan == 2 + 4 * 10
    assert held.makespan == 1 + 4 * (1 + 10)  # what is sent next waits until the reader is done


@pytest.mark.parametrize(("slots", "second"), [(1, 10), (2, 9), (0, 9)])
def test_two_edges_of_one_stage_to_one_rank_have_slots_of_their_own(
    slots: int, second: int
) -> None:
    """Stages 1 and 2 are on rank 1 and read stage 0: what waits for one leaves the other its slot,
    and each edge's own next transfer waits for its last to be used."""
    program = parse_program("0: F(0,0) F(0,1)\n1: F(1,0) F(2,0) F(1,1) F(2,1)")
    edges = [(0, 1, 1), (0, 2, 1)]
    found = simulate(program, Costs([1, 5, 1], link=Link(0, 2), edges=edges, slots=slots))
    began = {
        tuple(row): start
        for row, lane, start in zip(
            found.tasks.rows.tolist(), found.tasks.lane.tolist(), found.start.tolist(), strict=True
        )
        if lane == 1
    }
    assert began[0, 1, 0] == 3  # made at 1, sent by 3
    assert began[0, 2, 0] == 8  # sent while stage 1 still holds its own slot
    assert began[0, 1, 1] == second
    check(program, Costs([1, 5, 1], edges=edges), slots=1)
