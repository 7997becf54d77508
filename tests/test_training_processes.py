"""Training in processes that a script starts itself: equal to threads, mended, nothing left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import dfc
from dfc.errors import DfcError
from dfc.planning.actions import FULL, SELECTIVE, Action, Kind
from dfc.planning.machine import Wire
from dfc.planning.model import Wish
from dfc.planning.pipeline import plan
from dfc.runtime.pipeline.links import Doing
from dfc.runtime.pipeline.staged_folder import write_staged
from dfc.runtime.pipeline.staged_model import StagedModel
from dfc.runtime.pipeline.training import Trainer
from dfc.runtime.pipeline.training_processes import ProcessTrainer
from tests.bad_optimizers import FailsSecond
from tests.fair_clock import FairClock
from tests.test_looped_plans import machine
from tests.test_processes import gone_in_two
from tests.training_models import MLP, adamw, captured, evenly, staged, traced

ROOT = Path(__file__).parent.parent
ADAMW = partial(torch.optim.AdamW, lr=1e-2)


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Weights and slots, to the bit; gradients are in the slots."""
    assert a["step"] == b["step"]
    for name, x in b["weights"].items():
        assert torch.equal(a["weights"][name], x), name
        for slot, y in b["slots"][name].items():
            assert torch.equal(a["slots"][name][slot], y), (name, slot)


@pytest.mark.parametrize(
    ("name", "stages", "schedule"),
    [
        ("mlp", 2, "1f1b"),
        pytest.param("tied", 4, "interleaved_zb", marks=pytest.mark.slow),
    ],
)
def test_processes_train_as_threads_do(
    name: str, stages: int, schedule: str, tmp_path: Path
) -> None:
    """To the bit; states and folders go on in the other way; a failure changes nothing, and a rank
    that is lost ends it."""
    model, args = captured(name)
    options: dict[str, Any] = {"schedule": schedule, "microbatches": 4, "threads": 2}
    with (
        Trainer(staged(name, stages), optimizer=adamw, **options) as threads,
        ProcessTrainer(staged(name, stages), optimizer=ADAMW, **options) as processes,
    ):
        pids = processes.pids
        for _ in range(2):
            assert torch.equal(processes.step(*args), threads.step(*args))
        same(processes.state_dict(), threads.state_dict())
        report = processes.report()
        assert report.in_flight == threads.report().in_flight
        assert len(report.timing.busy) == 2 and all(report.timing.busy)
        bad = args[1].clone()
        bad[-1] = 99
        with pytest.raises(DfcError, match=r"rank [01]: stage . failed") as e:
            processes.step(args[0], bad)
        assert e.value.code == ("K050")
        for trainer in (processes, threads):
            trainer.set_options(lr=3e-3)
            trainer.step(*args)
        same(processes.state_dict(), threads.state_dict())
        processes.save(tmp_path / "last")
        threads.load(tmp_path / "last")
        threads.step(*args)
        threads.save(tmp_path / "last")
        processes.load(tmp_path / "last")
        assert processes.steps == 4 and processes.pids == pids
        assert torch.equal(processes.step(*args), threads.step(*args))
        processes.load_into(model)
        for n, p in threads.parameters.items():
            assert torch.equal(model.get_parameter(n), p)
        seconds, told = struck(processes, 1, signal.SIGKILL, lambda: processes.step(*args))
        assert seconds < 2 and "rank 1 lost" in told
        assert gone_in_two(pids)
        with pytest.raises(DfcError, match="the ranks have ended"):
            processes.step(*args)


def struck(
    trainer: ProcessTrainer, rank: int, signal_: int, step: Callable[[], object]
) -> tuple[float, str]:
    """Send a signal to a rank while it steps, until it is noticed; in how many fair seconds, and
    what is told where it is lost for good."""
    pid, sent, told = trainer.pids[rank], 0.0, ""

    def strike() -> None:
        nonlocal sent
        sent = clock.now
        os.kill(pid, signal_)

    with FairClock() as clock:
        thread = threading.Timer(0.05, strike)
        thread.start()
        try:
            while thread.is_alive() or pid in trainer.pids:
                step()
        except DfcError as e:
            assert e.code == "K058"
            told = str(e)
        finally:
            thread.join()
        return clock.since(sent), told


def test_a_lost_rank_is_started_again(tmp_path: Path) -> None:
    """zb1p with a tied table; with a checkpoint losses go on as if nothing had been."""
    _, args = captured("tied")
    options: dict[str, Any] = {"schedule": "zb1p", "microbatches": 4, "threads": 2}
    with (
        Trainer(staged("tied", 2), optimizer=adamw, **options) as threads,
        ProcessTrainer(staged("tied", 2), optimizer=ADAMW, checkpoint=tmp_path / "last", every=2,
                       **options) as trainer,
    ):  # fmt: skip
        for _ in range(3):
            trainer.step(*args)
        struck(trainer, 0, signal.SIGKILL, lambda: trainer.step(*args))
        assert len(trainer.incidents) == 1
        assert "rank 0 lost" in trainer.incidents[0] and "SIGKILL" in trainer.incidents[0]
        for _ in range(trainer.steps):
            threads.step(*args)
        same(trainer.state_dict(), threads.state_dict())


