"""What the README shows runs, and what it names is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dfc.cli.command import VERBS
from tests.command import Run

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 2
    exec(compile("\n".join(blocks), str(README), "exec"), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.dfcpkg", "model.onnx"]


def test_the_readme_names_every_verb_and_status(run: Run) -> None:
    text = README.read_text()
    assert all(f"dfc {verb}" in text for verb in VERBS)
    for status in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 130):
        assert re.search(rf"(statuses:|·)\s{status} ", text), status


@pytest.mark.slow
def test_the_demo_runs(tmp_path: Path) -> None:
    from tests.assets import path_or_skip

    script = README.parent / "examples" / "sentence_encoder.py"
    argv = [
        sys.executable,
        str(script),
        "--model",
        str(path_or_skip("minilm")),
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1.0000000") >= 4 and "0.66" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder.dfcpkg", "encoder.onnx"]
