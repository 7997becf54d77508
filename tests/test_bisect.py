"""Which step, and which change of it, breaks a check: by halving, by programs, by functions."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dfc
from dfc.cli import main
from dfc.errors import DfcError
from dfc.lang.source import Source
from dfc.rewrite.bisect import Candidate, bisect
from dfc.rewrite.pass_ import PASSES, Pass, find_pass
from dfc.rewrite.read_rules import rules_of
from dfc.rewrite.rulesets import instead
from dfc.rewrite.search import NotBroken, bad_bound, find_border, first_bad
from tests.seeded import BUGS, Bug, Seeded, host
from tests.test_reproducer import RULES, model

# Halving


@pytest.mark.parametrize("bad", range(1, 40))
def test_halving_finds_each_place_in_few_tries(bad: int) -> None:
    tries = []

    def is_bad(n: int) -> bool:
        tries.append(n)
        return n >= bad

    assert first_bad(0, 40, is_bad) == bad
    assert len(tries) <= math.ceil(math.log2(40)) and len(set(tries)) == len(tries)


def test_where_it_turns_more_than_once_a_turn_is_found() -> None:
    wrong = {3, 4, 5, 9, 11, 12, 13, 14, 15, 16}
    found = first_bad(0, 16, wrong.__contains__)
    assert found in wrong and found - 1 not in wrong


@pytest.mark.parametrize("bad", [1, 2, 3, 7, 8, 9, 100])
def test_the_end_is_found_where_nobody_knows_it(bad: int) -> None:
    good, high = bad_bound(0, lambda n: n >= bad)
    assert good < bad <= high
    with pytest.raises(NotBroken):
        bad_bound(0, lambda n: False, most=1000)


@pytest.mark.parametrize("unknown", [set(), {5}, {4, 5, 6}, {1, 2, 3, 4, 5, 6, 7}, {7}, {1}])
@pytest.mark.parametrize("bad", [1, 4, 8])
def test_what_cannot_be_told_is_passed_over(bad: int, unknown: set[int]) -> None:
    border = find_border(0, 8, lambda n: None if n in unknown else n >= bad)
    assert border.good < bad <= border.bad
    assert border.between == border.bad - border.good - 1
    assert set(range(border.good + 1, border.bad)) <= unknown


# Steps and changes

RIGHT = ("canonicalize", "remove_noops", "cse")


def agreement(probes: Any) -> Callable[[Candidate], bool]:
    return lambda c: bool(probes.check(c.graph, c.promised).agrees)


@pytest.mark.parametrize("b", [b for b in BUGS if b.by_results], ids=str)
@pytest.mark.parametrize("place", [0, 3])
def test_the_step_and_its_change_are_found(b: Bug, place: int) -> None:
    graph, probes = host()
    steps: list[Pass] = [find_pass(n) for n in RIGHT]
    steps.insert(place, Seeded((b,)))
    steps.append(find_pass("dce"))
    before = str(graph)
    found = bisect(graph, steps, agreement(probes))
    assert (found.step, found.culprit) == (place + 1, "seeded")
    assert found.change is not None and found.change.node == b.at
    assert found.at == found.change.number + 1 and found.change.place.startswith("host.py:")
    assert found.tries <= 2 + math.ceil(math.log2(5)) + math.ceil(math.log2(found.changes))
    assert str(graph) == before


def test_a_rule_is_named_with_its_place() -> None:
    module, args = model()
    graph = dfc.trace(module, args)
    wanted = module(*args)

    def check(c: Candidate) -> bool:
        from dfc.ir.interpret import interpret

        return torch.allclose(interpret(c.graph, list(args))[0], wanted, atol=1e-4)

    with instead(rules_of(Source(RULES, "mine.dfc"), "mine")):
        found = bisect(graph, [find_pass("cse"), find_pass("fuse", {"rules": ("mine",)})], check)
    assert found.step == 2 and found.change is not None and found.skips
    assert (found.change.rule, found.change.origin) == ("mine.drop_relu", "mine.dfc:10:1")
    assert "test_reproducer.py" in found.change.place


def test_nothing_is_found_where_nothing_is_broken() -> None:
    graph, probes = host()
    found = bisect(graph, [find_pass(n) for n in RIGHT], agreement(probes))
    assert (found.step, found.culprit, found.change, found.tries) == (0, "", None, 2)


def test_a_check_that_fails_from_the_start_blames_no_step() -> None:
    graph, _ = host()
    with pytest.raises(DfcError, match="on the graph as it is") as error:
        bisect(graph, [find_pass("cse")], lambda c: False)
    assert (error.value.code, error.value.status) == ("Q020", 2)


@pytest.mark.parametrize("b", [b for b in BUGS if not b.by_results], ids=str)
def test_a_step_that_does_not_run_is_the_culprit(b: Bug) -> None:
    graph, probes = host()
    steps = [find_pass("cse"), Seeded((b,)), find_pass("dce")]
    found = bisect(graph, steps, agreement(probes))
    assert found.step == 2 and "pass `seeded`" in found.broken and found.tries == 2


def test_what_breaks_before_a_step_that_does_not_run_is_found_first() -> None:
    graph, probes = host()
    wrong = Seeded((BUGS[0],))
    raising = Seeded((next(b for b in BUGS if not b.by_results),))
    found = bisect(graph, [wrong, raising], agreement(probes))
    assert found.step == 1 and not found.broken and found.change is not None


def test_a_check_that_cannot_tell_leaves_a_doubt() -> None:
    graph, _ = host()
    steps = [Seeded(), find_pass("remove_noops"), find_pass("dce")]
    counts: list[int] = []

    def check(c: Candidate) -> bool | None:
        counts.append(len(c.steps))
        return {0: True, 3: False}.get(len(c.steps))

    found = bisect(graph, steps, check)
    assert (found.step, found.doubtful, found.change) == (3, 2, None)
    assert sorted(counts) == [0, 1, 2, 3]


# The command

TIDY = """
from dataclasses import dataclass
import dfc
from dfc.rewrite.pass_ import Pass

