"""Training of partitioned models: gradients and losses of one process, under every schedule."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
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
from dfc.ir.expr import symbol
from dfc.ir.graph import Graph, Node
from dfc.ir.interpret import interpret
from dfc.ir.types import TensorType, dtype_of
from dfc.planning.actions import parse_program
from dfc.planning.engine import Engine, Runner
from dfc.planning.microbatches import cut
from dfc.rewrite.pass_ import Context, find_pass
from dfc.runtime.engines import find_engine
from dfc.runtime.pipeline import trained
from dfc.runtime.pipeline.dropout import Mask, masked
from dfc.runtime.pipeline.staged_model import StagedModel
from dfc.runtime.pipeline.training import Trainer

B = torch.export.Dim("B", min=1, max=64)
SCHEDULES = ("gpipe", "1f1b", "zb1p", "interleaved", "breadth_first", "interleaved_zb", "zb_v",
             "dualpipe_v", "auto")  # fmt: skip


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [(nn.Linear(12, 12), nn.LayerNorm(12), nn.GELU()) for _ in range(4)]
        self.layers = nn.Sequential(*(part for layer in layers for part in layer))
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.layers(x)), y)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, s, 3, 2, w // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, w))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Tied(nn.Module):
    """A decoder whose head is its table: the first and the last stage share it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(31, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(3))

    def forward(self, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy((x @ self.table.weight.T).flatten(0, 1), y.flatten())


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(c, 2 * c, 3, padding=1) for c in (2, 4))
        self.up = nn.ModuleList(nn.Conv2d(3 * c, c, 3, padding=1) for c in (4, 2))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        skips = []
        for layer in self.down:
            skips.append(x)
            x = F.max_pool2d(torch.relu(layer(x)), 2)
        for layer in self.up:
            x = F.interpolate(x, scale_factor=2.0)
            x = layer(torch.cat([x, skips.pop()], 1))
        return F.mse_loss(x, y)


class Branches(nn.Module):
    """Two branches that meet, and one of them goes on beside the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.b = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 8))
        self.c = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b = self.a(x), self.b(x)
        return F.cross_entropy(self.c(a + b) + b[:, :3], y)


Made = tuple[nn.Module, tuple[Any, ...]]
MODELS: dict[str, Callable[[], Made]] = {
    "mlp": lambda: (MLP(), (torch.randn(10, 12), torch.randint(5, (10,)))),
    "tied": lambda: (Tied(), (torch.randint(31, (10, 6)), torch.randint(31, (10, 6)))),
    "unet": lambda: (UNet(), (torch.randn(10, 2, 8, 8), torch.randn(10, 2, 8, 8))),
    "branches": lambda: (Branches(), (torch.randn(10, 8), torch.randint(3, (10,)))),
}


@cache
def traced(name: str) -> tuple[nn.Module, tuple[Any, ...], Graph]:
    torch.manual_seed(0)
    model, args = MODELS[name]()
    return model, args, dfc.trace(model, args, dynamic_shapes=({0: B}, {0: B}))


def captured(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    model, args, _ = traced(name)
    return deepcopy(model), args


@cache
def staged(name: str, count: int) -> StagedModel:
    """Differentiated once for all tests: trainers have weights of their own."""
    graph = traced(name)[2]
    return StagedModel(graph, evenly(graph, count))


def evenly(graph: Graph, count: int) -> dict[Node, int]:
    """Equal numbers of nodes, in order."""
    nodes = list(graph.nodes)
    return {n: i * count // len(nodes) for i, n in enumerate(nodes)}


def reference(
    model: nn.Module, args: tuple[Any, ...], m: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Plain PyTorch: the same microbatches one after another, their gradients added."""
    model.zero_grad()
    parts = cut(dict(enumerate(args)), {0: 0, 1: 0}, m)
    total = torch.zeros(())
    for part in parts:
        loss = model(*part.values()) * (len(part[0]) / len(args[0]))
        loss.backward()
        total = total + loss.detach()
    return total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, e in expected.items():
        error = (found[name] - e).norm() / e.norm().clamp_min(1e-12)
        assert error <= 1e-6, f"{name}: {error}"


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, 1e-2)


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


def test_a_microbatch_is_no_smaller_than_the_batch_may_be() -> None:
    """Batch norm has no statistics of one item: four of `min=2` are two microbatches, not four."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    x, y = torch.randn(4, 4), torch.randint(3, (4,))
    batch = torch.export.Dim("B", min=2, max=64)
    graph = dfc.trace(model, (x,), dynamic_shapes=({0: batch},))
    losses = []
    for count in (2, 4):
        with Trainer(graph, dict.fromkeys(graph.nodes, 0), loss=_cross_entropy, targets=["i64[B]"],
                     schedule="1f1b", microbatches=count, optimizer=adamw) as trainer:  # fmt: skip
            losses.append(trainer.step(x, y))
            assert trainer.report().program.microbatches == 2
    assert torch.equal(*losses)


class Recurrent(nn.Module):
    """Two kinds of recurrent layers, the first of which reads what has no gradient."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.a = nn.LSTM(4, 6, num_layers=2, batch_first=True, dropout=dropout)
        self.b = nn.GRU(6, 5, batch_first=True)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.b(self.a(x)[0])[0][:, -1], y)


