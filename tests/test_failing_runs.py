"""What can go wrong around a command that is right: passes with bugs, full disks, Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import dfc
from dfc.cli import main
from dfc.passes.cse import CommonSubexpressions
from dfc.publish import faults
from tests.failing import Try, nets_in


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nets_in(tmp_path_factory.mktemp("bad"))


# proofs


def _drops_relu(self: CommonSubexpressions, graph: Any, ctx: Any) -> int:
    for node in graph.nodes:
        if node.op == "aten.relu.default":
            graph.replace(node, [node.inputs[0]])
            return 1
    return 0


def test_a_wrong_pass_fails_under_strict(
    fails: Try, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CommonSubexpressions, "run", _drops_relu)
    err = fails(4, "compile", f"{made}/nets.py:build", "--strict", "-o", "out.dfcpkg")
    assert "pass `cse` changed the results" in err
    assert re.search(r"first at %mul.*nets.py:\d+", err), err


def test_a_wrong_pass_is_reverted_otherwise(
    made: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CommonSubexpressions, "run", _drops_relu)
    assert main(["compile", f"{made}/nets.py:build", "--engine", "eager"]) == 0
    assert "reverted" in capfd.readouterr().out


# our own bugs


def test_a_bug_leaves_a_reproducer(
    fails: Try, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(self: Any, graph: Any, ctx: Any) -> int:
        raise ZeroDivisionError("seven by zero")

    monkeypatch.setattr(CommonSubexpressions, "run", crash)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    model = f"{made}/nets.py:build"
    err = fails(1, "compile", model, "-o", "out.dfcpkg", "--verify", "none")
    assert "V034" in err and "ZeroDivisionError: seven by zero" in err
    (folder,) = tmp_path.glob("dfc-reproducer-*")
    assert str(folder) in err
    assert "aten.relu" in str(dfc.parse((folder / "graph.dfc").read_text()))
    command = (folder / "command.txt").read_text()
    assert f"dfc compile {model} -o out.dfcpkg --verify none" in command
    assert "in crash" in (folder / "error.txt").read_text()


# the world around


@pytest.mark.parametrize(
    "fault",
    ["publish.create:1:ENOSPC", "publish.fsync_folder:1:ENOSPC", "manifest.write:1:ENOSPC",
     "publish.rename:1:EROFS", "publish.fsync_file:2:EIO"],
)  # fmt: skip
def test_a_disk_that_fails_is_status_7(
    fails: Try, made: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setenv("DFC_FAULT", fault)
    faults.HITS.clear()
    argv = "compile", f"{made}/nets.py:build", "--engine", "eager", "-o", "out.dfcpkg"
    err = fails(7, *argv, said="proved on")
    assert "error[D013]: cannot write `out.dfcpkg`" in err
    assert ("free some space" in err) == ("ENOSPC" in fault)


@pytest.mark.parametrize("output", ["out.onnx", "out.npz"])
def test_a_full_disk_leaves_no_half_of_a_file(
    fails: Try, made: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.setenv("DFC_FAULT", "publish.rename:1:ENOSPC")
    faults.HITS.clear()
    runs = output.endswith("npz")
    argv = ["run", "-o", output] if runs else ["compile", "--onnx", output]
    assert "D013" in fails(7, *argv, made / "net.dfcpkg", said="" if runs else "proved on")


def test_an_interrupt_while_writing_leaves_nothing(
    fails: Try, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DFC_FAULT", "publish.rename:1:int")
    faults.HITS.clear()
    err = fails(130, "compile", f"{made}/nets.py:build", "--engine", "eager", "-o", "out.dfcpkg")
    assert "interrupted" in err


@pytest.mark.parametrize("factory", ["slow", "slow_forward"])
def test_ctrl_c_ends_a_command_at_once(made: Path, tmp_path: Path, factory: str) -> None:
    argv = ["compile", f"{made}/nets.py:{factory}", "-o", "out.dfcpkg", "--onnx", "out.onnx"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dfc.cli", *argv], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    try:
        _wait_for(tmp_path / "ready", process)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        told = process.stderr.readline()
        while told and "interrupted" not in told:
            told = process.stderr.readline()
        process.send_signal(signal.SIGINT)  # again, while it ends
        _, err = process.communicate(timeout=300)  # of an hour that it would sleep
        err = told + err
    finally:
        process.kill()
    assert process.returncode == 130
    assert "dfc: interrupted" in err and "Traceback" not in err
    assert os.listdir(tmp_path) == ["ready"]


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
