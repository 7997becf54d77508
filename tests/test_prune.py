"""`prune`: what goes and what stays, of units and of layers; predicted, packed, explained."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dfc
from dfc.compress.blocks import find_blocks
from dfc.compress.work import work_of
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.ir.interpret import interpret
from dfc.lang.selectors import parse_selector
from dfc.rewrite.pass_ import Context
from tests.pruned import Net, X, compiled, prune, shape


@pytest.fixture(scope="module")
def net() -> Net:
    return Net().eval()


@pytest.fixture(scope="module")
def graph(net: Net) -> Graph:
    return dfc.trace(net, (X,))


def test_hidden_units_go_and_the_stream_stays(graph: Graph) -> None:
    small = prune(graph, ratio=0.3)
    for i in range(4):
        assert shape(small, f"layers.{i}.up.weight") == (48, 16), "44.8 is nearest to 48"
        assert shape(small, f"layers.{i}.down.weight") == (16, 48)
        assert shape(small, f"layers.{i}.norm.weight") == (16,)
    assert len(small.parameters) == len(graph.parameters)
    assert shape(graph, "layers.0.up.weight") == (64, 16), "the original is as it was"


def test_the_units_that_matter_least_go() -> None:
    net = Net().eval()
    gone = [3, 5, 17, 40]
    with torch.no_grad():
        net.layers[0].up.weight[gone] = 0  # type: ignore[index,union-attr]
        net.layers[0].up.bias[gone] = 0  # type: ignore[index,union-attr]
        net.layers[0].down.weight[:, gone] = 0  # type: ignore[index,union-attr]
    graph = dfc.trace(net, (X,))
    data = Context(examples=[[X]])
    for by in ("magnitude", "activation", "taylor", "reconstruction"):
        small = prune(graph, '"layers.0.up"', data, ratio=4 / 64, align=4, by=by)
        assert shape(small, "layers.0.up.weight") == (60, 16)
        torch.testing.assert_close(interpret(small, [X])[0], net(X))


def test_only_what_is_selected_goes_and_not_what_is_excepted(graph: Graph) -> None:
    small = prune(graph, '"layers.1.up"', ratio=0.5)
    assert shape(small, "layers.1.up.weight") == (32, 16)
    assert shape(small, "layers.0.up.weight") == (64, 16)
    small = prune(graph, ratio=0.5, exclude=parse_selector('"layers.1.**"'))
    assert shape(small, "layers.1.up.weight") == (64, 16)
    assert shape(small, "layers.0.up.weight") == (32, 16)


def test_a_global_ratio_takes_more_where_units_matter_less() -> None:
    net = Net().eval()
    with torch.no_grad():
        net.layers[2].up.weight[8:] *= 1e-3  # type: ignore[index,union-attr]
        net.layers[2].down.weight[:, 8:] *= 1e-3  # type: ignore[index,union-attr]
    small = prune(dfc.trace(net, (X,)), ratio=56 / 256, scope="global")
    kept = [shape(small, f"layers.{i}.up.weight")[0] for i in range(4)]
    assert kept[2] == 8 and all(k >= 56 for i, k in enumerate(kept) if i != 2), kept


# Whole layers


def test_the_layer_that_does_least_goes() -> None:
    net = Net().eval()
    with torch.no_grad():
        net.layers[2].down.weight *= 0.01  # type: ignore[union-attr,operator]
        net.layers[2].down.bias *= 0.01  # type: ignore[union-attr,operator]
    graph = dfc.trace(net, (X,))
    assert [b.path for b in find_blocks(graph) if not b.reason] == [f"layers.{i}" for i in range(4)]
    for by in ("magnitude", "activation"):
        small = prune(graph, ctx=Context(examples=[[X]]), what="layers", ratio=0.25, by=by)
        assert not any(name.startswith("layers.2.") for name in small.parameters)
        assert sum(name.startswith("layers.1.") for name in small.parameters) == 6
    shorter = copy.deepcopy(net)
    del shorter.layers[2]
    torch.testing.assert_close(interpret(small, [X])[0], shorter(X))


@pytest.mark.parametrize("weak", [(2, 3), (0, 1, 2)], ids=str)
def test_layers_that_follow_each_other_go_together(weak: tuple[int, ...]) -> None:
    net = Net().eval()
    with torch.no_grad():
        for i in weak:
            net.layers[i].up.weight *= 0.01  # type: ignore[union-attr,operator]
    small = prune(dfc.trace(net, (X,)), what="layers", ratio=len(weak) / 4)
    shorter = copy.deepcopy(net)
    shorter.layers = nn.ModuleList(b for i, b in enumerate(net.layers) if i not in weak)
    torch.testing.assert_close(interpret(small, [X])[0], shorter(X))
    assert len(small.parameters) == len([*shorter.parameters()])


class Uneven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def test_layers_without_a_residual_stay_and_say_so() -> None:
    graph = dfc.trace(Uneven().eval(), (X,))
    with pytest.raises(DfcError, match="no layer that") as error:
        prune(graph, '"layers.*"', what="layers")
    assert error.value.code == "Q071"
    assert any("no residual ties" in n for n in error.value.diagnostics[0].notes)


# Recipes


def data_bytes(package: Path) -> int:
    """Of the weights' file, without the table of names, which is as long as before."""
    data = (package / "weights.safetensors").read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def test_a_recipe_prunes_predicts_and_packs_what_is_left(net: Net, tmp_path: Path) -> None:
    said: list[str] = []
    whole = compiled(net, "dce")
    small = compiled(
        net, 'p: prune "layers.*.up" by activation using calib with ratio=0.5, refit=yes',
        "data calib", data={"calib": [X]}, progress=said.append,
    )  # fmt: skip
    (note,) = [n for n in small.report.notes if "predicted" in n]
    assert note in said and "fewer multiply-adds" in note and "x as fast by the roofline" in note
    whole.save(tmp_path / "whole.dfcpkg")
    small.save(tmp_path / "small.dfcpkg")
    small.export(tmp_path / "small.onnx")
    bytes_of = {n: data_bytes(tmp_path / n) for n in ("whole.dfcpkg", "small.dfcpkg")}
    kept = work_of(small.graph).weight_bytes / work_of(whole.graph).weight_bytes
    assert bytes_of["small.dfcpkg"] <= 1.02 * kept * bytes_of["whole.dfcpkg"]
    import onnx

    shapes = {tuple(t.dims) for t in onnx.load(tmp_path / "small.onnx").graph.initializer}
    assert (32, 16) in shapes or (16, 32) in shapes
    assert not shapes & {(64, 16), (16, 64), (64,)}
    again = dfc.load(tmp_path / "small.dfcpkg", engine="eager")
    torch.testing.assert_close(again(X), small(X))


