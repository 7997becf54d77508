"""`dfc plan`: targets that are wrong, what is told, and files that it writes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dfc.cli import main
from dfc.cli.plan import show_plan
from dfc.ir.graph import Graph
from dfc.planning.pipeline import plan
from tests.planned_tower import TARGET, machine, traced_tower


@pytest.fixture(scope="module")
def tower() -> Graph:
    return traced_tower()


def test_all_that_is_wrong_with_a_target_is_told_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "t.dfc"
    target.write_text("""dfc 1
target t {
  device a : cuda(mem=0GB, peak=-40TFLOPS, bw=2TB/s, launch=0us)
  device b : h100(price=0)
  link a <-> b : nvlink(bw=0GB/s, latency=-5us)
}
""")
    for command in (["plan", "no.py:model", "-t"], ["check"]):
        assert main([*command, str(target)]) == 2
        said = re.findall(r"t\.dfc:(\d+):\d+: error\[N045\]: (.*)", capsys.readouterr().err)
        assert said == [
            ("3", "device `a` has an impossible `mem`: 0GB"),
            ("3", "device `a` has an impossible `peak`: -40TFLOPS"),
            ("4", "device `b` has an impossible `price`: 0"),
            ("5", "the link from `a` to `b` has an impossible `bw`: 0GB/s"),
            ("5", "the link from `a` to `b` has an impossible `latency`: -5us"),
        ]
    target.write_text(
        "dfc 1\ntarget t {\n  device a : cpu(mem=1GB)\n  device b : cpu(bw=1GB/s)\n}\n"
    )
    assert main(["plan", "no.py:model", "-t", str(target)]) == 2
    said = capsys.readouterr().err
    assert "t.dfc:3:10: error[N045]: device `a` has no `peak` and no `bw`" in said
    assert "t.dfc:4:10: error[N045]: device `b` has no `mem` and no `peak`" in said


ONE = "target {} {{ device a : cpu(mem=8GB, peak=9GFLOPS, bw=9GB/s) }}\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "`t.dfc` has no target"),
        (ONE.format("t") + ONE.format("u"), "there are 2 targets: `t`, `u`"),
        ("target t { device a : h100(mem=80) }\n", "write it as in mem=80GB"),
        ("target t { device a : h100(launch=8) }\n", "write it as in launch=5us"),
    ],
)
def test_a_file_that_is_no_target_is_told_before_the_model_is_read(
    text: str, told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("t.dfc").write_text(f"dfc 1\n{text}")
    assert main(["plan", "no.py:model", "-t", "t.dfc"]) == 2
    assert told in capsys.readouterr().err


def test_what_a_plan_without_a_target_goes_by_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tower: Graph
) -> None:
    (tmp_path / "model.dfc").write_text(str(tower))
    assert main(["plan", str(tmp_path / "model.dfc")]) == 0
    assert "figures of this host are nominal, not measured" in capsys.readouterr().out
    (tmp_path / "t.dfc").write_text(f"dfc 1\n{ONE.format('t')}")
    assert main(["plan", str(tmp_path / "model.dfc"), "-t", str(tmp_path / "t.dfc")]) == 0
    assert "nominal" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--on", "gpu0,,gpu1"], "`--on gpu0,,gpu1` has an empty name"),
        (["--svg", "t.png"], "`--svg` writes no `.png` file"),
        (["--trace", "t.txt"], "`--trace` writes no `.txt` file"),
        (["--trace", "t"], "ends in .json"),
    ],
)
def test_a_picture_of_another_format_is_refused_before_the_work(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "no.py:model", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--pipeline", "2", "--trace", "t.svg"], "ends in .json\n"),
        (["--memory", "1MB", "--trace", "t.txt"], "ends in .json or .svg"),
        (["-o", "out.txt"], "ends in .npz or .safetensors"),
        (["--on", "cpu0,cpu0"], "devices of stages are for --devices"),  # as `dfc plan` has them
    ],
)
def test_what_a_run_cannot_write_is_refused_before_the_work(
    options: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "no.py:model", *options]) == 2
    assert wanted in capsys.readouterr().err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], tower: Graph) -> None:
    (tmp_path / "model.dfc").write_text(str(tower))
    (tmp_path / "pair.dfc").write_text(TARGET)
    model, target = str(tmp_path / "model.dfc"), str(tmp_path / "pair.dfc")
    svg = tmp_path / "t.svg"
    arguments = ["plan", model, "-t", target, "--size", "B=64", "-m", "4", "--svg", str(svg)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "a step takes" in out and "gpu0" in out and svg.exists()
    assert main(arguments) == 2  # the picture exists
    assert "--force" in capsys.readouterr().err
    assert main(["plan", model, "-t", target, "--size", "B=64", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["schedule"] == "forward" and data["stages"][0]["device"] == "gpu0"
    tiny = tmp_path / "tiny.dfc"
    tiny.write_text("dfc 1\ntarget t { device a : cuda(mem=10KB, peak=1TFLOPS, bw=1TB/s) }\n")
    assert main(["plan", model, "-t", str(tiny)]) == 6


def test_splits_that_take_as_long_share_a_line(
    capsys: pytest.CaptureFixture[str], tower: Graph
) -> None:
    found = plan(tower, machine(2))
    splits = (("equal layers", 1.004), ("equal parameters", 1.2), ("equal operators", 1.0))
    show_plan(replace(found, splits=splits))
    told = capsys.readouterr().out.splitlines()
    assert "equal layers, equal operators: 1.00 times as long for each microbatch" in told
    assert "equal parameters: 1.20 times as long for each microbatch" in told


def test_sizes_that_nobody_asked_for_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tower: Graph
) -> None:
    (tmp_path / "graph.dfc").write_text(str(tower))
    (tmp_path / "pair.dfc").write_text(TARGET)
    (tmp_path / "model.py").write_text(MODEL)
    target = ["-t", str(tmp_path / "pair.dfc")]

    def told(model: str, *more: str) -> str:
        assert main(["plan", str(tmp_path / model), *target, *more]) == 0
        return capsys.readouterr().out

    plain = told("graph.dfc")
    assert "microbatches of B=1:" in plain
    assert "B is the least that the model takes: `--size B=N` plans for others" in plain
    example = told("model.py:build", "-m", "1")
    assert "1 microbatch of B=5, S=7:" in example
    assert "B and S are as in the example: `--size B=N,S=N` plans for others" in example
    assert "B is as in the example: `--size B=N`" in told("model.py:build", "--size", "S=3")
    assert "plans for others" not in told("model.py:build", "--size", "S=3,B=2")


MODEL = """
import torch
def build():
    batch, length = torch.export.Dim("B", max=64), torch.export.Dim("S", max=64)
    return torch.nn.Linear(8, 8), (torch.ones(5, 7, 8),), {}, ({0: batch, 1: length},)
