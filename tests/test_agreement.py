"""When numbers agree: the witness judges, passes promise, users allow, and probes are enough."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import dfc
from dfc.emit.onnx_export import compare, export_onnx
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.ir.interpret import interpret
from dfc.ir.op import lookup
from dfc.ir.types import DTYPES
from dfc.ir.verify import verify
from dfc.ops.rounding import ROUNDED_RTOL
from dfc.passes.quantize import Quantize
from dfc.rewrite.agree import judge
from dfc.rewrite.driver import run_passes
from dfc.rewrite.pass_ import EXACT, Context, Pass, find_pass
from dfc.rewrite.probe import make_probes

NORM = """dfc 1
graph @f(%x: {t}[B, 64]) -> {t}[B, 64]
    where B in 1..8 {{
  %s: {t}[B, 64] = aten.mul.Tensor(%x, %x)
  %m: {t}[B, 1] = aten.mean.dim(%s, dim=[-1], keepdim=True, dtype=None)
  %e: {t}[B, 1] = aten.add.Scalar(%m, other=1e-05, alpha=1)
  %r: {t}[B, 1] = aten.rsqrt.default(%e)
  %y: {t}[B, 64] = aten.mul.Tensor(%x, %r)
  return %y
}}
"""
TIGHT, LOOSE = dfc.close(1e-6), dfc.close(1.2e-4)
TORCH = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


def norm(dtype: str, scale: float = 1.0) -> tuple[Graph, Any]:
    graph = dfc.parse(NORM.format(t=dtype))
    verify(graph)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * scale
    return graph, make_probes(graph, [x.to(TORCH[dtype])])


@dataclass(frozen=True)
class NormIn(Pass):
    """Compute the norm in another type, as a fused kernel does."""

    name = "norm_in"
    numerics: Any = TIGHT
    dtype: str = "f32"

    def run(self, graph: Graph, ctx: Context) -> int:
        y = graph.outputs[0].node
        assert y is not None
        x, own = graph.inputs[0], graph.inputs[0].tensor_type.dtype

        def cast(v: Any, to: Any) -> Any:
            given = {"dtype": to, "non_blocking": False}
            known = {a.name for a in lookup("aten._to_copy.default").attributes}
            given = {k: v for k, v in given.items() if k in known}
            return graph.add("aten._to_copy.default", [v], given, before=y).result

        wide = cast(x, DTYPES[self.dtype])
        s = graph.add("aten.mul.Tensor", [wide, wide], before=y).result
        mean = {"dim": (-1,), "keepdim": True, "dtype": None}
        m = graph.add("aten.mean.dim", [s], mean, before=y).result
        e = graph.add("aten.add.Scalar", [m], {"other": 1e-5, "alpha": 1}, before=y).result
        r = graph.add("aten.rsqrt.default", [e], before=y).result
        z = graph.add("aten.mul.Tensor", [wide, r], before=y).result
        graph.replace(y, [cast(z, own)])
        return 1


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_what_is_more_exact_than_the_original_is_right(dtype: str) -> None:
    graph, probes = norm(dtype)
    (report,) = run_passes(graph, [NormIn()], probes=probes).reports
    assert report.verdict == "proved", report.reason
    own = max(judge(p.original, p.original, p.witness).worst for p in probes.ready())
    assert report.error is not None and report.error <= own


def test_what_is_less_exact_than_the_original_is_wrong() -> None:
    for dtype, other in (("f32", "f16"), ("f32", "bf16")):
        graph, probes = norm(dtype)
        (report,) = run_passes(graph, [NormIn(dtype=other)], probes=probes).reports
        assert report.verdict == "reverted" and "too far from the witness" in report.reason


def test_where_the_original_overflows_the_witness_judges() -> None:
    graph, probes = norm("f16", scale=600.0)  # the squares are beyond f16, the norm is not
    first = next(probes.ready())
    assert not bool(first.original[0].any()), "1 / sqrt(inf) is 0"
    (report,) = run_passes(graph, [NormIn()], probes=probes).reports
    assert report.verdict == "proved", report.reason


INFINITE = torch.tensor([float("inf"), 1.0], dtype=torch.float16)


@pytest.mark.parametrize("got, right", [(2.0, True), (2.5, False), (float("inf"), True),
                                        (-float("inf"), False), (float("nan"), False)])  # fmt: skip
def test_an_element_that_overflowed_may_be_what_the_witness_says(got: float, right: bool) -> None:
    x = torch.tensor([got, 1.0], dtype=torch.float16)
    witness = torch.tensor([2.0, 1.0], dtype=torch.float64)
    assert judge([x], [INFINITE], [witness]).agrees is right


def test_an_infinity_that_the_witness_has_too_must_stay() -> None:
    witness = torch.tensor([float("inf"), 1.0], dtype=torch.float64)
    for got in (65504.0, float("nan"), -float("inf")):
        x = torch.tensor([got, 1.0], dtype=torch.float16)
        assert not judge([x], [INFINITE], [witness]).agrees


@pytest.mark.parametrize("rows, right", [(1, True), (20, False)])
def test_where_values_are_rounded_a_row_may_go_elsewhere_but_not_many(
    rows: int, right: bool
) -> None:
    """As in Whisper's encoder: which frame goes elsewhere is chance, in float64 too."""
    torch.manual_seed(0)
    witness = torch.randn(1000, 16, dtype=torch.float64)
    original, x = ((witness + 0.1 * torch.randn(1000, 16)).float() for _ in range(2))
    x[:rows] = -witness[:rows]
    assert not judge([x], [original], [witness], rtol=0.05).agrees
    assert judge([x], [original], [witness], rtol=0.05, rounded=True).agrees is right
    graph = dfc.trace(torch.nn.ReLU(), (original,))
    with nullcontext() if right else pytest.raises(DfcError, match="another result for `y`"):
        compare(graph, [original], [original], [x], ["y"], witness=[witness], rounded=0.05)


