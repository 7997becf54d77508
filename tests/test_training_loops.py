"""What training loops do between two calls: with gradients, weights, and batches of other sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dfc
from dfc.runtime.pipeline.local import Pipeline
from dfc.runtime.pipeline.training import Trainer
from tests.training_models import captured, close, evenly, staged

TABLE, BIAS = "table.weight", "blocks.1.up.bias"  # the first is tied: two stages have parts of it
Parameters = dict[str, nn.Parameter]


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1)


def forget(p: nn.Parameter) -> None:
    p.grad = None


def halve(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad *= 0.5


def replace(p: nn.Parameter) -> None:
    p.grad = torch.ones_like(p)


def clear(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad.zero_()


@pytest.mark.parametrize("change", [forget, halve, replace, clear])
def test_gradients_are_added_to_what_the_caller_made_of_them(
    change: Callable[[nn.Parameter], None],
) -> None:
    model, args = captured("tied")
    with Trainer(staged("tied", 4), microbatches=2, optimizer=sgd, threads=1) as trainer:
        for of, parameters in (
            ("plain", dict(model.named_parameters())), ("trainer", trainer.parameters)
        ):  # fmt: skip
            for call in range(2):
                if of == "plain":
                    model(*args).backward()
                else:
                    trainer.backward(*args)
                if not call:
                    change(parameters[TABLE])
                    change(parameters[BIAS])
        expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        close({n: p.grad for n, p in trainer.parameters.items() if p.grad is not None}, expected)


def test_weights_that_the_caller_freezes_keep_still() -> None:
    _, args = captured("tied")
    with Trainer(staged("tied", 4), microbatches=2, optimizer=sgd, threads=1) as trainer:
        before = trainer.state_dict()["weights"]
        trainer.parameters[BIAS].requires_grad_(False)
        trainer.parameters[TABLE].requires_grad_(False)
        trainer.step(*args)
        after = trainer.parameters
        changed = {n for n, w in before.items() if not torch.equal(w, after[n])}
        assert changed == set(before) - {BIAS, TABLE}
        trainer.parameters[BIAS].requires_grad_()
        trainer.step(*args)
        assert not torch.equal(before[BIAS], after[BIAS])


def test_stages_read_weights_of_another_memory() -> None:
    """As some optimizers write them: `p.data = p.data - lr * p.grad`."""

    class Replaces(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                p.data = p.data - 0.1 * p.grad

    losses = []
    _, args = captured("tied")
    for optimizer in (sgd, Replaces):
        with Trainer(staged("tied", 2), microbatches=2, optimizer=optimizer, threads=1) as trainer:
            losses.append([float(trainer.step(*args)) for _ in range(3)])
    assert losses[0] == losses[1] and len(set(losses[0])) == 3


def test_reports_tell_the_bytes_of_the_step_that_they_are_of() -> None:
    _, (x, y) = captured("mlp")
    for recompute in (False, True):
        with Trainer(staged("mlp", 2), microbatches=2, optimizer=sgd, threads=1,
                     recompute=recompute) as trainer:  # fmt: skip
            kept = []
            for items in (8, 4, 8):
                trainer.step(x[:items], y[:items])
                report = trainer.report()
                kept.append((report.saved_bytes, report.taken_bytes, report.peak_bytes))
        assert kept[0] == kept[2]
        assert all(a > b for a, b in zip(kept[0][0], kept[1][0], strict=True))
        assert all(a > b for a, b in zip(kept[0][2], kept[1][2], strict=True))


class Normed(nn.Module):
    """Batch norm over two sizes that vary: one item of one position has no variance."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.b(self.norm(self.a(x))), y)


def test_microbatches_have_sizes_that_the_model_is_true_for() -> None:
    torch.manual_seed(0)
    b, s = torch.export.Dim("B", min=1, max=64), torch.export.Dim("S", min=1, max=64)
    example = torch.randn(6, 2, 5), torch.randn(6, 2, 5)
    graph = dfc.trace(Normed(), example, dynamic_shapes=({0: b, 2: s}, {0: b, 2: s}))
    stage_of = {n: int(i > 3) for i, n in enumerate(graph.nodes)}
    with Trainer(graph, stage_of, microbatches=6, optimizer=sgd, threads=1) as trainer:
        for positions, count in ((5, 6), (1, 3)):
            trainer.backward(torch.randn(6, 2, positions), torch.randn(6, 2, positions))
            assert trainer.last is not None and trainer.last[0].microbatches == count
            gradients = [p.grad for p in trainer.parameters.values()]
            assert all(g is not None and g.isfinite().all() for g in gradients)


def test_pipelines_cut_batches_as_the_model_is_true_for() -> None:
    torch.manual_seed(0)
    b = torch.export.Dim("B", max=64)
    model = nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2)))

    class Halved(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return model(x).reshape(2, x.shape[0] // 2, 4).transpose(0, 1).reshape(x.shape)

    x = torch.randn(10, 4)  # not as two of 5
    graph = dfc.trace(Halved(), (x,), dynamic_shapes=({0: b},))
    assert graph.requires
    with Pipeline(graph, evenly(graph, 2), microbatches=4) as pipeline:
        pipeline(x)
        assert pipeline.last is not None and pipeline.last[0].microbatches == 1