def test_recurrent_layers_draw_nothing_without_dropout_between_them() -> None:
    torch.manual_seed(0)
    args = (torch.randn(6, 3, 4), torch.randint(5, (6,)))
    model = Recurrent()
    graph = dfc.trace(model, args, dynamic_shapes=({0: B}, {0: B}))
    loss, expected = reference(model, args, 3)
    with Trainer(graph, evenly(graph, 2), microbatches=3, optimizer=adamw, threads=1) as trainer:
        torch.testing.assert_close(trainer.backward(*args), loss)
        close({n: p.grad for n, p in trainer.parameters.items()}, expected)
    dropped = dfc.trace(Recurrent(dropout=0.5), args)
    with pytest.raises(DfcError, match=r"N071.*`aten\.lstm\.input`.*draws random numbers"):
        StagedModel(dropped, evenly(dropped, 2))


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        self.drop = nn.Dropout(0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.drop(torch.relu(self.b(self.drop(torch.relu(self.a(x)))))))


def _cross_entropy(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs, target)


def test_dropout_does_not_depend_on_how_the_model_is_cut() -> None:
    """The masks are drawn by counters; a loss may be a function of the model's outputs."""
    torch.manual_seed(1)
    model = Dropped()
    x, y = torch.randn(9, 8), torch.randint(4, (9,))
    graph = dfc.trace(model, (x,), dynamic_shapes=({0: B},))
    assert any("dropout" in n.op for n in graph.nodes)
    target = ("i64[B]",)
    curves = []
    for count, schedule, seed in ((1, "gpipe", 0), (3, "1f1b", 0), (2, "zb1p", 0), (1, "gpipe", 1)):
        with Trainer(graph, evenly(graph, count), schedule=schedule, microbatches=3,
                     loss=_cross_entropy, targets=target, optimizer=adamw, threads=1,
                     seed=seed) as trainer:  # fmt: skip
            curves.append([float(trainer.step(x, y)) for _ in range(4)])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)
    assert curves[3] != pytest.approx(curves[0], rel=1e-2)
    assert len(set(curves[0])) == 4


@pytest.mark.parametrize("kind", ["causal", "bool", "float", "none"])
def test_attention_that_drops_out_is_its_own_parts(kind: str) -> None:
    """With a probability that drops nothing it is what PyTorch's is."""

    class Attention(nn.Module):
        def forward(self, *qkv: torch.Tensor) -> torch.Tensor:
            causal = kind == "causal"
            return F.scaled_dot_product_attention(*qkv, dropout_p=1e-12, is_causal=causal)

    torch.manual_seed(0)
    args = [torch.randn(2, 3, 5, 8) for _ in range(3)]
    if kind in ("bool", "float"):
        mask = torch.rand(5, 5)
        mask.diagonal().fill_(1)
        args.append(mask > 0.4 if kind == "bool" else mask)
    graph = dfc.trace(Attention(), tuple(args))
    (mask,) = masked(graph)
    found = interpret(graph, [*args, torch.ones(2, 3, 5, 5)])
    expected = F.scaled_dot_product_attention(*args, is_causal=kind == "causal")
    torch.testing.assert_close(found[0], expected)


def test_a_mask_is_zero_as_often_as_dropout_says() -> None:
    mask = Mask(0, TensorType(dtype_of(torch.float32), (100, symbol("B"))), 0.25)
    drawn = mask.draw(0, 0, 0, {"B": 100})
    assert drawn.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (drawn == 0).float().mean() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(drawn, mask.draw(0, 0, 0, {"B": 100}))
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert not torch.equal(drawn, mask.draw(*other, {"B": 100}))


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
    whole = StagedModel(graph, evenly(graph, 2), _cross_entropy, target)

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
    assert lines and files == {"tests/test_pipeline_training.py"}


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


def test_a_state_that_is_no_trainers_is_refused_before_it_is_read() -> None:
    with Trainer(staged("mlp", 2), optimizer=adamw) as trainer:
        for state in ({"q": torch.ones(1)}, {"weights": {}}, [1]):
            with pytest.raises(DfcError, match=r"N075.*it is no trainer's"):
                trainer.load_state_dict(state)  # type: ignore[arg-type]


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
