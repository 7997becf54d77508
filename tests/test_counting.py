"""What a user reads of numbers: one thing in the singular, one unit everywhere, where it is of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dfc
from dfc.counting import counted
from dfc.lang.units import amount_text
from dfc.planning.stages import split
from dfc.rewrite.pass_ import Context
from tests.command import Run

ROOT = Path(__file__).resolve().parent.parent
ONE = """import torch


def build():
    return torch.nn.Linear(1, 1, bias=False).eval(), (torch.ones(1, 1),)
"""
GOAL = """dfc 1
recipe r {
  minimize latency(p50)
  minimize size
  partition on host
}
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(ONE)
    return f"{tmp_path}/net.py:build"


def test_one_is_singular() -> None:
    words = [counted(n, w) for n in (0, 1, 2) for w in ("node", "batch", "miss")]
    assert words[:3] == ["0 nodes", "0 batches", "0 misses"]
    assert words[3:6] == ["1 node", "1 batch", "1 miss"]
    assert counted(1, "op stands", "ops stand") == "1 op stands"
    assert counted(2, "op stands", "ops stand") == "2 ops stand"


def test_messages_count_one_thing(run: Run, model: str) -> None:
    assert "1 node, 1 parameter (1 element, 4 B, f32)" in run("show", model, "--summary").out
    assert "1 of 1 node, in 1 module; 1 of 1 parameter" in run("select", model, "op(linear)").out
    graph = dfc.trace(torch.nn.ReLU(), (torch.ones(2),))
    assert repr(graph) == "<graph @main: 1 input, 1 node>"


def test_times_are_told_in_one_unit(run: Run, model: str) -> None:
    assert amount_text(5e-6, "time") == "5 µs" and amount_text(2e3, "bytes", True) == "2 kB"
    told = run("plan", model).out
    assert " µs" in told and " us" not in told


def test_times_are_read_as_they_are_told(run: Run, tmp_path: Path) -> None:
    text = (
        "dfc 1\n\ntarget t {\n  device a : h100\n  link a <-> a : local(bw=3kB/s, latency=5µs)\n}\n"
    )
    (tmp_path / "t.dfc").write_text(text)
    assert run("check", tmp_path / "t.dfc").status == 0
    assert run("fmt", "--check", tmp_path / "t.dfc").status == 0


def test_what_an_encoding_lacks_is_spelled_out(model: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dfc", "plan", model]
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert b" us" in done.stdout and b"\\x" not in done.stdout


def test_a_goal_says_where_it_was_timed(run: Run, model: str, tmp_path: Path) -> None:
    (tmp_path / "r.dfc").write_text(GOAL)
    done = run("compile", model, "-r", tmp_path / "r.dfc", "--engine", "eager")
    assert done.status == 0
    (goal,) = [line for line in done.out.splitlines() if line.startswith("minimize latency")]
    assert goal.endswith("(both on eager, timed anew)")
    assert "minimize size: 4 B -> 4 B\n" in done.out
    assert (done.out + done.err).count("partition: 1 stage on host") == 1


def test_notes_are_for_the_report_and_what_is_told_is_said_at_once() -> None:
    said: list[str] = []
    ctx = Context(say=said.append)
    ctx.note("later")
    ctx.tell("now")
    assert said == ["now"] and ctx.products["notes"] == ["later", "now"]


def test_a_node_without_a_line_has_no_place(run: Run, model: str) -> None:
    """PyTorch's own modules called each other: no line of the user's is nearest."""
    code = "import torch\n\n\ndef build():\n    seq = torch.nn.Sequential(torch.nn.ReLU()).eval()\n"
    path = Path(model.partition(":")[0]).with_name("seq.py")
    path.write_text(code + "    return seq, (torch.ones(2),)\n")
    (node,) = run("select", f"{path}:build", "op(relu)", "--json").data["nodes"]
    assert node["place"] != ":0"


def test_a_pipeline_names_the_buffer_that_it_cannot_have() -> None:
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count.add_(1)
            return x + self.count

    graph = dfc.trace(Counting().eval(), (torch.ones(2),))
    with pytest.raises(dfc.DfcError, match=r"N050.*writes to its buffer `count` at every call"):
        split(graph, dict.fromkeys(graph.nodes, 0))


def test_a_batch_norm_that_counts_batches_is_named() -> None:
    norm = torch.nn.BatchNorm1d(4, momentum=None)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), norm).train()
    with pytest.raises(dfc.DfcError, match="the batch norm `1` has momentum=None") as refused:
        dfc.trace(model, (torch.randn(8, 4),))
    assert refused.value.code == "T004"
    dfc.trace(model.eval(), (torch.randn(8, 4),))
