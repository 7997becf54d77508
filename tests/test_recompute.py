"""Recomputation in a trainer: the same gradients to the bit with fewer bytes kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from dfc.errors import DfcError
from dfc.planning.actions import Action, Kind, Program
from dfc.runtime.pipeline.training import Trainer
from tests.recomputed import equal, staged
from tests.training_models import adamw


def trained(schedule: str | Program, **options: Any) -> tuple[list[torch.Tensor], Trainer]:
    """Losses and gradients of two steps, the batch of the second one smaller."""
    model, (ids, y) = staged()
    found = []
    with Trainer(model, schedule=schedule, microbatches=4, optimizer=adamw, threads=1,
                 **options) as trainer:  # fmt: skip
        for items in (10, 9):
            found += [trainer.step(ids[:items], y[:items])]
            found += [p.grad.clone() for p in trainer.parameters.values() if p.grad is not None]
    return found, trainer


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "interleaved_zb", "zb_v"])
def test_gradients_are_equal_to_the_bit_dropout_and_tied_weights_included(name: str) -> None:
    plain, _ = trained(name)
    state = torch.get_rng_state()
    for some in (True, {0, 2}, "selective"):
        again, trainer = trained(name, recompute=some)
        equal(plain, again)
        assert trainer.last is not None
        assert trainer.last[0].recomputes == ({0, 2} if some == {0, 2} else {0, 1, 2, 3})
    assert torch.equal(torch.get_rng_state(), state)  # dropout draws by counters


def test_fewer_bytes_are_alive_as_the_report_says() -> None:
    """Of tensors that live between two actions, by what Python holds, not by what is counted."""
    model, args = staged()
    most: dict[bool | str, list[int]] = {}
    reports = {}
    for again in (False, "selective", True):
        with Trainer(model, schedule="gpipe", microbatches=5, optimizer=adamw, threads=1,
                     sequential=True, recompute=again) as trainer:  # fmt: skip
            run, most[again] = trainer._run, [0] * 4

            def watched(
                action: Action, values: Mapping[Any, Any],
                run: Any = run, most: list[int] = most[again], trainer: Trainer = trainer,
            ) -> dict[Any, Any]:  # fmt: skip
                found: dict[Any, Any] = run(action, values)
                stage = trainer._by_stage[action.stage]
                most[action.stage] = max(most[action.stage], alive(stage))
                return found

            trainer._way.run = watched  # type: ignore[attr-defined]
            trainer.step(*args)
            reports[again] = trainer.report()
    assert sum(most[True]) < 0.4 * sum(most[False])
    assert sum(most[True]) < sum(most["selective"]) < 0.75 * sum(most[False])
    assert sum(reports[True].peak_bytes) < 0.45 * sum(reports[False].peak_bytes)
    for s in range(4):
        own = reports["selective"]
        assert (
            most["selective"][s] <= own.peak_bytes[s] <= most["selective"][s] + own.saved_bytes[s]
        )
        assert most[True][s] < 0.7 * most[False][s]
        # What the stage took is counted where it recomputes alone.
        assert (
            0 <= most[False][s] - reports[False].peak_bytes[s] <= 5 * reports[True].taken_bytes[s]
        )
        assert (
            most[True][s]
            <= reports[True].peak_bytes[s]
            <= most[True][s] + reports[True].taken_bytes[s]
        )
    assert "computed again" in str(reports[True]) and "again" not in str(reports[False])


def alive(stage: Any) -> int:
    """The memory that a stage holds of its microbatches, without weights and the caller's batch."""
    others = (*stage._weights.values(), *staged()[1])
    own = {x.untyped_storage().data_ptr() for x in others}
    kept = (x for known in stage._alive.values() for x in known.values())
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    return sum(size for at, size in storages.items() if at not in own)


def test_the_fewest_stages_recompute_that_leave_the_room() -> None:
    plain, trainer = trained("1f1b")
    report = trainer.report()
    room = max(report.peak_bytes) - 1
    for name in ("1f1b", "auto"):
        again, other = trained(name, recompute="auto", memory=room)
        assert other.last is not None
        assert other.last[0].recomputes  # as few as needed, which is not all
        assert 3 not in other.last[0].recomputes
        assert max(other.report().peak_bytes) <= room
        if name == "1f1b":
            equal(plain, again)
    with pytest.raises(DfcError, match="whatever recomputes") as e:
        trained("1f1b", recompute="auto", memory=1)
    assert e.value.status == 6
    with pytest.raises(DfcError, match="do not agree"):
        trained("1f1b", recompute="auto")
    with pytest.raises(DfcError, match="4 stages"):
        trained("1f1b", recompute={4})


def test_selective_recomputation_leaves_cheap_operators_alone_to_run_again() -> None:
    _, trainer = trained("gpipe", recompute="selective")
    for stage in trainer.trained:
        again = [n.op for n in stage._runs[Kind.S].part.graph.nodes]
        assert again and not any("mm" in op for op in again)


def test_a_failed_recomputation_is_named_and_the_next_step_is_whole() -> None:
    plain, _ = trained("1f1b")
    model, (ids, y) = staged()
    with Trainer(model, schedule="1f1b", microbatches=4, optimizer=adamw, threads=1,
                 recompute=True) as trainer:  # fmt: skip
        stage = trainer._by_stage[1]
        right = stage._runs[Kind.R]

        def broken(known: Any, weights: Any) -> None:
            raise RuntimeError("no more memory")

        stage._runs[Kind.R] = broken  # type: ignore[assignment]
        with pytest.raises(DfcError, match="stage 1 failed on the recomputation of microbatch 0"):
            trainer.step(ids, y)
        stage._runs[Kind.R] = right
        found = [trainer.step(ids, y)]
        found += [p.grad.clone() for p in trainer.parameters.values() if p.grad is not None]
    equal(found, plain[: len(found)])
