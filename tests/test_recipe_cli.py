"""Recipes on the command line: what is named where, what is written, and the exit status."""

from __future__ import annotations

from pathlib import Path

import pytest

import dfc
from dfc.cli.steps import parse_pipeline
from dfc.recipe.plan import Hole
from dfc.recipe.sources import plan_of, plan_of_passes
from tests.command import Run

NET = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(8, 16)
        self.bn = torch.nn.BatchNorm1d(16)
        self.head = torch.nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.relu(self.bn(self.fc(x))) * 1)


def build():
    torch.manual_seed(0)
    return Net().eval(), (torch.randn(3, 8),)


def val():
    torch.manual_seed(1)
    return [(torch.randn(3, 8), 0)]


def empty():
    raise FileNotFoundError("no such data set")


def accuracy(run, data):
    return sum(int((run(x).argmax(-1) == y).sum()) for x, y in data) / 3


def broken(run, data):
    return data[7]


def batches():
    return [torch.randn(3, 8)]
"""
RECIPE = """dfc 1
data val
metric accuracy on val, higher is better

recipe small {
  minimize size
  require accuracy >= baseline - 1pp
  apply simplify
  c: cse with limit=tune(1, 2)
  emit onnx with opset=21
  emit graph
}

recipe hopeless {
  require size <= 1KiB
  dce
}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and a recipe, as the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "small.dfc").write_text(RECIPE)
    return tmp_path


GIVEN = ("--data", "val=net.py:val", "--metric", "accuracy=net.py:accuracy", "--engine", "eager")
MODEL = "net.py:build"


def test_a_recipe_is_carried_out_and_its_files_are_written(run: Run, here: Path) -> None:
    done = run("compile", MODEL, "-r", "small.dfc", "--name", "small", *GIVEN, "-o", "m.dfcpkg")
    assert done.status == 0, done.err
    assert "accuracy is" in done.out and "met" in done.out and "tried 2 combinations" in done.out
    assert sorted(p.name for p in here.glob("m*")) == ["m.dfc", "m.dfcpkg", "m.onnx"]
    recipe = (here / "m.dfcpkg" / "recipe.dfc").read_text()
    assert "c: cse with limit=1" in recipe and "apply" not in recipe
    assert run("show", "--resolved", "m.dfcpkg").out.startswith(recipe.rstrip())
    # what is written down carries the recipe out again
    (here / "again.dfc").write_text(recipe)
    again = run("compile", MODEL, "-r", "again.dfc", *GIVEN, "--json")
    assert again.status == 0 and again.data["report"]["recipe"] == recipe
    assert again.data["report"]["requirements"][0]["met"]


def test_what_cannot_be_written_is_told_behind_what_was(run: Run, here: Path) -> None:
    (here / "apart.dfc").write_text("dfc 1\nrecipe r {\n  emit onnx with stages=separate\n}\n")
    done = run("compile", MODEL, "-r", "apart.dfc", "--engine", "eager", "-o", "m.dfcpkg")
    assert done.status == 2 and "X005" in done.err and "write `partition` before" in done.err
    assert "wrote m.dfcpkg" in done.out and "latency" in done.out and "next:" not in done.out
    assert [p.name for p in here.glob("m.*")] == ["m.dfcpkg"]


def test_what_is_not_passed_is_told_before_a_model_is_loaded(run: Run, here: Path) -> None:
    (here / "slow.py").write_text("def build():\n    raise AssertionError('it was loaded')\n")
    done = run("compile", "slow.py:build", "-r", "small.dfc:small")
    assert done.status == 2 and "data `val` is not passed" in done.err
    assert "metric `accuracy` is not passed" in done.err and "it was loaded" not in done.err


def test_a_missed_requirement_is_status_5_and_writes_the_report_alone(run: Run, here: Path) -> None:
    argv = ("compile", MODEL, "-r", "small.dfc:hopeless", "--engine", "eager")
    done = run(*argv, "-o", "m.dfcpkg", "--onnx", "m.onnx", "--html", "m.html")
    assert done.status == 5
    assert "NOT MET" in done.out and "size <= 1KiB" in done.out and "next:" not in done.out
    assert "Q050" in done.err and "size is" in done.err and "1KiB" in done.err
    assert [p.name for p in here.glob("m.*")] == ["m.html"]
    data = run(*argv, "--json").data
    assert data["report"]["requirements"][0]["met"] is False and data["written"] == {}
    assert " KiB" in data["report"]["requirements"][0]["numbers"]
    decimal = (here / "small.dfc").read_text().replace("1KiB", "1KB")
    (here / "decimal.dfc").write_text(decimal)
    again = run("compile", MODEL, "-r", "decimal.dfc:hopeless", "--engine", "eager")
    assert again.status == 5 and " kB" in again.err  # in the units that were asked in


