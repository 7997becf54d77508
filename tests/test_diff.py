"""Graph diff: nothing between equals, something between unequals, told in few words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import dfc
from dfc.cli import main
from dfc.ir.diff import diff_graphs
from dfc.ir.graph import Graph
from dfc.rewrite.driver import run_passes
from dfc.rewrite.pass_ import find_pass
from tests.random_graphs import random_graph

BEFORE = """dfc 1
graph @f(%x: f32[2, 3], %m: bool[2, 3]) -> (f32[2, 3]) {
  %a: f32[2, 3] = aten.exp.default(%x)
  %b: f32[2, 3] = aten.exp.default(%x)
  %s: f32[2, 3] = aten.softmax.int(%b, dim=1, dtype=None)
  %y: f32[2, 3] = aten.add.Tensor(%a, %s, alpha=1)
  return %y
}
"""


class Block(torch.nn.Module):
    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(4, 4)
        self.plain = plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        if self.plain:
            return x + y * torch.sigmoid(y)
        return x + torch.nn.functional.silu(y)


def blocks(plain: bool) -> Graph:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[Block(plain) for _ in range(4)])
    return dfc.trace(model, (torch.ones(2, 4),))


@pytest.mark.parametrize("seed", range(40))
def test_a_graph_and_its_copy_do_not_differ(seed: int) -> None:
    graph = random_graph(seed)
    found = diff_graphs(graph, graph.copy())
    assert not found, found.words()
    assert len(found.pairs) == len(graph)


@pytest.mark.parametrize("seed", range(40))
def test_a_diff_is_empty_exactly_when_graphs_are_equal(seed: int) -> None:
    graph = random_graph(seed)
    passes = [find_pass(name) for name in ("canonicalize", "remove_noops", "cse", "dce")]
    after = run_passes(graph, passes, mode="none").graph
    found = diff_graphs(graph, after)
    assert bool(found) == (graph != after)
    assert len(graph) - len(found.removed) == len(after) - len(found.added) == len(found.pairs)
    if found:
        assert found.words()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("dim=1", "dim=0", "(top): softmax: dim was 1, is 0"),
        ("alpha=1", "alpha=2", "(top): add: alpha was 1, is 2"),
        ("aten.exp.default(%x)\n  %s", "aten.neg.default(%x)\n  %s", "(top): exp became neg"),
        ("%m: bool[2, 3]", "%m: bool[2, 4]", "the input %m: bool[2, 3] became bool[2, 4]"),
        ("add.Tensor(%a, %s,", "add.Tensor(%s, %a,", "1 node reads other values"),
        ("return %y", "return %s", "(top): add is gone"),
    ],
)
def test_one_change_is_one_sentence(old: str, new: str, words: str) -> None:
    text = BEFORE.replace(old, new)
    if new == "return %s":
        text = text.replace("  %y: f32[2, 3] = aten.add.Tensor(%a, %s, alpha=1)\n", "")
    found = diff_graphs(dfc.parse(BEFORE), dfc.parse(text))
    assert words in found.words(), found.words()


def test_outputs_in_another_order_are_a_change() -> None:
    graphs = [
        dfc.parse(BEFORE.replace("-> (f32[2, 3])", "-> (f32[2, 3], f32[2, 3])").replace(
            "return %y", f"return {values}"
        ))
        for values in ("(%y, %s)", "(%s, %y)")
    ]  # fmt: skip
    assert diff_graphs(*graphs).words() == ["the outputs are other values"]


def test_equal_changes_of_sibling_modules_are_told_once() -> None:
    words = diff_graphs(blocks(True), blocks(False)).words()
    assert words == ["0-3 (4 times): sigmoid, mul became silu"]


def test_a_patch_shows_what_left_and_what_came() -> None:
    text = diff_graphs(blocks(True), blocks(False)).text(context=0).splitlines()
    assert sum(line.startswith("- ") for line in text) == 12  # with each add, which reads another
    assert sum(line.startswith("+ ") for line in text) == 8
    assert any("aten.silu.default" in line and line.startswith("+") for line in text)


def test_renamed_and_retrained_parameters_are_told() -> None:
    before, after = blocks(True), blocks(True)
    after.rename(after.parameters["0.fc.weight"], "first.weight")
    words = diff_graphs(before, after).words()
    assert words == ["!0.fc.weight is called !first.weight"]
    torch.manual_seed(1)
    other = dfc.trace(torch.nn.Sequential(Block(True)), (torch.ones(2, 4),))
    torch.manual_seed(2)
    trained = dfc.trace(torch.nn.Sequential(Block(True)), (torch.ones(2, 4),))
    words = diff_graphs(other, trained).words()
    assert words == ["!0.fc.weight has other numbers", "!0.fc.bias has other numbers"]


def test_the_command_exits_with_9_on_a_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = tmp_path / "a.dfc", tmp_path / "b.dfc"
    a.write_text(BEFORE)
    b.write_text(BEFORE.replace("dim=1", "dim=0"))
    assert main(["diff", str(a), str(a)]) == 0
    assert capsys.readouterr().out == "no difference\n"
    assert main(["diff", str(a), str(b)]) == 9
    assert "softmax: dim was 1, is 0" in capsys.readouterr().out
    assert main(["diff", str(a), "-p", "cse", "--json"]) == 9
    data = json.loads(capsys.readouterr().out)
    assert [n["op"] for n in data["removed"]] == ["aten.exp.default"]
    assert main(["diff", str(a), str(b), "--text"]) == 9
    assert "+ %s: f32[2, 3] = aten.softmax.int(%b, dim=0" in capsys.readouterr().out
    assert main(["diff", str(a)]) == 2
