"""Scales that make rounding finer where activations are large; folded, results stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dfc
from dfc.compress.awq import clipped, search_scale
from dfc.compress.gptq import gptq
from dfc.compress.grid import Grid, round_to_nearest
from dfc.compress.hessian import Hessian
from dfc.ir.graph import Graph
from dfc.ir.interpret import interpret
from tests.tiny_models import run_step, tiny_llama, tokens

GRID = Grid(4, 32)


def with_outliers(n: int = 24, k: int = 128) -> tuple[torch.Tensor, Hessian]:
    """Weights, and inputs of which a few channels are much larger: as in language models."""
    g = torch.Generator().manual_seed(0)
    size = torch.ones(k)
    size[torch.randperm(k, generator=g)[:6]] = 30.0
    hessian = Hessian(k)
    hessian.update(torch.randn(400, k, generator=g) * size)
    return torch.randn(n, k, generator=g) * 0.1, hessian


def test_the_search_finds_what_plain_enumeration_finds() -> None:
    w, hessian = with_outliers()
    made = search_scale([w[:10], w[10:]], hessian, GRID)
    size, losses = hessian.mean_magnitude.float(), {}
    for i in range(20):
        s = size ** (i / 20)
        s = s / (s.max() * s.min()).sqrt()
        losses[i / 20] = hessian.loss(round_to_nearest(w * s, GRID).weight / s - w)
    assert made.alpha == min(losses, key=losses.__getitem__) > 0
    assert made.error == pytest.approx(min(losses.values()), rel=1e-4)
    assert made.plain == pytest.approx(losses[0.0], rel=1e-4)
    assert made.error < 0.5 * made.plain


def test_inputs_of_one_size_need_no_scale() -> None:
    hessian = Hessian(64)
    hessian.update(torch.eye(64).repeat(3, 1))
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    made = search_scale([w], hessian, GRID)
    assert made.alpha == 0 and torch.equal(made.scale, torch.ones(64))


@pytest.mark.parametrize("grid", [GRID, Grid(4, 32, False), Grid(4, None), Grid(8, 64)], ids=str)
def test_clipping_never_costs_more(grid: Grid) -> None:
    w, hessian = with_outliers()
    plain = hessian.loss(round_to_nearest(w, grid).weight - w)
    shrunk = hessian.loss(clipped(w, hessian, grid).weight - w)
    assert shrunk < plain * 1.02
    if grid.bits == 4:
        assert shrunk < 0.9 * plain


def test_scaled_and_clipped_is_best() -> None:
    w, hessian = with_outliers()
    scale = search_scale([w], hessian, GRID).scale
    both = hessian.loss(clipped(w, hessian, GRID, scale).weight / scale - w)
    scaled = hessian.loss(round_to_nearest(w * scale, GRID).weight / scale - w)
    shrunk = hessian.loss(clipped(w, hessian, GRID).weight - w)
    assert both < scaled and both < shrunk
    assert gptq(w, hessian, GRID)[0].codes.shape == (24, 128)


# As the method of a step


@pytest.fixture(scope="module")
def graph() -> Graph:
    """A model whose norms make a few channels large."""
    model = tiny_llama()
    with torch.no_grad():
        for block in model.model.layers:
            block.input_layernorm.weight[[3, 17]] *= 20
            block.post_attention_layernorm.weight[[5, 9]] *= 20
    return dfc.trace(model, (tokens(),))


STEP = "quantize int4 using calib with group=32, method=awq, embeddings=no, smallest=1"


def test_scales_are_folded_into_norms_and_into_the_layer_before(graph: Graph) -> None:
    _, _, ctx = run_step(graph, STEP)
    told = {d.loc.module: d.reason for d in ctx.decisions if d.outcome == "scaled"}
    assert "less error; folded into %mul" in told["model.layers.0.self_attn.q_proj"]
    clipped_ = {d.loc.module: d.reason for d in ctx.decisions if d.outcome == "clipped"}
    assert "no norm or linear layer" in clipped_["model.layers.0.self_attn.o_proj"]


def test_folding_changes_nothing_but_the_rounding(graph: Graph) -> None:
    """With eight bits hardly anything is rounded away: what is left would be a wrong fold."""
    step = STEP.replace("int4", "int8")
    quantized, _, ctx = run_step(graph, step.replace("calib with", "calib with scheme=weights,"))
    assert any(d.outcome == "scaled" for d in ctx.decisions)
    a, b = (interpret(g, [tokens(seed=7)])[0] for g in (graph, quantized))
    assert float((a - b).norm() / a.norm()) < 0.02
    names = [p for p in quantized.parameters if p.endswith(".awq")]
    assert any("layernorm" in n for n in names)


def test_a_scale_goes_through_a_gate_into_codes_and_bias() -> None:
    """up and down: the rows of `up`, quantized itself, are divided; so is its bias."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(32, 64), nn.Linear(32, 64)
            self.down = nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    torch.manual_seed(0)
    model = Gated().eval()
    with torch.no_grad():
        model.up.weight[[4, 40]] *= 30
        model.up.bias[[4, 40]] *= 30
    data = [torch.randn(16, 32) for _ in range(4)]
    graph = dfc.trace(model, (data[0],))
    step = "quantize int8 using calib with scheme=weights, group=32, method=awq, smallest=1"
    quantized, _, ctx = run_step(graph, step, data)
    told = {d.loc.module: d.outcome for d in ctx.decisions if d.outcome != "quantized"}
    assert told["down"] == "scaled" and "up.bias.awq" in quantized.parameters
    x = torch.randn(16, 32)
    a, b = (interpret(g, [x])[0] for g in (graph, quantized))
    assert float((a - b).norm() / a.norm()) < 0.01
