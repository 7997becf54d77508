"""Wrong rewrites are found one by one, told by rule and line, left out; the rest is kept."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import dfc
from dfc.emit.onnx_export import compare
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.ir.op import lookup
from dfc.ir.types import DTYPES
from dfc.ir.verify import verify
from dfc.lang.source import Source
from dfc.rewrite.agree import judge
from dfc.rewrite.blame import PER_RULE
from dfc.rewrite.driver import run_passes
from dfc.rewrite.pass_ import EXACT, Context, Pass, find_pass, pass_classes
from dfc.rewrite.probe import make_probes
from dfc.rewrite.read_rules import rules_of
from dfc.rewrite.rulesets import instead
from tests.golden_file import Golden, give_data, parse
from tests.seeded import BUGS, Bug, Seeded, host, read_through_alias

NODES = 27


def fields_of_class(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


def bug(name: str) -> Bug:
    return next(b for b in BUGS if b.name == name)


# Seeded bugs


@pytest.mark.parametrize("b", BUGS, ids=str)
def test_a_seeded_bug_is_caught_and_blamed_on_its_rewrite(b: Bug) -> None:
    graph, probes = host()
    outcome = run_passes(graph, [Seeded((b,))], probes=probes)
    (report,) = outcome.reports
    (out,) = report.left_out
    assert report.verdict == "proved" and report.changes == NODES - 1, report.reason
    assert out.number == line_of(graph, b.at) - 1
    if b.by_results or out.node:  # what fails half-way may not have come to its node
        assert out.node == b.at
        assert out.place == f"host.py:{line_of(graph, b.at)} ({module_of(graph, b.at)})"
    assert bool(out.elements) == bool(out.probe) == b.by_results
    assert probes.check(outcome.graph, EXACT).agrees


def line_of(graph: Graph, name: str) -> int:
    return next(n.loc.line for n in graph.nodes if n.results[0].name == name and n.loc)


def module_of(graph: Graph, name: str) -> str:
    return next(n.loc.module for n in graph.nodes if n.results[0].name == name and n.loc)


PAIRS = [
    ("swap the operands of sub", "believe that the batch is 1"),
    ("drop a random op", "raise on the way"),
    ("softmax over another dimension", "state another type"),
    ("another gelu", "forget eps", "ignore alpha", "write an op that does not exist"),
]


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
@pytest.mark.parametrize("mode", ["each", "end"])
def test_several_bugs_are_all_left_out(names: tuple[str, ...], mode: str) -> None:
    graph, probes = host()
    bugs = tuple(map(bug, names))
    steps = [Seeded(bugs), find_pass("dce")]
    outcome = run_passes(graph, steps, probes=probes, mode=mode)
    report = outcome.reports[0]
    wanted = sorted(line_of(graph, b.at) - 1 for b in bugs)
    assert sorted(x.number for x in report.left_out) == wanted
    assert report.changes == NODES - len(bugs) and report.verdict == "proved"
    assert outcome.left_out == list(report.left_out)
    assert probes.check(outcome.graph, EXACT).agrees


@pytest.mark.parametrize("b", [BUGS[0], BUGS[21]], ids=str)
def test_strict_stops_at_the_rewrite(b: Bug) -> None:
    graph, probes = host()
    with pytest.raises(DfcError, match="pass `seeded`") as error:
        run_passes(graph, [Seeded((b,))], probes=probes, strict=True)
    text = error.value.render()
    number = line_of(graph, b.at)
    assert (error.value.code, error.value.status) == ("V030", 4)
    assert f"change {number}" in text
    if b.by_results:
        assert f"traced from host.py:{number}" in text and "witness" in text


def test_the_worst_elements_are_shown_in_a_table() -> None:
    graph, probes = host()
    outcome = run_passes(graph, [Seeded((bug("sum for mean"),))], probes=probes)
    (out,) = outcome.left_out
    assert len(out.elements) == 5
    assert [e.error for e in out.elements] == sorted((e.error for e in out.elements), reverse=True)
    lines = out.lines()
    assert lines[0] == "seeded: change 18 at %mean = aten.mean.dim, traced from host.py:18 (pool)"
    assert lines[2].split() == ["index", "got", "original", "witness", "error", "allowed"]
    first = out.elements[0]
    assert lines[3].split()[-5] == f"{first.got:.9g}"
    assert abs(first.got - first.witness) == pytest.approx(first.error)
    assert len({len(line) for line in lines[2:]}) == 1, "the columns stand below each other"


def test_a_bug_of_one_size_alone_is_found_on_its_probe() -> None:
    graph, probes = host()
    labels = {p.label: p for p in probes.probes}
    example = labels["the example"]
    example.inputs = [x[:1] for x in example.inputs]  # at batch 1 it is right
    outcome = run_passes(graph, [Seeded((bug("believe that the batch is 1"),))], probes=probes)
    (out,) = outcome.left_out
    assert out.node == "batch" and out.probe == "B=4" != "the example"


# Rewrites that are wrong together, pass by pass, or not always

TWICE = """dfc 1
graph @f(%x: f32[B, 4]) -> f32[B, 4]
    where B in 1..8 {
  %a: f32[B, 4] = aten.relu.default(%x) loc("f.py":1 "")
  %b: f32[B, 4] = aten.relu.default(%a) loc("f.py":2 "")
  %c: f32[B, 4] = aten.sub.Tensor(%b, %x, alpha=1) loc("f.py":3 "")
  %d: f32[B, 4] = aten.neg.default(%c) loc("f.py":4 "")
  return %d
}
"""


def twice() -> tuple[Graph, Any]:
    graph = dfc.parse(TWICE)
    return graph, make_probes(
        graph, [torch.randn(3, 4, generator=torch.Generator().manual_seed(0))]
    )


@dataclass(frozen=True)
class DropRelus(Pass):
    """Drops relus: right as long as one is left."""

    name = "drop_relus"
    limit: int | None = None
    skip: tuple[int, ...] = ()

    def run(self, graph: Graph, ctx: Context) -> int:
        done = 0
        for number, node in enumerate([n for n in graph.nodes if n.op == "aten.relu.default"]):
            if done != self.limit and number not in self.skip:
                graph.replace(node, [node.inputs[0]])  # type: ignore[list-item]
                done += 1
        return done


def test_of_rewrites_that_are_wrong_together_the_last_is_left_out() -> None:
    graph, probes = twice()
    outcome = run_passes(graph, [DropRelus()], probes=probes)
    (out,) = outcome.left_out
    assert (out.node, out.number) == ("b", 1) and outcome.reports[0].changes == 1
    assert [n.op for n in outcome.graph.nodes].count("aten.relu.default") == 1
    assert outcome.reports[0].applied == "drop_relus{skip=[1]}"


def test_without_skip_what_comes_before_is_kept() -> None:
    @dataclass(frozen=True)
    class Limited(Pass):
        name = "limited"
        limit: int | None = None

        def run(self, graph: Graph, ctx: Context) -> int:
            return DropRelus(self.limit).run(graph, ctx)

    graph, probes = twice()
    outcome = run_passes(graph, [Limited()], probes=probes)
    assert outcome.reports[0].applied == "limited{limit=1}" and outcome.reports[0].changes == 1
    assert outcome.left_out[0].node == "b"
    assert [p.name for p in outcome.passes] == ["limited"]


def test_a_pass_that_cannot_be_cut_is_undone_with_the_first_value_that_differs() -> None:
    class Whole(Pass):
        name = "whole"

        def run(self, graph: Graph, ctx: Context) -> int:
            return DropRelus().run(graph, ctx)

        def __str__(self) -> str:
            return self.name

    graph, probes = twice()
    outcome = run_passes(graph, [Whole()], probes=probes)
    (report,) = outcome.reports
    assert report.verdict == "reverted" and "first at %c" in report.reason
    assert report.left_out[0].place == "f.py:3" and outcome.passes == []
    assert str(outcome.graph) == str(graph)


@dataclass(frozen=True)
class Fickle(Pass):
    """Wrong the first time, right the second."""

    name = "fickle"
    runs: tuple[int, ...] = (0,)
    limit: int | None = None

    def run(self, graph: Graph, ctx: Context) -> int:
        first = not ctx.data["runs"]
        ctx.data["runs"].append(1)
        return DropRelus(None if first else 1).run(graph, ctx)


def test_a_pass_that_is_not_deterministic_is_undone() -> None:
    graph, probes = twice()
    ctx = Context(data={"runs": []})
    (report,) = run_passes(graph, [Fickle()], probes=probes, ctx=ctx).reports
    assert report.verdict == "reverted" and "not deterministic" in report.reason


def test_weights_that_a_pass_wrote_to_are_told() -> None:
    class Writes(Pass):
        name = "writes"

        def run(self, graph: Graph, ctx: Context) -> int:
            p = graph.parameters["w"]
            assert p.data is not None
            p.data.tensor().mul_(2)
            read_through_alias(graph, next(graph.nodes))
            return 1

        def __str__(self) -> str:
            return self.name

    graph, probes = host()
    (report,) = run_passes(graph, [Writes()], probes=probes).reports
    assert report.verdict == "reverted" and "no longer right" in report.reason


def test_a_limit_that_is_not_obeyed_is_noticed() -> None:
    @dataclass(frozen=True)
    class Deaf(Pass):
        name = "deaf"
        limit: int | None = None

        def run(self, graph: Graph, ctx: Context) -> int:
            return DropRelus().run(graph, ctx)

    graph, probes = twice()
    (report,) = run_passes(graph, [Deaf()], probes=probes).reports
    assert report.verdict == "reverted" and report.left_out[0].number == -1


# The shipped passes can be cut

LIMITED = sorted(n for n, c in pass_classes().items() if "limit" in fields_of_class(c))
GOLDENS = [Golden.read(p) for p in sorted((Path(__file__).parent / "golden").glob("*.dfc"))]


def test_most_shipped_passes_can_be_cut() -> None:
    wanted = "canonicalize cse decompose fold_batch_norm fold_constants fuse remove_noops"
    assert set(wanted.split()) <= set(LIMITED)


@pytest.mark.parametrize("golden", [g for g in GOLDENS if g.steps in LIMITED], ids=str)
def test_a_shipped_pass_makes_as_many_changes_as_it_may(golden: Golden) -> None:
    def run(**options: Any) -> tuple[int, str]:
        graph = with_data(golden)
        return find_pass(golden.steps, options).run(graph, Context()), str(graph)

    total, whole = run()
    seen = [run(limit=n) for n in range(total + 1)]
    assert [n for n, _ in seen] == list(range(total + 1))
    assert seen[0][1] == str(with_data(golden)) and seen[-1][1] == whole
    if total and "skip" in fields_of_class(pass_classes()[golden.steps]):
        assert run(skip=tuple(range(total + 100))) == seen[0]
        assert run(skip=(0,))[0] < total + (golden.steps == "fuse") and run(skip=(0,))[1] != whole


def with_data(golden: Golden) -> Graph:
    graph = parse(golden.before)
    if golden.weights:
        give_data(graph)
    return graph


# Rules

WRONG_RULES = """dfc 1
rule drop_relu {
  match   y = relu(x)
  rewrite y = aten.alias.default(x)
  exact
}
rule sub_of_neg {
  match   y = neg(sub(a, b))
  rewrite y = sub(b, a)
  exact
}
"""


def test_a_rule_that_is_wrong_again_and_again_is_left_out_as_a_whole() -> None:
    lines = ["dfc 1", "graph @f(%x: f32[64]) -> f32[64] {", "  %v0: f32[64] = aten.sin.default(%x)"]
    for i in range(9):
        lines += [
            f"  %m{i}: f32[64] = aten.mul.Scalar(%x, other={i + 2}.0)",
            f"  %t{i}: f32[64] = aten.sin.default(%m{i})",
            f"  %r{i}: f32[64] = aten.relu.default(%t{i})",
            f"  %s{i}: f32[64] = aten.sub.Tensor(%r{i}, %x, alpha=1)",
            f"  %n{i}: f32[64] = aten.neg.default(%s{i})",
            f"  %v{i + 1}: f32[64] = aten.add.Tensor(%v{i}, %n{i}, alpha=1)",
        ]
    graph = dfc.parse("\n".join([*lines, "  return %v9", "}", ""]))
    probes = make_probes(graph, [torch.randn(64, generator=torch.Generator().manual_seed(1))])
    with instead(rules_of(Source(WRONG_RULES, "bad.dfc"), "bad")):
        outcome = run_passes(graph, [find_pass("fuse", {"rules": ("bad",)})], probes=probes)
    (report,) = outcome.reports
    assert report.verdict == "proved" and report.changes == 9, "the other rule is kept everywhere"
    numbers = [x.number for x in report.left_out]
    assert numbers[-1] == -1 and len(numbers) == PER_RULE + 1
    assert {x.rule for x in report.left_out} == {"bad.drop_relu"}
    assert "the rule `bad.drop_relu`" in report.left_out[-1].what
    assert report.applied == 'fuse{rules=["bad.sub_of_neg"]}'
    assert len(outcome.notes()) == PER_RULE + 1


def test_the_journal_tells_what_was_kept_alone() -> None:
    graph, probes = twice()
    ctx = Context()
    with instead(rules_of(Source(WRONG_RULES, "bad.dfc"), "bad")):
        outcome = run_passes(
            graph, [find_pass("fuse", {"rules": ("bad",)})], probes=probes, ctx=ctx
        )
    fired = [f.rule.full_name for f in ctx.products["fuse"].firings]
    assert len(fired) == outcome.reports[0].changes
    assert fired.count("bad.drop_relu") == 1, "of two relus in a row one may go"


def test_a_rewrite_that_is_left_out_is_not_tried_again_when_its_surroundings_change() -> None:
    graph, _ = twice()
    with instead(rules_of(Source(WRONG_RULES, "bad.dfc"), "bad")):
        step = find_pass("fuse", {"rules": ("bad.drop_relu",), "skip": (0,)})
        ctx = Context()
        run_passes(graph, [step], mode="none", ctx=ctx)
    assert [f.number for f in ctx.products["fuse"].firings] == [1]


# Numerics

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
        compare(graph, [], [original], [x], ["y"], witness=[witness], rounded=0.05)


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


# Memory


@pytest.mark.slow
def test_proving_each_pass_holds_one_copy_of_the_weights() -> None:
    """8 layers, 277 MB: activations and one layer in double precision (69 MB), with room to err."""
    script = Path(__file__).parent.parent / "benchmarks" / "memory_verify.py"
    done = subprocess.run(
        [sys.executable, str(script), "8"], capture_output=True, text=True, check=True
    )
    share = {
        line.split()[0]: float(line.split("(")[1].split()[0]) for line in done.stdout.splitlines()
    }
    assert set(share) == {"module", "file", "folded", "wrong"}
    assert max(share["module"], share["file"], share["wrong"]) < 0.7, done.stdout
    assert share["folded"] < 1.5, "new weights in the place of the old ones, which are let go"
