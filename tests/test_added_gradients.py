"""Gradients of several batches are added up until the optimizers' step, as PyTorch does."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dfc.errors import DfcError
from dfc.runtime.pipeline.training import Trainer
from dfc.runtime.pipeline.training_processes import ProcessTrainer
from tests import recomputed
from tests.test_training_buffers import SGD, M, batch, net
from tests.test_training_buffers import staged as with_buffers
from tests.test_training_processes import same
from tests.training_models import adamw, captured, close, reference, staged

SIZES = (10, 7, 3)


def grads(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in trainer.parameters.items() if p.grad is not None}


def added(name: str) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Plain PyTorch's losses and gradients of several batches."""
    model, args = captured(name)
    losses, total = [], dict[str, torch.Tensor]()
    for size in SIZES:
        loss, found = reference(model, tuple(x[:size] for x in args), 4)
        losses.append(loss)
        total = {n: total.get(n, 0) + g.clone() / len(SIZES) for n, g in found.items()}
    return losses, total


@pytest.mark.parametrize(
    ("name", "schedule"), [("mlp", "1f1b"), ("tied", "auto"), ("tied", "zb_v")]
)
def test_gradients_of_batches_add_up(name: str, schedule: str) -> None:
    """Also where `auto` measures the stages anew for a smaller batch."""
    _, args = captured(name)
    losses, expected = added(name)
    with Trainer(staged(name, 4), schedule=schedule, microbatches=4, optimizer=adamw,
                 threads=1) as trainer:  # fmt: skip
        for _ in range(2):  # the second time from nothing again
            for size, loss in zip(SIZES, losses, strict=True):
                part = (x[:size] for x in args)
                torch.testing.assert_close(trainer.backward(*part, of=len(SIZES)), loss)
            close(grads(trainer), expected)
            trainer.zero_grad()
            assert not grads(trainer)
        with pytest.raises(DfcError, match="no gradients"):
            trainer.update()
        with pytest.raises(DfcError, match="one of 1 or more"):
            trainer.backward(*args, of=0)


@pytest.mark.parametrize("recompute", [False, True, "selective"])
def test_batches_are_one_step_of_all_their_microbatches(recompute: bool | str) -> None:
    """Bit for bit, with dropout's masks, a tied table, and the optimizers' step."""
    model, (ids, y) = recomputed.staged()
    found: list[dict[str, Any]] = []
    for count in (1, 2):
        with Trainer(model, schedule="1f1b", microbatches=4 // count, optimizer=adamw, threads=1,
                     recompute=recompute) as trainer:  # fmt: skip
            for _ in range(2):
                for some, others in zip(ids[:8].chunk(count), y[:8].chunk(count), strict=True):
                    trainer.backward(some, others, of=count)
                trainer.update()
            found.append(grads(trainer) | trainer.state_dict()["weights"])
    assert all(torch.equal(x, found[1][n]) for n, x in found[0].items())


def test_optimizers_may_forget_them_and_a_failure_does() -> None:
    _, args = captured("mlp")
    bad = args[1].clone()
    bad[-1] = 99
    with Trainer(staged("mlp", 2), microbatches=4, optimizer=adamw, threads=1) as trainer:
        trainer.backward(*args)
        once = grads(trainer)
        for optimizer in trainer.optimizers:
            optimizer.zero_grad()
        trainer.backward(*args)
        assert all(torch.equal(g, once[n]) for n, g in grads(trainer).items())
        with pytest.raises(DfcError, match=r"stage . failed"):
            trainer.backward(args[0], bad)
        with pytest.raises(DfcError, match="no gradients"):
            trainer.update()
        trainer.backward(*args)
        assert all(torch.equal(g, once[n]) for n, g in grads(trainer).items())
        trainer.load_state_dict(trainer.state_dict())  # they were those of other weights
        trainer.step(*args)
        assert all(torch.equal(g, once[n]) for n, g in grads(trainer).items())


def test_buffers_go_on_from_batch_to_batch() -> None:
    model = net()
    with Trainer(with_buffers(), optimizer=SGD, microbatches=M, threads=1) as trainer:
        for items in (7, 8):
            x, y = batch(items)
            for some, others in zip(x.tensor_split(M), y.tensor_split(M), strict=True):
                model(some, others)
            trainer.backward(x, y)
        trainer.update()
        found = trainer.state_dict()["buffers"]
    for name, expected in model.named_buffers():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)


def test_processes_add_up_as_threads_do_also_when_one_is_lost(tmp_path: Path) -> None:
    _, args = captured("tied")
    options: dict[str, Any] = {"schedule": "zb1p", "microbatches": 4, "threads": 2}
    with (
        Trainer(staged("tied", 2), optimizer=adamw, **options) as threads,
        ProcessTrainer(staged("tied", 2), optimizer=partial(torch.optim.AdamW, lr=1e-2),
                       checkpoint=tmp_path / "last", **options) as processes,
    ):  # fmt: skip
        with pytest.raises(DfcError, match="no gradients"):
            processes.update()
        for kills in (False, True, False):
            for size in SIZES:
                part = tuple(x[:size].clone() for x in args)
                mine = tuple(x.clone() for x in part)
                assert torch.equal(processes.backward(*part, of=3), threads.backward(*mine, of=3))
                for x in part:
                    x.zero_()  # a script may use its tensors again
                if kills and size == SIZES[1]:
                    os.kill(processes.pids[1], signal.SIGKILL)
            for trainer in (processes, threads):
                trainer.update()
        assert len(processes.incidents) == 1
        for trainer in (processes, threads):
            trainer.backward(*args)
            trainer.zero_grad()
            trainer.step(*args)
        same(processes.state_dict(), threads.state_dict())
