"""What a user can get wrong, and what can go wrong around them: a clear message, the documented
exit status, and nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import dfc
from dfc.cli import main
from dfc.passes.cse import CommonSubexpressions
from dfc.publish import faults

NETS = """
import time
from pathlib import Path
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(4, 4)

    def forward(self, x, table=None):
        y = torch.relu(self.fc(x)) * 2
        return y if table is None else table[y.long()]


def build():
    torch.manual_seed(0)
    return Net().eval(), (torch.randn(3, 4),), None, {"x": {0: torch.export.Dim("B", max=8)}}


def load_checkpoint():
    raise FileNotFoundError("no checkpoint here")


def raises():
    load_checkpoint()


def leaves():
    raise SystemExit("bye")


def bare():
    return Net()


def too_long():
    return Net(), (), {}, None, 5


def not_a_module():
    return 3, (torch.ones(1),)


def tensor_for_args():
    return Net(), torch.ones(3, 4)


def list_for_kwargs():
    return Net(), (torch.ones(3, 4),), [1]


def misfit():
    return Net(), (torch.ones(3, 4), None, 7)


def wrong_size():
    return Net(), (torch.ones(3, 5),)


def wrong_dims():
    return Net(), (torch.ones(3, 4),), None, {"y": {0: "B"}}


class Sparse(torch.nn.Module):
    def forward(self, x):
        return x.to_sparse()


def uncapturable():
    return Sparse(), (torch.ones(3),)


def slow():
    Path("ready").touch()
    time.sleep(3600)


class Loud(torch.nn.Module):
    def forward(self, x):
        print("inside forward")
        return x + 1


def loud():
    print("building")
    return Loud(), (torch.ones(2),)


class Slow(torch.nn.Module):
    def forward(self, x):
        Path("ready").touch()
        time.sleep(3600)
        return x


def slow_forward():
    return Slow(), (torch.ones(1),)


