"""Models that write to their buffers, trained in stages: batch norm's statistics, and a state that
the next microbatch reads."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import dfc
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.runtime.pipeline.staged_model import StagedModel
from dfc.runtime.pipeline.training import Trainer
from dfc.runtime.pipeline.training_processes import ProcessTrainer

M = 3
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Net(nn.Module):
    """Convolutions with batch norms, a skip, and a running mean that later microbatches read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False)
        self.head = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        skip = x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.other(self.second(x))) + skip
        x = self.head(x.mean((2, 3)))
        x = x * (1 + self.seen.sin())
        self.seen.mul_(0.5).add_(x.detach().mean(0))
        return F.mse_loss(x, y)


def batch(items: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(items)
    shapes = (items, 2, 5, 5), (items, 3)
    x, y = (torch.randn(s, generator=generator) for s in shapes)
    return x, y


def net() -> Net:
    torch.manual_seed(1)
    return Net().train()


@cache
def staged() -> StagedModel:
    size = torch.export.Dim("B", min=2, max=64)
    graph = dfc.trace(net(), batch(), dynamic_shapes=({0: size}, {0: size}))
    return StagedModel(graph, cut(graph))


def cut(graph: Graph) -> dict[Node, int]:
    """Two stages, at the second convolution."""
    nodes = list(graph.nodes)
    at = [n.op.startswith("aten.conv") for n in nodes].index(True, 1)
    return {n: int(i >= at) for i, n in enumerate(nodes)}


def by_pytorch(steps: int) -> tuple[list[torch.Tensor], Net]:
    model = net()
    optimizer, losses = SGD(model.parameters()), []
    for step in range(steps):
        x, y = batch(7 + step)
        optimizer.zero_grad()
        total = torch.zeros(())
        for some, others in zip(x.tensor_split(M), y.tensor_split(M), strict=True):
            loss = model(some, others) * len(some) / len(x)
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        losses.append(total)
    return losses, model


def trained(steps: int, of: Any = Trainer, **options: Any) -> tuple[list[torch.Tensor], Any]:
    with of(staged(), optimizer=SGD, microbatches=M, threads=2, **options) as trainer:
        losses = [trainer.step(*batch(7 + step)) for step in range(steps)]
        return losses, trainer.state_dict()


WAYS = [("1f1b", False), ("zb1p", "selective"), ("gpipe", True), ("auto", False)]


@pytest.mark.parametrize(("schedule", "recompute"), WAYS)
def test_buffers_are_what_microbatches_leave_one_after_the_other(
    schedule: str, recompute: bool | str
) -> None:
    losses, model = by_pytorch(3)
    found, state = trained(3, schedule=schedule, recompute=recompute)
    torch.testing.assert_close(found, losses)
    expected = dict(model.named_buffers())
    assert set(state["buffers"]) == set(expected)
    torch.testing.assert_close(state["buffers"], expected)
    torch.testing.assert_close(state["weights"], dict(model.named_parameters()))
    assert state["buffers"]["norm.num_batches_tracked"] == 3 * M


def test_recomputation_reads_buffers_as_they_were() -> None:
    plain, state = trained(2, schedule="gpipe")
    for way in (True, "selective"):
        again, other = trained(2, schedule="gpipe", recompute=way)
        assert all(map(torch.equal, plain, again))
        for part in ("weights", "buffers"):
            assert all(torch.equal(x, other[part][n]) for n, x in state[part].items())


def test_buffers_change_with_the_step_alone() -> None:
    with Trainer(staged(), optimizer=SGD, microbatches=M) as trainer:
        first = trainer.backward(*batch())
        assert not trainer.state_dict()["buffers"]["seen"].any()
        trainer.zero_grad()
        assert torch.equal(trainer.backward(*batch()), first)
        trainer.update()
        assert trainer.state_dict()["buffers"]["seen"].any()


def test_a_checkpoint_and_a_module_have_them(tmp_path: Path) -> None:
    whole, end = trained(3)
    model = net()
    with Trainer(staged(), optimizer=SGD, microbatches=M, threads=2) as trainer:
        trainer.step(*batch(7))
        trainer.save(tmp_path / "last")
        trainer.load_into(model)
        held = trainer.state_dict()["buffers"]
    assert all(torch.equal(x, held[n]) for n, x in model.named_buffers())
    other = net()
    other.load_state_dict(load_file(tmp_path / "last" / "model.safetensors"))
    assert all(torch.equal(x, held[n]) for n, x in other.named_buffers())
    with Trainer(staged(), optimizer=SGD, microbatches=M, threads=2) as trainer:
        trainer.load(tmp_path / "last")
        losses = [trainer.step(*batch(7 + step)) for step in (1, 2)]
        assert all(map(torch.equal, losses, whole[1:]))
        state = trainer.state_dict()
        assert all(torch.equal(x, end["buffers"][n]) for n, x in state["buffers"].items())
        del state["buffers"]["seen"]
        with pytest.raises(DfcError, match="lacks `seen`"):
            trainer.load_state_dict(state)


def test_processes_train_as_threads_do() -> None:
    losses, state = trained(2)
    found, other = trained(2, ProcessTrainer)
    assert all(map(torch.equal, losses, found))
    for part in ("weights", "buffers"):
        assert set(state[part]) == set(other[part])
        assert all(torch.equal(x, other[part][n]) for n, x in state[part].items())


def test_what_a_loss_follows_keeps_what_is_written() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.layer(x))

    x, y = torch.randn(6, 4), torch.randn(6, 3)
    size = torch.export.Dim("B", min=2, max=64)
    graph = dfc.trace(Inner().train(), (x,), dynamic_shapes=({0: size},))
    stages = {n: int(i > 0) for i, n in enumerate(graph.nodes)}
    with Trainer(graph, stages, optimizer=SGD, microbatches=2, loss=F.mse_loss,
                 targets=["f32[B, 3]"]) as trainer:  # fmt: skip
        trainer.step(x, y)
        assert trainer.state_dict()["buffers"]["norm.num_batches_tracked"] == 2


