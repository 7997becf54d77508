"""Stages of equal time: as many as asked for, since schedules need their number."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dfc
from dfc.errors import DfcError
from dfc.planning.balanced import balanced
from dfc.planning.stages import split
from dfc.runtime.pipeline.training import Trainer


class Branches(nn.Module):
    """One node that takes nearly all of the time, views, and a skip."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.head = nn.Linear(64, 64), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x @ (self.wide.weight @ self.wide.weight)).view(-1, 8, 8)
        return (self.head(torch.tanh(y).transpose(1, 2)) + y.sum()).square().mean()


ARGS = (torch.linspace(-1, 1, 6 * 64).reshape(6, 64),)
SHAPES = ({0: torch.export.Dim("B", min=1, max=64)},)


@pytest.mark.parametrize("stages", range(1, 8))
def test_there_are_as_many_stages_as_asked_for(stages: int) -> None:
    graph = dfc.trace(Branches(), ARGS, dynamic_shapes=SHAPES)
    placed = balanced(graph, stages, ARGS)
    assert set(placed) == set(graph.nodes)
    assert sorted(set(placed.values())) == list(range(stages))
    assert len(split(graph, placed)) == stages  # each is convex


class Watched(nn.Module):
    """A running mean that is read long before it is written."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.register_buffer("mean", torch.zeros(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x) - self.mean
        x = torch.tanh(self.layers[2](torch.tanh(self.layers[1](x))))
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return self.layers[3](x).square().mean()


@pytest.mark.parametrize("stages", [2, 3, 20])
def test_who_reads_and_who_writes_a_buffer_share_a_stage(stages: int) -> None:
    model = Watched()
    graph = dfc.trace(model, ARGS, dynamic_shapes=SHAPES)
    placed = balanced(graph, stages, ARGS)
    assert len(set(placed.values())) == stages or stages == 20
    with Trainer(graph, placed, microbatches=1, optimizer=torch.optim.SGD) as trainer:
        for _ in range(2):
            trainer.backward(*ARGS)
            trainer.update()
            trainer.zero_grad()
        assert trainer.state_dict()["buffers"]["mean"].abs().sum() > 0


def test_a_schedule_of_two_stages_a_rank_trains_a_model_of_few_nodes() -> None:
    model = nn.Sequential(nn.Linear(64, 2), nn.Tanh(), nn.Linear(2, 2))
    graph = dfc.trace(model, ARGS, dynamic_shapes=SHAPES)
    options = {"loss": nn.functional.mse_loss, "targets": ["f32[B, 2]"], "microbatches": 2}
    placed = balanced(graph, 3, ARGS)
    with pytest.raises(DfcError, match=r"N073.*3 cannot be shared out") as error:
        Trainer(graph, placed, schedule="dualpipe_v", optimizer=torch.optim.SGD, **options)
    assert "of a model with few nodes `balanced` and plans make fewer" in str(error.value)
    placed = balanced(graph, 2, ARGS)
    kind = torch.optim.SGD
    with Trainer(graph, placed, schedule="dualpipe_v", optimizer=kind, **options) as trainer:
        target = torch.zeros(6, 2)
        want = nn.functional.mse_loss(model(*ARGS), target)
        torch.testing.assert_close(trainer.step(*ARGS, target), want.detach())
    assert len(set(balanced(graph, 9, ARGS).values())) == len(graph) == 3
