"""Recipes carried out on real models: every construct, decided by what does not depend on time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import dfc
from dfc.ir.graph import Graph
from dfc.ir.weights import TensorData
from dfc.origin import origin_of
from dfc.report import Decision, Report
from dfc.rewrite.pass_ import CHANGES, PASSES, Context, Pass


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(8, 16)
        self.bn = torch.nn.BatchNorm1d(16)
        self.head = torch.nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.bn(self.fc(x))) + 0) * 1


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Round the weights to a grid."""

    name = "round_weights"
    numerics = CHANGES
    idempotent = False
    auto = {"step": (0.5, 0.125)}  # noqa: RUF012

    step: float = 0.25
    bias: bool = True

    def run(self, graph: Graph, ctx: Context) -> int:
        chosen = [p for n, p in graph.parameters.items() if self.bias or n.endswith("weight")]
        for p in chosen:
            assert p.data is not None
            p.data = TensorData(p.name, (p.data.tensor() / self.step).round() * self.step)
        return len(chosen)


@dataclass(frozen=True)
class DropRelu(Pass):
    """Claims to be exact, and is wrong."""

    name = "drop_relu"

    def run(self, graph: Graph, ctx: Context) -> int:
        found = [n for n in graph.nodes if n.op == "aten.relu.default"]
        for n in found:
            graph.replace(n, [next(n.operands)])
        return len(found)


@pytest.fixture(autouse=True)
def passes() -> Iterator[None]:
    with PASSES.restored():
        for cls in (RoundWeights, DropRelu):
            PASSES.add(cls.name, cls, origin_of(cls))
        yield


@pytest.fixture(scope="module")
def net() -> tuple[Net, tuple[torch.Tensor]]:
    torch.manual_seed(0)
    return Net().eval(), (torch.randn(3, 8),)


NORM = "aten._native_batch_norm_legit_no_training.default"
Model = tuple[Net, tuple[torch.Tensor]]


def make(net: Model, body: str, head: str = "", **options: Any) -> dfc.Compiled:
    text = f"dfc 1\n{head}\nrecipe r {{\n{body}\n}}\n"
    return dfc.compile(*net, recipe=text, engine="eager", **options)


def verdicts(compiled: dfc.Compiled) -> dict[str, str]:
    return {p.step.partition("{")[0]: p.verdict for p in compiled.report.passes}


def ops(compiled: dfc.Compiled) -> list[str]:
    return [n.op for n in compiled.graph.nodes]


DATA = "data val\nmetric loss on val, lower is better\n"


def loss(run: Any, data: Any) -> float:
    return sum(float((run(x) - y).square().mean()) for x, y in data) / len(data)


@pytest.fixture(scope="module")
def val(net: Model) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    inputs = [torch.randn(3, 8) for _ in range(2)]
    with torch.no_grad():
        return [(x, net[0](x)) for x in inputs]


# Steps


def test_steps_run_in_order_and_are_proved(net: Model) -> None:
    compiled = make(net, "remove_noops\nfold_batch_norm\ndce")
    assert verdicts(compiled) == {
        "remove_noops": "proved", "fold_batch_norm": "proved", "dce": "proved"
    }  # fmt: skip
    assert NORM not in ops(compiled)
    torch.testing.assert_close(compiled(*net[1]), net[0](*net[1]))


def test_a_wrong_step_is_reverted_and_the_rest_goes_on(net: Model) -> None:
    compiled = make(net, "drop_relu\nremove_noops")
    assert verdicts(compiled) == {"drop_relu": "reverted", "remove_noops": "proved"}
    with pytest.raises(dfc.DfcError, match="drop_relu") as e:
        make(net, "drop_relu", strict=True)
    assert e.value.status == 4


