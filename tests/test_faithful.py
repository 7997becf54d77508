"""Graphs that would train something else than their models are refused before the first step."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dfc
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.runtime.pipeline.faithful import compare
from dfc.runtime.pipeline.training import Trainer
from tests.training_models import B, adamw, evenly

X, Y = torch.randn(6, 8), torch.randint(3, (6,))


class Layers(nn.Module):
    """Each layer is called by `layer`, which models override."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head, self.drop, self.calls = nn.Linear(8, 3), nn.Dropout(0.3), 0

    def layer(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.drop(torch.tanh(layer(x)))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        for layer in self.layers:
            x = self.layer(layer, x)
        return F.cross_entropy(self.head(x), y)


class Skips(Layers):
    def layer(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return super().layer(layer, x) * random.random()


class Counts(Layers):
    def layer(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return super().layer(layer, x) / self.calls


class Knows(Layers):
    def layer(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(layer(x)) if torch.compiler.is_exporting() else super().layer(layer, x)


class Stops(Layers):
    """Another way for gradients alone."""

    def layer(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = super().layer(layer, x)
        return y.detach() if torch.compiler.is_exporting() and layer is self.layers[0] else y


class Inferred(Layers):
    def layer(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if layer is not self.layers[0]:
            return super().layer(layer, x)
        with torch.inference_mode():
            y = super().layer(layer, x)
        return y.clone() + x


class Checkpointed(Layers):
    def layer(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if layer is self.layers[0]:
            return super().layer(layer, x)  # a reentrant one wants inputs with gradients
        made = checkpoint(super().layer, layer, x, use_reentrant=True)
        assert isinstance(made, torch.Tensor)
        return made


class Normed(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def layer(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.norm(super().layer(layer, x))
        return made


def traced(make: Callable[[], nn.Module]) -> tuple[nn.Module, Graph]:
    torch.manual_seed(0)
    model = make()
    return model, dfc.trace(model, (X, Y), dynamic_shapes=({0: B}, {0: B}))


@pytest.mark.parametrize("make", [Layers, Normed, Inferred, Checkpointed])
def test_graphs_that_train_what_their_models_do_pass(make: Callable[[], nn.Module]) -> None:
    model, graph = traced(make)
    model.eval()  # in between: it was traced in training
    before = {name: b.clone() for name, b in model.named_buffers()}
    state = torch.get_rng_state()
    assert compare(graph).startswith("compared with the model: same results and gradients")
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


@pytest.mark.parametrize("make, what, why", [
    (Skips, "", "does not give the same twice"),
    (Counts, "", "does not give the same twice"),
    (Knows, "the result is off", "takes another way while it is traced"),
    (Stops, "the gradient of `layers.0.", "takes another way while it is traced"),
])  # fmt: skip
def test_graphs_that_train_something_else_are_refused(
    make: Callable[[], nn.Module], what: str, why: str
) -> None:
    _, graph = traced(make)
    with pytest.raises(DfcError) as e:
        Trainer(graph, evenly(graph, 2), optimizer=adamw)
    assert e.value.code == "T010" and what in e.value.message and why in str(e.value)


def test_a_graph_that_is_not_compared_says_why() -> None:
    _, graph = traced(Knows)
    with Trainer(graph, evenly(graph, 2), optimizer=adamw, compare=False) as trainer:
        assert trainer.compared is None
    copy = graph.copy()  # as passes make
    with Trainer(copy, evenly(copy, 2), optimizer=adamw) as trainer:
        trainer.step(X, Y)
        assert str(trainer.report()).endswith("the graph is not as it was captured from one")


def test_gradients_of_inference_mode_and_reentrant_checkpoints_are_pytorchs() -> None:
    kinds: tuple[type[Layers], ...] = (Inferred, Checkpointed)
    for make in kinds:
        torch.manual_seed(0)
        model = make()
        model.drop.p = 0.0
        graph = dfc.trace(model, (X, Y))
        with Trainer(graph, evenly(graph, 2), microbatches=1, optimizer=adamw) as trainer:
            trainer.backward(X, Y)
            model(X, Y).backward()
            expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            found = {n: p.grad for n, p in trainer.parameters.items() if p.grad is not None}
        torch.testing.assert_close(found, expected)


def test_a_model_that_writes_to_its_weights_is_refused() -> None:
    class Renormed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(8, 4, max_norm=0.5), nn.Linear(4, 3)

        def forward(self, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.head(self.table(ids)), y)

    graph = dfc.trace(Renormed(), (Y, Y))
    with pytest.raises(DfcError, match=r"N050.*its own weight !table\.weight") as e:
        Trainer(graph, evenly(graph, 1), optimizer=adamw)
    assert "max_norm" in str(e.value)


class Summed(Layers):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(x, y) * x.shape[0]


def test_a_loss_that_microbatches_change_is_told() -> None:
    for make, reduction, told in (
        (Layers, "mean", False), (Summed, "mean", True), (Summed, "sum", False),
        (Layers, "sum", True), (Normed, "mean", False),
    ):  # fmt: skip
        made = compare(traced(make)[1], reduction)
        assert ("microbatches change its loss" in made) is told, (make, reduction, made)


def test_calls_of_other_keys_and_losses_that_fail_are_told_in_words() -> None:
    class Keyed(Layers):
        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
            return super().forward(batch["x"], batch["y"])

    graph = dfc.trace(Keyed(), ({"x": X, "y": Y},))
    with (
        Trainer(graph, evenly(graph, 2), optimizer=adamw) as trainer,
        pytest.raises(DfcError, match="keys 'x', 'y', got a dict of x, labels"),
    ):
        trainer.step({"x": X, "labels": Y})

    def fails(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such target")

    graph = dfc.trace(nn.Linear(8, 3), (X,))
    with pytest.raises(DfcError, match=r"N074.*f32\[6, 3\], i64\[6\]: ValueError: no such target"):
        Trainer(graph, evenly(graph, 1), optimizer=adamw, loss=fails, targets=["i64[6]"])
