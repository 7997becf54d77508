"""A recipe from Python is the same recipe: its text is in layout, and reads back to its plan."""

from __future__ import annotations

import doctest
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dfc
import dfc.recipe.build
from dfc.errors import DfcError
from dfc.lang.format import format_text
from dfc.lang.source import Source
from dfc.recipe import Recipe, auto, recipe, tune
from dfc.recipe.resolve import resolve

begin: Callable[..., Recipe] = dfc.recipe  # type: ignore[assignment]


def same(r: Recipe) -> str:
    text = str(r)
    assert format_text(text) == text
    assert resolve(Source(text)) == r.plan()
    assert resolve(Source(str(r.plan()))) == r.plan()
    return text


def test_no_module_takes_the_place_of_what_is_exported() -> None:
    """`dfc.recipe.tune` was a module as soon as something had been compiled."""
    import pkgutil

    modules = {m.name for m in pkgutil.iter_modules(dfc.recipe.__path__)}
    assert not modules & set(dfc.recipe.__all__)


def test_the_example_of_the_docstring() -> None:
    failed, tried = doctest.testmod(dfc.recipe.build)
    assert tried >= 3 and not failed


def test_a_whole_recipe() -> None:
    r = (
        begin("small")
        .doc("the smallest that keeps its accuracy")
        .imports("std/simplify.dfc")
        .data("calib", "val")
        .metric("top1", on="val", better="higher")
        .target(
            "edge",
            {"gpu0": "cuda(mem=16GiB)", "host": "cpu(cores=8)"},
            {"gpu0 <-> host": "pcie(bw=25GB/s, latency=10us)"},
        )
        .minimize("latency(p50)")
        .require("top1>=baseline-0.5pp")
        .require("peak_memory(gpu0) <= 12GiB")
        .apply("simplify", keep_if="faster")
        .apply("rules(attention, norms)")
        .fuse("norms", on="blocks.*.mlp.**", except_=["head.**", "op(layer_norm)"], label="q")
        .cse(limit=tune(1, 2), keep_if="size < before")
        .when("latency(q) > latency", lambda b: b.revert("q").dce(), lambda b: b.dce(label="z"))
        .keep("q", if_="smaller")
        .verify("each", atol=1e-3, samples=8)
        .emit("onnx", opset=21, contrib=False)
    )  # fmt: skip
    assert (
        same(r)
        == """dfc 1
import "std/simplify.dfc"
data calib, val
metric top1 on val, higher is better

target edge {
  device gpu0 : cuda(mem=16GiB)
  device host : cpu(cores=8)
  link gpu0 <-> host : pcie(bw=25GB/s, latency=10us)
}

recipe small for edge {
  "the smallest that keeps its accuracy"
  minimize latency(p50)
  require top1 >= baseline - 0.5pp
  require peak_memory(gpu0) <= 12GiB
  apply simplify keep if faster
  apply rules(attention, norms)
  q: fuse norms on "blocks.*.mlp.**" except "head.**", op(layer_norm)
  cse keep if size < before with limit=tune(1, 2)
  when latency(q) > latency {
    revert q
    dce
  } else {
    z: dce
  }
  keep q if smaller
  verify each with atol=0.001, samples=8
  emit onnx with opset=21, contrib=no
}
"""
    )


def test_nothing_changes_what_was_built_before() -> None:
    base = begin("r").cse()
    a, b = base.dce(), base.cse(limit=3, label="again")
    assert len(base.plan().steps) == 1 and len(a.plan().steps) == len(b.plan().steps) == 2
    assert base == begin("r").step("cse") and a != b and hash(base) != hash(a)


def test_a_recipe_extends_another() -> None:
    r = begin("mine").extends("simplify").cse(label="cse_", limit=2)
    assert "recipe mine extends simplify {" in same(r)
    assert len(r.plan().steps) == 8


def wrong(code: str, message: str, build: Callable[[Recipe], Any]) -> Any:
    return pytest.param(code, message, build, id=message)


@pytest.mark.parametrize(
    "code, message, build",
    [
        wrong("Q001", "did you mean `cse`", lambda r: r.step("csee")),
        wrong("Q002", "did you mean `limit`", lambda r: r.cse(limt=3)),
        wrong("Q012", "`limit` is a whole number or none", lambda r: r.cse(limit="x")),
        wrong("P002", "`}` closes nothing", lambda r: r.cse(limit="3 }")),
        wrong("P002", "`{` is not closed", lambda r: r.require("size < 3MiB\n}\nrecipe x {")),
        wrong("Q012", "a recipe cannot say nan", lambda r: r.cse(limit=float("nan"))),
        wrong("Q012", "a recipe cannot say a dict", lambda r: r.cse(limit={})),
        wrong("Q013", "is no name", lambda r: r.cse(label="a: b")),
        wrong("Q013", "no step before this", lambda r: r.revert("cse")),
        wrong("Q013", "no quantity is called `latencyy`", lambda r: r.minimize("latencyy")),
        wrong("Q015", "one side measures time", lambda r: r.require("latency < 3MiB")),
        wrong("Q016", "write `minimize`", lambda r: r.maximize("latency")),
        wrong("Q011", "did you mean `simplify`", lambda r: r.apply("simplfy")),
        wrong("Q011", "there is no recipe `nope`", lambda r: r.extends("nope")),
        wrong("Q013", "is no link", lambda r: r.target("t", {}, {"a b": "pcie()"})),
        wrong("R008", "did you mean `attention`", lambda r: r.rules("atention")),
        wrong("Q020", "did you mean `op`", lambda r: r.rules("norms", on="opp(relu)")),
        wrong("Q013", "did you mean `cse`", lambda r: r.cse().when("size(csee) > 1B", lambda b: b)),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_by_the_call_that_is(
    code: str, message: str, build: Callable[[Recipe], Any]
) -> None:
    with pytest.raises(DfcError) as error:
        build(begin("r"))
    assert error.value.code == code and message in str(error.value)


def test_no_method_but_passes() -> None:
    with pytest.raises(AttributeError, match="did you mean `cse`"):
        begin("r").csee()
    assert not hasattr(begin("r"), "__fspath__")


def test_values_are_written_as_options_want_them() -> None:
    from dfc.recipe.build import _value

    assert _value(True, bool) == "yes" and _value(None, None) == "none"
    assert _value("12GiB", int) == "12GiB" and _value("12GiB", str) == '"12GiB"'
    assert _value(torch.bfloat16, None) == "bf16" and _value(auto, int) == "auto"
    assert _value([1, -2.5], None) == "[1, -2.5]" and _value("none", str) == '"none"'


def test_the_package_and_the_function_share_a_name() -> None:
    code = "import dfc; r = dfc.recipe('a'); import dfc.recipe.plan; print(r == dfc.recipe('a'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
    assert recipe("a") == begin("a")