def test_verify_end_finds_the_wrong_step_too(net: Model) -> None:
    compiled = make(net, "verify end\nremove_noops\ndrop_relu")
    assert verdicts(compiled) == {"remove_noops": "proved", "drop_relu": "reverted"}
    fine = make(net, "remove_noops\nverify end")
    assert verdicts(fine) == {"remove_noops": "proved"}


def test_verify_none_proves_nothing(net: Model) -> None:
    compiled = make(net, "verify none\nremove_noops")
    assert verdicts(compiled) == {"remove_noops": "unproved"}
    assert compiled.report.proof == "unproved"


def test_tolerances_and_samples_reach_the_proof(net: Model) -> None:
    loose = make(net, "verify each with atol=100, rtol=10\ndrop_relu")
    assert verdicts(loose) == {"drop_relu": "proved"}
    assert len(make(net, "verify each with samples=6\nremove_noops").probes) == 6


# Labels, revert, when, keep


def test_revert_goes_back_to_before_the_label(net: Model) -> None:
    compiled = make(net, "here: remove_noops\nfold_batch_norm\nrevert here")
    assert NORM in ops(compiled) and "aten.mul.Scalar" in ops(compiled)
    assert set(verdicts(compiled).values()) == {"reverted"}
    assert compiled.report.decisions[-1].step == "revert here"


def test_too_few_runs_leave_no_bounds() -> None:
    decision = Decision("s: keep if faster", "reverted", "", "eager", 0.9, 0.0, float("inf"), 3)
    assert (decision.low, decision.high) == (None, None)
    report = Report(decisions=[decision])
    assert Report.from_json(report.to_json()) == report and "Infinity" not in report.to_json()


def test_when_takes_one_branch(net: Model) -> None:
    body = "s: fold_batch_norm\ndce\nwhen size(dce) < baseline {{ {} }} else {{ {} }}"
    taken = make(net, body.format("remove_noops", "cse"))
    assert "remove_noops" in verdicts(taken) and "cse" not in verdicts(taken)
    decision = taken.report.decisions[0]
    assert decision.verdict == "taken" and "size" in decision.reason
    other = make(net, body.replace("<", ">").format("remove_noops", "cse"))
    assert "cse" in verdicts(other) and "remove_noops" not in verdicts(other)


def test_when_undoes_by_label(net: Model) -> None:
    compiled = make(net, "r: round_weights\nwhen error(r) > 1e-4 {\n revert r\n}")
    assert verdicts(compiled) == {"round_weights": "reverted"}
    assert torch.equal(compiled(*net[1]), net[0](*net[1]))


def test_keep_if_smaller_or_by_comparison(net: Model) -> None:
    same = make(net, "remove_noops keep if smaller")
    assert verdicts(same) == {"remove_noops": "reverted"}
    assert "bytes before" in same.report.passes[0].reason
    less = make(net, "fold_batch_norm\nf: dce\nkeep f if size < before")
    assert less.report.decisions[0].verdict == "kept"
    worse = make(net, "round_weights keep if error <= before * 2")
    assert verdicts(worse) == {"round_weights": "reverted"}


def test_keep_if_faster_says_what_was_measured(net: Model) -> None:
    compiled = make(net, "remove_noops keep if faster")
    (decision,) = compiled.report.decisions
    assert decision.verdict in ("kept", "reverted") and decision.engine == "eager"
    assert decision.low is not None and decision.high is not None and decision.ratio is not None
    assert decision.low <= decision.ratio <= decision.high and decision.runs >= 12
    assert "x as fast" in decision.reason


# Goals, requirements, holes


def test_goals_and_requirements_are_measured(net: Model) -> None:
    compiled = make(net, "minimize size\nrequire error <= 1e-5\nfold_batch_norm\ndce")
    (goal,) = compiled.report.goals
    assert goal.after < goal.before == compiled.report.bytes_before
    (requirement,) = compiled.report.requirements
    assert requirement.met and "1e-05" in requirement.text


