"""Words on the command line that mean nothing here: said at once, with what would help."""

from __future__ import annotations

from pathlib import Path

import pytest

import dfc
from dfc.cli import main
from dfc.cli.inputs import random_inputs
from dfc.errors import DfcError
from tests.command import NET, Run

TARGET = "dfc 1\n\ntarget pair {\n  device gpu0 : h100\n  device gpu1 : h100\n}\n"
RECIPES = """dfc 1

data calib, other
metric top1 on calib, higher is better

recipe a {
  require top1 >= baseline - 0.5pp
  cse
}
"""
MORE = """
def batches():
    return [torch.randn(2, 8)]


def none():
    return []


def top1(run, data):
    return 0.5
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("words")
    (made / "net.py").write_text(NET + MORE)
    (made / "pair.dfc").write_text(TARGET)
    (made / "two.dfc").write_text(RECIPES)
    (made / "static.dfc").write_text(
        "dfc 1\ndata calib\nrecipe q { quantize int8 using calib with scheme=static }\n"
    )
    (made / "model.onnx").write_bytes(b"\x08\x0a")
    package = str(made / "net.dfcpkg")
    assert main(["compile", f"{made}/net.py:build", "-o", package, "--engine", "eager"]) == 0
    return made


CASES = [
    ("show :build", "no file or module stands before the colon"),
    ("compile {}/net.py:build --budget 3s", "--budget is for a search, and nothing is searched"),
    ("compile {}/net.py:build -p autocast{{dtype=x}}", "help: `dtype` is bf16 or f16"),
    ("compile {}/net.py:build --data x=net.py:none", "the recipe names no data `x`"),
    ("compile {}/net.py:build --metric x=net.py:top1", "the recipe names no metric `x`"),
    ("compile {0}/net.py:build -r {0}/two.dfc --data calb={0}/net.py:none", "mean `calib`"),
    ("compile {0}/net.py:build -r {0}/two.dfc:nope", "help: the file has a"),
    ("compile {0}/net.py:build -r {0}/static.dfc --data calib={0}/net.py:none", "it is empty"),
    ("compile {}/model.onnx", "dfc writes ONNX and does not read it"),
    ("compile {}/mdoel.onnx", "did you mean `model.onnx`"),
    ("run {}/net.dfcpkg --seed 99999999999999999999999", "a seed has 64 bits"),
    ("run {}/net.dfcpkg --size B=99999999999999999999999", "outside its range 1..64"),
    ("plan {0}/net.py:build -t {0}/pair.dfc --size B=0", "`B` is 0, outside its range 1..64"),
    ("plan {0}/net.py:build -t {0}/pair.dfc --on banana", "it has gpu0, gpu1"),
    ("plan {0}/net.py:none -t {0}/nothing.dfc", "there is no `"),
    ("plan {0}/net.py:build --measured {0}/net.py", "cannot read times from"),
    ("plan {0}/net.py:build --measured {0}/no.json", "D050"),
    ("plan {0}/net.py:build --svg x.svg --trace x.svg", "`--svg` and `--trace` both write"),
    ("diff {0}/net.dfcpkg {0}/net.dfcpkg --context -5", "greater than or equal to 0"),
    ("bisect {0}/net.py:build -p cse --check {0}/net.py", "net.py:FUNCTION"),
    ("verify {}/net.py:build", "a package is wanted"),
    ("tune {}/net.py:build", "a package is wanted"),
    ("tune {}/net.dfcpkg --budget 0s", "`0s` is no time"),
]


@pytest.mark.parametrize(("words", "said"), CASES, ids=[c[0].replace("{}", "") for c in CASES])
def test_wrong_words(run: Run, home: Path, words: str, said: str) -> None:
    done = run(*words.format(home).split())
    assert (done.status, done.out) == (2, "")
    assert said in done.err and "Traceback" not in done.err


def test_a_suffix_makes_no_two_names_alike(run: Run, home: Path) -> None:
    assert "did you mean" not in run("check", f"{home}/encoder.dfc").err


def test_data_that_is_declared_but_not_used_may_be_passed(run: Run, home: Path) -> None:
    """One command line for all recipes of a file."""
    given = [f"--data={name}={home}/net.py:batches" for name in ("calib", "other")]
    words = ["compile", f"{home}/net.py:build", "-r", f"{home}/two.dfc", "--engine", "eager"]
    assert run(*words, *given, f"--metric=top1={home}/net.py:top1").status == 0


def test_nothing_found_is_told(run: Run) -> None:
    assert run("list", "passes", "zzz").out == "no pass has `zzz` in its name\n"
    assert run("list", "passes", "zzz", "--json").data == []


def test_inputs_beyond_memory_are_told() -> None:
    graph = dfc.parse("dfc 1 graph @f(%x: f32[B]) -> f32[B] where B in 0.. { return %x }")
    for size in (10**15, 10**30):
        with pytest.raises(DfcError, match=f"`x` of {size} elements cannot be drawn") as e:
            random_inputs(graph, {"B": size}, 0, None)
        assert e.value.status == 2
