"""Scripts that Ctrl-C ends: what they do then they do, and PyTorch is not taken apart."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

_SCRIPT = """
import atexit, gc, os, signal, sys, time
atexit.register(lambda: print("kept", gc.get_freeze_count() > 0))  # the last to be called
import dfc

class Cycle:
    def __init__(self):
        self.me = self
        self.file, self.closed = open(sys.argv[1], "w"), open(os.devnull)
        self.closed.close()
        self.file.write("written")

made = Cycle()
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)
    return [torch.ones(2)]
"""

_PIPELINE = """
import torch
from dfc.runtime.pipeline.local import Pipeline
x = torch.ones(2)
graph = dfc.trace(torch.nn.Tanh(), (x,))
stages = dict.fromkeys(graph.nodes, 0)
try:
    {}
except KeyboardInterrupt:
    print("except")
"""

_CAUGHT = {
    "pipeline": "Pipeline(graph, stages, microbatches=1, build=lambda *_: interrupt)(x)",
    "with": "with Pipeline(graph, stages): interrupt()",
    "compiled": "made = dfc.compile(graph, engine='eager'); made._runner = interrupt; made(x)",
}


def lines(script: str, folder: Path, status: int) -> list[str]:
    """What it says; what it wrote to a file that only a cycle holds is there."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT + script, str(folder / "file")], cwd=ROOT,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert ("KeyboardInterrupt" in done.stderr) == (status != 0)
    assert (folder / "file").read_text() == "written"
    return done.stdout.splitlines()


def test_a_script_that_ctrl_c_ends_unwinds_and_is_not_taken_apart(tmp_path: Path) -> None:
    script = "try:\n    interrupt()\n    time.sleep(60)\nfinally:\n    print('finally')"
    assert lines(script, tmp_path, -signal.SIGINT) == ["finally", "kept True"]


@pytest.mark.parametrize("where", _CAUGHT)
def test_nor_is_one_that_catches_it(where: str, tmp_path: Path) -> None:
    script = _PIPELINE.format(_CAUGHT[where])
    assert lines(script, tmp_path, 0) == ["except", "kept True"]


def test_nor_is_a_command_that_is_done(tmp_path: Path) -> None:
    script = "from dfc.cli import main\nsys.argv[1:] = ['--version']\nassert main() == 0"
    version, kept = lines(script, tmp_path, 0)
    assert version.startswith("dfc ") and kept == "kept True"


_SWALLOWED = """
from dfc.ending import heeding
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGINT))
before = signal.getsignal(signal.SIGALRM), sys.unraisablehook
try:
    with heeding():
        if os.fork() == 0:
            os._exit(0)
        time.sleep(60)
except KeyboardInterrupt:
    print("except")
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
assert (signal.getsignal(signal.SIGALRM), sys.unraisablehook) == before
assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
"""


def test_ctrl_c_that_a_hook_of_fork_swallows_is_heeded(tmp_path: Path) -> None:
    assert lines(_SWALLOWED, tmp_path, 0) == ["except", "kept False"]


def test_any_other_script_ends_as_python_does(tmp_path: Path) -> None:
    script = "try:\n    interrupt()\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    pass"
    assert lines(script, tmp_path, 0) == ["kept False"]