def test_a_missed_requirement_is_an_error_with_the_report(net: Model) -> None:
    with pytest.raises(dfc.RequirementMissed) as e:
        make(net, "require error <= 1e-6\nrequire size <= 1GiB\nround_weights")
    assert e.value.status == 5 and e.value.code == "Q050"
    assert [r.met for r in e.value.report.requirements] == [False, True]
    assert "error is 0." in e.value.message
    assert e.value.compiled(*net[1]).shape == (3, 4)


def test_peak_memory_counts_what_is_alive(net: Model) -> None:
    with pytest.raises(dfc.RequirementMissed, match="peak_memory"):
        make(net, "require peak_memory <= 1KiB\ncse")
    compiled = make(net, "minimize peak_memory\ncse")
    weights = compiled.report.bytes_before
    # the input, and the two largest neighbours
    assert compiled.report.goals[0].before == weights + 4 * 3 * (8 + 16 + 16)


def test_timings_can_be_required(net: Model) -> None:
    body = (
        "require latency(p95) <= 1min\nrequire throughput >= 1items/s\nrequire latency >= 1ns\ncse"
    )
    assert all(r.met for r in make(net, body).report.requirements)


def test_tune_takes_the_best_by_a_metric(net: Model, val: Any) -> None:
    body = "minimize loss\nround_weights with step=tune(0.5, 0.25, 0.125)"
    compiled = make(net, body, DATA, data={"val": val}, metrics={"loss": loss})
    tried = compiled.report.tried
    assert [t.choices for t in tried] == [
        {"round_weights.step": v} for v in ("0.5", "0.25", "0.125")
    ]
    losses = [t.values["loss"] for t in tried]
    assert losses[2] == min(losses) and [t.chosen for t in tried] == [False, False, True]
    assert "round_weights with step=0.125" in compiled.recipe
    assert compiled.report.goals[0].after == losses[2] > compiled.report.goals[0].before


def test_requirements_come_before_goals(net: Model, val: Any) -> None:
    body = "minimize loss\nrequire error >= 0.05\nround_weights with step=tune(0.5, 0.001)"
    compiled = make(net, body, DATA, data={"val": val}, metrics={"loss": loss})
    assert [t.chosen for t in compiled.report.tried] == [True, False]
    assert compiled.report.tried[1].missed == ["error >= 0.05"]


def test_where_no_choice_meets_a_requirement_the_nearest_is_taken(net: Model) -> None:
    """They are all of one size: the goal chose the first, which is furthest off."""
    body = "minimize size\nrequire error <= 1e-9\nround_weights with step=tune(0.5, 0.125, 0.25)"
    with pytest.raises(dfc.RequirementMissed) as e:
        make(net, body)
    assert [t.chosen for t in e.value.report.tried] == [False, True, False]


def test_several_goals_mark_the_front(net: Model, val: Any) -> None:
    body = (
        "minimize size\nminimize loss\nf: fold_batch_norm with limit=tune(0, none)\ndce\n"
        "round_weights with step=tune(0.5, 0.125)"
    )
    body = body.replace("fold_batch_norm with limit", "cse with limit")
    compiled = make(net, body, DATA, data={"val": val}, metrics={"loss": loss})
    tried = compiled.report.tried
    assert len(tried) == 4 and sum(t.chosen for t in tried) == 1
    assert {t.choices["round_weights.step"] for t in tried if t.best} == {"0.125"}


def test_auto_tries_the_choices_of_the_pass(net: Model, val: Any) -> None:
    body = "minimize loss\nround_weights with step=auto"
    compiled = make(net, body, DATA, data={"val": val}, metrics={"loss": loss})
    assert "step=0.125" in compiled.recipe and len(compiled.report.tried) == 2