def test_a_buffer_lies_in_one_stage() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layer(x + self.seen)
            self.seen.copy_(x.detach().mean(0))
            return x.sum()

    graph = dfc.trace(Twice().train(), (torch.randn(6, 4),))
    stages = {n: int(i > 0) for i, n in enumerate(graph.nodes)}
    with pytest.raises(DfcError, match="stage 0 reads the buffer !seen, which stage 1 writes"):
        StagedModel(graph, stages)


def test_no_microbatch_is_of_one_value_a_channel() -> None:
    """PyTorch refuses one: its variance, which the buffers would hold, is no number."""
    size = torch.export.Dim("B", min=1, max=64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)).train()
    x, y = torch.randn(5, 4), torch.randn(5, 1)
    graph = dfc.trace(model, (x,), dynamic_shapes=({0: size},))
    assert any("`B` is at least 2: batch norm" in note for note in graph.notes)
    stages = {n: int(i > 1) for i, n in enumerate(graph.nodes)}
    options: dict[str, Any] = {"loss": F.mse_loss, "targets": ["f32[B, 1]"], "microbatches": 4}
    with Trainer(graph, stages, optimizer=SGD, **options) as trainer:
        trainer.step(x, y)
        found = trainer.state_dict()["buffers"]
        with pytest.raises(DfcError, match=r"K015.*`B` is 1"):
            trainer.step(x[:1], y[:1])
    for part in (x[:3], x[3:]):
        model(part)
    torch.testing.assert_close(found["1.running_var"], model[1].running_var)
    torch.testing.assert_close(found["1.running_mean"], model[1].running_mean)


@pytest.mark.parametrize(
    ("norm", "shape", "low", "requires"),
    [
        (nn.BatchNorm1d(3), (4, 3), 2, ""),
        (nn.BatchNorm1d(3), (4, 3, 2), 1, ""),
        (nn.BatchNorm1d(3).eval(), (4, 3), 1, ""),
        (nn.BatchNorm2d(3), (4, 3, 5, 1), 1, "lt(1, B*S)"),
    ],
)
def test_sizes_of_batch_norm(
    norm: nn.Module, shape: tuple[int, ...], low: int, requires: str
) -> None:
    sizes = {0: torch.export.Dim("B", min=1, max=64)}
    if requires:
        sizes[2] = torch.export.Dim("S", min=1, max=64)
    graph = dfc.trace(norm, (torch.randn(shape),), dynamic_shapes=(sizes,))
    assert graph.ranges["B"] == (low, 64)
    assert [str(r) for r in graph.requires] == ([requires] if requires else [])