def test_a_rank_that_hangs_is_named_with_what_its_peer_waits_for() -> None:
    # many rows, and gradients alone: between batches and in an update no rank waits for another
    rows = 50_000
    args = torch.randn(rows, 12), torch.randint(5, (rows,))
    size = {0: torch.export.Dim("B", min=1, max=1 << 20)}
    graph = dfc.trace(MLP(), args, dynamic_shapes=(size, size))
    model = StagedModel(graph, evenly(graph, 2))
    options: dict[str, Any] = {"schedule": "1f1b", "microbatches": 4, "threads": 2}
    with ProcessTrainer(model, optimizer=ADAMW, **options) as trainer:
        trainer.step(*args)
        pids = trainer.pids
        seconds, told = struck(trainer, 1, signal.SIGSTOP, lambda: trainer.backward(*args))
        assert seconds < 5
        assert "rank 1 lost" in told and "rank 0 waits in" in told
        assert gone_in_two(pids)


def test_every_action_is_told_with_its_stage() -> None:
    """A rank that is in one for long is judged by what that stage should take."""
    for kind in Kind:
        doing = Doing()
        doing.set(kind.name, 2, 5)
        assert str(doing) == str(Action(kind, 2, 5)) == f"{kind.name}(2,5)"


@pytest.mark.parametrize(("recompute", "way"), [("always", FULL), ("selective", SELECTIVE)])
def test_a_plan_that_recomputes_is_followed(recompute: str, way: str) -> None:
    """Several stages a rank, dropout masks and what is computed again, as threads do it."""
    _, args = captured("tied")
    graph = traced("tied")[2]
    wish = Wish(microbatches=4, trains=True, recompute=recompute)
    found = plan(graph, machine(2, wire=Wire(1e12, 0.0)), schedule="interleaved",
                 stages_per_device=2, wish=wish)  # fmt: skip
    with (
        Trainer(graph, found, optimizer=adamw, threads=2) as threads,
        ProcessTrainer(graph, found, optimizer=ADAMW, threads=2) as processes,
    ):
        for _ in range(2):
            assert torch.equal(processes.step(*args), threads.step(*args))
        same(processes.state_dict(), threads.state_dict())
        program = processes.report().program
        assert program == threads.report().program
        assert {*program.ways.values()} == {way} and len(program.placement) == 4


_SCRIPT = """
import json, sys, torch
from functools import partial
from pathlib import Path
from dfc.runtime.pipeline.staged_folder import read_staged
from dfc.runtime.pipeline.training_processes import ProcessTrainer
folder = Path(sys.argv[1])
model = read_staged(folder, json.loads((folder / "told.json").read_text()))
trainer = ProcessTrainer(model, microbatches=4, threads=2,
                         optimizer=partial(torch.optim.AdamW, lr=1e-2))
print(*trainer.pids, flush=True)
while True:
    trainer.step(torch.randn(10, 12), torch.randint(5, (10,)))
"""


@pytest.mark.parametrize(
    "signal_", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_a_script_without_a_guard_ends_with_its_ranks(signal_: int, tmp_path: Path) -> None:
    """It has no `if __name__ == "__main__"`, no `close()`, and is interrupted or killed."""
    (tmp_path / "train.py").write_text(_SCRIPT)
    (tmp_path / "told.json").write_text(json.dumps(write_staged(tmp_path, staged("mlp", 2))))
    script = subprocess.Popen(
        [sys.executable, str(tmp_path / "train.py"), str(tmp_path)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert script.stdout is not None
        pids = [int(p) for p in script.stdout.readline().split()]
        assert len(pids) == 2
        time.sleep(0.2)
        script.send_signal(signal_)
        assert gone_in_two([script.pid, *pids])
        assert script.wait(timeout=60) != 0
    finally:
        script.kill()
        script.wait()


def _local(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if not parameters[0].is_meta:  # as those are that stand for the ranks'
        raise ValueError("no such rate")
    return torch.optim.SGD(parameters, 1e-2)


def test_what_cannot_be_is_told() -> None:
    model = staged("mlp", 2)
    with pytest.raises(DfcError, match="cannot travel") as e:
        ProcessTrainer(model, optimizer=lambda p: torch.optim.SGD(p, 1e-2))
    assert e.value.code == "N077" and "functools.partial" in str(e.value)
    with pytest.raises(DfcError, match="every"):
        ProcessTrainer(model, optimizer=ADAMW, every=0)
    with pytest.raises(DfcError, match="sequential"):
        ProcessTrainer(model, optimizer=ADAMW, sequential=True)
    with pytest.raises(DfcError, match=r"(?s)rank [01]: the optimizer .*ValueError.*_local") as e:
        ProcessTrainer(model, optimizer=_local, microbatches=2, threads=2)
    assert e.value.code == "K057"


def test_ranks_that_cannot_save_go_on_and_those_that_ended_say_why(tmp_path: Path) -> None:
    _, args = captured("mlp")
    with ProcessTrainer(staged("mlp", 2), optimizer=partial(FailsSecond, lr=0.1), microbatches=2,
                        threads=2) as trainer:  # fmt: skip
        trainer.step(*args)
        (tmp_path / "file").write_text("here")
        pids = trainer.pids
        with pytest.raises(DfcError, match="D011"):
            trainer.save(tmp_path / "file")
        trainer.backward(*args)
        assert trainer.pids == pids
        with pytest.raises(DfcError, match=r"K057.*two is too many"):
            trainer.update()
        with pytest.raises(DfcError, match=r"K057.*have ended, since .*two is too many"):
            trainer.step(*args)
