"""GPTQ of experts: each is rounded for the rows that reach it, and leans on those of all."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dfc
from dfc.compress.gptq import gptq
from dfc.compress.grid import Grid
from dfc.compress.hessian import Hessian
from dfc.compress.rtn import nearest
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.ir.interpret import interpret
from dfc.rewrite.journal import Journal
from tests.test_experts import Experts
from tests.tiny_models import run_step

K = 64
MODEL = Experts(K, 48)
ENDS = ([200, 200, 390, 394], [150, 150, 398, 398])  # none for the second, four for the last
STEP = "quantize int4 using calib with method={}, smallest=1"


def rows(seed: int) -> Tensor:
    """Inputs that hang together."""
    mixed = torch.randn(K, K, generator=torch.Generator().manual_seed(7)) / 8
    mixed *= torch.logspace(0, -1.5, K)[:, None]
    return torch.randn(400, K, generator=torch.Generator().manual_seed(seed)) @ mixed


@cache
def graph() -> Graph:
    return dfc.trace(MODEL, (rows(0), torch.tensor(ENDS[0], dtype=torch.int32)))


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(rows(i), torch.tensor(e, dtype=torch.int32)) for i, e in enumerate(ENDS)]


def off(quantized: Graph, start: int, end: int) -> float:
    """How far results of some rows are from the float model's, on other rows."""
    inputs = [rows(9), torch.tensor([200, 200, 390, 394], dtype=torch.int32)]
    (y,), (want,) = (interpret(g, inputs) for g in (quantized, graph()))
    return float((y - want)[start:end].norm() / want[start:end].norm())


@pytest.mark.parametrize("more", ["", ", symmetric=no", ", group=16", ", scheme=weights"])
def test_experts_that_rows_reach_are_nearer_than_the_nearest_values(more: str) -> None:
    plain, _, _ = run_step(graph(), STEP.format("rtn") + more, batches())
    better, changes, _ = run_step(graph(), STEP.format("gptq") + more, batches())
    assert changes == 2
    for start, end in ((0, 200), (200, 390)):
        assert off(better, start, end) < 0.85 * off(plain, start, end)


def test_codes_are_those_of_an_experts_own_rows_and_the_mean_of_all() -> None:
    made, _, ctx = run_step(graph(), STEP.format("gptq"), batches())
    common, own = Hessian(K), [Hessian(K) for _ in range(4)]
    for x, ends in batches():
        common.update(x[: int(ends[-1])])
        for e, part in enumerate(torch.tensor_split(x, ends.long())[:4]):
            own[e].update(part)
    node = next(n for n in made.nodes if n.op == "dfc.grouped_linear_w4")
    packed, scale = (node.inputs[i].data.tensor() for i in (2, 3))  # type: ignore[union-attr]
    assert [h.tokens for h in own] == [350, 0, 438, 4]
    for e, hessian in enumerate(own):
        hessian.sum += common.sum * K / 792
        w = MODEL.up.detach()[e]
        few = hessian.tokens < K / 8
        found = nearest(w, Grid(4, 32)) if few else gptq(w, hessian, Grid(4, 32))[0]
        codes = torch.stack([packed[e] & 15, packed[e] >> 4], -1).flatten(1).int() - 8
        assert torch.equal(codes, found.codes) and torch.equal(scale[e], found.scale.half())
    told = {d.reason for d in ctx.decisions if d.outcome == "calibrated"}
    wanted = "2 of 4 experts on 350 to 438 rows each; 2 to nearest, which at most 4 rows reached"
    assert told == {wanted}


def test_a_layer_sees_what_rounded_experts_give() -> None:
    """`down`, whose inputs lie first, on what `up` gives when it is rounded."""
    step = "quantize int4 using calib with method=gptq, smallest=1, scheme=weights"
    both, _, _ = run_step(graph(), step, batches())
    down = [n for n in both.nodes if n.op == "dfc.grouped_linear_w4"][1]
    hessian, common = Hessian(48), Hessian(48)
    seen: list[Tensor] = []

    def watch(node: Any, results: Any) -> None:
        if down.inputs[0] in node.results:
            seen.extend(results)

    for x, ends in batches():
        interpret(both, [x, ends], observe=watch)
        hessian.update(seen[-1][: int(ends[0])])
        common.update(seen[-1][: int(ends[-1])])
    hessian.lean_on(common)
    found, _ = gptq(MODEL.down.detach()[0].T, hessian, Grid(4, 32))
    packed = down.inputs[2].data.tensor()[0]  # type: ignore[union-attr]
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1).int()[:, :48] - 8
    assert float((codes == found.codes).float().mean()) > 0.97  # scales are stored as f16


def test_experts_that_are_interrupted_go_on_and_end_equal(tmp_path: Path) -> None:
    wanted, _, decided = run_step(graph(), STEP.format("gptq"), batches())
    calls: list[int] = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 11:  # of 2 batches for each of 4 experts of 2 weights
            raise KeyboardInterrupt

    journal = Journal(tmp_path, every_s=0)
    with pytest.raises(KeyboardInterrupt):
        run_step(graph(), STEP.format("gptq"), batches(), progress=progress, journal=journal)
    got, _, again = run_step(
        graph(), STEP.format("gptq"), batches(), progress=progress, journal=journal
    )
    assert calls[11:17] == [*range(11, 17)] and got == wanted
    assert again.decisions == decided.decisions


def test_rows_that_are_no_numbers_name_the_layer() -> None:
    broken = Experts(K, 48)
    with torch.no_grad():
        broken.up[2] *= 1e20  # whose product of gate and up no float32 holds
    x, ends = batches()[0]
    traced = dfc.trace(broken, (x, ends))
    with pytest.raises(DfcError, match=r"%grouped_mm_fallback_1: .* NaN or infinite") as e:
        run_step(traced, STEP.format("gptq"), [(x, ends)])
    assert e.value.code == "D090"