def test_a_budget_ends_the_search_and_says_so(net: Model, val: Any) -> None:
    body = "minimize loss\nround_weights with step=tune(0.5, 0.25, 0.125)"
    given: dict[str, Any] = {"data": {"val": val}, "metrics": {"loss": loss}}
    compiled = make(net, body, DATA, budget=2, **given)
    assert len(compiled.report.tried) == 2
    assert any("2 of 3 combinations" in n for n in compiled.report.notes)
    assert len(make(net, body, DATA, budget="0.001s", **given).report.tried) == 1
    with pytest.raises(dfc.DfcError, match="Q052"):
        make(net, body, DATA, budget="3GiB", **given)


def test_holes_without_a_goal_take_the_first_choices(net: Model) -> None:
    compiled = make(net, "cse with limit=tune(3, 4)")
    assert "limit=3" in compiled.recipe
    assert any("no goal" in n for n in compiled.report.notes)


# What the caller passes


def test_data_and_metrics_must_be_there(net: Model, val: Any) -> None:
    with pytest.raises(dfc.DfcError) as e:
        make(net, "minimize loss\ncse", DATA, data={"vall": val})
    assert [d.code for d in e.value.diagnostics] == ["Q051", "Q051"] and e.value.status == 2
    text = str(e.value)
    assert "did you mean `vall`" in text and "--metric loss=FILE.py:FUNCTION" in text


def test_data_that_runs_out_is_refused(net: Model) -> None:
    once: Iterator[Any] = iter([])
    with pytest.raises(dfc.DfcError, match="only once"):
        make(net, "minimize loss\ncse", DATA, data={"val": once}, metrics={"loss": loss})


def test_a_metric_that_raises_is_blamed_by_its_line(net: Model, val: Any) -> None:
    def broken(run: Any, data: Any) -> float:
        return data[99]  # the line that is named

    given: dict[str, Any] = {"data": {"val": val}}
    with pytest.raises(dfc.DfcError, match="metric `loss` raised IndexError") as e:
        make(net, "minimize loss\ncse", DATA, metrics={"loss": broken}, **given)
    span = e.value.diagnostics[0].span
    assert e.value.status == 8 and span is not None and span.file.endswith("test_recipe_run.py")
    assert "the line that is named" in str(e.value)
    with pytest.raises(dfc.DfcError, match=r"K041.*returned the text"):
        make(net, "minimize loss\ncse", DATA, metrics={"loss": lambda run, data: "x"}, **given)
    with pytest.raises(dfc.DfcError, match="cannot be called as loss"):
        make(net, "minimize loss\ncse", DATA, metrics={"loss": lambda run: 1.0}, **given)


def test_a_call_that_a_metric_makes_wrong_names_the_metric(net: Model, val: Any) -> None:
    def narrow(run: Any, data: Any) -> float:
        return float(run(torch.ones(3, 5)).mean())

    with pytest.raises(dfc.DfcError, match="must have size 8") as e:
        make(net, "minimize loss\ncse", DATA, data={"val": val}, metrics={"loss": narrow})
    assert "metric `loss` called the model so" in str(e.value) and e.value.status == 2


def test_a_metric_without_data_gets_the_model_alone(net: Model) -> None:
    def mean(run: Any) -> torch.Tensor:
        return run(torch.ones(3, 8)).abs().mean()

    compiled = make(net, "require m > 0\ncse", "metric m, higher is better", metrics={"m": mean})
    assert compiled.report.requirements[0].met


def test_what_cannot_be_measured_is_refused_before_work() -> None:
    with torch.device("meta"):
        empty = Net().eval(), (torch.randn(3, 8),)
    with pytest.raises(dfc.DfcError, match=r"Q053.*no weights"):
        make(empty, "minimize latency")
    sized = make(empty, "require size < 1MiB\ncse")
    assert sized.report.requirements[0].met


# Forms of a recipe, and what is written down


