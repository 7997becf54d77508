"""Results of long passes, remembered by content: the same text and weights, or run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
