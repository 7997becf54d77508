"""Outliers of activations move into weights; results stay, and the step is proved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dfc
from dfc.compress.producers import Producer, producer_of
from dfc.compress.sequential import weight_of
from dfc.compress.smoothing import Peaks, smoothing
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.ir.interpret import interpret
from tests.tiny_models import CALIB, run_step, tiny_llama, tokens

CHANNELS = [3, 17]  # with outliers


@pytest.fixture(scope="module")
def graph() -> Graph:
    model = tiny_llama()
    with torch.no_grad():
        for block in model.model.layers:
            block.input_layernorm.weight[CHANNELS] *= 40
            block.post_attention_layernorm.weight[CHANNELS] *= 40
    return dfc.trace(model, (tokens(),))


def layer_of(graph: Graph, module: str) -> Node:
    return next(n for n in graph.nodes if weight_of(n) and n.loc and n.loc.module == module)


def peaks_of(graph: Graph, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of each channel, of what a layer reads and of its weight."""
    layer, seen = layer_of(graph, module), Peaks()

    def watch(node: Node, results: Any) -> None:
        if layer.inputs[0] in node.results:
            seen.update(results[0])

    for batch in CALIB:
        interpret(graph, [batch], observe=watch)
    return seen.peaks, weight_of(layer).data.tensor().abs().amax(dim=0)


def test_activations_and_weights_become_equally_large(graph: Graph) -> None:
    module = "model.layers.1.mlp.gate_proj"
    before, _ = peaks_of(graph, module)
    assert before[CHANNELS].min() > 10 * before.median()
    smoothed, changes, _ = run_step(graph, "smooth using calib")
    x, gate = peaks_of(smoothed, module)
    _, up = peaks_of(smoothed, "model.layers.1.mlp.up_proj")
    torch.testing.assert_close(x, torch.maximum(gate, up), rtol=1e-4, atol=1e-5)
    assert x.max() < 0.3 * before.max() and changes == 6


def test_results_stay(graph: Graph) -> None:
    smoothed, _, _ = run_step(graph, "smooth using calib with alpha=0.7")
    wanted, got = interpret(graph, [tokens()])[0], interpret(smoothed, [tokens()])[0]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.equal(got, wanted)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
def test_what_is_smooth_stays_as_it_is(graph: Graph, alpha: float) -> None:
    smoothed, _, _ = run_step(graph, f"smooth using calib with alpha={alpha}")
    again, changes, ctx = run_step(smoothed, f"smooth using calib with alpha={alpha}")
    assert changes == 0 and again == smoothed
    assert any("smooth already" in d.reason for d in ctx.decisions)


def test_each_layer_has_its_reason(graph: Graph) -> None:
    _, _, ctx = run_step(graph, 'smooth using calib except "**.layers.0.mlp.**"')
    told = {d.loc.module: f"{d.outcome}: {d.reason}" for d in ctx.decisions}
    assert told["model.layers.0.self_attn.q_proj"].startswith("smoothed: channels divided by")
    assert "excluded" in told["model.layers.0.mlp.up_proj"]
    assert "no norm or linear layer" in told["model.layers.0.self_attn.o_proj"]
    assert "stored twice" in told["lm_head"]  # tied to the embedding


def test_int8_activations_lose_less(graph: Graph) -> None:
    """The reason for it all: rows rounded to int8, and weights of each output, lose less."""

    def rounded(t: torch.Tensor) -> torch.Tensor:
        scale = t.abs().amax(dim=-1, keepdim=True) / 127
        return (t / scale).round() * scale

    def loss(graph: Graph) -> float:
        layer, total = layer_of(graph, "model.layers.1.mlp.gate_proj"), []

        def watch(node: Node, results: Any) -> None:
            if layer.inputs[0] in node.results:
                x, w = results[0], weight_of(layer).data.tensor()
                total.append((rounded(x) @ rounded(w).T - x @ w.T).square().sum())

        interpret(graph, [tokens()], observe=watch)
        return float(sum(total))

    smoothed, _, _ = run_step(graph, "smooth using calib")
    assert loss(smoothed) < 0.5 * loss(graph)


@pytest.mark.parametrize("step", ["smooth using calib", "equalize"])
def test_the_weights_as_they_were_are_not_kept_beside_them(step: str) -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    data = {"calib": [torch.randn(8, 64)]}
    recipe = f"dfc 1\ndata calib\nrecipe r {{\n  {step}\n}}\n"
    report = dfc.compile(
        model, (torch.randn(8, 64),), recipe=recipe, data=data, engine="eager"
    ).report
    assert report.passes[0].changes and report.bytes_after == report.bytes_before


def test_of_a_folded_norm_nothing_is_kept() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)).eval()
    recipe = "dfc 1\nrecipe r {\n  fold_batch_norm\n  autocast f16\n}\n"
    report = dfc.compile(model, (torch.randn(8, 64),), recipe=recipe, engine="eager").report
    count = 8  # of batches, which nothing reads: for `dce`
    assert report.bytes_after == 2 * (64 * 64 + 64) + count


def test_it_is_proved_in_a_recipe() -> None:
    text = "dfc 1\ndata calib\nrecipe r { smooth using calib }"
    compiled = dfc.compile(
        tiny_llama(), (tokens(),), recipe=text, data={"calib": CALIB}, engine="eager"
    )
    (step,) = [p for p in compiled.report.passes if p.step.startswith("smooth")]
    assert step.verdict == "proved" and step.changes == 6


# What makes a value's channels


