"""What a user can get wrong on the command line: a clear message, the documented exit status, and
nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dfc.cli import main
from tests.failing import Try, nets_in

NO_FILES = pytest.mark.skipif(sys.platform != "linux", reason="root may write but in /proc")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = nets_in(tmp_path_factory.mktemp("bad"))
    (folder / "broken.py").write_text("def build(:\n")
    (folder / "missing.py").write_text("import torch\nimport no_such_library\n")
    return folder


@pytest.mark.parametrize(
    ("model", "status", "message"),
    [
        ("{}/net.py:build", 2, "did you mean `nets.py`"),
        ("{}/nets.py", 2, "nets.py:build"),
        ("{}/nets.py:biuld", 2, "did you mean `build`"),
        ("{}/nets.py:number", 2, "is a int, not a function"),
        ("{}/nets.py:Net", 2, "is a class"),
        ("{}/nowhere/nets.py:build", 2, "there is no folder"),
        ("{}/broken.py:build", 8, r"broken.py:1:\d+: error\[K040\]: .* is not valid Python"),
        ("{}/missing.py:build", 8, r"missing.py:2: .*ModuleNotFoundError: .*no_such_library"),
        ("{}/nets.py:raises", 8, r"nets.py:\d+: .* raised FileNotFoundError: no checkpoint here"),
        ("{}/nets.py:leaves", 8, "raised SystemExit: bye"),
        ("{}/nets.py:bare", 2, "returned a Net, not a tuple"),
        ("{}/nets.py:too_long", 2, "returned a tuple of 5"),
        ("{}/nets.py:not_a_module", 2, "returned a int where the module should be"),
        ("{}/nets.py:tensor_for_args", 2, "a Tensor where the tuple of arguments should be"),
        ("{}/nets.py:list_for_kwargs", 2, "a list where the dict of keyword arguments should be"),
        ("{}/nets.py:misfit", 2, r"T032.*\n.*forward\(x, table=None\)"),
        ("{}/nets.py:wrong_dims", 2, "T031.*names `y`"),
        ("{}/nets.py:wrong_size", 8, r"nets.py:\d+: error.T003"),
        ("{}/nets.py:uncapturable", 3, "error.T021"),
        ("no.such.module:build", 2, "there is no module `no.such.module`"),
        ("{}/nothing.pt2", 2, "there is no"),
        ("{}/nothing.dfc", 2, "there is no"),
        ("{}/nothing.dfcpkg", 2, "there is no"),
        ("model.onnx", 2, "there is no `model.onnx`"),
        ("", 2, "`MODEL` is empty"),
        ("{}", 2, "is not a package: it has no manifest.json"),
    ],
)
def test_a_model_that_cannot_be_used(
    fails: Try, made: Path, model: str, status: int, message: str
) -> None:
    err = fails(status, "compile", model.format(made), "-o", "out.dfcpkg", "--onnx", "out.onnx")
    assert re.search(message, err), err
    assert re.search(message, fails(status, "run", model.format(made)))


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["-p", "cse,dec"], 2, "did you mean `dce`"),
        (["-p", "cse{lim=3}"], 2, "did you mean `limit`"),
        (["-p", "cse{limit=many}"], 2, "`limit`: `many` is not a whole number"),
        (["-p", "cse{limit=3"], 2, "--passes:1:1"),
        (["-p", "cse dce"], 2, "Q005"),
        (["--engine", "eagre"], 2, "did you mean `eager`"),
        (["--verify", "always"], 2, "verify is one of none, end, each"),
        (["--print-after", "cs"], 2, "did you mean `cse`"),
        (["--device", "tpu"], 2, "there are cpu and cuda"),
        (["-o", "no/such/folder/out.dfcpkg"], 2, "there is no folder `no/such/folder`"),
    ],
)
def test_an_option_that_makes_no_sense(
    fails: Try, made: Path, options: list[str], status: int, message: str
) -> None:
    err = fails(status, "compile", f"{made}/nets.py:build", *options)
    assert message in err


def test_a_device_that_is_not_here(fails: Try, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in fails(7, "compile", f"{made}/nets.py:build", "--device", "cuda")


def test_an_existing_target_is_kept(fails: Try, made: Path) -> None:
    Path("out.dfcpkg").write_text("mine")
    err = fails(2, "compile", f"{made}/nets.py:build", "-o", "out.dfcpkg")
    assert "D010" in err and "--force" in err
    fails(2, "compile", f"{made}/nets.py:build", "-o", "out.dfcpkg", "--force")
    assert Path("out.dfcpkg").read_text() == "mine"


def refused_before_the_work(fails: Try, made: Path, status: int, *argv: object) -> str:
    """The message, without the model ever having been built."""
    err = fails(status, "compile", f"{made}/nets.py:slow", *argv)
    assert not Path("ready").exists()
    return err


def test_targets_that_cannot_be_written_are_refused_before_the_work(
    fails: Try, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "`--output` is empty" in refused_before_the_work(fails, made, 2, "-o", "")
    err = refused_before_the_work(fails, made, 2, "-o", "m.x", "--html", "./m.x")
    assert "`-o` and `--html` both write `./m.x`" in err
    err = refused_before_the_work(fails, made, 2, "--onnx", made / "nets.py", "--force")
    assert "`--onnx` would replace" in err and "which is read" in err
    Path("work").mkdir()
    Path("work/thesis.txt").write_text("years")
    err = refused_before_the_work(fails, made, 2, "-o", "work", "--force")
    assert "was not written by dfc" in err
    err = refused_before_the_work(fails, made, 2, "--onnx", "work", "--force")
    assert "is not a plain file" in err
    Path("r.dfc").write_text("dfc 1\nrecipe r {\n  cse\n  emit onnx\n}\n")
    argv = ("-r", "r.dfc", "-o", "m.dfcpkg", "--onnx", "m.onnx")
    err = refused_before_the_work(fails, made, 2, *argv)
    assert "`--onnx` and `emit onnx` both write `m.onnx`" in err


@NO_FILES
@pytest.mark.parametrize("option", ["-o", "--onnx", "--html"])
def test_a_folder_that_takes_no_file_is_refused_before_the_work(
    fails: Try, made: Path, option: str
) -> None:
    err = refused_before_the_work(fails, made, 7, option, "/proc/m.x")
    assert "error[D013]: cannot write `/proc/m.x`: nothing can be written in `/proc`" in err


@NO_FILES
@pytest.mark.parametrize(
    "argv",
    ["tune {}/net.dfcpkg -o /proc/m.dfcpkg", "run {}/net.dfcpkg -o /proc/m.npz",
     "run {}/net.dfcpkg --pipeline 2 --trace /proc/m.json", "plan {}/net.dfcpkg --svg /proc/m.svg",
     "plan {}/net.dfcpkg --trace /proc/m.json", "calibrate -o /proc/m.dfc",
     "explain {}/net.dfcpkg -r r.dfc --sensitivity -o /proc/m.svg"],
)  # fmt: skip
def test_whatever_writes_looks_whether_it_can(fails: Try, made: Path, argv: str) -> None:
    Path("r.dfc").write_text("dfc 1\nrecipe r {\n  quantize int8\n}\n")
    err = fails(7, *argv.format(made).split())
    assert "nothing can be written in `/proc`" in err


def test_what_the_users_code_prints_is_no_data(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("print('at import')\n")
    argv = ["--json", "--engine", "eager", "--use", "mine.py"]
    assert main(["compile", f"{made}/nets.py:loud", *argv]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["model"].endswith("nets.py:loud")
    assert all(text in err for text in ("at import", "building", "inside forward"))


def test_what_only_another_option_reads_is_not_left_unread(fails: Try, made: Path) -> None:
    err = fails(2, "explain", f"{made}/nets.py:build", "-o", "plot.svg")
    assert "-o is for --sensitivity" in err


# inputs


def _x(*shape: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": _x(3, 5)}, "K014"),
        ({"x": _x(3)}, "K014.*must have the shape"),
        ({"x": _x(9, 4)}, "K015.*`B` is 9, outside its range 1..8"),
        ({"x": _x(0, 4)}, "K015.*`B` is 0"),
        ({"x": _x(3, 4, dtype=np.float64)}, "K013.*must have dtype f32, got f64"),
        ({"y": _x(3, 4)}, "D054.*no input `y`"),
        ({}, "D054.*`x` is missing"),
        ({"x": np.array([object()])}, "D053.*allow_pickle"),
    ],
)
def test_inputs_that_do_not_fit(
    fails: Try, made: Path, arrays: dict[str, Any], message: str
) -> None:
    np.savez("in.npz", **arrays)
    err = fails(2, "run", made / "net.dfcpkg", "in.npz", "-o", "out.npz")
    assert re.search(message, err), err


def test_input_files_that_cannot_be_read(fails: Try, made: Path) -> None:
    package = made / "net.dfcpkg"
    assert "there is no" in fails(2, "run", package, "none.npz")
    Path("x.txt").write_text("1 2 3")
    assert "no .npz, .npy or .safetensors" in fails(2, "run", package, "x.txt")
    for name in ("x.npz", "x.npy", "x.safetensors"):
        Path(name).write_bytes(b"\x10garbage\xff" * 9)
        told = fails(2, "run", package, name)
        assert f"`{name}` is not a" in told and "pickle" not in told
    for option in (["--random"], ["--size", "B=2"]):
        assert f"{option[0]} draws inputs, and `x.npz`" in fails(
            2, "run", package, "x.npz", *option
        )
    save_file({"x": torch.ones(3, 4)}, "good.safetensors")
    assert "given twice" in fails(2, "run", package, "good.safetensors", "good.safetensors")
    assert "writes no `.txt` file" in fails(2, "run", package, "-o", "out.txt")
    assert "writes a file with an ending" in fails(2, "run", package, "-o", "out")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [("C=3", "no dynamic dimension `C`"), ("B", "is no size"), ("B=-1", "is no size"),
     ("B=9", "outside its range 1..8"), ("B=0", "outside its range 1..8")],
)  # fmt: skip
def test_sizes_that_do_not_fit(fails: Try, made: Path, sizes: str, message: str) -> None:
    assert message in fails(2, "run", made / "net.dfcpkg", "--size", sizes)


# packages


@pytest.mark.parametrize("verb", ["run", "show", "verify", "bench", "compile"])
def test_a_damaged_package_is_refused_by_every_verb(
    fails: Try, made: Path, tmp_path: Path, verb: str
) -> None:
    broken = tmp_path / "broken.dfcpkg"
    shutil.copytree(made / "net.dfcpkg", broken)
    weights = bytearray((broken / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (broken / "weights.safetensors").write_bytes(weights)
    err = fails(2, verb, broken)
    assert "D027" in err and "weights.safetensors" in err


def test_a_package_of_the_wrong_kind(fails: Try, tmp_path: Path) -> None:
    from dfc.manifest import write_manifest

    (tmp_path / "other").mkdir()
    write_manifest(tmp_path / "other", "asset")
    assert "is a asset, not a package" in fails(2, "run", tmp_path / "other")


def test_text_that_does_not_parse(fails: Try) -> None:
    Path("g.dfc").write_text("dfc 1\ngraph @main(%x f32[2]) -> f32[2] {\n  return %x\n}\n")
    for verb in ("compile", "show"):
        err = fails(2, verb, "g.dfc")
        assert err.startswith("g.dfc:2:16: error[P") and "^" in err
    Path("v.dfc").write_text(
        "dfc 1\ngraph @main(%x: f32[2]) -> f32[2] {\n"
        "  %y: f32[2] = aten.expp.default(%x)\n  return %y\n}\n"
    )
    assert "unknown op `aten.expp.default`" in fails(2, "compile", "v.dfc")
    Path("b.dfc").write_bytes(b"dfc 1\xff")
    assert "not UTF-8" in fails(2, "compile", "b.dfc")


def test_a_target_is_read_before_the_model_is_built(fails: Try, made: Path) -> None:
    Path("bad.dfc").write_text("dfc 1\ntarget t { device a : h100(memory=36GB) }\n")
    err = fails(2, "plan", f"{made}/nets.py:slow", "-t", "bad.dfc")
    assert "`h100` has no `memory`" in err and "did you mean `mem`" in err
    assert not Path("ready").exists()


@pytest.mark.parametrize("verb", ["test", "check", "fmt", "compile {}/nets.py:build -r"])
def test_python_in_the_place_of_rules_and_recipes_is_one_error(
    fails: Try, made: Path, verb: str
) -> None:
    said = "1 error" if verb == "check" else ""
    err = fails(2, *verb.format(made).split(), made / "broken.py", said=said)
    assert re.findall(r"error\[(\w+)\]: ([^;]*)", err) == [("P003", "this is Python")], err
