"""Benchmarks run rarely, so that what they import from dfc and the tests is looked up here."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks._rows import Rows

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


def _imported(script: Path) -> Iterator[tuple[str, str]]:
    """Module and name of each `from dfc... import` and `from tests... import`, wherever it is."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("dfc", "tests")):
            yield from ((node.module or "", alias.name) for alias in node.names)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_what_a_benchmark_imports_is_there(script: Path) -> None:
    for module, name in _imported(script):
        found = import_module(module)
        if not hasattr(found, name):
            import_module(f"{module}.{name}")


# benchmarks/gpu.sh, with an interpreter that says that there is a device

DEVICE = 'case "$*" in *get_device_name*) echo "Some GPU 1"; exit;; esac\n'


def gpu(tmp_path: Path, python: str, *parts: str) -> tuple[int, str, Path]:
    """The status, what was said, and the folder of results."""
    interpreter, out = tmp_path / "python", tmp_path / "out"
    interpreter.write_text(f"#!/bin/bash\n{python}")
    interpreter.chmod(0o755)
    out.mkdir()
    env = {**os.environ, "PYTHON": str(interpreter), "OUT": str(out)}
    ran = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *parts], env=env, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    return ran.returncode, ran.stdout, out


def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    status, told, out = gpu(tmp_path, f'exec {sys.executable} "$@"\n')
    assert status == 0 and told.startswith("no CUDA device that ") and not list(out.iterdir())


def test_a_part_that_is_stopped_leaves_its_lines_and_the_next_runs(tmp_path: Path) -> None:
    """Lines are in the file as they are said; `engines` is told the file that it goes on with."""
    status, _, out = gpu(
        tmp_path,
        DEVICE + 'case "$*" in\n'
        '*" pytest "*) echo first; sleep 0.5; cp $OUT/*-1-processes.txt $OUT/then; exit 3;;\n'
        '*) echo said; echo kept >>"${@: -1}";;\n'
        "esac\n",
        "processes", "engines",
    )  # fmt: skip
    head, first = (out / "then").read_text().splitlines()
    assert head.startswith("Some GPU 1, 20") and first == "first"
    assert "-- status 3 after" in (out / "gpu-some-gpu-1-processes.txt").read_text()
    assert (out / "gpu-some-gpu-1-engines.txt").read_text() == "kept\n"
    assert status == 1


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="they would run")
def test_all_parts_start(tmp_path: Path) -> None:
    status, told, out = gpu(tmp_path, f'{DEVICE}exec {sys.executable} "$@"\n')
    parts = re.split(r"^== (\w+)$", told, flags=re.M)[1:]
    said = dict(zip(parts[::2], parts[1::2], strict=True))
    assert len(said) == 8 and len(list(out.iterdir())) == 7  # engines has written none
    for name, text in said.items():
        none = "skipped" if name in ("processes", "tests") else "no CUDA device: nothing to measure"
        assert none in text and "-- done in" in text, text
    assert status == 0


def test_rows_of_a_file_are_found_and_replaced(tmp_path: Path) -> None:
    file = tmp_path / "gpu-some-gpu-1-engines.txt"
    rows = Rows(file, "Some GPU 1; engines")
    rows.put("small f32: not measured: out of memory")
    rows.put("large f32; 200 rounds\n        median   to peer\n  dfc auto   0.741 ms\n  peer  1 ms")
    rows.put("large f32: not measured: out of memory")
    rows = Rows(file, "another head")
    assert rows.head == "Some GPU 1; engines" and list(rows.blocks) == ["small f32", "large f32"]
    assert rows.has("large f32", "dfc auto") and rows.has("large f32", "peer")
    assert not rows.has("large f32", "dfc") and not rows.has("small f32", "dfc auto")
    rows.put("small f32; 9 rounds\n  dfc auto  0.1 ms")
    assert Rows(file, "").has("small f32", "dfc auto")


def test_rows_measured_on_an_h100_are_found() -> None:
    rows = Rows(ROOT / "benchmarks/results/gpu-nvidia-h100-80gb-hbm3-engines.txt", "")
    assert all(re.fullmatch(r"(bert-base|resnet50)\S+ (bf16|f32)", name) for name in rows.blocks)
    assert len(rows.blocks) == 6 and rows.has(
        "bert-base-b8-s128 bf16", "torch.compile max-autotune"
    )