number = 3
"""

Try = Callable[..., str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "nets.py").write_text(NETS)
    (folder / "broken.py").write_text("def build(:\n")
    (folder / "missing.py").write_text("import torch\nimport no_such_library\n")
    model, args, _, shapes = _build(folder)
    dfc.compile(model, args, dynamic_shapes=shapes, engine="eager").save(folder / "net.dfcpkg")
    return folder


def _build(folder: Path) -> Any:
    from dfc.cli.sources import open_source

    found = open_source(f"{folder}/nets.py:build")
    return found.model, found.args, found.kwargs, found.dynamic_shapes


@pytest.fixture
def fails(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Try:
    """Run a command in an empty folder; it must fail so, say why, and leave nothing. On stdout it
    says nothing, or what is `said` of work that was done before."""
    here = tmp_path / "work"
    here.mkdir()
    monkeypatch.chdir(here)

    def attempt(status: int, *argv: object, said: str = "") -> str:
        before = sorted(os.listdir(here))
        capfd.readouterr()
        found = main([str(a) for a in argv])
        out, err = capfd.readouterr()
        assert found == status, err
        assert said in out if said else out == "", out
        assert "Traceback" not in err
        assert sorted(os.listdir(here)) == before
        return err

    return attempt


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
    assert fails(status, "run", model.format(made)) is not None


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
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    err = refused_before_the_work(fails, made, 7, "-o", "m.dfcpkg")
    assert "error[D013]: cannot write `m.dfcpkg`: nothing can be written in `.`" in err


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


@pytest.mark.parametrize(
    ("given", "code", "status"),
    [
        ({"args": torch.ones(4, 16)}, "T030", 2),
        ({"kwargs": [1]}, "Q055", 2),
        ({"model": "net.py"}, "Q055", 2),
        ({"recipe": 3}, "Q055", 2),
        ({"data": [1]}, "Q055", 2),
        ({"metrics": [1]}, "Q055", 2),
        ({"passes": "cse"}, "Q055", 2),
        ({"passes": [dfc.Pass]}, "Q001", 2),
        ({"progress": True}, "Q055", 2),
        ({"engine": 3}, "Q055", 2),
        ({"device": "gpu"}, "Q007", 2),
        ({"device": "cuda:x"}, "Q007", 2),
        ({"device": "cuda:99"}, "K004", 7),
    ],
)
def test_arguments_of_compile_are_checked_first(
    given: dict[str, Any], code: str, status: int
) -> None:
    right = {"model": torch.nn.Linear(16, 4).eval(), "args": (torch.ones(4, 16),)}
    with pytest.raises(dfc.DfcError, match=code) as e:
        dfc.compile(**{**right, **given})
    assert e.value.status == status


def test_sparse_tensors_are_refused() -> None:
    x = torch.ones(4, 16)
    compiled = dfc.compile(torch.nn.Linear(16, 4).eval(), (x,), engine="eager")
    with pytest.raises(dfc.DfcError, match="K013"):
        compiled(x.to_sparse())


def test_an_index_beyond_a_table_is_an_error_of_the_run() -> None:
    ids = torch.zeros(3, dtype=torch.int64)
    compiled = dfc.compile(torch.nn.Embedding(8, 4).eval(), (ids,), engine="eager")
    with pytest.raises(dfc.DfcError, match="K023"):
        compiled(ids + 8)


def test_data_with_an_index_beyond_a_table_is_an_error_of_the_data() -> None:
    """It has the right shape, and a step that could not run it was left out."""
    model = torch.nn.Sequential(torch.nn.Embedding(8, 16), torch.nn.Linear(16, 16)).eval()
    recipe = "dfc 1\ndata calib\nrecipe r {\n  quantize int8 using calib with scheme=static\n}\n"
    with pytest.raises(dfc.DfcError, match="a batch of data `calib` cannot be run") as e:
        dfc.compile(
            model, (torch.arange(4)[None],), recipe=recipe, engine="eager",
            data={"calib": [(torch.full((1, 4), 8),)]},
        )  # fmt: skip
    assert e.value.code == "D081" and e.value.status == 2 and "aten.embedding" in e.value.message


def test_data_that_a_step_names_and_does_not_read_is_told() -> None:
    recipe = "dfc 1\ndata calib\nrecipe q {\n  quantize int8 using calib\n}\n"
    compiled = dfc.compile(
        torch.nn.Linear(64, 64).eval(), (torch.ones(2, 64),), recipe=recipe, engine="eager",
        data={"calib": [torch.ones(2, 64)]},
    )  # fmt: skip
    (note,) = [n for n in compiled.report.notes if "`calib` was not read" in n]
    assert "`dynamic` rounds by the numbers at hand, `scheme=static` by data" in note
    assert "`scheme=tune(dynamic, static)`" in note


def test_a_model_that_fails_with_an_expanded_buffer_is_told_as_it_fails() -> None:
    class Wrong(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("row", torch.ones(1, 4).expand(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.row

    with pytest.raises(dfc.DfcError, match=r"T003.*itself fails on the example"):
        dfc.compile(Wrong().eval(), (torch.ones(2, 4),))


@pytest.mark.parametrize("given", [3, None, b"graph"])
def test_what_is_no_text_is_no_graph(given: Any) -> None:
    with pytest.raises(dfc.DfcError, match="`text` is the text of a graph, got") as e:
        dfc.parse(given)
    assert (e.value.code, e.value.status) == ("Q055", 2)


def test_a_limit_below_zero_is_refused() -> None:
    graph = dfc.parse("dfc 1\ngraph @f(%x: f32[2]) -> f32[2] {\n  return %x\n}\n")
    with pytest.raises(dfc.DfcError, match="`limit` counts changes: it is 0 or more, got -1"):
        dfc.compile(graph, recipe="dfc 1\nrecipe r {\n  cse with limit=-1\n}\n", engine="eager")


def test_a_target_is_read_before_the_model_is_built(fails: Try, made: Path) -> None:
    Path("bad.dfc").write_text("dfc 1\ntarget t { device a : h100(memory=36GB) }\n")
    err = fails(2, "plan", f"{made}/nets.py:slow", "-t", "bad.dfc")
    assert "`h100` has no `memory`" in err and "did you mean `mem`" in err
    assert not Path("ready").exists()
