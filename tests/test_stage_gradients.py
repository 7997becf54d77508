"""The backward graphs of stages: what they keep, add up, stop at, and tell of their source."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dfc
from dfc.errors import DfcError
from dfc.rewrite.pass_ import Context, find_pass
from dfc.runtime.pipeline.staged_model import StagedModel
from dfc.runtime.pipeline.training import Trainer
from tests.training_models import MLP, B, adamw, captured, close, evenly, reference, staged


class Offset(nn.Module):
    """Adds a parameter whose gradient is the one that goes on to the input, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.offset = nn.Linear(6, 6), nn.Parameter(torch.randn(4, 6))
        self.twin = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.first(x) + (self.offset + self.twin)).square().mean()


def test_gradients_that_several_read_are_added_to_each_sum() -> None:
    torch.manual_seed(0)
    model, x = Offset(), torch.randn(4, 6)
    graph = dfc.trace(model, (x,))
    model(x).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for schedule in ("1f1b", "zb1p"):
        with Trainer(graph, evenly(graph, 2), schedule=schedule, microbatches=1, optimizer=adamw,
                     threads=1) as trainer:  # fmt: skip
            for _ in range(2):  # the second starts from nothing again
                trainer.zero_grad()
                trainer.backward(x)
                close({n: p.grad for n, p in trainer.parameters.items()}, expected)


def test_a_gradient_is_added_where_it_is_made_and_needs_no_memory() -> None:
    """A product by the kernel that makes it, others at once; over the old sum."""
    (stage,) = staged("mlp", 1).parts
    graph = stage.cut.both.graph
    nodes, sums = list(graph.nodes), [v for v in graph.inputs if v.name.startswith("sum_")]
    assert len(sums) == len(stage.cut.weight_gradients) == 18
    assert not [n for n in nodes if n.op == "aten.mm.default" and graph.is_output(n.result)]
    for total in sums:
        (user,) = total.users
        made = user.inputs[1].node
        assert user.op == "aten.addmm.default" or nodes.index(user) - nodes.index(made) <= 2
    with Trainer(staged("mlp", 1), microbatches=2, optimizer=adamw, threads=1) as trainer:
        held = {n: g.data_ptr() for n, g in trainer.trained[0].gradients.items()}
        trainer.step(*captured("mlp")[1])
        assert {n: g.data_ptr() for n, g in trainer.trained[0].gradients.items()} == held


def test_backward_nodes_say_which_line_and_module_they_come_from() -> None:
    (stage,) = staged("mlp", 1).parts
    assert not set(stage.joint.tangents[-1:]) & set(stage.cut.forward.takes)
    forward = {n.loc.module for n in stage.cut.forward.graph.nodes if n.loc and "addmm" in n.op}
    weights = [n for n in stage.cut.weights.graph.nodes if "addmm" in n.op]
    assert {n.loc.module for n in weights if n.loc} == forward == {
        "head", *(f"layers.{i}" for i in (0, 3, 6, 9))}  # fmt: skip
    lines = {n.loc.line for n in stage.cut.both.graph.nodes if n.loc and n.loc.file}
    files = {n.loc.file for n in stage.cut.both.graph.nodes if n.loc and n.loc.file}
    assert lines and files == {"tests/training_models.py"}


def test_what_the_weights_need_is_kept_and_nothing_else() -> None:
    """I and W together do what B does, and each node is in one of them."""
    for part in staged("unet", 2).parts:
        c = part.cut
        split = len(c.inputs.graph) + len(c.weights.graph) - len(c.both.graph)
        masked = [n for n in c.both.graph.nodes if sum(n.attributes.get("output_mask", ())) == 3]
        assert split == len(masked)  # a convolution's three gradients, in two parts
        assert not {n.op for n in c.inputs.graph.nodes if "convolution_backward" in n.op
                    and n.attributes["output_mask"][1]}  # fmt: skip
        made = {*c.forward.gives, *c.inputs.gives, *part.joint.graph.inputs}
        assert set(c.weights.takes) <= made
    assert not staged("unet", 2).parts[0].cut.inputs.gives  # nobody waits for the first stage


