"""Inputs whose names torch.fx changes are not taken for other inputs that have those names."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import dfc
from dfc.emit.fx import to_fx
from dfc.runtime.pipeline.training import Trainer
from tests.training_models import B, adamw


class Named(nn.Module):
    def forward(
        self, input: torch.Tensor, input_1: torch.Tensor, slice: torch.Tensor, slice_1: torch.Tensor
    ) -> torch.Tensor:
        return input - 2 * input_1 + 3 * slice - 5 * slice_1


ARGS = tuple(torch.full((2, 3), float(i)) for i in range(4))


def test_arguments_with_names_of_builtins_stay_apart() -> None:
    graph = dfc.trace(Named(), ARGS)
    assert torch.equal(to_fx(graph)(*ARGS)[0], Named()(*ARGS))
    assert torch.equal(dfc.compile(graph, engine="eager")(*ARGS), Named()(*ARGS))


class Written(nn.Module):
    """What is written in place is two slices of one value, `slice` and `slice_1`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x[:, 0] = 0
        return F.mse_loss(x, y)


def test_stages_that_take_such_values_have_their_gradients() -> None:
    model, args = Written(), (torch.randn(4, 4), torch.randn(4, 4))
    graph = dfc.trace(model, args, dynamic_shapes=({0: B}, {0: B}))
    here = {"linear", "slice", "slice_1"}
    names = [n.results[0].name for n in graph.nodes]
    assert here <= set(names)
    placed = {n: int(name not in here) for n, name in zip(graph.nodes, names, strict=True)}
    loss = model(*args)
    loss.backward()
    with Trainer(graph, placed, microbatches=1, optimizer=adamw) as trainer:
        torch.testing.assert_close(trainer.backward(*args), loss.detach())
        for name, p in model.named_parameters():
            torch.testing.assert_close(trainer.parameters[name].grad, p.grad)
