"""Results of long passes, remembered by content: the same text and weights, or run again."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dfc
from dfc.rewrite import code_digest

ROOT = Path(__file__).resolve().parent.parent
MODULE = """
import time
import dfc


@dfc.pass_
class Slow(dfc.Pass):
    \"\"\"Halve the weights of linear layers, slowly.\"\"\"

    name = "slow"
    numerics = dfc.CHANGES
    idempotent = False
    cached = True
    factor: float = 0.5
    journal: bool = False

    def run(self, graph, ctx):
        time.sleep(1.05)
        print("ran")
        if self.journal:
            ctx.products["notes"] = "something else"
        changes = 0
        for node in list(graph.nodes):
            if node.op == "aten.linear.default":
                x, w, b = node.inputs
                made = graph.add_constant(f"{w.name}.half", w.data.tensor() * self.factor)
                graph.set_inputs_of(node, [x, made, b])
                y = graph.add("aten.neg.default", node.results, {}, names=["late"], loc=node.loc)
                graph.erase(y)
                changes += 1
        return changes
"""
MAIN = """
import sys
import torch, dfc, slow
from dfc.rewrite.driver import run_passes

torch.manual_seed(int(sys.argv[1]))
graph = dfc.trace(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), (torch.randn(2, 4),))
p = slow.Slow(factor=float(sys.argv[2]), journal=len(sys.argv) > 3)
after = run_passes(graph, [p], mode="none").graph
from dfc.ir.verify import verify
verify(after)
print(str(after))
for q in after.parameters.values():
    print(q.name, q.kind, q.data.sha256(), q.data.tensor().stride(), q.data.tensor().sum().item())
print([n.graph is after for n in after.nodes], after.notes == graph.notes)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "slow.py").write_text(MODULE)
    (tmp_path / "main.py").write_text(MAIN)
    return tmp_path


def run(home: Path, *args: str, code: str = "main.py") -> tuple[bool, str]:
    """Whether the pass ran, and what came out."""
    environment = {
        **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{home}", "XDG_CACHE_HOME": str(home / "c"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, code, *args], capture_output=True, text=True, env=environment, cwd=home
    )
    assert done.returncode == 0, done.stderr
    ran = done.stdout.startswith("ran\n")
    return ran, done.stdout.removeprefix("ran\n")


def entries(home: Path) -> list[Path]:
    return sorted((home / "c" / "dfc" / "passes").iterdir())


def test_the_same_content_is_not_run_twice_and_gives_the_same(home: Path) -> None:
    ran, fresh = run(home, "0", "0.5")
    assert ran
    (entry,) = entries(home)
    assert json.loads((entry / "facts.json").read_text()) == {"changes": 1}
    assert {p.suffix for p in entry.iterdir()} == {".dfc", ".json", ".safetensors"}
    ran, again = run(home, "0", "0.5")
    assert not ran and again == fresh


@pytest.mark.slow
def test_other_weights_options_or_code_run_again(home: Path) -> None:
    assert run(home, "0", "0.5")[0]
    assert run(home, "1", "0.5")[0]  # other weights
    assert run(home, "0", "0.25")[0]  # another option
    (home / "slow.py").write_text(MODULE.replace("0.5\n", "0.5  # another day\n"))
    assert run(home, "0", "0.5")[0]  # other code
    assert len(entries(home)) == 4


def test_what_is_imported_while_a_pass_runs_is_seen(home: Path) -> None:
    """A result that code made of which the key knew nothing is not remembered."""
    late = MODULE.replace(
        "        changes = 0\n", "        from helper import MORE\n        changes = 0\n"
    )
    (home / "slow.py").write_text(late.replace("self.factor)", "self.factor * MORE)"))
    (home / "helper.py").write_text("MORE = 1.0\n")
    ran, before = run(home, "0", "0.5")
    assert ran
    (home / "helper.py").write_text("MORE = 2.00\n")
    ran, after = run(home, "0", "0.5")
    assert ran and after != before


def test_a_package_that_brings_a_pass_is_part_of_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "brings"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text("FACTOR = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "brings", importlib.import_module("brings"))
    assert code_digest.code_of_package("brings.inner") == ""  # the user's own, which is seen anyway
    monkeypatch.setattr(code_digest, "_is_library", lambda file: file.startswith(str(tmp_path)))
    before = code_digest.code_of_package("brings.inner")
    (package / "inner.py").write_text("FACTOR = 2\n")
    assert before and code_digest.code_of_package("brings.inner") != before
    assert code_digest.code_of_package("dfc.passes.cse") == ""


def test_code_of_the_users_counts_where_their_ops_are_run() -> None:
    assert not code_digest.is_of_users(["aten.add.Tensor", "dfc.linear_w4", "relu"])
    assert code_digest.is_of_users(["aten.add.Tensor", "mylib.twice"])
    graph = dfc.trace(torch.nn.ReLU(), (torch.ones(2),))
    assert code_digest.code_of(graph) == code_digest.versions()


@pytest.mark.slow
def test_what_was_damaged_or_is_uncertain_runs_again(home: Path) -> None:
    _, fresh = run(home, "0", "0.5")
    (entry,) = entries(home)
    text = (entry / "graph.dfc").read_text()
    (entry / "graph.dfc").write_text(text.replace("relu", "tanh"))
    assert run(home, "0", "0.5") == (True, fresh)
    assert run(home, "0", "0.5") == (False, fresh)  # mended
    # A pass that leaves something besides the graph is not remembered.
    assert run(home, "0", "0.5", "journal")[0] and run(home, "0", "0.5", "journal")[0]
    (home / "c" / "dfc" / "passes").chmod(0o777)  # somebody else could have written there
    assert run(home, "0", "0.5") == (True, fresh)
