"""The kernels are built with the package, or not: then the reason is said, and what to do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dfc
from dfc.runtime.kernels import build, library

ROOT = Path(__file__).resolve().parent.parent
BUILT = pytest.mark.skipif(not library.state().built, reason="they are not")


def test_without_a_compiler_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler"):
        build.build(tmp_path / "lib.so")
    assert list(tmp_path.glob("*.so")) == []
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.BuildError, match="failed"):
        build.build(tmp_path / "lib.so")


def test_the_package_is_built_from_files_that_an_sdist_has() -> None:
    """In an sdist, links are folders: what setup.py names must be below the package's own."""
    named = re.search(r'KERNELS = Path\("([^"]+)"\)', (ROOT / "setup.py").read_text())
    assert named is not None and named[1].startswith("dfc/")
    assert all((ROOT / named[1] / f).is_file() for f in (*build.SOURCES, *build.HEADERS))


@BUILT
@pytest.mark.parametrize("value, path", [("off", None), ("portable", "portable")])
def test_a_variable_turns_kernels_off_or_chooses_a_path(value: str, path: str | None) -> None:
    code = "from dfc.runtime.kernels.library import state; print(state().path, state().reason)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, library.OFF: value},
    )
    assert done.stdout.startswith(f"{path} "), done.stderr


@BUILT
def test_a_report_says_that_layers_ran_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def notes() -> list[str]:
        model, x = torch.nn.Linear(32, 32).eval(), torch.randn(2, 32)
        recipe = "dfc 1\nrecipe r {\n  quantize int8\n}\n"
        return dfc.compile(model, (x,), recipe=recipe, engine="eager").report.notes

    assert not any("kernels" in note for note in notes())
    monkeypatch.setattr(library, "_load", lambda: (None, "not built"))
    monkeypatch.setattr(library, "compiler", lambda: ["c++"])
    assert any("not built: the engines' own are used; python -m" in note for note in notes())


@BUILT
def test_the_doctor_tells_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    from dfc.cli import doctor

    data = doctor._look()
    assert data["kernels"]["built"] and data["kernels"]["path"] in data["kernels"]["paths"]
    doctor._print(data)
    assert "int4 and int8 linear layers: " in " ".join(capsys.readouterr().out.split())


def test_the_doctor_says_what_to_do_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_load", lambda: (None, "not built"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert library.state().advice == "apt-get install g++, then python -m dfc.runtime.kernels.build"
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(library, "compiler", lambda: ["c++"])
    assert library.state().advice == "python -m dfc.runtime.kernels.build"
