"""Rules as a set: what undoes, grows, forestalls or overlaps is found on the rules' samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dfc.cli import main
from dfc.lang.source import Source
from dfc.rewrite.lint import Lint, lint
from dfc.rewrite.read_rules import rules_of


def lints(text: str) -> list[Lint]:
    return lint(rules_of(Source(f"dfc 1\n{text}", "set.dfc"), "set").rules)


def codes(text: str) -> list[tuple[str, str]]:
    return [(x.rule.name, x.problem.code) for x in lints(text)]


def rule(name: str, match: str, rewrite: str, more: str = "", sample: str = "x: f32[2, 3]") -> str:
    return f"""
rule {name} {{
  match   y = {match}
  where   floating(x)
  rewrite y = {rewrite}
  within  1e-5
  {more}
  applies {sample}
  refuses {sample.replace("f32", "i64")}
}}
"""


GOOD = rule("drop", "neg(neg(x))", "x")


def test_a_good_rule_gives_nothing() -> None:
    assert codes(GOOD) == []


def test_a_rule_that_comes_back_to_what_it_was() -> None:
    swap = rule("swap", "maximum(x, b)", "maximum(b, x)", "", "x: f32[2, 3], b: f32[2, 3]")
    assert codes(swap) == [("swap", "R030")]


def test_rules_that_undo_each_other() -> None:
    there = rule("there", "neg(x)", "mul(x, -1.0)")
    back = rule("back", "mul(x, -1.0)", "neg(x)")
    (found,) = lints(there + back)
    assert found.problem.code == "R030"
    assert "`set.there`, `set.back` undo each other" in found.problem.message
    assert codes(there) == codes(back) == []  # each alone is fine


def test_a_rule_that_grows() -> None:
    found = codes(rule("grow", "relu(x)", "relu(relu(x))"))
    assert ("grow", "R031") in found


def test_rules_that_grow_together() -> None:
    first = rule("first", "relu(x)", "clamp(tanh(x), 0.0)")
    second = rule("second", "tanh(x)", "relu(tanh(relu(x)))")
    assert "R031" in {code for _, code in codes(first + second)}


def test_a_rule_that_another_forestalls() -> None:
    broad = rule("broad", "exp(x)", "exp2(x)", "priority 1")
    narrow = rule("narrow", "exp(neg(x))", "reciprocal(exp2(x))")
    (found,) = [x for x in lints(broad + narrow) if not x.warning]
    assert (found.rule.name, found.problem.code) == ("narrow", "R032")
    assert "`set.broad` applies to every sample of it" in found.problem.message
    # Without the priority, the larger pattern comes first: nothing is wrong.
    assert codes(broad.replace("priority 1", "") + narrow) == []


def test_rules_for_the_same_place_need_a_priority() -> None:
    first = rule("first", "sigmoid(x)", "hardsigmoid(x)")
    second = rule("second", "sigmoid(x)", "tanh(x)")
    assert codes(first + second) == [("second", "R032")]  # it never has its turn
    square = first.replace("floating(x)", "floating(x) and rank(x) == 2")
    wide = second.replace("[2, 3]", "[2, 3, 4]")
    assert codes(square + wide) == [("second", "R033")]
    assert codes(square.replace("within", "priority 1\n  within") + wide) == []


def test_a_right_side_that_costs_more() -> None:
    (found,) = lints(rule("uphill", "mul(x, 3.0)", "add(add(x, x), x)"))
    assert (found.problem.code, found.warning) == ("R034", True)
    assert "set.dfc:3:1: warning[R034]" in found.render()


def test_names_that_nothing_uses() -> None:
    text = rule("unused", "dropout(x, p, False)", "x", "", "x: f32[2, 3], p=0.5")
    assert codes(text) == []  # a sample gives it
    assert codes(text.replace(", p=0.5", "").replace("x, p,", "x, _,")) == []


def test_samples_that_no_condition_refuses() -> None:
    text = rule("untried", "sum(matmul(x, w), [0])", "matmul(sum(x, [0]), w)", "",
                "x: f32[2, 3], w: f32[3, 4]")  # fmt: skip
    text = text.replace("refuses x: i64[2, 3], w: i64[3, 4]", "refuses x: f32[2, 3], w: f32[9, 9]")
    (found,) = lints(text)
    assert (found.problem.code, found.warning) == ("R036", True)


def test_the_command_tells_proofs_and_lints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "set.dfc"
    file.write_text("dfc 1\n" + GOOD)
    assert main(["test", str(file)]) == 0
    assert "set.drop: proved on " in capsys.readouterr().out
    file.write_text("dfc 1\n" + GOOD + rule("there", "neg(x)", "mul(x, -1.0)")
                    + rule("back", "mul(x, -1.0)", "neg(x)"))  # fmt: skip
    assert main(["test", str(file)]) == 9
    assert "1 error about the set" in capsys.readouterr().out
    assert main(["test", str(file), "-k", "drop", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["rule"] for r in found["rules"]] == ["set.drop"]
    assert found["rules"][0]["proved"] and found["rules"][0]["inputs"] > 50


def test_the_command_shows_what_breaks_a_rule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "set.dfc"
    file.write_text("dfc 1\n" + rule("wrong", "relu(x)", "x"))
    assert main(["test", str(file)]) == 9
    out = capsys.readouterr().out
    assert "error[R022]" in out and "left 0, right -" in out and "1 wrong" in out


def test_text_that_does_not_parse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "set.dfc"
    file.write_text("dfc 1\nrule x {\n  match y = relu(\n}\n")
    assert main(["test", str(file)]) == 2
    assert "error[P" in capsys.readouterr().err
    assert main(["test", str(tmp_path / "none.dfc")]) == 2
