"""Training of partitioned models: gradients and losses of one process, under every schedule."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dfc
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.planning.actions import parse_program
from dfc.planning.engine import Engine, Runner
from dfc.runtime.engines import find_engine
from dfc.runtime.pipeline import trained
from dfc.runtime.pipeline.staged_model import StagedModel
from dfc.runtime.pipeline.training import Trainer
from tests.training_models import (
    MODELS,
    B,
    adamw,
    captured,
    close,
    cross_entropy,
    evenly,
    reference,
    staged,
)

SCHEDULES = ("gpipe", "1f1b", "zb1p", "interleaved", "breadth_first", "interleaved_zb", "zb_v",
             "dualpipe_v", "auto")  # fmt: skip


@pytest.mark.parametrize("name", sorted(MODELS))
def test_gradients_are_those_of_one_process(name: str) -> None:
    model, args = captured(name)
    loss, expected = reference(model, args, 4)
    for schedule in SCHEDULES:
        with Trainer(staged(name, 4), schedule=schedule, microbatches=4, optimizer=adamw,
                     threads=1) as trainer:  # fmt: skip
            found = trainer.backward(*args)
            torch.testing.assert_close(found, loss)
            close({n: p.grad for n, p in trainer.parameters.items()}, expected)


@pytest.mark.parametrize("schedule", ["1f1b", "zb_v"])
def test_losses_of_several_steps_are_those_of_plain_pytorch(schedule: str) -> None:
    model, args = captured("tied")
    optimizer = adamw(list(model.parameters()))
    with Trainer(staged("tied", 4), schedule=schedule, microbatches=4, optimizer=adamw,
                 threads=1) as trainer:  # fmt: skip
        for _ in range(5):
            expected, _ = reference(model, args, 4)
            optimizer.step()
            torch.testing.assert_close(trainer.step(*args), expected, rtol=1e-5, atol=0)
        for name, p in model.named_parameters():
            if not name.endswith("qkv.bias"):  # a key's has no gradient but rounding
                torch.testing.assert_close(trainer.parameters[name], p, rtol=1e-4, atol=1e-5)
        report = trainer.report()
        assert report.in_flight == report.allowed  # the schedule's formula, neither more nor less
        assert all(b > 0 for b in report.saved_bytes)
        assert report.timing.predicted > 0 and schedule in str(report)


def test_threads_give_what_one_after_another_gives_bit_for_bit() -> None:
    _, args = captured("branches")
    for schedule in ("1f1b", "interleaved_zb"):
        found = []
        for sequential in (False, True):
            with Trainer(staged("branches", 4), schedule=schedule, microbatches=4,
                         optimizer=adamw, threads=1, sequential=sequential) as trainer:  # fmt: skip
                losses = [trainer.step(*args) for _ in range(3)]
                found.append((losses, [p.detach() for p in trainer.parameters.values()]))
        (losses, weights), (others, other_weights) = found
        assert losses == others
        assert all(map(torch.equal, weights, other_weights))


def test_the_last_microbatch_may_be_smaller_and_the_batch_too() -> None:
    model, args = captured("mlp")
    with Trainer(staged("mlp", 2), schedule="zb1p", microbatches=4, optimizer=adamw,
                 threads=1) as trainer:  # fmt: skip
        for size in (10, 7, 3, 1):
            part = tuple(x[:size] for x in args)
            loss, expected = reference(model, part, 4)
            torch.testing.assert_close(trainer.backward(*part), loss)
            close({n: p.grad for n, p in trainer.parameters.items()}, expected)
            trainer.zero_grad()


def test_microbatches_of_what_has_no_batch_are_refused() -> None:
    """One microbatch in their place would be no pipeline."""
    fixed = dfc.trace(nn.Linear(4, 1), (torch.randn(8, 4),))
    settings: dict[str, Any] = {"loss": lambda y: y.square().mean(), "optimizer": adamw}
    with pytest.raises(DfcError, match=r"N051.*cut into 4 microbatches: all sizes.*fixed") as e:
        Trainer(fixed, evenly(fixed, 1), microbatches=4, **settings)
    assert e.value.status == 2 and "dynamic_shapes" in str(e.value)
    with Trainer(fixed, evenly(fixed, 1), **settings) as trainer:
        trainer.step(torch.randn(8, 4))
        assert trainer.report().program.microbatches == 1
    a, b = torch.export.Dim("A", max=9), torch.export.Dim("B", max=9)
    sums = dfc.trace(Apart(), (torch.ones(2, 4), torch.ones(3, 4)), dynamic_shapes=({0: a}, {0: b}))
    with pytest.raises(DfcError, match=r'inputs have A, B\n  help: .*batch="A"'):
        Trainer(sums, evenly(sums, 1), microbatches=2, optimizer=adamw)


class Apart(nn.Module):
    """Two inputs, of which either could be the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.a(x).mean() + self.b(y).mean()


