"""The driver keeps the passes' promises: proves, blames, reverts, and says what it cannot know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import dfc
import dfc.ops
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.ir.interpret import interpret
from dfc.ir.types import DTYPES
from dfc.rewrite.driver import run_passes
from dfc.rewrite.pass_ import CHANGES, Context, Numerics, Pass, close, find_pass
from dfc.rewrite.probe import Probes, make_probes
from tests.golden_file import give_data

ROUNDED = close(1e-6)
TEXT = """dfc 1
graph @f(%x: f32[B, 4], %y: f32[B, 4]) -> f32[B, 4]
    where B in 1..8 {
  !w: f32[4, 4] meta

  %copy: f32[B, 4] = aten.clone.default(%x) loc("net.py":1 "")
  %a: f32[B, 4] = aten.linear.default(%copy, !w, None) loc("net.py":2 "proj")
  %b: f32[B, 4] = aten.sub.Tensor(%a, %y, alpha=1) loc("net.py":3 "proj")
  %zero: f32[B, 4] = aten.mul.Scalar(%y, other=0) loc("net.py":4 "")
  %c: f32[B, 4] = aten.relu.default(%b) loc("net.py":5 "act")
  %d: f32[B, 4] = aten.add.Tensor(%c, %zero, alpha=1) loc("net.py":6 "")
  %e: f32[B, 4] = aten.exp.default(%d) loc("net.py":7 "")
  return %e
}
"""


def example() -> tuple[Graph, Probes]:
    graph = dfc.parse(TEXT)
    give_data(graph)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 4, generator=generator) for _ in range(2))
    y[0, 0] = float("inf")
    return graph, make_probes(graph, [x, y])


def op(graph: Graph, name: str) -> Node | None:
    return next((n for n in graph.nodes if n.op == name), None)


@dataclass(frozen=True)
class SwapSub(Pass):
    """Swap the operands of a subtraction."""

    name = "swap_sub"

    def run(self, graph: Graph, ctx: Context) -> int:
        node = op(graph, "aten.sub.Tensor")
        if node is None or node.stage is not None:
            return 0
        graph.set_inputs_of(node, tuple(reversed(node.inputs)))
        return 1


@dataclass(frozen=True)
class DropRelu(Pass):
    """Drop a relu."""

    name = "drop_relu"

    def run(self, graph: Graph, ctx: Context) -> int:
        node = op(graph, "aten.relu.default")
        if node is None:
            return 0
        graph.replace(node, [next(node.operands)])
        return 1


@dataclass(frozen=True)
class FoldTimesZero(Pass):
    """Believe that x * 0 is 0."""

    name = "fold_times_zero"

    def run(self, graph: Graph, ctx: Context) -> int:
        node = op(graph, "aten.mul.Scalar")
        if node is None:
            return 0
        given = {"size": node.result.tensor_type.shape, "dtype": DTYPES["f32"]}
        zeros = graph.add("aten.zeros.default", [], given, before=node)
        graph.replace(node, zeros)
        return 1


@dataclass(frozen=True)
class Reassociate(Pass):
    """Compute `c + zero` as `(c * 3 + zero * 3) / 3`: right, but for rounding."""

    name = "reassociate"
    numerics: Numerics = ROUNDED  # type: ignore[misc]

    def run(self, graph: Graph, ctx: Context) -> int:
        node = op(graph, "aten.add.Tensor")
        if node is None:
            return 0
        thirds = [
            graph.add("aten.mul.Scalar", [v], {"other": 3.0}, before=node) for v in node.operands
        ]
        graph.set_inputs_of(node, [t.result for t in thirds])
        total = graph.add("aten.div.Scalar", [node.result], {"other": 3.0})
        graph.move_before(total, op(graph, "aten.exp.default"))  # type: ignore[arg-type]
        graph.replace_uses(node.result, total.result, where=lambda n: n is not total)
        return 1


WRONG = [(SwapSub(), "%b"), (DropRelu(), "%d"), (FoldTimesZero(), "%d")]


def same_as_original(graph: Graph, probes: Probes) -> bool:
    return probes.check(graph, find_pass("cse").numerics).agrees


# Proof and blame


def test_right_passes_are_proved() -> None:
    graph, probes = example()
    before = str(graph)
    outcome = run_passes(graph, [find_pass("remove_noops"), find_pass("cse")], probes=probes)
    noops, cse = outcome.reports
    assert (noops.verdict, noops.changes, noops.nodes_before, noops.nodes_after) == (
        "proved",
        1,
        7,
        6,
    )
    assert (cse.verdict, cse.changes) == ("unchanged", 0)
    assert noops.error is not None and noops.ms >= 0
    assert str(graph) == before, "the caller's graph is left alone"
    assert len(outcome.graph) == 6


@pytest.mark.parametrize("wrong, where", WRONG, ids=lambda x: getattr(x, "name", x))
def test_a_wrong_pass_is_caught_named_and_reverted(wrong: Pass, where: str) -> None:
    graph, probes = example()
    steps = [find_pass("remove_noops"), wrong, find_pass("dce")]
    outcome = run_passes(graph, steps, probes=probes)
    (reverted,) = outcome.reverted
    assert reverted.step == wrong.name and reverted.changes == 1
    assert where in reverted.reason and "first at" in reverted.reason
    assert same_as_original(outcome.graph, probes)
    assert len(outcome.graph) == 6, "the passes around it have their effect"


@pytest.mark.parametrize("wrong, where", WRONG, ids=lambda x: getattr(x, "name", x))
def test_strict_stops_at_a_wrong_pass(wrong: Pass, where: str) -> None:
    graph, probes = example()
    with pytest.raises(DfcError, match=wrong.name) as error:
        run_passes(graph, [wrong], probes=probes, strict=True)
    assert (error.value.code, error.value.status) == ("V030", 4)
    assert where in str(error.value)


def test_the_first_diverging_node_is_named_with_its_line() -> None:
    graph, probes = example()
    outcome = run_passes(graph, [SwapSub()], probes=probes)
    assert "first at %b = aten.sub.Tensor, traced from net.py:3 (proj)" in outcome.reports[0].reason


@pytest.mark.parametrize("wrong, where", WRONG, ids=lambda x: getattr(x, "name", x))
def test_verify_end_finds_the_culprit(wrong: Pass, where: str) -> None:
    graph, probes = example()
    steps = [find_pass("remove_noops"), wrong, find_pass("cse"), find_pass("dce")]
    outcome = run_passes(graph, steps, probes=probes, mode="end")
    assert [r.step for r in outcome.reverted] == [wrong.name]
    assert same_as_original(outcome.graph, probes)
    assert outcome.reports[0].verdict == "proved"


def test_verify_end_proves_all_at_once() -> None:
    graph, probes = example()
    steps = [find_pass(n) for n in ("canonicalize", "remove_noops", "cse", "dce")]
    outcome = run_passes(graph, steps, probes=probes, mode="end")
    assert [r.verdict for r in outcome.reports if r.changes] == ["proved"]


def test_verify_none_proves_nothing_and_says_so() -> None:
    graph, probes = example()
    outcome = run_passes(graph, [SwapSub()], probes=probes, mode="none")
    assert [r.verdict for r in outcome.reports] == ["unproved"]
    assert not same_as_original(outcome.graph, probes)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(DfcError, match="none, end, each"):
        run_passes(example()[0], [], mode="sometimes")


# How close is close


def test_rounding_is_allowed_where_it_is_promised() -> None:
    graph, probes = example()
    outcome = run_passes(graph, [Reassociate()], probes=probes)
    assert outcome.reports[0].verdict == "proved"


def test_rounding_breaks_an_exact_promise() -> None:
    graph, probes = example()

    class Exact(Reassociate):
        name = "exactly_reassociate"

    liar = Exact(numerics=find_pass("cse").numerics)
    outcome = run_passes(graph, [liar], probes=probes)
    (report,) = outcome.reports
    assert report.verdict == "reverted" and "bits changed" in report.reason
    assert "first at" in report.reason


def test_what_changes_results_on_purpose_is_left_to_its_metric() -> None:
    graph, probes = example()

    class Lossy(DropRelu):
        name = "lossy"
        numerics = CHANGES

    (report,) = run_passes(graph, [Lossy()], probes=probes).reports
    assert report.verdict == "unproved" and "on purpose" in report.reason


def test_a_graph_that_fails_when_it_runs_is_reverted() -> None:
    graph, probes = example()

    @dataclass(frozen=True)
    class Overreach(Pass):
        name = "overreach"

        def run(self, graph: Graph, ctx: Context) -> int:
            """Look up rows by numbers that no type rule can check."""
            given = {"fill_value": 7, "size": (1,), "dtype": DTYPES["i64"]}
            index = graph.add("aten.full.default", [], given, before=next(graph.nodes))
            w = graph.parameters["w"]
            node = op(graph, "aten.linear.default")
            assert node is not None
            rows = graph.add(
                "aten.index_select.default", [w, index.result], {"dim": 0}, before=node
            )
            graph.add("aten.sum.default", [rows.result], {"dtype": None})
            return 1

    (report,) = run_passes(graph, [Overreach()], probes=probes).reports
    assert report.verdict == "reverted"
    assert "the rewritten graph fails" in report.reason and "index_select" in report.reason


# Broken promises


class Broken(Pass):
    """A pass made of a function."""

    name = "broken"

    def __init__(self, run: Any) -> None:
        self._run = run

    def run(self, graph: Graph, ctx: Context) -> int:
        return int(self._run(graph))

    def __str__(self) -> str:
        return self.name


def exp(graph: Graph) -> Node:
    node = op(graph, "aten.exp.default")
    assert node is not None
    return node


def late_operand(graph: Graph) -> int:
    graph.move_before(exp(graph), next(graph.nodes))
    return 1


def unknown_op(graph: Graph) -> int:
    exp(graph).op = "aten.expp.default"
    return 1


def wrong_type(graph: Graph) -> int:
    graph.set_type(exp(graph).result, graph.parameters["w"].type)
    return 1


def wrong_operand_type(graph: Graph) -> int:
    first = next(graph.nodes).result
    graph.set_type(first, first.tensor_type.with_dtype(DTYPES["f64"]))
    return 1


INVALID = [late_operand, unknown_op, wrong_type, wrong_operand_type]


@pytest.mark.parametrize("run", INVALID)
@pytest.mark.parametrize("mode", ["none", "each"])
def test_an_invalid_graph_is_an_error_where_nothing_is_proved(run: Any, mode: str) -> None:
    graph, _ = example()
    with pytest.raises(DfcError, match="pass `broken` left an invalid graph") as error:
        run_passes(graph, [Broken(run)], mode=mode)
    assert (error.value.code, error.value.status) == ("V031", 1)
    assert "note: error[V0" in str(error.value)


@pytest.mark.parametrize("run", INVALID)
@pytest.mark.parametrize("mode", ["end", "each"])
def test_an_invalid_graph_is_undone_where_results_are_proved(run: Any, mode: str) -> None:
    graph, probes = example()
    steps = [find_pass("remove_noops"), Broken(run), find_pass("dce")]
    outcome = run_passes(graph, steps, probes=probes, mode=mode)
    (reverted,) = outcome.reverted
    assert reverted.step == "broken" and "invalid graph (error[V0" in reverted.reason
    assert same_as_original(outcome.graph, probes) and len(outcome.graph) == 6
    with pytest.raises(DfcError, match="invalid graph") as error:
        run_passes(graph, [Broken(run)], probes=probes, mode=mode, strict=True)
    assert (error.value.code, error.value.status) == ("V030", 4)


def swap(graph: Graph) -> int:
    return SwapSub().run(graph, Context()) * 0


def attribute(graph: Graph) -> int:
    graph.set_attributes(op(graph, "aten.mul.Scalar"), other=0.0)  # type: ignore[arg-type]
    return 0


def order(graph: Graph) -> int:
    node = op(graph, "aten.mul.Scalar")
    assert node is not None
    graph.move_before(node, next(graph.nodes))
    return 0


def added(graph: Graph) -> int:
    graph.add("aten.neg.default", graph.inputs[:1])
    return 0


def erased(graph: Graph) -> int:
    return find_pass("remove_noops").run(graph, Context()) * 0


def stage(graph: Graph) -> int:
    graph.set_stage(exp(graph), 1)
    return 0


def weights(graph: Graph) -> int:
    w = graph.parameters["w"]
    w.data = None
    give_data(graph)
    return 0


def outputs(graph: Graph) -> int:
    graph.set_outputs([exp(graph).inputs[0]])  # type: ignore[list-item]
    return 0


@pytest.mark.parametrize(
    "run",
    [swap, attribute, order, added, erased, stage, weights, outputs],
    ids=lambda f: f.__name__,
)
def test_a_pass_that_says_nothing_changed_is_checked(run: Any) -> None:
    graph, probes = example()
    with pytest.raises(DfcError, match="says 0 changes and changed the graph") as error:
        run_passes(graph, [Broken(run)])
    assert (error.value.code, error.value.status) == ("V032", 1)
    outcome = run_passes(graph, [Broken(run)], probes=probes)
    assert [r.verdict for r in outcome.reports] == ["reverted"]
    assert "says 0 changes" in outcome.reports[0].reason and str(outcome.graph) == str(graph)


# What cannot be proved


def test_without_weights_passes_run_unproved() -> None:
    graph = dfc.parse(TEXT)
    outcome = run_passes(graph, [find_pass("remove_noops"), find_pass("dce")])
    assert [r.verdict for r in outcome.reports] == ["unproved", "unchanged"]


def test_compiling_a_model_without_weights_says_that_nothing_was_proved() -> None:
    compiled = dfc.compile(dfc.parse(TEXT), engine="eager")
    assert not compiled.report.proved and "unproved" in compiled.report.proof
    assert any("no weights" in note for note in compiled.report.notes)
    with pytest.raises(DfcError, match="no weights"):
        compiled(torch.zeros(2, 4), torch.zeros(2, 4))


# Around the passes


def test_the_graph_is_shown_after_each_pass() -> None:
    graph, probes = example()
    seen: list[tuple[str, int]] = []
    run_passes(
        graph,
        [find_pass("remove_noops"), DropRelu(), find_pass("cse", {"limit": 0})],
        probes=probes,
        print_after=lambda step, g: seen.append((step, len(g))),
    )
    assert seen == [("remove_noops", 6), ("drop_relu", 6), ("cse{limit=0}", 6)]


def test_passes_are_handed_the_context_in_every_mode() -> None:
    class Counting(Pass):
        name = "counting"

        def __str__(self) -> str:
            return self.name

        def run(self, graph: Graph, ctx: Context) -> int:
            ctx.products["runs"] = ctx.products.get("runs", 0) + 1
            return 0

    for mode in ("none", "each", "end"):
        graph, probes = example()
        ctx = Context()
        run_passes(graph, [Counting(), Counting()], probes=probes, mode=mode, ctx=ctx)
        assert ctx.products == {"runs": 2}


def test_what_a_reverted_pass_made_is_taken_back() -> None:
    class Making(SwapSub):
        name = "making"

        def run(self, graph: Graph, ctx: Context) -> int:
            ctx.products.setdefault("made", []).append(1)
            return super().run(graph, ctx)

    for mode in ("each", "end"):
        graph, probes = example()
        made: list[int] = []
        ctx = Context(products={"made": made})
        run_passes(graph, [Making()], probes=probes, mode=mode, ctx=ctx)
        assert ctx.products == {"made": []}


def test_outputs_of_a_rewritten_graph_are_the_originals() -> None:
    graph, probes = example()
    outcome = run_passes(graph, [find_pass("remove_noops")], probes=probes)
    for probe in probes.ready():
        (before,), (after,) = (interpret(g, probe.inputs) for g in (graph, outcome.graph))
        assert torch.equal(before, after) or bool(before.isnan().any())
