"""Rounding with compensation: equal to the definition, never worse than the nearest values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dfc
from dfc.compress.gptq import Gptq, gptq
from dfc.compress.grid import Grid, round_to_nearest
from dfc.compress.hessian import Hessian, factor
from dfc.compress.sequential import weight_of
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.ir.interpret import interpret
from dfc.ir.verify import verify
from dfc.ir.weights import TensorData
from dfc.rewrite.journal import Journal
from tests.smollm2 import in_floats
from tests.tiny_models import CALIB, run_step, tiny_llama, tokens

GRIDS = [
    Grid(bits, group, symmetric)
    for bits in (4, 8)
    for group in (32, 64, 128, None)
    for symmetric in (True, False)
]


def layer(n: int, k: int, tokens: int = 300, seed: int = 0) -> tuple[torch.Tensor, Hessian]:
    """Weights, and the Hessian of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(k, k, generator=g) / k**0.5 + 0.5 * torch.eye(k)
    x = torch.randn(tokens, k, generator=g) @ mixed
    hessian = Hessian(k)
    for rows in x.split(64):
        hessian.update(rows)
    return torch.randn(n, k, generator=g), hessian


def by_definition(w: torch.Tensor, hessian: Hessian, grid: Grid, damping: float) -> torch.Tensor:
    """Optimal brain surgery in a fixed order, with the inverse of what is left each time."""
    w = w.double().clone()
    h = hessian.sum + damping * hessian.sum.diagonal().mean() * torch.eye(w.shape[1]).double()
    scale, zero = grid.fit_groups(w.float())
    width = grid.width(w.shape[1])
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(h[j:, j:])
        s, z = scale[:, j // width], zero[:, j // width]
        q = grid.value(grid.code(w[:, j].float(), s, z), s, z).double()
        error = (w[:, j] - q) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
        w[:, j] = q
    return w.float()


@pytest.mark.parametrize("grid", [Grid(4, None), Grid(4, None, False), Grid(3, None)], ids=str)
def test_gptq_is_optimal_brain_surgery(grid: Grid) -> None:
    w, hessian = layer(6, 24, tokens=60)
    wanted = by_definition(w, hessian, grid, 0.01)
    rounded, _ = gptq(w, hessian, grid, Gptq(by_importance=False, search=False, block=7))
    torch.testing.assert_close(rounded.weight, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_importance", [True, False])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gptq_beats_the_nearest_values(grid: Grid, by_importance: bool) -> None:
    w, hessian = layer(24, 160)
    plain = round_to_nearest(w, grid).weight
    rounded, _ = gptq(w, hessian, grid, Gptq(by_importance=by_importance, search=False))
    assert hessian.loss(rounded.weight - w) < 0.8 * hessian.loss(plain - w)
    searched, _ = gptq(w, hessian, grid, Gptq(by_importance=by_importance))
    assert hessian.loss(searched.weight - w) < 0.8 * hessian.loss(plain - w)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_is_stored_is_what_was_meant(grid: Grid) -> None:
    w, hessian = layer(5, 160)
    rounded, _ = gptq(w, hessian, grid)
    assert rounded.codes.dtype == torch.int32
    assert grid.low <= int(rounded.codes.min()) and int(rounded.codes.max()) <= grid.high
    assert rounded.scale.shape == (5, -(-160 // grid.width(160)))
    again = round_to_nearest(rounded.weight, grid)
    if not grid.group:  # a range that is reached is found again
        assert bool((rounded.scale > 0).all()) and again.scale.shape == rounded.scale.shape


def test_order_of_importance_is_undone() -> None:
    """Columns come back to their places, each with its own group's scale."""
    w, hessian = layer(8, 64)
    rounded, found = gptq(w, hessian, Grid(8, 32), Gptq(by_importance=True))
    assert found.order.tolist() != list(range(64))
    torch.testing.assert_close(rounded.weight, w, rtol=0, atol=0.15)


def test_weights_on_the_grid_stay() -> None:
    grid = Grid(4, 32)
    w, hessian = layer(6, 64)
    w = round_to_nearest(w, grid).weight
    rounded, _ = gptq(w, hessian, grid, Gptq(search=False))
    torch.testing.assert_close(rounded.weight, w)


def test_dead_inputs_get_no_weight_and_disturb_nobody() -> None:
    w, _ = layer(4, 32)
    x = torch.randn(100, 32, generator=torch.Generator().manual_seed(1))
    x[:, [3, 17]] = 0
    hessian = Hessian(32)
    hessian.update(x)
    rounded, _ = gptq(w, hessian, Grid(4, 32))
    assert not rounded.weight[:, [3, 17]].any()
    assert hessian.loss(rounded.weight - w) < hessian.loss(
        round_to_nearest(w, Grid(4, 32)).weight - w
    )


def test_few_tokens_are_damped_and_more_when_that_does_not_help() -> None:
    w, hessian = layer(4, 32, tokens=8)
    assert gptq(w, hessian, Grid(4, 32))[1].damping == 0.01
    assert factor(hessian, damping=1e-9).damping > 1e-9


def test_no_damping_helps() -> None:
    hessian = Hessian(4)
    hessian.update(torch.ones(2, 4))
    hessian.sum[0, 1] = hessian.sum[1, 0] = 1e6  # no sum of squares
    with pytest.raises(DfcError, match="2 tokens for 4 inputs cannot be inverted") as e:
        factor(hessian)
    assert e.value.code == "D092"


def test_nothing_but_dead_inputs() -> None:
    hessian = Hessian(4)
    hessian.update(torch.zeros(2, 4))
    with pytest.raises(DfcError, match="all its 4 inputs were 0"):
        factor(hessian)


def test_activations_that_are_no_numbers() -> None:
    x = torch.ones(3, 4)
    x[1, 2] = torch.nan
    with pytest.raises(DfcError, match="1 of 3 calibration tokens"):
        Hessian(4).update(x)


def test_a_search_never_fits_worse() -> None:
    w, hessian = layer(16, 64)
    importance = hessian.sum.diagonal().float()
    for grid in (Grid(4, None), Grid(4, None, False)):
        errors = []
        for weights in (None, importance):
            scale, zero = grid.fit(w, weights)
            change = grid.value(grid.code(w, scale, zero), scale, zero) - w
            errors.append((change.square() * importance).sum(dim=1))
        assert bool((errors[1] <= errors[0]).all())


def test_rows_of_zeros_have_a_scale() -> None:
    for grid in GRIDS:
        rounded = round_to_nearest(torch.zeros(2, 160), grid)
        assert not rounded.weight.any() and bool((rounded.scale == 1).all())


# As the method of a step


@pytest.fixture(scope="module")
def graph() -> Graph:
    return dfc.trace(tiny_llama(), (tokens(),))


STEP = "quantize int4 using calib with group=32, method={}, embeddings=no, smallest=1"


def mean_error(graph: Graph, other: Graph) -> float:
    """How far two graphs are apart on other data than that of the calibration."""
    pairs = [[interpret(g, [tokens(2, seed=9)])[0] for g in (graph, other)]]
    return float(sum((a - b).square().mean() for a, b in pairs))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_method_beats_the_nearest_values_on_other_data(graph: Graph, method: str) -> None:
    plain, _, _ = run_step(graph, STEP.format("rtn"))
    better, changes, ctx = run_step(graph, STEP.format(method))
    verify(better)
    assert changes == 14 and sum(n.op == "dfc.linear_w4" for n in better.nodes) == 14
    assert mean_error(graph, better) < mean_error(graph, plain)
    outcomes = {d.outcome for d in ctx.decisions}
    assert outcomes >= ({"calibrated"} if method == "gptq" else {"scaled"}), outcomes


def test_layers_are_rounded_on_what_rounded_layers_give(graph: Graph) -> None:
    """The last layer's codes are those of the algorithm on what the quantized layers give."""
    quantized, _, _ = run_step(graph, STEP.format("gptq"))
    (last,) = [n for n in quantized.nodes if n.loc and n.loc.module.endswith("1.mlp.down_proj")]
    hessian = Hessian(64)

    def watch(node: Node, results: Any) -> None:
        if last.inputs[0] in node.results:
            hessian.update(results[0])

    for batch in CALIB:
        interpret(quantized, [batch], observe=watch)
    weight = graph.parameters["model.layers.1.mlp.down_proj.weight"].data.tensor()
    wanted, _ = gptq(weight, hessian, Grid(4, 32))
    as_floats = quantized.copy()
    in_floats(as_floats)
    (made,) = [n for n in as_floats.nodes if n.loc and n.loc.module.endswith("1.mlp.down_proj")]
    got = weight_of(made).data.tensor()
    same = (got - wanted.weight).abs() <= 2e-3 * wanted.weight.abs().max()  # scales are stored f16
    assert float(same.float().mean()) > 0.97


def test_the_packed_layers_equal_the_weights_they_stand_for(graph: Graph) -> None:
    """What lets benchmarks judge packed models as float ones."""
    quantized, _, _ = run_step(graph, f"{STEP.format('gptq')}, scheme=weights")
    floats = quantized.copy()
    assert in_floats(floats) == 14
    a, b = (interpret(g, [tokens()])[0] for g in (quantized, floats))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_bad_calibration_names_the_layer(graph: Graph) -> None:
    broken = graph.copy()
    name = "model.layers.0.post_attention_layernorm.weight"
    broken.parameters[name].data = TensorData(name, torch.full((32,), torch.inf))
    for method in ("gptq", "awq"):
        with pytest.raises(DfcError, match=r"of `model\.layers\.0\.mlp\.gate_proj`.* NaN or") as e:
            run_step(broken, STEP.format(method))
        assert e.value.code == "D090"


def test_a_layer_that_reads_zeros_alone_is_rounded_to_nearest_and_told(graph: Graph) -> None:
    idle = graph.copy()
    name = "model.layers.0.post_attention_layernorm.weight"
    idle.parameters[name].data = TensorData(name, torch.zeros(32))
    found, _, ctx = run_step(idle, STEP.format("gptq"))
    told = [d for d in ctx.decisions if d.reason.startswith("to nearest: all its inputs were 0")]
    assert len(told) == 3  # gate, up, and down, which multiplies what they give
    plain, _, _ = run_step(idle, STEP.format("rtn"))
    name = "model.layers.0.mlp.gate_proj.weight"
    codes, scales = (
        [g.parameters[f"{name}.{part}"].data.tensor() for g in (found, plain)]
        for part in ("codes", "scale")
    )
    assert torch.equal(*scales)
    assert float((codes[0] != codes[1]).float().mean()) < 0.01  # scales are rounded to f16 later


def test_few_tokens_are_told(graph: Graph) -> None:
    _, _, ctx = run_step(graph, STEP.format("gptq"), [tokens()[:, :16]])
    told = [d.reason for d in ctx.decisions if d.outcome == "calibrated"]
    assert any("on 32 tokens, fewer than its 64 inputs" in t for t in told)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_after_an_interrupt_it_goes_on_and_ends_equal(
    graph: Graph, method: str, tmp_path: Path
) -> None:
    wanted, _, decided = run_step(graph, STEP.format(method))
    calls: list[int] = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 22:  # of 4 batches for each of 8 groups
            raise KeyboardInterrupt

    journal = Journal(tmp_path, every_s=0)
    with pytest.raises(KeyboardInterrupt):
        run_step(graph, STEP.format(method), progress=progress, journal=journal)
    got, _, again = run_step(graph, STEP.format(method), progress=progress, journal=journal)
    assert calls[22:34] == [*range(21, 33)] and got == wanted
    assert again.decisions == decided.decisions
