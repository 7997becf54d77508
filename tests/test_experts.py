"""Experts of a mixture as codes: one weight for all of them, rows in runs, each with its own."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dfc
from dfc.emit.fx import to_fx
from dfc.emit.onnx import build_onnx
from dfc.emit.onnx_run import Session
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.ir.interpret import interpret
from dfc.recipe.quantities import weight_bytes
from dfc.rewrite.pass_ import Context, find_pass
from dfc.runtime.engines import find_engine
from dfc.runtime.kernels.graph import are_built, kernels
from dfc.runtime.kernels.grouped import are_packed, floats, in_one_piece, register
from dfc.runtime.kernels.linear import pack_w8
from tests.tower import memory_of, runner_of

NO_DEVICE = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
RUNS = (  # where each expert's rows end: one without rows, one with one, none behind, one for all
    [2, 2, 3, 7], [0, 0, 0, 7], [7, 7, 7, 7], [1, 2, 4, 5],
)  # fmt: skip


class Experts(nn.Module):
    """Four experts of odd sizes; `down` lies with inputs first, as GPT-OSS has it."""

    def __init__(self, k: int = 40, hidden: int = 37) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(4, 2 * hidden, k) / 6)
        self.down = nn.Parameter(torch.randn(4, hidden, k) / 6)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        import transformers.integrations.moe  # noqa: F401 - makes the operator known

        product = torch.ops.transformers.grouped_mm_fallback
        gate, up = product(x, self.up.transpose(1, 2), ends).chunk(2, -1)
        return product(F.silu(gate) * up, self.down, ends)  # type: ignore[no-any-return]


@cache
def traced() -> tuple[Graph, list[list[Any]]]:
    x = torch.randn(7, 40, generator=torch.Generator().manual_seed(1))
    given = [[x, torch.tensor(ends, dtype=torch.int32)] for ends in RUNS]
    return dfc.trace(Experts(), tuple(given[0])), given


def quantized(graph: Graph, **options: Any) -> tuple[Graph, Context]:
    made, ctx = graph.copy(), Context(decisions=[])
    assert find_pass("quantize", options).run(made, ctx) == 2
    return made, ctx


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


FORMS = [
    ({}, "w8", 0.03, 0.27),
    ({"scheme": "weights"}, "w8", 0.02, 0.27),
    ({"scheme": "weights", "group": 32}, "w8", 0.02, 0.30),
    ({"to": "int4"}, "w4", 0.25, 0.24),
    ({"to": "int4", "group": 16, "symmetric": False}, "w4", 0.25, 0.24),
    ({"to": "int4", "scheme": "weights"}, "w4", 0.25, 0.24),
    ({"to": "fp8", "scheme": "weights"}, "w8", 0.02, 0.27),
]


@pytest.mark.parametrize(("options", "op", "error", "share"), FORMS, ids=str)
def test_experts_read_codes(options: dict[str, Any], op: str, error: float, share: float) -> None:
    graph, given = traced()
    small, _ = quantized(graph, **options)
    assert [n.op for n in small.nodes if n.op.startswith("dfc.")] == 2 * [
        f"dfc.grouped_linear_{op}"
    ]
    assert not any("grouped_mm" in n.op or n.op == "aten.transpose.int" for n in small.nodes)
    assert dfc.parse(str(small)) == small
    assert find_pass("quantize", options).run(small, Context()) == 0
    assert weight_bytes(small) / weight_bytes(graph) < share
    for inputs in given:
        (y,), (want,) = interpret(small, inputs), interpret(graph, inputs)
        assert 0 < relative(y, want) < error
        assert not y[int(inputs[1][-1]) :].any()


@pytest.mark.parametrize("options", [f[0] for f in FORMS], ids=str)
@pytest.mark.parametrize(("opset", "contrib"), [(20, False), (21, False), (23, True)])
def test_onnx_agrees_and_is_small(options: dict[str, Any], opset: int, contrib: bool) -> None:
    graph, given = traced()
    small, _ = quantized(graph, **options)
    model = build_onnx(small, opset=opset, contrib=contrib)
    held = sum(v.const_value.nbytes for v in model.graph.initializers.values())  # type: ignore[misc, union-attr]
    assert held < 0.5 * weight_bytes(graph)
    session = Session(model, small, threads=1)
    for inputs in given:
        (y,), (want,) = session.run(inputs), interpret(small, inputs)
        assert relative(y, want) < 1e-5


def run(graph: Graph, inputs: list[Any]) -> Tensor:
    return find_engine("eager").build(graph)(inputs)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("options", [f[0] for f in FORMS], ids=str)
def test_the_eager_engine_agrees(options: dict[str, Any]) -> None:
    graph, given = traced()
    small, _ = quantized(graph, **options)
    runner = find_engine("eager").build(small)
    for inputs in given:
        (y,), (want,) = runner(inputs), interpret(small, inputs)
        assert relative(y, want) < 1e-5
        assert not y[int(inputs[1][-1]) :].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("to", ["int8", "int4"])
def test_other_types_agree(to: str, dtype: torch.dtype) -> None:
    model, (_, *given) = Experts().to(dtype), traced()[1]
    graph = dfc.trace(model, (given[0][0].to(dtype), given[0][1]))
    small, _ = quantized(graph, to=to)
    for x, ends in given:
        inputs = [x.to(dtype), ends]
        y, (want,) = run(small, inputs), interpret(small, inputs)
        assert y.dtype == dtype
        assert relative(y.double(), want.double()) < (1e-5 if dtype == torch.float64 else 0.02)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_DEVICE])]
)
def test_pytorchs_grouped_product_of_bfloat16_gives_zeros_behind_the_last_row(device: str) -> None:
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=random).to(device) for s in ((7, 24), (4, 16, 24)))
    for ends in (torch.tensor(e, device=device) for e in (*RUNS, [0, 0, 0, 0])):
        y = floats(x.bfloat16(), ends, weight.bfloat16())
        want = floats(x.bfloat16().double(), ends, weight.bfloat16().double())
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), want, rtol=0.01, atol=0.01)
        assert not y[int(ends[-1]) :].any()


def test_pytorchs_own_grouped_product_is_one_of_experts() -> None:
    x, ends = torch.randn(7, 32).bfloat16(), torch.tensor([2, 2, 7], dtype=torch.int32)
    weight = torch.randn(3, 64, 32).bfloat16()

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight)

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return F.grouped_mm(x, self.weight.transpose(1, 2), offs=ends)

    graph = dfc.trace(Own(), (x, ends))
    assert [n.op for n in graph.nodes][-1] == "aten._grouped_mm.default"
    for options in ({}, {"scheme": "weights"}, {"to": "int4"}):
        small = graph.copy()
        assert find_pass("quantize", options).run(small, Context()) == 1
        y = run(small, [x, ends])
        assert relative(y.double(), interpret(graph, [x, ends])[0].double()) < 0.2
        assert relative(y.double(), interpret(small, [x, ends])[0].double()) < 0.01


def test_torch_compile_sees_one_operator() -> None:
    graph, given = traced()
    for options in ({}, {"to": "int4"}, {"scheme": "weights"}):
        small, _ = quantized(graph, **options)
        module = to_fx(small, "cpu", kernels("cpu", traced=True))
        called = [str(n.target) for n in module.graph.nodes if "grouped" in str(n.target)]
        assert len(called) == 2 and all(c.startswith("dfc.grouped_linear_") for c in called)
        for inputs in given:
            assert relative(module(*inputs)[0], interpret(small, inputs)[0]) < 1e-5


def test_the_operators_are_what_torch_wants_of_them() -> None:
    register()
    x, ends = torch.randn(5, 32), torch.tensor([2, 2, 5])
    weight = torch.randint(-127, 128, (3, 7, 32), dtype=torch.int8)
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.dfc
    codes = (x, ends, weight, torch.rand(3, 7), None, 8, 0, 1)
    torch.library.opcheck(ops.grouped_linear_codes.default, codes, test_utils=checks)
    torch.library.opcheck(
        ops.grouped_linear_floats.default, (x, ends, torch.randn(3, 7, 32)), test_utils=checks
    )
    if are_built():
        packed = in_one_piece([pack_w8(w, torch.ones(7)) for w in weight])
        torch.library.opcheck(
            ops.grouped_linear_packed.default, (x, ends, packed, 7), test_utils=checks
        )


@pytest.mark.skipif(not are_built(), reason="the kernels are not built")
def test_packed_weights_in_one_piece_are_checked() -> None:
    weight = torch.randint(-127, 128, (3, 7, 40), dtype=torch.int8)
    packed = in_one_piece([pack_w8(w, torch.ones(7)) for w in weight])
    assert are_packed(packed, 8, 3, 7, 40, 0)
    assert not are_packed(packed, 8, 3, 7, 41, 0) and not are_packed(packed[:16], 8, 3, 7, 40, 0)
    for place in (0, 8, 16):
        broken = packed.clone()
        broken[place] += 1
        assert not are_packed(broken, 8, 3, 7, 40, 0)


def test_a_package_holds_codes(tmp_path: Path) -> None:
    x, ends = torch.randn(7, 64), torch.tensor([2, 2, 3, 7])
    sizes, results = [], []
    for name, step in (("floats", "dce"), ("codes", "quantize int8")):
        recipe = f"dfc 1\nrecipe q {{ {step} }}"
        made = dfc.compile(Experts(64, 200), (x, ends), recipe=recipe, engine="eager")
        made.save(tmp_path / name)
        loaded = dfc.load(tmp_path / name)
        assert relative(loaded(x, ends), made(x, ends)) < 1e-6
        sizes.append(sum(f.stat().st_size for f in (tmp_path / name).rglob("*") if f.is_file()))
        results.append(loaded(x, ends))
    assert sizes[1] < 0.32 * sizes[0]
    assert 0 < relative(results[1], results[0]) < 0.03


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts(64, 200) for _ in range(3))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, ends)
        return x


def test_codes_of_experts_are_brought_when_they_are_needed(tmp_path: Path) -> None:
    x, ends = torch.randn(7, 64), torch.tensor([2, 2, 3, 7])
    recipe = "dfc 1\nrecipe q { quantize int4 }"
    dfc.compile(Layers(), (x, ends), recipe=recipe, engine="eager").save(tmp_path / "p")
    whole = dfc.load(tmp_path / "p")
    with dfc.load(tmp_path / "p", memory=memory_of(whole, 0.7, [x, ends])) as streamed:
        assert runner_of(streamed).plan.streamed
        assert relative(streamed(x, ends), whole(x, ends)) < 1e-5


def test_a_layer_of_experts_is_one_of_those_that_are_measured() -> None:
    x, ends = torch.randn(7, 64), torch.tensor([2, 2, 3, 7])
    recipe = "dfc 1\nrecipe q { quantize int8 except worst(1) }"
    made = dfc.compile(Layers(), (x, ends), recipe=recipe, engine="eager").graph
    assert ops_of(made, "dfc.grouped_linear_w8") == 4 and ops_of(made, "grouped_mm") == 2


def ops_of(graph: Graph, name: str) -> int:
    return sum(name in n.op for n in graph.nodes)


def test_awq_rounds_experts_to_nearest() -> None:
    """And the note says so."""
    graph, given = traced()
    made, ctx = graph.copy(), Context(decisions=[], data={"calib": [tuple(given[0])]})
    p = find_pass("quantize", {"to": "int4", "method": "awq", "data": "calib"})
    assert p.run(made, ctx) == 2
    assert any("experts are rounded to nearest: `awq`" in note for note in ctx.products["notes"])
    told = [d.reason for d in ctx.decisions or () if d.outcome == "quantized"]
    assert len(told) == 2 and all("symmetric by rtn" in t for t in told)
    plain, _ = quantized(graph, to="int4")
    assert made == plain


def test_static_rounds_what_experts_read_as_the_model_runs() -> None:
    graph, given = traced()
    made, ctx = graph.copy(), Context(data={"calib": [tuple(given[0])]})
    assert find_pass("quantize", {"scheme": "static", "data": "calib"}).run(made, ctx) == 2
    found = [n for n in made.nodes if n.op == "dfc.grouped_linear_w8"]
    assert [n.attributes["activations"] for n in found] == ["int8", "int8"]


def test_small_experts_stay() -> None:
    graph, _ = traced()
    ctx = Context(decisions=[])
    with pytest.raises(DfcError, match="nothing is left") as error:
        find_pass("quantize", {"smallest": 20_000}).run(graph.copy(), ctx)
    assert "less than `smallest`" in error.value.diagnostics[0].notes[0]
    with pytest.raises(DfcError, match="nothing is left") as error:
        find_pass("quantize", {"to": "int4", "group": 64}).run(graph.copy(), ctx)
    assert "shorter than a group of 64" in error.value.diagnostics[0].notes[0]