JUDGED = ("-r", "small.dfc:small", "--metric", "accuracy=net.py:accuracy")


def test_outputs_are_refused_before_the_work(run: Run, here: Path) -> None:
    (here / "m.onnx").write_text("precious")
    done = run("compile", MODEL, "-r", "small.dfc:small", *GIVEN, "-o", "m.dfcpkg")
    assert done.status == 2 and "m.onnx" in done.err and not (here / "m.dfcpkg").exists()


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (("-r", "small.dfc"), 2, "FILE.dfc:NAME"),
        (("-r", "smal.dfc"), 2, "did you mean `small.dfc`"),
        (("-r", "small.dfc:tiny"), 2, "no recipe `tiny`"),
        (("-r", "O7"), 2, "no recipe `O7`"),
        (("-O9",), 2, "invalid value for '-O'"),
        (("-r", "O1", "-p", "cse"), 2, "-r and -p both name the steps"),
        (("-O1", "--set", "limit"), 2, "STEP.OPTION=VALUE"),
        (("-O1", "--set", "cse.limit=many"), 2, "`many` is not a whole number"),
        (("-O1", "--set", "csee.limit=1"), 2, "did you mean `cse`"),
        (("-O1", "--budget", "soon"), 2, "`soon` is no budget"),
        (("-r", "small.dfc:small"), 2, "--data val=FILE.py:FUNCTION"),
        ((*JUDGED, "--data", "val=net.py:vall"), 2, "did you mean `val`"),
        ((*JUDGED, "--data", "val=net.py:empty"), 8, "raised FileNotFoundError"),
        ((*JUDGED, "--data", "val"), 2, "NAME=FILE.py:FUNCTION"),
        (("-r", "tiny"), 2, "write FILE.dfc, or one of O0, O1, O2, O3"),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_their_remedy(
    run: Run, here: Path, argv: tuple[str, ...], status: int, words: str
) -> None:
    done = run("compile", MODEL, "--engine", "eager", *argv)
    assert done.status == status, done.err
    assert words in done.err and not done.out


def test_a_metric_that_raises_names_its_line(run: Run, here: Path) -> None:
    given = ("--data", "val=net.py:val", "--metric", "accuracy=net.py:broken")
    done = run("compile", MODEL, "-r", "small.dfc:small", "--engine", "eager", *given)
    assert done.status == 8
    assert "metric `accuracy` raised IndexError" in done.err and "return data[7]" in done.err
    assert "net.py:35" in done.err


STREAMED = """
import torch
from net import *

def stream():
    print("opened")
    for seed in range(3):
        torch.manual_seed(seed)
        yield torch.randn(3, 8)

def torn():
    yield torch.randn(3, 8)
    raise OSError("the share is gone")

def near(run, data):
    return sum(float(run(x).abs().sum()) for x in data)
"""


def test_data_that_a_function_yields_is_read_as_often_as_it_is_wanted(run: Run, here: Path) -> None:
    (here / "streamed.py").write_text(STREAMED)
    (here / "s.dfc").write_text("""dfc 1
data val
metric near on val, lower is better
recipe s {
  require near <= 2 * baseline
  fold_batch_norm
  quantize int8 using val with scheme=static, smallest=1
}
""")
    command = ["compile", f"{here}/net.py:build", "-r", here / "s.dfc", "--engine", "eager"]
    command += ["--metric", f"near={here}/streamed.py:near", "--data"]
    done = run(*command, f"val={here}/streamed.py:stream", "-o", "s.dfcpkg")
    assert done.status == 0, done.err
    assert (done.out + done.err).count("opened") >= 3  # by calibration, and by the metric twice
    torn = run(*command, f"val={here}/streamed.py:torn")
    assert torn.status == 8
    assert "streamed.py:13" in torn.err and "OSError: the share is gone" in torn.err, torn.err


def test_levels_are_presets(run: Run, here: Path) -> None:
    none = run("compile", MODEL, "-O0", "--engine", "eager", "--json").data["report"]
    assert none["passes"] == [] and none["nodes_before"] == none["nodes_after"]
    some = run("compile", MODEL, "-O1", "--engine", "eager", "--json").data["report"]
    assert some["nodes_after"] < some["nodes_before"] and "fold_batch_norm" not in some["recipe"]