class Norms(nn.Module):
    """Each attribute a chain whose last linear layer reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.plain = nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False)
        self.rms = nn.RMSNorm(8)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: torch.Tensor, kind: str = "norm") -> torch.Tensor:
        made = {
            "norm": lambda: self.norm(x),
            "rms": lambda: self.rms(x),
            "plain": lambda: self.plain(x),
            "relu": lambda: torch.relu(self.first(x)),
            "gelu": lambda: nn.functional.gelu(self.first(x)),
            "gate": lambda: nn.functional.silu(self.norm(x)) * self.first(x),
            "scale": lambda: x * self.scale,
            "shared": lambda: self.first(x),
            "input": lambda: x,
            "sum": lambda: self.first(x) + x,
            "tied": lambda: torch.relu(self.first(torch.relu(self.first(x)))),
        }[kind]()
        y = self.last(made)
        return (y, made.sum()) if kind == "shared" else y


@pytest.mark.parametrize(
    "kind, found",
    [
        ("norm", "aten.layer_norm.default"), ("rms", "rms_norm"), ("relu", "aten.linear.default"),
        ("gate", "aten.linear.default"), ("scale", "aten.mul.Tensor"),
        ("plain", "has no weight"), ("gelu", "made by aten.gelu.default"),
        ("shared", "is read by"), ("input", "the graph's own input"), ("sum", "made by aten.add"),
        ("tied", "!first.weight is read by %linear as well, and would be stored twice"),
    ],
)  # fmt: skip
def test_the_producer_is_found_or_there_is_a_reason(kind: str, found: str) -> None:
    torch.manual_seed(0)

    class One(Norms):
        def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
            return super().forward(x, kind)

    graph = dfc.trace(One().eval(), (torch.randn(3, 8),))
    last = [n for n in graph.nodes if weight_of(n)][-1]
    made = producer_of(graph, last.inputs[0], [last])
    if isinstance(made, Producer):
        assert found in made.node.op
        data = [torch.randn(3, 8) * torch.logspace(0, 2, 8) for _ in range(2)]
        smoothed, changes, _ = run_step(graph, 'smooth "last" using calib', data)
        assert changes == 1
        for x in data:
            wanted, got = interpret(graph, [x])[0], interpret(smoothed, [x])[0]
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    else:
        assert found in made


def test_a_shared_norm_keeps_its_other_reader() -> None:
    """One norm used twice: the reader that is not smoothed still sees the old weight."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.a(self.norm(x)) + self.b(self.norm(y)).exp()

    torch.manual_seed(0)
    data = [(torch.randn(3, 8) * 9, torch.randn(3, 8)) for _ in range(2)]
    graph = dfc.trace(Twice().eval(), data[0])
    smoothed, changes, _ = run_step(graph, 'smooth "a" using calib', data)
    assert changes == 1
    torch.testing.assert_close(interpret(smoothed, data[1])[0], interpret(graph, data[1])[0])


def test_dead_channels_keep_their_scale() -> None:
    scale = smoothing(torch.tensor([0.0, 4.0, 4.0]), [torch.tensor([[1.0, 0.0, 1.0]])], 0.5)
    assert scale.tolist() == [1.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "text, code, words",
    [
        ("smooth using calib with alpha=1.5", "D094", "`alpha` is a number from 0 to 1, got 1.5"),
        ('smooth "model.norm" using calib', "D093", "no linear layer"),
        ('smooth "decoder.**" using calib', "Q021", "decoder"),
        ("smooth", "Q002", "needs `data`"),
    ],
)
def test_what_cannot_be_is_refused(graph: Graph, text: str, code: str, words: str) -> None:
    with pytest.raises(DfcError) as e:
        run_step(graph, text)
    assert e.value.code == code and words in str(e.value)


def test_activations_that_are_no_numbers_name_the_layer() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.norm(torch.log(x)))

    graph = dfc.trace(Root().eval(), (torch.rand(3, 8),))
    with pytest.raises(DfcError, match="of `last`: calibration gives NaN") as e:
        run_step(graph, "smooth using calib", [-torch.ones(3, 8)])
    assert e.value.code == "D090"


def test_peaks_go_on_from_a_state() -> None:
    whole, half, rest = Peaks(), Peaks(), Peaks()
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    whole.update(x)
    half.update(x[:3])
    rest.load(half.state())
    rest.update(x[3:])
    assert torch.equal(whole.peaks, rest.peaks)


class Posted(nn.Module):
    """Norms behind residuals, as BERT has: what a norm gives is read by others as well."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(64, 24), nn.LayerNorm(24)
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)
        with torch.no_grad():
            self.norm.weight[CHANNELS] *= 200
            self.up.weight[:, CHANNELS] *= 0.01

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.norm(self.table(ids))
        return self.down(torch.nn.functional.gelu(self.up(x))), x


def test_a_product_is_written_where_nothing_takes_the_division() -> None:
    torch.manual_seed(0)
    graph = dfc.trace(Posted().eval(), (tokens(),))
    assert run_step(graph, "smooth using calib")[1] == 0
    made, changes, _ = run_step(graph, "smooth using calib with multiply=yes")
    assert changes == 2
    assert len(list(made.nodes)) == len(list(graph.nodes)) + 2
    x = CALIB[0]
    torch.testing.assert_close(interpret(made, [x])[0], interpret(graph, [x])[0])

    def away(graph: Graph) -> float:
        rounded = run_step(graph, "quantize int8 using calib with scheme=static")[0]
        want = interpret(graph, [x])[0]
        return float((interpret(rounded, [x])[0] - want).norm() / want.norm())

    smooth = run_step(graph, "smooth using calib with multiply=yes, alpha=0.7")[0]
    assert away(smooth) < 0.5 * away(graph)
