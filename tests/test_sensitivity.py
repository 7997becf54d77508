"""What a step costs layer by layer, `worst(n)` in recipes, and metrics that say nothing."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfc
from dfc.cli import main
from dfc.cli.sensitivity import tell
from dfc.compress.distance import Distance, logits_of
from dfc.compress.replay import Replay, differences
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.ir.interpret import interpret
from dfc.lang.selectors import parse_selector
from dfc.lang.source import Source
from dfc.recipe.resolve import check_source, resolve
from dfc.recipe.sensitivity import Effect, Measuring, Sensitivity
from dfc.rewrite.journal import Journal
from dfc.rewrite.pass_ import Context, find_pass

RECIPE = """dfc 1
data val
metric top1 on val, higher is better
recipe r {
  apply simplify
  q: autocast bf16
}
"""


class Net(nn.Module):
    """Four layers; rounding the second one's weights costs the most."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 16)
        self.c, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        with torch.no_grad():
            self.b.weight[0] *= 50

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        return self.head(torch.relu(self.c(x)))


@pytest.fixture(autouse=True)
def own_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DFC_CACHE", str(tmp_path / "cache"))


def net() -> tuple[Net, tuple[Tensor]]:
    torch.manual_seed(0)
    return Net().eval(), (torch.randn(16, 8),)


def graph() -> tuple[Graph, list[Tensor]]:
    model, args = net()
    return dfc.trace(model, args), list(args)


def layers(found: Any) -> list[str]:
    return [e.layer for e in found.layers]


# Replaying


def test_a_variant_is_run_from_where_it_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    g, args = graph()
    replay = Replay(g, args)
    variant = g.copy()
    find_pass("autocast", {"select": parse_selector('"c"')}).run(variant, Context())
    ran: list[str] = []
    step = dfc.ir.interpret._Interpreter.step  # type: ignore[attr-defined]

    def counted(self: Any, node: Node, *rest: Any) -> Any:
        ran.append(node.results[0].name)
        return step(self, node, *rest)

    monkeypatch.setattr("dfc.ir.interpret._Interpreter.step", counted)
    (found,) = replay.run(variant)
    monkeypatch.undo()
    assert torch.equal(found, interpret(variant, args)[0])
    assert "linear" not in ran and "linear_1" not in ran and "linear_3" in ran
    before, after = differences(g, variant)
    assert {n.results[0].name for n in before} == {"linear_2", "relu_2"}
    assert len(after) == 4  # and two casts


def test_distances_are_what_they_say() -> None:
    torch.manual_seed(0)
    o, x = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    d = Distance((True,))
    for i in range(2):
        d.add([x[i]], [o[i]])
    assert d.relative == pytest.approx(float((x - o).norm() / o.norm()))
    assert d.cosine == pytest.approx(float(torch.cosine_similarity(x, o, dim=-1).mean()))
    kl = nn.functional.kl_div(
        x.double().log_softmax(-1), o.double().log_softmax(-1), reduction="sum", log_target=True
    )
    assert d.kl == pytest.approx(float(kl) / 10)
    d.add([torch.full((5, 7), math.nan)], [o[0]])
    assert d.relative == math.inf and d.cosine is None


def test_logits_are_products_as_they_come_out() -> None:
    assert logits_of(graph()[0]) == (True,)
    g = dfc.trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), (torch.randn(2, 4),))
    assert logits_of(g) == (False,)


# Layers


def test_each_layer_alone_is_what_it_costs() -> None:
    """Against the plain way: a copy in which one layer is changed, run as a whole."""
    model, args = net()
    (found,) = dfc.sensitivity(model, args, recipe=RECIPE, times=False)
    assert sorted(layers(found)) == ["a", "b", "c", "head"] and found.label == "q"
    assert [e.kl for e in found.layers] == sorted((e.kl for e in found.layers), reverse=True)
    g, inputs = graph()
    want = interpret(g, inputs)[0]
    for e in found.layers:
        alone = g.copy()
        selector = parse_selector(json.dumps(e.layer))
        find_pass("autocast", {"select": selector}).run(alone, Context())
        got = interpret(alone, inputs)[0]
        assert e.relative == pytest.approx(float((got - want).norm() / want.norm()), rel=1e-4)
        numel = sum(p.numel() for p in getattr(model, e.layer).parameters())
        assert e.bytes == -2 * numel
    assert found.whole.bytes == sum(e.bytes for e in found.layers)
    assert found.layers[0].layer == "b" and found.where == "the example"