class Positive(nn.Module):
    """What is above a threshold, as detectors give it: its size is data's to decide."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        return y[y > 0.35]


def test_results_whose_number_changes_are_no_failure() -> None:
    net = Positive().eval()
    text = 'dfc 1\nrecipe r {\n  prune "net.layers.*.up" with ratio=0.9\n}\n'
    small = dfc.compile(net, (X,), recipe=text, engine="eager")
    assert small(X).shape != net(X).shape
    assert not any("NaN" in note for note in small.report.notes)


def test_keep_if_smaller_and_taking_it_back(net: Net) -> None:
    kept = compiled(net, 'p: prune "layers.*.up" keep if smaller with ratio=0.5')
    assert shape(kept.graph, "layers.0.up.weight") == (32, 16)
    back = compiled(net, 'p: prune "layers.*.up" with ratio=0.5\nrevert p')
    assert shape(back.graph, "layers.0.up.weight") == (64, 16)


def test_the_prediction_stands_on_stderr_before_anything_is_measured(tmp_path: Path) -> None:
    """Progress is shown after a second; what a pass tells is shown in any case."""
    from typer.testing import CliRunner

    from dfc.cli.command import app

    graph, recipe = tmp_path / "net.pt2", tmp_path / "p.dfc"
    torch.export.save(torch.export.export(Net().eval(), (X,)), graph)
    recipe.write_text("dfc 1\nrecipe p {\n  prune with ratio=0.5\n}\n")
    done = CliRunner().invoke(
        app, ["compile", str(graph), "-r", str(recipe), "--engine", "eager", "--json"]
    )
    assert done.exit_code == 0, done.output
    assert "prune: predicted" in done.stderr and done.stdout.startswith("{")


# Explained


def test_explain_lists_the_groups_and_why_others_stay(graph: Graph) -> None:
    text = str(dfc.explain(graph, pass_="prune", passes=["prune"], all=True))
    assert "layers.0.up: 64 ffn, importance" in text
    assert "layers.0.up.weight[0]" in text and "48 of 64 stay" in text
    assert "it is a size of the output" in text