def test_a_recipe_is_text_a_file_a_plan_or_a_preset(net: Model, tmp_path: Path) -> None:
    from dfc.recipe.sources import plan_of

    file = tmp_path / "small.dfc"
    file.write_text("dfc 1\nrecipe a { cse with limit=1\n }\nrecipe b { dce\n }\n")
    plan = plan_of(file, name="a")
    text = dfc.compile(*net, recipe=plan, engine="eager").recipe
    assert text == str(plan) == dfc.compile(*net, recipe=text, engine="eager").recipe
    with pytest.raises(dfc.DfcError, match="2 recipes"):
        dfc.compile(*net, recipe=file)
    built = dfc.recipe("made").minimize("size").cse(limit=3)
    assert "cse with limit=3" in dfc.compile(*net, recipe=built, engine="eager").recipe
    assert "recipe O1 {" in dfc.compile(*net, recipe="O1", engine="eager").recipe
    with pytest.raises(dfc.DfcError, match="no recipe `O9`"):
        dfc.compile(*net, recipe="O9")
    with pytest.raises(dfc.DfcError, match=r"D050.*no `smal.dfc`"):
        dfc.compile(*net, recipe="smal.dfc")


def test_settings_change_options(net: Model) -> None:
    compiled = make(net, "q: cse with limit=1", settings={"q.limit": 7})
    assert "limit=7" in compiled.recipe
    with pytest.raises(dfc.DfcError, match="no step is called `z`"):
        make(net, "q: cse", settings={"z.limit": 7})


def test_passes_and_recipe_exclude_each_other(net: Model) -> None:
    with pytest.raises(dfc.DfcError, match="Q055"):
        dfc.compile(*net, passes=["cse"], recipe="O1")
    assert dfc.compile(*net, passes=["cse", DropRelu()], engine="eager").report.passes


def test_presets_are_sane(net: Model) -> None:
    plain = dfc.compile(*net, recipe="O0", engine="eager")
    assert plain.report.passes == [] and plain.report.nodes_before == plain.report.nodes_after
    exact = dfc.compile(*net, recipe="O1", engine="eager")
    assert torch.equal(exact(*net[1]), net[0](*net[1]))
    default = dfc.compile(*net, engine="eager")
    assert default.report.decisions[-1].step == "the result against the original"


def test_selectors_are_checked_against_the_model(net: Model) -> None:
    with pytest.raises(dfc.DfcError, match='"fd"'):
        make(net, 'fuse attention on "fd"')


def test_the_report_goes_to_json_and_back(net: Model, val: Any) -> None:
    body = "minimize loss\nrequire size < 1MiB\nround_weights keep if smaller with step=tune(1, 2)"
    report = make(net, body, DATA, data={"val": val}, metrics={"loss": loss}).report
    assert Report.from_json(report.to_json()) == report
    page = report.to_html()
    assert "round_weights.step=1" in page and "recipe r" in page and "<script" not in page
    assert "tried round_weights.step=1" in str(report) and "require size" in str(report)


def test_a_package_holds_the_resolved_recipe(net: Model, tmp_path: Path) -> None:
    compiled = make(net, "apply simplify\ncse with limit=tune(2, 3)")
    compiled.save(tmp_path / "m.dfcpkg")
    text = (tmp_path / "m.dfcpkg" / "recipe.dfc").read_text()
    assert text == compiled.recipe and "limit=2" in text and "apply" not in text
    loaded = dfc.load(tmp_path / "m.dfcpkg")
    assert loaded.recipe == text and torch.equal(loaded(*net[1]), compiled(*net[1]))


def test_emit_writes_beside_the_stem(net: Model, tmp_path: Path) -> None:
    body = 'cse\nemit onnx with opset=21\nemit graph with file="g.dfc"\n'
    body += "when size > 1GiB { emit graph\n }"
    compiled = make(net, body)
    written = compiled.emit(tmp_path / "m")
    assert written == [str(tmp_path / "m.onnx"), str(tmp_path / "g.dfc")]
    assert dfc.parse((tmp_path / "g.dfc").read_text()) == compiled.graph