def test_an_infinity_is_told_where_values_are_rounded_too() -> None:
    ones, inf = torch.ones(2), torch.tensor([float("inf"), 1.0])
    assert not judge([inf], [ones], [ones.double()], rounded=True).agrees
    assert not judge([inf], [ones], [inf.double()], rounded=True).agrees


@dataclass(frozen=True)
class Nudge(Pass):
    """Multiply the output by a little more than 1."""

    name = "nudge"
    by: float = 1e-4
    numerics: Any = LOOSE

    def run(self, graph: Graph, ctx: Context) -> int:
        (y,) = graph.outputs
        scaled = graph.add("aten.mul.Scalar", [y], {"other": 1 + self.by}).result
        graph.set_outputs([scaled])
        return 1


def test_what_passes_promise_adds_up() -> None:
    graph, probes = norm("f32")
    for mode in ("each", "end"):
        outcome = run_passes(graph, [Nudge()] * 4, probes=probes, mode=mode)
        assert [r.verdict for r in outcome.reports] == ["proved"] * 4
        assert outcome.numerics.rtol == pytest.approx(4.8e-4)
    greedy = Nudge(by=5e-4)
    outcome = run_passes(graph, [Nudge(), greedy, Nudge()], probes=probes)
    assert [r.verdict for r in outcome.reports] == ["proved", "reverted", "proved"]
    assert outcome.numerics.rtol == pytest.approx(2.4e-4)


@pytest.mark.parametrize("mode", ["each", "end"])
def test_what_was_promised_before_counts(mode: str) -> None:
    graph, probes = norm("f32")
    first = run_passes(graph, [Nudge()], probes=probes)
    steps = [find_pass("cse"), Nudge(), Nudge(by=1e-2), find_pass("dce")]
    outcome = run_passes(first.graph, steps, probes=probes, mode=mode, numerics=first.numerics)
    assert [r.verdict for r in outcome.reports] == ["unchanged", "proved", "reverted", "unchanged"]
    outcome = run_passes(first.graph, [Nudge(by=0.0)], probes=probes, mode=mode)
    assert outcome.reports[0].verdict == "proved", "2.4e-4 would be too little without the first"


# What a user allows, and how many probes


@pytest.mark.parametrize("mode", ["each", "end"])
@pytest.mark.parametrize(
    "given, verdict",
    [
        ({"atol": 1e-2}, "proved"),
        ({"rtol": 1e-2}, "proved"),
        ({"atol": 1e-4}, "reverted"),
        ({}, "reverted"),
    ],
    ids=str,
)
def test_a_user_may_allow_more(mode: str, given: dict[str, float], verdict: str) -> None:
    graph, probes = norm("f32")
    step = Nudge(by=1e-3, numerics=EXACT)
    outcome = run_passes(graph, [step], probes=probes, mode=mode, **given)
    assert [r.verdict for r in outcome.reports] == [verdict]


@dataclass(frozen=True)
class WrongFromSix(Pass):
    """Change the sign of every row after the fifth."""

    name = "wrong_from_six"

    def run(self, graph: Graph, ctx: Context) -> int:
        (y,) = graph.outputs
        ones = graph.add("aten.ones_like.default", [y], {"dtype": None}).result
        row = graph.add("aten.cumsum.default", [ones], {"dim": 0, "dtype": None}).result
        kept = graph.add("aten.le.Scalar", [row], {"other": 5}).result
        turned = graph.add("aten.neg.default", [y]).result
        graph.set_outputs([graph.add("aten.where.self", [kept, y, turned]).result])
        return 1