def test_a_microbatch_is_no_smaller_than_the_batch_may_be() -> None:
    """Batch norm has no statistics of one item: four of `min=2` are two microbatches, not four."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    x, y = torch.randn(4, 4), torch.randint(3, (4,))
    batch = torch.export.Dim("B", min=2, max=64)
    graph = dfc.trace(model, (x,), dynamic_shapes=({0: batch},))
    losses = []
    for count in (2, 4):
        with Trainer(graph, dict.fromkeys(graph.nodes, 0), loss=cross_entropy, targets=["i64[B]"],
                     schedule="1f1b", microbatches=count, optimizer=adamw) as trainer:  # fmt: skip
            losses.append(trainer.step(x, y))
            assert trainer.report().program.microbatches == 2
    assert torch.equal(*losses)


class Copies(nn.Module):
    """A weight, a constant and an input that are copied before they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), torch.ones(4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weight, bias, skip = self.weight.clone(), self.bias.clone(), x.clone()
        return F.mse_loss(torch.tanh(x @ weight + bias) @ weight.T + skip, y)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_stages_hand_on_what_they_only_copy(kept: int) -> None:
    torch.manual_seed(0)
    model, args = Copies(), (torch.randn(6, 4), torch.randn(6, 4))
    graph = dfc.trace(model, args, dynamic_shapes=({0: B}, {0: B}))
    nodes = list(graph.nodes)
    assert [n.op for n in nodes[:3]] == ["aten.clone.default"] * 3
    loss, expected = reference(model, args, 3)
    with Trainer(graph, {n: int(i >= kept) for i, n in enumerate(nodes)}, microbatches=3,
                 optimizer=adamw) as trainer:  # fmt: skip
        torch.testing.assert_close(trainer.backward(*args), loss)
        close({n: p.grad for n, p in trainer.parameters.items()}, expected)


class Unwilling(Engine):
    """Runs as eager does, and writes over nothing."""

    name, devices = "unwilling", ("cpu",)

    def supports(self, node: Node) -> str | None:
        return None

    def build(self, graph: Graph, device: str = "cpu", threads: int | None = None) -> Runner:
        return find_engine("eager").build(graph, device, threads)


def test_an_engine_that_writes_over_nothing_gives_the_same(monkeypatch: Any) -> None:
    _, args = captured("branches")
    found = []
    for engine in (find_engine("eager"), Unwilling()):
        monkeypatch.setattr(trained, "find_engine", lambda _, engine=engine: engine)
        with Trainer(staged("branches", 2), schedule="zb1p", microbatches=4, optimizer=adamw,
                     threads=1) as trainer:  # fmt: skip
            losses = [float(trainer.step(*args)) for _ in range(2)]
            found.append((losses, [p.detach() for p in trainer.parameters.values()]))
    (losses, weights), (others, other_weights) = found
    assert losses == others
    assert all(map(torch.equal, weights, other_weights))


class Scaled(nn.Module):
    """Multiplies by a number of its data."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.a(x) * x[0, 0].item()).square().mean()


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.a(x) + torch.rand_like(x)).mean()


def test_what_cannot_be_trained_is_refused_before_it_runs() -> None:
    three = staged("mlp", 3)
    for settings, code in (
        ({"schedule": "forward"}, "N073"),
        ({"schedule": "zb_v"}, "N073"),
        ({"schedule": "nothing"}, "N001"),
        ({"reduction": "median"}, "N073"),
        ({"microbatches": 0}, "N073"),
        ({"microbatches": "4"}, "N073"),
        ({"optimizer": "adamw"}, "N073"),
        ({"optimizer": adamw([nn.Parameter(torch.ones(1))])}, "N073"),
        ({"optimizer": lambda parameters: None}, "N073"),
        ({"optimizer": torch.optim.LBFGS}, "N073"),
        ({"schedule": parse_program("0: F(0,0) B(0,0)")}, "N073"),
    ):
        with pytest.raises(DfcError) as e:
            Trainer(three, **{"optimizer": adamw, **settings})
        assert e.value.code == code
    scaled = dfc.trace(Scaled(), (torch.randn(2, 4),))
    with pytest.raises(DfcError, match=r"reads `uf0`, a number that data tell") as e:
        _ = StagedModel(scaled, evenly(scaled, 1)).parts[0].cut
    assert e.value.code == "N070"
    noisy = dfc.trace(Noisy(), (torch.randn(2, 4),))
    with pytest.raises(DfcError, match="random") as e:
        StagedModel(noisy, evenly(noisy, 1))
    assert e.value.code == "N071"
    plain = dfc.trace(nn.Linear(4, 4), (torch.randn(2, 4),))
    with pytest.raises(DfcError, match="no output of the model could be the loss"):
        StagedModel(plain, evenly(plain, 1))
    with pytest.raises(DfcError, match="one float tensor without dimensions"):
        StagedModel(plain, evenly(plain, 1), loss=lambda y: y)
    with pytest.raises(DfcError, match="a target is given by its type, not by `Tensor`"):
        StagedModel(plain, evenly(plain, 1), loss=F.mse_loss, targets=(torch.ones(2, 4),))  # type: ignore[arg-type]
    with pytest.raises(DfcError, match="no input of the model has a size `Q`"):
        StagedModel(plain, evenly(plain, 1), loss=F.mse_loss, targets=("f32[Q, 4]",))
    with pytest.raises(DfcError, match="does not depend on any weight"):
        StagedModel(plain, evenly(plain, 1), loss=lambda y: y.detach().mean())


class Picks(nn.Module):
    """Keeps the rows that its data choose, as a detector does: nobody knows how many."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.b(y[y.sum(-1) > 0])


def picking() -> tuple[Picks, torch.Tensor, Graph]:
    torch.manual_seed(0)
    model, x = Picks(), torch.randn(6, 4)
    return model, x, dfc.trace(model, (x,))


@pytest.mark.parametrize("split", [None, "aten.gt.Scalar", "aten.index.Tensor"])
def test_a_loss_of_results_whose_size_data_decide(split: str | None) -> None:
    model, x, graph = picking()
    ops = [n.op for n in graph.nodes]
    first = ops.index(split) if split else len(ops)
    stages = {n: int(i >= first) for i, n in enumerate(graph.nodes)}
    with Trainer(graph, stages, loss=lambda y: y.square().mean() + y.sum() / y.shape[0],
                 optimizer=adamw, microbatches=1, threads=1) as trainer:  # fmt: skip
        loss = trainer.backward(x)
        y = model(x)
        assert 0 < len(y) < len(x)
        wanted = y.square().mean() + y.sum() / y.shape[0]
        wanted.backward()
        torch.testing.assert_close(loss, wanted.detach())
        close({n: p.grad for n, p in trainer.parameters.items()},
              {n: p.grad for n, p in model.named_parameters()})  # fmt: skip


def test_a_loss_cannot_branch_on_what_data_decide_nor_a_stage_give_it_back() -> None:
    _, _, graph = picking()
    with pytest.raises(DfcError, match="takes another way by `u0 > 3`") as e:
        StagedModel(graph, evenly(graph, 1), loss=lambda y: y.sum() if y.shape[0] > 3 else y.mean())
    assert e.value.code == "N074"
    last = {n: int(n.results[:1] == graph.outputs) for n in graph.nodes}
    with pytest.raises(DfcError, match=r"the derivative of %index, f32\[u0, 4\]") as e:
        Trainer(graph, last, loss=lambda y: y.mean(), optimizer=adamw)
    assert e.value.code == "N070"


class Repeats(Picks):
    def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return self.a(x).repeat(int(n.item()), 1).mean()


class Chunks(Picks):
    """Takes rows by eights, and as many as there are weights: two for up to eight rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.pad(self.a(x), (0, 0, 0, -x.shape[0] % 8)).view(-1, 8, 4)
        y = torch.cat([y[:1], y])
        return torch.einsum("cd,ckl->dkl", torch.ones(2, 3), y).mean()


def test_what_pytorch_cannot_differentiate_is_said_in_the_graphs_words() -> None:
    x = torch.randn(6, 4)

    def cut(graph: Graph) -> object:
        return StagedModel(graph, evenly(graph, 1)).parts[0].cut

    with pytest.raises(DfcError, match=r"it depends on `Eq\(u0, 0\)`, which data decide") as e:
        cut(dfc.trace(Repeats(), (x, torch.tensor(3))))
    assert e.value.code == "N070"
    (note,) = e.value.diagnostics[0].notes
    assert note.startswith("the model reads a number from data at ")
    assert "test_pipeline_training.py:" in note
    rows = torch.export.Dim("rows", min=2, max=64)
    with pytest.raises(DfcError, match=r"test_pipeline_training.py:\d+: einsum.*rows") as e:
        cut(dfc.trace(Chunks(), (x,), dynamic_shapes=({0: rows},)))
    help = e.value.diagnostics[0].help or ""
    assert e.value.code == "N070" and "fixed sizes" in help
    assert cut(dfc.trace(Chunks(), (x,)))  # as it says


def test_a_failing_action_is_named_and_the_next_step_is_whole() -> None:
    model, args = captured("mlp")
    with Trainer(staged("mlp", 2), microbatches=2, optimizer=adamw, threads=1) as trainer:
        bad = args[1].clone()
        bad[-1] = 77  # no such class: the second microbatch fails in the last stage
        with pytest.raises(DfcError, match="stage 1 failed on microbatch 1") as e:
            trainer.step(args[0], bad)
        assert e.value.code == "K050"
        loss, expected = reference(model, args, 2)
        torch.testing.assert_close(trainer.backward(*args), loss)
        close({n: p.grad for n, p in trainer.parameters.items()}, expected)


class Decides(nn.Module):
    """Doubles where a test of its data says so."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.a(x).relu()
        if bool((x > -9).all()):
            h = h * 2
        return F.cross_entropy(self.b(h), y)


class Counts(nn.Module):
    """Asserts a number of its data, which PyTorch keeps as a symbol."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        torch._check(y.max().item() < 3)
        return F.cross_entropy(self.a(x), y)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_was_decided_on_data_is_checked_in_every_microbatch(recompute: bool) -> None:
    torch.manual_seed(0)
    model, (x, y) = Decides(), (torch.randn(4, 6), torch.randint(3, (4,)))
    graph = dfc.trace(model, (x, y), dynamic_shapes=({0: B}, {0: B}))
    loss, expected = reference(model, (x, y), 2)
    other = x.clone()
    other[-1] = -10  # the model would not double
    with Trainer(graph, evenly(graph, 2), microbatches=2, optimizer=adamw, threads=1,
                 recompute=recompute) as trainer:  # fmt: skip
        with pytest.raises(DfcError, match="microbatch 1: the model was traced for True here"):
            trainer.step(other, y)
        torch.testing.assert_close(trainer.backward(x, y), loss)
        close({n: p.grad for n, p in trainer.parameters.items()}, expected)


def test_a_number_that_is_asserted_is_checked_as_well() -> None:
    torch.manual_seed(0)
    model, (x, y) = Counts(), (torch.randn(4, 6), torch.tensor([0, 1, 2, 1]))
    graph = dfc.trace(model, (x, y))
    assert any(n.op == "aten._assert_scalar.default" for n in graph.nodes)
    loss, expected = reference(model, (x, y), 1)
    with Trainer(graph, evenly(graph, 1), microbatches=1, optimizer=adamw, threads=1) as trainer:
        with pytest.raises(DfcError, match="stage 0 failed on microbatch 0: Runtime assertion"):
            trainer.step(x, y + 5)
        torch.testing.assert_close(trainer.backward(x, y), loss)
        close({n: p.grad for n, p in trainer.parameters.items()}, expected)


@pytest.mark.slow
def test_the_example_learns() -> None:
    command = [sys.executable, "examples/train_pipeline.py", "--schedule", "auto", "--steps", "31"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=300,
        check=True,
    )  # fmt: skip
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert "microbatches in flight" in done.stdout