def test_a_layer_whose_weights_alone_change_is_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    text = "dfc 1\nrecipe r {\n  autocast f16 with only_weights=yes\n}\n"
    (found,) = dfc.sensitivity(model, (torch.randn(4, 32),), recipe=text, times=False)
    assert sorted(layers(found)) == ["0", "2"]
    assert all(e.bytes < 0 < e.relative for e in found.layers)


def test_layers_are_timed_once_for_each_shape() -> None:
    model, args = net()
    (found,) = dfc.sensitivity(model, args, recipe=RECIPE)
    times = {e.layer: (e.before_ms, e.after_ms) for e in found.layers}
    assert times["b"] == times["c"] and all(t and t > 0 for t in times["b"])
    assert found.whole.before_ms is None


def data() -> list[tuple[Tensor, Tensor]]:
    model, _ = net()
    torch.manual_seed(1)
    xs = [torch.randn(16, 8) for _ in range(20)]
    return [(x, model(x).argmax(-1)) for x in xs]


def top1(run: Any, batches: Any) -> Tensor:
    return torch.cat([run(x).argmax(-1) == y for x, y in batches])


def test_a_metric_orders_the_layers_and_says_how_sure_it_is() -> None:
    model, args = net()
    (found,) = dfc.sensitivity(
        model, args, recipe=RECIPE, metrics={"top1": top1}, data={"val": data()}, times=False
    )
    assert found.baseline == 1.0 and found.by == "the drop of top1"
    assert [e.drop for e in found.layers] == sorted((e.drop for e in found.layers), reverse=True)
    for e in found.layers:
        assert e.metric == pytest.approx(1 - e.drop) and e.bound > e.drop
        assert e.agreement == pytest.approx(1 - e.drop)


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    g, inputs = graph()
    journal = Journal(tmp_path / "journal")
    journal.folder.mkdir()
    said: list[str] = []

    class Stop(Exception):
        pass

    def stop(what: str) -> None:
        if "layer 3" in what:
            raise Stop

    p = find_pass("autocast")
    ctx = Context(examples=[inputs], journal=journal)
    with pytest.raises(Stop):
        Measuring(g, p, ctx, stop).measured()
    (file,) = journal.folder.iterdir()
    assert len(file.read_text().splitlines()) == 2

    measured: list[str | None] = []

    class Watched(Measuring):
        def _effect(self, layer: str | None, *rest: Any) -> Any:
            measured.append(layer)
            return super()._effect(layer, *rest)

    resumed = Watched(g, p, ctx, said.append).measured()
    assert len(measured) == len(resumed.layers) + 1 + 1 - 2  # the whole, and a module of relus
    again = Measuring(g, p, Context(examples=[inputs]), said.append).measured()
    assert resumed.to_json() == again.to_json()


def test_data_of_the_step_is_what_layers_are_run_on() -> None:
    model, args = net()
    text = "dfc 1\ndata calib\nrecipe r {\n  autocast f16 using calib\n}\n"
    batches = [torch.randn(3, 8) for _ in range(6)]
    g = dfc.trace(model, args, dynamic_shapes={"x": {0: torch.export.Dim("B")}})
    (found,) = dfc.sensitivity(g, recipe=text, data={"calib": batches}, times=False)
    assert found.where == "4 batches of calib"


@pytest.mark.parametrize(
    "text, words",
    [
        ("cse", "no step of the recipe changes results on purpose"),
        ('autocast except "**"', "changes nothing in this model"),
    ],
)
def test_nothing_to_measure_is_said(text: str, words: str) -> None:
    model, args = net()
    with pytest.raises(DfcError, match=words):
        dfc.sensitivity(model, args, recipe=f"dfc 1\nrecipe r {{\n  {text}\n}}\n")


def test_a_graph_without_an_example_or_data_cannot_be_measured() -> None:
    g, _ = graph()
    with pytest.raises(DfcError, match="no data and no example"):
        dfc.sensitivity(g, recipe=RECIPE)


# worst(n)


def compiled(text: str, **options: Any) -> Any:
    model, args = net()
    return dfc.compile(
        model, args, recipe=f"dfc 1\nrecipe r {{\n  {text}\n}}\n", engine="eager", **options
    )


def stays(c: Any) -> set[str]:
    """The layers whose weights are f32 still."""
    return {
        n.split(".")[0] for n, p in c.graph.parameters.items() if str(p.tensor_type.dtype) == "f32"
    }


