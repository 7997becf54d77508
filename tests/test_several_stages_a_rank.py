"""Training whose ranks have several stages each: `auto` chooses their places and the schedule."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dfc.errors import DfcError
from dfc.planning.actions import Kind
from dfc.planning.check import check
from dfc.planning.machine import Wire
from dfc.planning.model import Wish
from dfc.planning.pipeline import plan
from dfc.planning.schedules import SCHEDULES, schedule, split, why_not
from dfc.planning.simulate import Costs, simulate
from dfc.runtime.pipeline.programs import AUTO, Programs
from dfc.runtime.pipeline.training import Trainer
from dfc.runtime.pipeline.training_processes import ProcessTrainer
from tests.test_looped_plans import LOOPS, V, machine
from tests.test_training_ranks import judge, run_ranks
from tests.training_models import adamw, captured, close, reference, staged, traced

# Stages between which nothing is won by loops, and those of which the first rank's are long.
EVEN = Costs([2] * 4, [2] * 4, [2] * 4, activations=[1] * 4, taken=[0] * 4)
STEEP = Costs([3, 1, 1, 1], [3, 1, 1, 1], [3, 1, 1, 1], activations=[1] * 4, taken=[0] * 4)


def known(ranks: int, chunks: int, m: int, costs: Costs, room: float) -> dict[str, float]:
    """The step of each known schedule that fits."""
    found = {}
    for name, shape in SCHEDULES.items():
        alike = shape.trains and shape.chunks in ("any", str(chunks))
        if alike and why_not(shape, ranks, m, chunks) is None:
            step = simulate(schedule(name, ranks, m, chunks), costs)
            if max(step.peaks) <= room:
                found[name] = float(step.makespan)
    return found


def test_the_chosen_one_is_no_worse_than_any_that_fits_wherever_it_has_its_stages() -> None:
    chosen, refused = set(), 0
    for seed in range(40):
        rng = random.Random(seed)
        ranks, chunks, m = rng.choice([1, 2, 3]), rng.choice([2, 2, 3]), rng.randint(1, 8)
        n = ranks * chunks
        f, i, w = ([rng.randint(1, 6) for _ in range(n)] for _ in range(3))
        costs = Costs(f, i, w, activations=[rng.randint(1, 3) for _ in range(n)])
        room = rng.choice([float("inf"), 4.0 * chunks, 2.0 * chunks])
        programs = Programs(AUTO, n, m, 2, room=room, ranks=ranks, moves=True)
        fit = known(ranks, chunks, m, costs, room)
        try:
            found = programs.of(m, lambda costs=costs: costs)  # type: ignore[misc]
        except DfcError as e:
            assert e.code == "N062" and not fit
            refused += 1
            continue
        step = simulate(found, costs)
        assert float(step.makespan) <= min(fit.values()) and max(step.peaks) <= room
        assert programs.placement == found.placement and 1 + max(found.placement) == ranks
        check(found, costs, slots=m)
        chosen.add(
            (chunks, found.placement == schedule("breadth_first", ranks, m, chunks).placement)
        )
    assert {(2, True), (2, False), (3, True)} <= chosen and refused


def test_stages_stay_where_the_first_choice_put_them() -> None:
    programs = Programs(AUTO, 4, 6, 2, ranks=2, moves=True)
    assert programs.placement == LOOPS
    assert programs.of(6, lambda: STEEP).placement == programs.placement == V
    assert programs.of(5, lambda: EVEN).placement == V  # a smaller last batch
    for fixed in (LOOPS, V):
        assert Programs(AUTO, 4, 6, 2, ranks=fixed).of(6, lambda: STEEP).placement == fixed
    assert Programs(AUTO, 4, 6, 2, ranks=2).of(6, lambda: STEEP).placement == LOOPS


def test_what_is_measured_has_inputs_and_weights_apart_and_holds_little() -> None:
    for m in (1, 5, 8):
        program = Programs(AUTO, 4, m, 2, ranks=2).to_measure(m)
        check(program, EVEN, slots=m)
        kinds = {a.kind for r in range(2) for a in program.actions(r)}
        assert kinds == {Kind.F, Kind.I, Kind.W}
    joint = schedule("interleaved", 2, 4, 2)
    assert simulate(split(joint), EVEN).makespan < simulate(joint, EVEN).makespan
    assert simulate(split(joint), EVEN).peaks == simulate(joint, EVEN).peaks


def test_memory_is_that_of_all_stages_of_a_rank() -> None:
    for room in (float("inf"), 6.0, 4.0):
        program = Programs(AUTO, 4, 8, 2, room=room, ranks=2, moves=True).of(8, lambda: EVEN)
        assert max(simulate(program, EVEN).peaks) <= room
    with pytest.raises(DfcError, match="N062"):
        Programs(AUTO, 4, 8, 2, room=3.0, ranks=2, moves=True).of(8, lambda: EVEN)
    again = Programs(AUTO, 4, 8, 2, None, 3.0, ranks=2, moves=True).of(8, lambda: EVEN)
    assert max(simulate(again, EVEN).peaks) <= 3 and again.recomputes


class Measured(Trainer):
    """A trainer whose stages take what a test says."""

    costs = EVEN

    def measure(self, given: Sequence[Mapping[Any, Any]], repeats: int = 2) -> Costs:
        super().measure(given, 1)
        return self.costs


@pytest.mark.parametrize(
    "name",
    ["tied", *(pytest.param(n, marks=pytest.mark.slow) for n in ("unet", "branches", "mlp"))],
)
def test_gradients_are_those_of_one_process_in_loops_and_in_a_v(name: str) -> None:
    model, args = captured(name)
    loss, expected = reference(model, args, 4)
    ranks: tuple[Any, ...] = (2, LOOPS, V)
    for asked in ranks if name == "tied" else ranks[:1]:
        with Trainer(staged(name, 4), schedule="auto", ranks=asked, microbatches=4,
                     optimizer=adamw, threads=1) as trainer:  # fmt: skip
            torch.testing.assert_close(trainer.backward(*args), loss)
            close({n: p.grad for n, p in trainer.parameters.items()}, expected)
            found = trainer.report().program
            assert found.placement == asked or (asked == 2 and found.placement in (LOOPS, V))


def test_a_first_step_that_moves_stages_trains_like_any_other() -> None:
    model, args = captured("tied")
    optimizer = adamw(list(model.parameters()))
    with Measured(staged("tied", 4), schedule="auto", ranks=2, microbatches=6, optimizer=adamw,
                  threads=2) as trainer:  # fmt: skip
        trainer.costs = STEEP
        for size in (10, 10, 5):
            batch = tuple(x[:size] for x in args)
            expected, _ = reference(model, batch, 6)
            optimizer.step()
            torch.testing.assert_close(trainer.step(*batch), expected, rtol=1e-5, atol=0)
            assert trainer.report().program.placement == V
            assert len(trainer.report().timing.busy) == 2


def test_a_plan_says_where_stages_are_and_auto_the_schedule() -> None:
    model, args = captured("mlp")
    graph = traced("mlp")[2]
    loss, expected = reference(model, args, 4)
    found = plan(graph, machine(2, wire=Wire(1e12, 0.0)), schedule="dualpipe_v",
                 wish=Wish(microbatches=4, trains=True))  # fmt: skip
    with Trainer(graph, found, schedule="auto", optimizer=adamw, threads=1) as trainer:
        torch.testing.assert_close(trainer.backward(*args), loss)
        close({n: p.grad for n, p in trainer.parameters.items()}, expected)
        assert trainer.report().program.placement == V


def test_devices_say_how_many_ranks_there_are() -> None:
    with Trainer(staged("mlp", 4), schedule="auto", devices=["cpu", "cpu"],
                 optimizer=adamw) as trainer:  # fmt: skip
        assert trainer.programs.placement == LOOPS and len(trainer.devices) == 2
    with Trainer(staged("mlp", 4), schedule="interleaved", ranks=1, optimizer=adamw) as trainer:
        assert trainer.programs.placement == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("name", "ranks", "message"),
    [
        ("auto", 3, r"N073.*4 stages cannot be shared out evenly among 3 ranks\n.*multiple of 3"),
        ("auto", 0, r"N073.*among 0 ranks\n.*at least one"),
        ("auto", (0, 0, 1, 1), r"N073.*no schedule.*\[0, 0, 1, 1\]\n.*\[0, 1, 0, 1\] or \[0, 1, 1"),
        ("auto", (0, 1, 2), r"N073.*4 stages cannot be shared out evenly among 3"),
        ("1f1b", 2, r"N073.*`1f1b` has 4 stages on ranks \[0, 1, 2, 3\], not on 2\n.*zb_v, .*auto"),
        ("zb_v", LOOPS, r"N073.*`zb_v`.*\[0, 1, 1, 0\], not on \[0, 1, 0, 1\]"),
    ],
)
def test_ranks_that_no_schedule_has_are_told(name: str, ranks: Any, message: str) -> None:
    with pytest.raises(DfcError, match=message) as e:
        Trainer(staged("mlp", 4), schedule=name, ranks=ranks, optimizer=adamw)
    assert e.value.status == 2


@pytest.mark.parametrize("name", ["mlp", pytest.param("tied", marks=pytest.mark.slow)])
def test_ranks_of_a_launcher_have_two_stages_each(tmp_path: Path, name: str) -> None:
    (found,) = run_ranks(tmp_path, 2, f"several {name}").values()
    judge(found, {"table.weight"} if name == "tied" else set())


def test_processes_of_a_script_have_two_stages_each() -> None:
    _, args = captured("mlp")
    options: dict[str, Any] = {"schedule": "auto", "ranks": V, "microbatches": 4, "threads": 2}
    with (
        Trainer(staged("mlp", 4), optimizer=adamw, **options) as threads,
        ProcessTrainer(
            staged("mlp", 4), optimizer=partial(torch.optim.AdamW, lr=1e-2), **options
        ) as processes,
    ):
        assert len(processes.pids) == 2
        for _ in range(2):
            found, expected = processes.step(*args), threads.step(*args)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        assert processes.report().program.placement == V