def test_more_samples_find_what_few_do_not() -> None:
    graph, probes = norm("f32")
    few = run_passes(graph, [WrongFromSix()], probes=probes)
    assert [r.verdict for r in few.reports] == ["proved"], "no probe has six rows"
    many = run_passes(graph, [WrongFromSix()], probes=probes, samples=8)
    assert [r.verdict for r in many.reports] == ["reverted"]
    labels = [p.label for p in probes.ready(8)]
    assert len(labels) == 8 == len(set(labels))
    sizes = {p.inputs[0].shape[0] for p in probes.ready(8)}
    assert 1 in sizes and max(sizes) <= 8
    assert [p.label for p in probes.ready(8)] == labels and len(list(probes.ready(3))) == 3


def on_the_edge(middle: float) -> tuple[Graph, torch.Tensor]:
    """A layer that rounds rows to int8, and a row of which 31 of 32 numbers are `middle` steps."""
    layer = torch.nn.Linear(32, 4, bias=False)
    weight = torch.full((4, 32), 0.05)
    weight[:, 0] = 10 / 127
    layer.weight = torch.nn.Parameter(weight)
    x = torch.full((1, 32), middle)
    x[0, 0] = 127
    graph = dfc.trace(layer.eval(), (x,))
    Quantize(smallest=1).run(graph, Context())
    return graph, x


@pytest.mark.parametrize(
    ("middle", "times", "agrees"), [(0.5, 1.0, True), (0.5, 2.0, False), (0.4, 1.08, False)]
)
def test_an_engine_may_go_as_far_as_a_rounded_graph_goes_by_itself(
    middle: float, times: float, agrees: bool
) -> None:
    """Values in the middle between two codes get either: here they are 8 % of the result."""
    graph, x = on_the_edge(middle)
    generator = torch.Generator().manual_seed(7)
    last_bit = 1 + 2.0**-23 * torch.randint(0, 2, x.shape, generator=generator)
    last_bit[0, 0] = 1  # which decides the scale

    def engine(inputs: Any) -> Any:
        return [times * y for y in interpret(graph, [inputs[0] * last_bit])]

    probes = make_probes(graph, [x], count=1)
    assert probes.judge(engine, rtol=ROUNDED_RTOL).agrees is False
    assert probes.judge(engine, rtol=ROUNDED_RTOL, rounded=True).agrees is agrees
    (probe,) = probes.ready()
    given = engine(probe.inputs)
    with nullcontext() if agrees else pytest.raises(DfcError, match="X003"):
        compare(graph, [x], probe.original or [], given, ["y"], rounded=ROUNDED_RTOL)


def rare(tail: str) -> tuple[Graph, torch.Tensor]:
    """A detector that sees nothing: all its results are sigmoids of about 3e-4."""
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) * 0.1
    graph = dfc.parse(f"""dfc 1
graph @f(%x: f32[4, 8]) -> f32[4, 8] {{
  %b: f32[4, 8] = aten.add.Scalar(%x, other=-8.1, alpha=1)
  %s: f32[4, 8] = aten.sigmoid.default(%b)
  {tail}
  return %y
}}
""")
    verify(graph)
    return graph, x


TAILS = ["%y: f32[4, 8] = aten.alias.default(%s)",
         "%y: f32[4, 8] = aten.mul.Scalar(%s, other=1000.0)"]  # fmt: skip


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(
    ("by", "agrees"), [(1.2e-7, True), (-1.2e-7, True), (3e-6, False), (1.5e-4, False)]
)
def test_small_sigmoids_are_exact_to_the_last_place_of_1(
    tail: str, by: float, agrees: bool
) -> None:
    graph, x = rare(tail)
    scale = 1000 if "1000" in tail else 1
    probes = make_probes(graph, [x], count=1)
    (probe,) = probes.ready()
    given = [(probe.original or [])[0] + scale * by]
    assert not judge(given, probe.original or [], probe.witness or [], rtol=1e-5).agrees
    assert probes.judge(lambda inputs: given, rtol=1e-5).agrees is agrees
    with nullcontext() if agrees else pytest.raises(DfcError, match="X003"):
        compare(graph, [x], probe.original or [], given, ["y"])


def test_without_a_function_that_saturates_small_results_are_as_exact_as_any() -> None:
    graph, x = norm("f32")[0], torch.full((4, 64), 3e-4)
    probes = make_probes(graph, [x], count=1)
    (probe,) = probes.ready()
    given = [(probe.original or [])[0] * (1 + 4e-4)]
    assert not probes.judge(lambda inputs: given, rtol=1e-5).agrees


def test_small_sigmoids_are_exported_and_wrong_ones_are_not(tmp_path: Path) -> None:
    graph, x = rare(TAILS[0])
    (right,) = make_probes(graph, [x], count=1).ready()
    written = export_onnx(graph, tmp_path / "m.onnx", probes=[right])
    assert written.proved and 0 < written.worst < 1e-2
    other = dfc.parse(str(graph).replace("-8.1", "-8.11"))  # 1 % of each result
    (wrong,) = make_probes(other, [x], count=1).ready()
    with pytest.raises(DfcError, match="X003"):
        export_onnx(graph, tmp_path / "n.onnx", probes=[wrong])