def test_the_worst_layers_are_left_out() -> None:
    model, args = net()
    (found,) = dfc.sensitivity(model, args, recipe=RECIPE, times=False)
    order = layers(found)
    c = compiled("autocast bf16 except worst(2)")
    assert stays(c) == set(order[:2])
    (told,) = [d for d in c.report.decisions if d.step == "autocast: worst"]
    assert told.reason.startswith(f"{order[0]}, {order[1]} of 4 layers")
    assert stays(compiled("autocast bf16 except worst(50%)")) == set(order[:2])
    assert stays(compiled("autocast bf16 except worst(1%)")) == set(order[:1])


class Branches(nn.Module):
    """The layer of the large results is far off in numbers; decisions hang on the small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.fine = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 1000 * self.large(x), self.fine(x)


def _nearness(run: Any, data: Any) -> Tensor:
    """For each item, how near the second result is to what it should be."""
    return torch.cat([-(run(x)[1] - y).abs().sum(-1) for x, y in data])


def test_the_metric_says_which_layers_are_worst_where_the_recipe_names_one() -> None:
    torch.manual_seed(0)
    model, x = Branches().eval(), torch.randn(64, 8)
    data = {"val": [(x, model(x)[1].detach())]}
    head = "dfc 1\ndata val\nmetric nearness on val, higher is better\nrecipe r {\n"
    for goal in ("", "  minimize size\n  require nearness >= baseline - 1\n"):
        recipe = f"{head}{goal}  autocast bf16 except worst(1)\n}}\n"
        c = dfc.compile(
            model, (x,), recipe=recipe, engine="eager", data=data, metrics={"nearness": _nearness}
        )
        assert stays(c) == {"fine"}
        (told,) = [d for d in c.report.decisions if d.step == "autocast: worst"]
        assert told.reason == "fine of 2 layers, by the drop of nearness"
    with pytest.raises(DfcError, match="metric `nearness` is not passed"):
        dfc.compile(model, (x,), recipe=recipe, engine="eager", data=data)


def test_worst_combines_with_what_is_named() -> None:
    assert stays(compiled('autocast bf16 except worst(1), "a"')) == {"a", "b"}
    assert stays(compiled('autocast bf16 on "a", "c" except worst(1)')) >= {"b", "head"}
    assert len(stays(compiled('autocast bf16 on "a", "c" except worst(1)'))) == 3


class Tied(nn.Module):
    """An output layer that shares the table of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid = nn.Embedding(64, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mid(self.embed(ids)))


def test_a_shared_table_is_a_layer_of_the_part_that_the_step_names() -> None:
    """The embedding reads what changes, and a step on linear layers finds nothing in it."""
    torch.manual_seed(0)
    args = (torch.arange(12).reshape(3, 4),)
    step = "quantize int8 using calib with smallest=1"
    text = f"dfc 1\ndata calib\nrecipe r {{\n  {step.replace(' using', ' on op(linear) using')}"
    data = {"calib": [args]}
    (found,) = dfc.sensitivity(Tied().eval(), args, recipe=f"{text}\n}}\n", data=data, times=False)
    assert sorted(layers(found)) == ["head", "mid"]
    both = text.replace(" on op(linear)", "")
    (found,) = dfc.sensitivity(Tied().eval(), args, recipe=f"{both}\n}}\n", data=data, times=False)
    assert sorted(layers(found)) == ["embed", "mid"], "two that share a table are one layer"
    assert sum(e.bytes for e in found.layers) == found.whole.bytes
    worst = text.replace(" with", " except worst(1) with")
    c = dfc.compile(Tied().eval(), args, recipe=f"{worst}\n}}\n", data=data, engine="eager")
    assert sum(n.op.startswith("dfc.") for n in c.graph.nodes) in (1, 2)
    told = [n for n in c.report.notes if "was not read" in n]
    assert len(told) == 1, "a step that is tried layer by layer tells once what it tells"


def test_worst_is_text_until_it_is_measured() -> None:
    text = "dfc 1\nrecipe r {\n  autocast bf16 except worst(3)\n}\n"
    g, _ = graph()
    assert check_source(Source(text), g) == ([], [])
    plan = resolve(Source(text))
    assert "worst(3)" in str(plan) and resolve(Source(str(plan))) == plan
    assert parse_selector('worst(2) | "a"').nodes_left(g)[0].loc.module == "a"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text, words",
    [
        ("autocast bf16 except worst(0)", "takes a whole number above 0, or a share"),
        ("autocast bf16 except worst(101%)", "takes a whole number above 0, or a share"),
        ("autocast bf16 except worst(a)", "takes a whole number above 0, or a share"),
        ("fuse attention except worst(2)", "`fuse` cannot be measured layer by layer"),
        ("autocast bf16 except wurst(2)", "did you mean `worst`"),
    ],
)
def test_worst_where_it_cannot_be(text: str, words: str) -> None:
    errors, _ = check_source(Source(f"dfc 1\nrecipe r {{\n  {text}\n}}\n"))
    shown = " ".join(f"{e.message} {e.help}" for e in errors)
    assert words in shown