class Stopped(nn.Module):
    """A target that no gradient reaches, as a detached value and under `no_grad`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        with torch.no_grad():
            target = self.b(h) * 2
        return F.mse_loss(self.b(h), target) + F.mse_loss(h, self.b(y).detach())


@pytest.mark.parametrize("passes", [[], ["remove_noops"]])
def test_a_stopped_gradient_stays_stopped(passes: list[str]) -> None:
    torch.manual_seed(0)
    model, args = Stopped(), (torch.randn(8, 6), torch.randn(8, 6))
    graph = dfc.trace(model, args, dynamic_shapes=({0: B}, {0: B}))
    for name in passes:
        find_pass(name).run(graph, Context())
    loss, expected = reference(model, args, 2)
    with Trainer(graph, evenly(graph, 2), microbatches=2, optimizer=adamw, threads=1) as trainer:
        torch.testing.assert_close(trainer.backward(*args), loss)
        close({n: p.grad for n, p in trainer.parameters.items()}, expected)


class Written(nn.Module):
    """Writes over a part of a tensor, in another type and over more rows than it has."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        h[:, :4] *= h[:, 4:].sigmoid()
        h[:, 6:] = self.b.weight[0, :2].double() * 2
        return F.cross_entropy(self.b(h), y)


def test_what_is_written_over_a_part_is_trained() -> None:
    torch.manual_seed(0)
    model, args = Written(), (torch.randn(6, 6), torch.randint(3, (6,)))
    graph = dfc.trace(model, args, dynamic_shapes=({0: B}, {0: B}))
    assert any(n.op == "aten.copy.default" for n in graph.nodes)
    loss, expected = reference(model, args, 2)
    with Trainer(graph, evenly(graph, 2), microbatches=2, optimizer=adamw, threads=1) as trainer:
        torch.testing.assert_close(trainer.backward(*args), loss)
        close({n: p.grad for n, p in trainer.parameters.items()}, expected)


class Padded(nn.Module):
    """Pads images of a batch that varies: backwards, that cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.a(F.pad(x, (1, 1, 1, 1))).relu()
        return F.cross_entropy(self.b(F.pad(h, (0, 1, 0, -1))).mean((2, 3)), y)


def test_padding_is_trained_with_a_batch_that_varies() -> None:
    torch.manual_seed(0)
    model, args = Padded(), (torch.randn(6, 2, 5, 5), torch.randint(3, (6,)))
    graph = dfc.trace(model, args, dynamic_shapes=({0: B}, {0: B}))
    loss, expected = reference(model, args, 2)
    with Trainer(graph, evenly(graph, 2), microbatches=2, optimizer=adamw, threads=1) as trainer:
        torch.testing.assert_close(trainer.backward(*args), loss)
        close({n: p.grad for n, p in trainer.parameters.items()}, expected)


class Positions(nn.Module):
    """Makes a tensor itself, and gives it a size that is only known when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(17, 8), nn.Embedding(5, 8)
        self.head = nn.Linear(8, 17)

    def forward(self, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        at = torch.arange(5).unsqueeze(0).expand(ids.shape[0], -1)
        return F.cross_entropy(
            self.head(self.table(ids) + self.places(at)).flatten(0, 1), y.flatten()
        )


def test_a_tensor_that_the_model_makes_may_take_the_size_of_the_batch() -> None:
    model, ids = Positions(), torch.randint(17, (6, 5))
    args = ids, ids
    graph = dfc.trace(model, args, dynamic_shapes=({0: B}, {0: B}))
    with Trainer(graph, evenly(graph, 2), microbatches=2, optimizer=adamw, threads=1) as trainer:
        loss, expected = reference(model, args, 2)
        torch.testing.assert_close(trainer.backward(*args), loss)
        close({n: p.grad for n, p in trainer.parameters.items()}, expected)


def test_a_frozen_weight_stays_as_it_is_and_its_graph_says_so() -> None:
    torch.manual_seed(0)
    model, (x, y) = MLP(), (torch.randn(8, 12), torch.randint(5, (8,)))
    model.layers[0].requires_grad_(False)
    model.layers[4].weight.requires_grad_(False)  # a norm's
    graph = dfc.trace(model, (x, y), dynamic_shapes=({0: B}, {0: B}))
    read = dfc.parse(str(graph))
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert {p.name for p in read.parameters.values() if p.kind == "frozen"} == frozen
    with Trainer(graph, evenly(graph, 2), microbatches=2, optimizer=adamw, threads=1) as trainer:
        trainer.step(x, y)
        assert set(trainer.parameters) == {n for n, _ in model.named_parameters()} - frozen
        after = MLP()
        trainer.load_into(after)
    for name, p in after.named_parameters():
        assert torch.equal(p, model.get_parameter(name)) == (name in frozen)
    model.requires_grad_(False)
    still = dfc.trace(model, (x, y))
    with pytest.raises(DfcError, match="all its weights are frozen"):
        StagedModel(still, evenly(still, 2))