@dfc.pass_
@dataclass(frozen=True)
class Tidy(Pass):
    '''Turn additions about, and get one of them wrong.'''

    name = "tidy"
    numerics = dfc.close(1e-5)
    limit: int | None = None

    def run(self, graph, ctx):
        done = 0
        for node in list(graph.nodes):
            if done == self.limit:
                break
            if node.op == "aten.add.Tensor":
                graph.set_inputs_of(node, tuple(reversed(node.inputs)))
                done += 1
            elif node.op == "aten.sub.Tensor":
                graph.set_inputs_of(node, tuple(reversed(node.inputs)))
                done += 1
        return done
"""
MODEL = """
import torch

class Net(torch.nn.Module):
    def forward(self, x, y):
        a = x + y
        b = a + x
        c = b - y
        return torch.relu(c + a)

def build():
    torch.manual_seed(0)
    return Net(), (torch.randn(3, 4), torch.randn(3, 4))
"""
CHECKS = """
import torch

def accurate(compiled):
    x, y = torch.ones(3, 4), torch.full((3, 4), 2.0)
    assert torch.equal(compiled(x, y), torch.full((3, 4), 5.0))

def clumsy(compiled):
    return 3

def failing(compiled):
    return compiled.nothing
"""
PROGRAM = """#!{python}
import os, sys
import torch, dfc
compiled = dfc.load(sys.argv[1])
x, y = torch.ones(3, 4), torch.full((3, 4), 2.0)
print("steps:", os.environ["DFC_BISECT_STEPS"])
sys.exit(0 if torch.equal(compiled(x, y), torch.full((3, 4), 5.0)) else {status})
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in (("net.py", MODEL), ("tidy.py", TIDY), ("checks.py", CHECKS)):
        (tmp_path / name).write_text(text)
    (tmp_path / "small.dfc").write_text(
        "dfc 1\nrecipe small {\n  canonicalize\n  tidy\n  cse\n  dce\n}\n"
    )
    monkeypatch.chdir(tmp_path)
    with PASSES.restored():
        yield tmp_path


def program(files: Path, status: int = 1, name: str = "check") -> str:
    path = files / name
    path.write_text(PROGRAM.format(python=sys.executable, status=status))
    path.chmod(0o755)
    return f"./{name}"


def run(*args: str) -> int:
    return main(["bisect", "net.py:build", "--use", "tidy.py", *args])


FOUND = "change 3 of 4: change 3 at %sub = aten.sub.Tensor, traced from net.py:8"