# The command


CODE = """
import torch
from tests.test_sensitivity import data, net
from tests.test_sensitivity import top1 as measured

def build():
    return net()

def val():
    return data()

def top1(run, batches):
    return measured(run, batches)
"""


def test_the_command_shows_a_table_a_plot_and_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(CODE)
    (tmp_path / "r.dfc").write_text(RECIPE)
    call = ["explain", f"{tmp_path}/net.py:build", "-r", f"{tmp_path}/r.dfc", "--sensitivity"]
    more = ["--no-times", "--metric", f"top1={tmp_path}/net.py:top1"]
    more += ["--data", f"val={tmp_path}/net.py:val"]
    plot = tmp_path / "s.svg"
    assert run([*call, *more, "-o", str(plot)]) == 0
    shown = capsys.readouterr().out
    assert "each layer alone" in shown and "all 4 at once" in shown and "bound" in shown
    assert f"wrote {plot}" in shown.replace("\n", "")
    svg = plot.read_text()
    assert svg.startswith("<svg") and "head" in svg and "font-family" in svg
    assert "url(http" not in svg.replace('"', "") and "@font-face" not in svg, "nothing is fetched"
    assert run([*call, "--no-times", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (step,) = told["steps"]
    assert step["label"] == "q" and len(step["layers"]) == 4 and step["layers"][0]["score"] > 0
    assert run([*call, "-o", str(tmp_path / "s.txt")]) == 2
    assert "name a file that ends in .svg" in capsys.readouterr().err
    assert run([*call[:2], "--sensitivity"]) == 2
    assert "-r int8.dfc --sensitivity" in capsys.readouterr().err
    assert run([*call, "--step", "p"]) == 2
    assert "the recipe has no step `p`" in capsys.readouterr().err


def test_names_of_layers_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    long = "model.decoder.layers.11.cross_attention.output.projection.linear"
    ops = ("aten.linear.default", "dfc.linear_w4")
    effect = Effect(long, ops, -1000, 0.5, 0.9, 0.1, 1.0, 2.0, metric=0.5, drop=0.25, bound=0.5)
    tell([Sensitivity("quantize", "the drop of top1", [effect], effect, "val", 0.75)], every=True)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if long in line]
    assert "linear, linear_w4" in row and "0.2500" in row and "2 ms" in row


def run(argv: list[str]) -> int:
    return main(argv)


# Requirements that know how sure they are


def required(limit: str, wrong: int, items: int, right: int = 0) -> Any:
    """A result that is wrong on `wrong` of the items that the original is right on."""

    def top1(run: Any, batches: Any) -> Tensor:
        x = batches[0]
        first = run(x).double()
        scores = torch.ones(items)
        scores[:right] = 0
        if bool((first != net()[0](x).double()).any()):  # not the original any more
            scores[: wrong + right] = torch.cat([torch.ones(right), torch.zeros(wrong)])
        return scores

    model, args = net()
    text = f"""dfc 1
data val
metric top1 on val, higher is better
recipe r {{
  require top1 >= baseline - {limit}
  autocast bf16
}}
"""
    return dfc.compile(
        model, args, recipe=text, engine="eager", metrics={"top1": top1}, data={"val": [args[0]]}
    )


def test_a_requirement_is_met_when_its_bound_is() -> None:
    (told,) = required("2pp", wrong=10, items=2000).report.requirements
    assert told.met and not told.undecided
    assert "drop 0.50 pp, 95 % bound 0.76 pp, n=2 000, agree 99.5 %" in told.numbers


def test_a_requirement_that_is_surely_missed_is_not_met() -> None:
    with pytest.raises(dfc.RequirementMissed, match="is not met") as caught:
        required("0.5pp", wrong=100, items=2000)
    assert caught.value.status == 5 and "drop 5.00 pp" in str(caught.value)


def test_too_few_items_decide_nothing_and_it_is_said_how_many_would() -> None:
    with pytest.raises(dfc.RequirementMissed, match="cannot be judged") as caught:
        required("0.5pp", wrong=4, items=1000)  # 0.4 pp were seen: within the limit by luck or not
    (told,) = caught.value.report.requirements
    assert told.undecided and told.verdict == "NOT SHOWN"
    assert "1 000 items cannot tell it from the limit of 0.50 pp" in told.numbers
    assert "could, if the truth is this drop" in told.numbers
    with pytest.raises(dfc.RequirementMissed, match="could, if the truth is no drop at all"):
        required("0.5pp", wrong=7, items=1000)


def test_hopelessly_few_items_are_refused_before_any_work() -> None:
    with pytest.raises(DfcError, match="cannot be judged on 100 items") as caught:
        required("0.5pp", wrong=0, items=100)
    assert caught.value.code == "Q056" and "give `top1` 598 items" in str(caught.value)


def test_rows_of_sums_and_weights_are_drawn_by_rows() -> None:
    def wer(run: Any) -> Tensor:
        x = net()[1][0]
        words = torch.arange(1, 41).double()
        errors = (words / 10).floor()
        if bool((run(x) != net()[0](x)).any()):
            errors[::8] += 1
        return torch.stack([errors, words], dim=1)

    model, args = net()
    text = """dfc 1
metric wer, lower is better
recipe r {
  require wer <= baseline + 1.5pp
  autocast bf16
}
"""
    c = dfc.compile(model, args, recipe=text, engine="eager", metrics={"wer": wer})
    (told,) = c.report.requirements
    assert told.met and "drop 0.006098, 95 % bound 0.0" in told.numbers


# Metrics


@dataclass
class Returns:
    """A metric that returns something."""

    value: Any
    __name__ = "top1"

    def __call__(self, run: Any) -> Any:
        return self.value


@pytest.mark.parametrize(
    "value, words",
    [
        (None, "metric `m` returned nothing"),
        ("0.5", "metric `m` returned the text '0.5', not a number"),
        (math.nan, "metric `m` returned nan, not a number"),
        (math.inf, "metric `m` returned inf for the original model"),
        (-math.inf, "metric `m` returned -inf for the original model"),
        (torch.tensor([0.5, math.nan]), "metric `m` returned nan for item 1"),
        (torch.zeros(2, 3), r"metric `m` returned an array of \[2, 3\]"),
        (torch.zeros(0), r"metric `m` returned an array of \[0\]"),
        ({"a": 1}, "metric `m` returned a dict, not a number"),
        ([1.0, "b"], "metric `m` returned a list, not a number"),
        (1j, "metric `m` returned a complex, not a number"),
        ([[1.0, 0.0], [2.0, 0.0]], "metric `m` returned weights that are not positive"),
    ],
)
def test_a_metric_that_returns_nonsense_is_named(value: Any, words: str) -> None:
    text = "dfc 1\nmetric m, higher is better\nrecipe r {\n  maximize m\n}\n"
    model, args = net()
    with pytest.raises(DfcError, match=words) as caught:
        dfc.compile(model, args, recipe=text, engine="eager", metrics={"m": Returns(value)})
    assert caught.value.code == "K041"


def test_a_metric_that_raises_is_named_with_its_line() -> None:
    def m(run: Any) -> float:
        raise KeyError("labels")

    text = "dfc 1\nmetric m, higher is better\nrecipe r {\n  maximize m\n}\n"
    model, args = net()
    with pytest.raises(DfcError, match="metric `m`") as caught:
        dfc.compile(model, args, recipe=text, engine="eager", metrics={"m": m})
    assert caught.value.code == "K040" and caught.value.status == 8
    assert "it is called as m(run): the model, to be called like it" in str(caught.value)


def test_what_exact_steps_leave_behind_is_no_layers_gain() -> None:
    """What folding drops is no part of what quantizing a layer saves."""
    model = nn.Sequential(
        nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64)
    ).eval()
    text = "dfc 1\nrecipe r {\n  fold_batch_norm\n  q: quantize int8\n}\n"
    (found,) = dfc.sensitivity(model, (torch.randn(4, 32),), recipe=text, times=False)
    for e in found.layers:
        numel = model.get_parameter(f"{e.layer}.weight").numel()
        assert -4 * numel < e.bytes < 0
    assert found.whole.bytes == sum(e.bytes for e in found.layers)


def test_a_test_tells_what_its_quantities_are_and_no_number_twice() -> None:
    text = "dfc 1\nrecipe r {\n  require error <= 1e-3\n}\n"
    model, args = net()
    report = dfc.compile(model, args, recipe=text, engine="eager").report
    (told,) = report.requirements
    assert re.fullmatch(r"error is [\d.e-]+", told.numbers)


def test_steps_without_layers_that_change_results_are_left_out() -> None:
    """`recover` has no layers; its function need not be there."""
    model, args = net()
    text = "dfc 1\nrecipe r {\n  recover by train\n  autocast bf16\n}\n"
    (found,) = dfc.sensitivity(model, args, recipe=text, times=False)
    assert found.layers and "autocast" in found.step
