"""Models that define gradients themselves are not trained by those of their forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dfc
from dfc.emit.trainable import TrainableGraph
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.runtime.pipeline.training import Trainer
from tests.training_models import adamw, close, evenly


class Rounded(torch.autograd.Function):
    """Straight through: as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


@torch.library.custom_op("tests::rounded", mutates_args=())
def rounded(x: torch.Tensor) -> torch.Tensor:
    return torch.round(x * 4) / 4


rounded.register_fake(torch.empty_like)
rounded.register_autograd(lambda ctx, gradient: gradient)


class Net(nn.Module):
    def __init__(self, middle: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.middle = nn.Linear(6, 6), nn.Linear(6, 1), middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x))).square().mean()


X = torch.linspace(-1, 1, 24).reshape(4, 6)


def traced(model: nn.Module) -> Graph:
    return dfc.trace(model, (X,))


def hooked(x: torch.Tensor) -> torch.Tensor:
    y = x * 1.0
    y.register_hook(lambda gradient: gradient * 0.1)
    return y


def switched_off(x: torch.Tensor) -> torch.Tensor:
    """Captured below autograd, where nothing says that gradients are off."""
    with torch.no_grad():
        scale = x.abs().amax()
    return torch.func.grad(lambda z: z.square().sum())(x) / scale


def switched_off_by_a_decorator(x: torch.Tensor) -> torch.Tensor:
    largest = torch.no_grad()(lambda: x.abs().amax())
    return torch.func.grad(lambda z: z.square().sum())(x) / largest()


def with_module_hook() -> nn.Module:
    model = Net(torch.tanh)
    model.last.register_full_backward_hook(lambda module, given, got: None)
    return model


def with_parameter_hook() -> nn.Module:
    model = Net(torch.tanh)
    model.last.weight.register_hook(lambda gradient: gradient * 0.1)
    return model


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: Net(Rounded.apply), r"`Rounded`, a torch\.autograd\.Function"),
        (lambda: Net(hooked), "a hook that the code registers on a tensor"),
        (lambda: Net(switched_off), r"code under `torch\.no_grad\(\)`"),
        (lambda: Net(switched_off_by_a_decorator), r"code under `torch\.no_grad\(\)`"),
        (with_module_hook, "a backward hook of `last`"),
        (with_parameter_hook, r"a hook of the parameter `last\.weight`"),
    ],
)
def test_a_graph_does_not_train_what_it_does_not_know(
    make: Callable[[], nn.Module], what: str
) -> None:
    graph = traced(make())
    compiled = dfc.compile(graph, engine="eager")
    for train in (
        lambda: Trainer(graph, evenly(graph, 2), optimizer=adamw, microbatches=1),
        lambda: Trainer(compiled.graph, evenly(compiled.graph, 2), optimizer=adamw),
        lambda: TrainableGraph(graph),
    ):
        with pytest.raises(DfcError, match=f"N079.*{what}"):
            train()
    torch.testing.assert_close(compiled(X), make()(X))  # it infers all the same


def test_a_loss_that_defines_its_gradient_is_refused() -> None:
    model = nn.Linear(6, 2)
    graph = dfc.trace(model, (X,))

    def loss(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(Rounded.apply(y), target)

    with pytest.raises(DfcError, match=r"N079.*`Rounded`"):
        Trainer(graph, evenly(graph, 1), optimizer=adamw, loss=loss, targets=["f32[4, 2]"])


def test_a_model_that_differentiates_in_forward_is_trained() -> None:
    model = Net(lambda x: torch.func.grad(lambda z: z.pow(3).sum())(x))
    graph = traced(model)
    assert any("below autograd" in note for note in graph.notes)
    model(X).backward()
    with Trainer(graph, evenly(graph, 2), optimizer=adamw, microbatches=1) as trainer:
        trainer.backward(X)
        found = {n: p.grad for n, p in trainer.parameters.items() if p.grad is not None}
    close(found, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize(
    "middle",
    [lambda x: torch.ops.tests.rounded(x), lambda x: x + (torch.round(x * 4) / 4 - x).detach()],
    ids=["custom_op", "detach"],
)
def test_what_the_help_says_has_the_same_gradient(
    middle: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    before = vars(Rounded)["forward"], torch.Tensor.register_hook
    graph = traced(Net(middle))
    assert (vars(Rounded)["forward"], torch.Tensor.register_hook) == before
    whole = Net(Rounded.apply)
    whole(X).backward()
    with Trainer(graph, evenly(graph, 2), optimizer=adamw, microbatches=1) as trainer:
        trainer.backward(X)
        found = {n: p.grad for n, p in trainer.parameters.items() if p.grad is not None}
    close(found, {n: p.grad for n, p in whole.named_parameters() if p.grad is not None})


class Under(nn.Module):
    """Batch norm, and a spectral norm whose power iteration writes buffers, under `no_grad`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.last = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        with torch.no_grad():
            scale = torch.sin(self.first(y)) + y.square()
        return self.last(self.norm(y) * scale).square().mean()


def test_nothing_flows_through_what_is_computed_under_no_grad() -> None:
    """Also where the model writes to buffers."""
    graph, whole = traced(Under()), Under()
    with Trainer(graph, evenly(graph, 1), optimizer=adamw, microbatches=1) as trainer:
        for _ in range(2):
            whole.zero_grad()
            loss = whole(X)
            loss.backward()
            torch.testing.assert_close(trainer.backward(X), loss.detach())
            found = {n: p.grad for n, p in trainer.parameters.items() if p.grad is not None}
            expected = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
            trainer.set_options(lr=0.0, weight_decay=0.0)
            trainer.update()  # takes over the buffers
        for name, held in trainer.state_dict()["buffers"].items():
            torch.testing.assert_close(held, whole.get_buffer(name))
