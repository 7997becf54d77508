"""States and checkpoints of a trainer: training goes on from them, and what is none is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dfc
from dfc.errors import DfcError
from dfc.ir.expr import symbol
from dfc.ir.types import TensorType, dtype_of
from dfc.runtime.pipeline.staged_model import StagedModel
from dfc.runtime.pipeline.training import Trainer
from tests.training_models import B, Dropped, adamw, captured, cross_entropy, evenly, staged


def test_training_goes_on_from_a_state_with_other_stages() -> None:
    _, args = captured("tied")

    def trainer(count: int) -> Trainer:
        return Trainer(staged("tied", count), microbatches=2, optimizer=adamw, threads=1)

    with trainer(4) as first, trainer(1) as second, trainer(4) as third:
        for _ in range(2):
            first.step(*args)
        state = first.state_dict()
        assert sum("table" in name for name in state["weights"]) == 1  # a tied weight, once
        assert set(state["slots"]["table.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
        second.load_state_dict(state)
        third.load_state_dict(second.state_dict())
        for name, p in first.parameters.items():
            assert torch.equal(third.parameters[name], p)
        expected = [float(first.step(*args)) for _ in range(2)]
        assert [float(third.step(*args)) for _ in range(2)] == expected  # bit for bit
        assert [float(second.step(*args)) for _ in range(2)] == pytest.approx(expected, rel=1e-5)
        del state["weights"]["table.weight"]
        with pytest.raises(DfcError, match="another model"):
            second.load_state_dict(state)


def test_a_state_of_another_optimizer_is_refused_and_changes_nothing() -> None:
    _, args = captured("mlp")
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)

    with Trainer(staged("mlp", 2), microbatches=2, optimizer=adamw, threads=1) as first:
        first.step(*args)
        state = first.state_dict()
    with Trainer(staged("mlp", 2), microbatches=2, optimizer=sgd, threads=1) as second:
        before = second.state_dict()
        with pytest.raises(
            DfcError, match=r"(?s)N075.*another optimizer's.*`amsgrad`.*as SGD"
        ) as e:
            second.load_state_dict(state)
        assert e.value.status == 2
        for name, x in second.state_dict()["weights"].items():
            assert torch.equal(x, before["weights"][name])
        for options in state["options"].values():
            options.clear()  # nothing is known of it
        state["slots"] = {}
        second.load_state_dict(state)
        schedule = torch.optim.lr_scheduler.StepLR(second.optimizers[0], 1)
        second.step(*args)
        schedule.step()
        second.load_state_dict(second.state_dict())  # with the scheduler's `initial_lr`


def test_a_checkpoint_is_the_models_own_state_and_training_goes_on_from_it(tmp_path: Path) -> None:
    """Bit for bit, masks of dropout and a rate that has changed included."""
    torch.manual_seed(1)
    model, x, y = Dropped(), torch.randn(9, 8), torch.randint(4, (9,))
    graph = dfc.trace(model, (x,), dynamic_shapes=({0: B},))
    target = (TensorType(dtype_of(torch.int64), (symbol("B"),)),)
    whole = StagedModel(graph, evenly(graph, 2), cross_entropy, target)

    def trainer(seed: int) -> Trainer:
        return Trainer(whole, schedule="zb1p", microbatches=3, optimizer=adamw, threads=1,
                       seed=seed)  # fmt: skip

    with trainer(5) as first, trainer(0) as second:
        for _ in range(2):
            first.step(x, y)
        for optimizer in first.optimizers:
            optimizer.param_groups[0].update(lr=3e-3, betas=(0.8, 0.99))
        first.save(tmp_path / "last")
        second.load(tmp_path / "last")
        model.load_state_dict(load_file(tmp_path / "last" / "model.safetensors"))
        assert all(torch.equal(model.get_parameter(n), p) for n, p in first.parameters.items())
        assert second.optimizers[0].param_groups[0]["betas"] == (0.8, 0.99)
        losses = [[float(t.step(x, y)) for _ in range(3)] for t in (first, second)]
        assert losses[0] == losses[1]
        assert all(torch.equal(p, second.parameters[n]) for n, p in first.parameters.items())
        (tmp_path / "last" / "training.json").write_text("{}")
        with pytest.raises(DfcError, match=r"training\.json"):
            second.load(tmp_path / "last")


def test_a_state_that_is_no_trainers_is_refused_before_it_is_read() -> None:
    with Trainer(staged("mlp", 2), optimizer=adamw) as trainer:
        for state in ({"q": torch.ones(1)}, {"weights": {}}, [1]):
            with pytest.raises(DfcError, match=r"N075.*it is no trainer's"):
                trainer.load_state_dict(state)  # type: ignore[arg-type]
