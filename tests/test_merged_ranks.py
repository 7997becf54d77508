"""Ranks that share a thread: any program, the same results, an end, and errors with their stage."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from dfc.errors import DfcError
from dfc.planning.actions import Action, Kind
from dfc.planning.schedules import schedule
from dfc.planning.stages import HOST
from dfc.runtime.pipeline.lanes import Lanes, SharedMemory, Values
from dfc.runtime.pipeline.routes import routes
from dfc.runtime.pipeline.streams import drivers_of
from dfc.runtime.pipeline.training import Trainer, Way
from tests.test_lanes import TRAINED, Sums
from tests.training_models import adamw, captured, staged

DRIVERS = [(0, 0, 0), (0, 0, 1), (0, 1, 0)]


class Noted(SharedMemory):
    """A carrier that notes for which rank a thread is at work."""

    def __init__(self) -> None:
        self.here = threading.local()
        self.entered: list[int] = []

    @contextmanager
    def lane(self, rank: int) -> Iterator[None]:
        self.here.rank = rank
        self.entered.append(rank)
        yield

    def send(self, source: int, target: int, values: Values) -> Any:
        assert source == HOST or source == self.here.rank
        return super().send(source, target, values)

    def receive(self, source: int, target: int, parcel: Any) -> Values:
        assert target == HOST or target == self.here.rank
        return super().receive(source, target, parcel)


@pytest.mark.parametrize("name", ["forward", *TRAINED])
@pytest.mark.parametrize("drivers", DRIVERS)
def test_every_schedule_is_run_by_fewer_threads(name: str, drivers: Sequence[int]) -> None:
    chunks = 2 if name in ("forward", "interleaved", "breadth_first", "zb_v") else None
    program = schedule(name, 3, 6, chunks)
    n, sums, carrier = program.stages, Sums(program.stages), Noted()
    before = threading.active_count()
    with Lanes(sums.edges(), sums.run, [1] * 3, carrier, drivers) as lanes:
        assert threading.active_count() == before + 1 + max(drivers)
        for _ in range(3):
            sums.done.clear()
            step = lanes.step(program, [{"x0": 100 * b} for b in range(6)])
            for b, found in enumerate(step.results):
                assert found == {f"x{n}": 100 * b + n, **({"g0": n} if program.trains else {})}
            every = {str(a): 1 for r in range(3) for a in program.actions(r)}
            assert Counter(sums.done) == every
            for rank in range(3):
                mine = [str(s.action) for s in step.spans if s.rank == rank]
                assert mine == [str(a) for a in program.actions(rank)]
    if max(drivers) == 0:
        assert len(carrier.entered) == 3 * len(program)  # around each action, in any order


@pytest.mark.parametrize("name", ["forward", *TRAINED])
def test_one_driver_is_also_the_callers_thread(name: str) -> None:
    program = schedule(name, 3, 6, 2 if name == "forward" else None)
    sums, given = Sums(program.stages), [{"x0": 100 * b} for b in range(6)]
    with Lanes(sums.edges(), sums.run, [1] * 3, None, [0, 0, 0]) as lanes:
        want = lanes.step(program, given)
        found = lanes.here(program, given)
        assert found.results == want.results
        assert [s.action for s in found.spans] == [s.action for s in want.spans]


def test_a_failure_in_the_callers_thread_names_its_stage() -> None:
    program, sums = schedule("forward", 3, 2), Sums(3)

    def run(action: Action, values: Values) -> Values:
        if action.stage == 1:
            raise ValueError("no")
        return sums.run(action, values)

    lanes = Lanes(sums.edges(), run, [1] * 3, None, [0, 0, 0])
    with lanes, pytest.raises(DfcError, match=r"K050.*stage 1 failed on microbatch 0: no"):
        lanes.here(program, [{"x0": 0}, {"x0": 1}])


def test_one_order_has_everything_after_what_it_needs() -> None:
    """With one driver for all there is nothing to wait for, and no slots to keep."""
    for name in TRAINED:
        program = schedule(name, 4, 8)
        found = routes(program, Sums(program.stages).edges(), drivers=[0, 0, 0, 0])
        (order,) = found.driven
        assert set(found.slots) == {None}
        seen: set[tuple[int, int, int]] = set()
        for _, task in order:
            kind, s, b = task.action[:3]
            if kind == Kind.F:
                assert s == 0 or (0, s - 1, b) in seen
            elif kind == Kind.W:
                assert (1, s, b) in seen
            else:
                assert (0, s, b) in seen and (s == program.stages - 1 or (1, s + 1, b) in seen)
            seen.add((min(kind, 2) if kind != Kind.B else 1, s, b))


@pytest.mark.parametrize("drivers", DRIVERS)
def test_a_failure_names_its_stage_and_the_next_step_is_whole(drivers: Sequence[int]) -> None:
    program, sums, bad = schedule("interleaved", 3, 6), Sums(6), "B(4,2)"

    def run(action: Action, values: Values) -> Values:
        if str(action) == bad:
            raise ValueError("no")
        return sums.run(action, values)

    with Lanes(sums.edges(), run, [1] * 3, None, drivers) as lanes:
        given = [{"x0": 100 * b} for b in range(6)]
        with pytest.raises(DfcError, match=r"K050.*stage 4 failed on the backward pass of.* 2: no"):
            lanes.step(program, given)
        bad = "nowhere"
        assert len(lanes.step(program, given).results) == 6


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "interleaved", "zb_v"])
def test_training_is_the_same_to_the_bit(name: str) -> None:
    class Merged(Trainer):
        def _start(self, threads: Sequence[int]) -> Way:
            return Lanes(self.model.edges, self._run, threads, None, [0] * len(threads))

    _, args = captured("tied")
    found = []
    for kind in (Trainer, Merged):
        with kind(staged("tied", 4), schedule=name, microbatches=4, optimizer=adamw,
                  threads=1) as trainer:  # fmt: skip
            losses = [trainer.step(*args) for _ in range(2)]
            found.append((losses, {k: p.detach() for k, p in trainer.parameters.items()}))
    (losses, weights), (others, expected) = found
    assert all(torch.equal(a, b) for a, b in zip(losses, others, strict=True))
    assert all(torch.equal(x, expected[k]) for k, x in weights.items())


def test_ranks_of_one_gpu_share_a_thread_and_those_of_processors_do_not() -> None:
    assert drivers_of(["cpu", "cpu"]) == [0, 1]
    assert drivers_of(["cuda:0", "cpu", "cuda:0", "cuda:1", "cpu", "cuda:1"]) == [0, 1, 0, 2, 3, 2]