@pytest.mark.parametrize("check", [[], ["--check", "checks.py:accurate"]], ids=["probes", "fn"])
@pytest.mark.parametrize("steps", [["-r", "small.dfc"], ["-p", "canonicalize,tidy,cse,dce"]])
def test_the_command_names_step_change_and_line(
    files: Path, check: list[str], steps: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*steps, *check) == 9
    shown = capsys.readouterr()
    assert "step 2, `tidy`, breaks the check" in shown.out
    assert FOUND in shown.out and "all before it: `limit=2`" in shown.out
    assert "after canonicalize,tidy" in shown.err and "Traceback" not in shown.err


@pytest.mark.slow
def test_a_program_is_given_packages(
    files: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(dfc.__file__).parent.parent))
    assert run("-r", "small.dfc", "--check", program(files), "--json") == 9
    shown = capfd.readouterr()
    data = json.loads(shown.out)
    assert (data["step"], data["culprit"], data["change"]) == (2, "tidy", 3)
    assert data["what"]["node"] == "sub" and data["tries"] <= 6
    assert "steps: canonicalize,tidy{limit=2}" in shown.err, "what the program prints is shown"


def test_exit_statuses_of_programs(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "bare").write_text("#!/bin/sh\nexit 0\n")
    (files / "bare").chmod(0o755)
    assert run("-p", "tidy", "--check", "bare") == 0, "a program of this folder needs no `./`"
    for status, wanted in ((0, 0), (125, 2), (7, 2), (128, 2)):
        script = files / f"s{status}"
        script.write_text(f"#!/bin/sh\nexit {status}\n")
        script.chmod(0o755)
        assert run("-p", "tidy", "--check", f"./s{status}") == wanted
    shown = capsys.readouterr()
    assert "nothing breaks the check (2 checks by `bare`, 1 step)" in shown.out
    assert "gave up" in shown.err and "on the graph as it is" in shown.err


def test_a_model_without_weights_is_given_as_text(files: Path) -> None:
    graph = "dfc 1\ngraph @f(%x: f32[4]) -> f32[4] {\n  !w: f32[4] meta\n"
    graph += "  %a: f32[4] = aten.sub.Tensor(%x, !w, alpha=1)\n"
    graph += "  %b: f32[4] = aten.add.Tensor(%a, %x, alpha=1)\n  return %b\n}\n"
    (files / "f.dfc").write_text(graph)
    script = files / "grep"
    script.write_text('#!/bin/sh\nexec grep -q "(%x, !w" "$1"\n')
    script.chmod(0o755)
    assert main(["bisect", "f.dfc", "--use", "tidy.py", "-p", "tidy", "--check", "./grep"]) == 9
    assert main(["bisect", "f.dfc", "-p", "cse"]) == 2


@pytest.mark.parametrize(
    "args, status, text",
    [
        (["-r", "small.dfc", "-p", "cse"], 2, "both name the steps"),
        (["-r", "smal.dfc"], 2, "did you mean `small.dfc`?"),
        (["--check", "./nothing"], 2, "there is no program `./nothing`"),
        (["--check", "checks.py:accurat"], 2, "did you mean `accurate`?"),
        (["--check", "check.py:accurate"], 2, "there is no `check.py`"),
        (["--check", "'"], 2, "--check cannot be read"),
        (["--check", ""], 2, "`--check` is empty"),
        (["--check", "checks.py:clumsy"], 2, "not True or False"),
        (["--check", "checks.py:failing"], 8, "checks.py:12"),
        (["--check", "./tidy.py"], 2, "chmod +x"),
    ],
    ids=str,
)
def test_what_cannot_be_checked_is_told(
    files: Path, args: list[str], status: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*args) == status
    shown = capsys.readouterr().err
    assert text in shown and "Traceback" not in shown


def test_what_bisecting_a_recipe_passes_over_is_said(tmp_path: Path) -> None:
    from dfc.cli.bisect import _recipe_steps

    file = tmp_path / "r.dfc"
    file.write_text(
        "dfc 1\nrecipe r {\n  canonicalize\n  q: remove_noops\n  cse keep if faster\n"
        "  when size > 1MiB { dce }\n  revert q\n}\n"
    )
    steps, notes = _recipe_steps(file, None)
    assert [str(p) for p in steps] == ["canonicalize", "cse"]
    assert [n.partition(":")[0] for n in notes] == [
        "`revert q`", "steps inside of `when` are passed over", "`keep if` is passed over",
    ]  # fmt: skip