def test_show_prints_recipes_resolved(run: Run, here: Path) -> None:
    shown = run("show", "--resolved", "small.dfc:small", "--set", "c.limit=9")
    assert shown.status == 0 and "c: cse with limit=9" in shown.out and "apply" not in shown.out
    assert run("show", "--resolved", "small.dfc", "--name", "hopeless").out.count("recipe") == 1
    for level in range(4):
        text = run("show", "--resolved", f"-O{level}").out
        assert f"recipe O{level} {{" in text
        (here / "level.dfc").write_text(text)
        assert run("show", "level.dfc").out == text
    assert run("show", "--resolved", "-O1", "--json").data["resolved"]["recipe"].startswith("dfc 1")
    assert "nothing to show" in run("show", "--resolved").err
    assert run("show", MODEL, "--set", "a.b=1").status == 2


def test_a_recipe_cannot_name_code(run: Run, here: Path) -> None:
    (here / "evil.dfc").write_text(
        'dfc 1\ndata val = "net.py:val"\nimport "net.py"\nrecipe r { cse\n }\n'
    )
    done = run("compile", MODEL, "-r", "evil.dfc")
    assert done.status == 2 and '"net.py" is no .dfc file' in done.err


@pytest.mark.parametrize("file", ["../x.onnx", "/tmp/x.onnx", "a/b.onnx", "..", ""])
def test_a_recipe_writes_beside_the_package_only(run: Run, here: Path, file: str) -> None:
    (here / "out.dfc").write_text(f'dfc 1\nrecipe r {{ cse\n emit onnx with file="{file}"\n }}\n')
    done = run("compile", MODEL, "-r", "out.dfc", "-o", "m.dfcpkg")
    assert done.status == 2 and "is no file name" in done.err


def test_two_emits_may_not_write_one_file(run: Run, here: Path) -> None:
    (here / "out.dfc").write_text("dfc 1\nrecipe r { cse\n emit onnx\n emit onnx\n }\n")
    done = run("compile", MODEL, "-r", "out.dfc", "-o", "m.dfcpkg")
    assert done.status == 2 and "would replace the first" in done.err


# One-line pipelines


def test_pipelines_read_values_as_recipes_do() -> None:
    text = (
        'canonicalize, fuse{rules=[attention, norms], select="a.*" | op(mm)}, cse{limit=tune(1, 2)}'
    )
    first, fuse, cse = parse_pipeline(text).steps
    assert fuse.options["rules"] == ("attention", "norms")  # type: ignore[union-attr]
    assert str(fuse.options["select"]) == '"a.*" | op(mm)'  # type: ignore[union-attr]
    assert cse.options["limit"] == Hole("cse.limit", (1, 2))  # type: ignore[union-attr]
    assert dict(first.options) == {}  # type: ignore[union-attr]
    again = parse_pipeline("cse,dce,cse").steps
    assert [s.label for s in again] == ["cse", "dce", "cse_2"]  # type: ignore[union-attr]


def test_data_of_a_pipeline_are_passed_by_their_names(run: Run, here: Path) -> None:
    steps = "quantize{to=int8,scheme=static,data=calib,embeddings=no}"
    plan = parse_pipeline(steps)
    assert plan.data == ("calib",) and "data calib" in str(plan)
    assert plan_of(str(plan)).data == ("calib",)
    assert plan_of_passes([step.build({}) for step in plan.passes()]).data == ("calib",)
    argv = ("compile", "net.py:build", "-p", steps, "--engine", "eager")
    missing = run(*argv)
    assert missing.status == 2 and "error[Q051]" in missing.err and "calib" in missing.err
    done = run(*argv, "--data", "calib=net.py:batches", "-o", "m.dfcpkg")
    assert done.status == 0, done.err
    assert "data calib" in (here / "m.dfcpkg" / "recipe.dfc").read_text()


def test_a_selector_of_a_pipeline_is_told_in_the_whole_text(run: Run, here: Path) -> None:
    steps = 'cse,quantize{select="nope.**"}'
    err = run("compile", "net.py:build", "-p", steps).err
    assert f"\n 1 | {steps}\n" in err and "no module matches `nope.**`" in err


def test_every_mistake_of_a_pipeline_has_its_caret() -> None:
    with pytest.raises(dfc.DfcError) as e:
        parse_pipeline("csee,fuse{rulez=1, limit=x},dce{")
    codes = [(d.code, d.span.col) for d in e.value.diagnostics if d.span]
    assert codes == [("Q001", 1), ("Q002", 11), ("Q012", 26), ("Q005", 29)]
    assert "did you mean `cse`" in str(e.value) and "did you mean `rules`" in str(e.value)