"""


COUNTS = """
import torch
class Counts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
        self.register_buffer("calls", torch.zeros(1))
    def forward(self, x):
        self.calls += 1
        return self.down(torch.relu(self.up(x))) + self.calls
def build():
    return Counts(), (torch.ones(5, 64),)
"""


def test_a_plan_that_no_pipeline_can_run_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pair.dfc").write_text(TARGET)
    (tmp_path / "counts.py").write_text(COUNTS)
    (tmp_path / "model.py").write_text(MODEL)

    def told(model: str, *more: str) -> str:
        command = ["plan", f"{tmp_path}/{model}.py:build", "-t", f"{tmp_path}/pair.dfc", *more]
        assert main(command) == 0
        return capsys.readouterr().out

    note = "note: these stages cannot be run as a pipeline: the model writes to its buffer `calls`"
    two = ("--pin", "up=gpu0", "--pin", "down=gpu1")
    assert note in told("counts", *two)
    assert "writes to" in json.loads(told("counts", *two, "--json"))["no_pipeline"]
    assert "cannot be run" not in told("counts", "--on", "gpu0")  # one stage is the model itself
    assert "cannot be run" not in told("counts", *two, "--train")  # training carries its buffers
    assert json.loads(told("model", "--json"))["no_pipeline"] is None
