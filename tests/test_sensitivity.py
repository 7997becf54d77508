"""What a step costs layer by layer: measured, told, and shown by the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dfc
from dfc.cli import main
from dfc.cli.sensitivity import tell
from dfc.compress.distance import Distance, logits_of
from dfc.compress.replay import Replay, differences
from dfc.errors import DfcError
from dfc.ir.graph import Node
from dfc.ir.interpret import interpret
from dfc.lang.selectors import parse_selector
from dfc.recipe.sensitivity import Effect, Measuring, Sensitivity
from dfc.rewrite.journal import Journal
from dfc.rewrite.pass_ import Context, find_pass
from tests.four_layers import RECIPE, data, graph, layers, net, top1


@pytest.fixture(autouse=True)
def own_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DFC_CACHE", str(tmp_path / "cache"))


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


def test_steps_without_layers_that_change_results_are_left_out() -> None:
    """`recover` has no layers; its function need not be there."""
    model, args = net()
    text = "dfc 1\nrecipe r {\n  recover by train\n  autocast bf16\n}\n"
    (found,) = dfc.sensitivity(model, args, recipe=text, times=False)
    assert found.layers and "autocast" in found.step


# The command

CODE = """
import torch
from tests.four_layers import data, net
from tests.four_layers import top1 as measured

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
