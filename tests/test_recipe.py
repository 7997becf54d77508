"""Recipes and targets: what is read, what it becomes, and what is wrong with it."""

from __future__ import annotations

from typing import Any

import pytest

from dfc.errors import DfcError
from dfc.lang.source import Source
from dfc.recipe import plan as p
from dfc.recipe.resolve import preset, resolve, resolve_all

TARGET = """
target edge {
  device gpu0 : cuda(mem=16GiB, peak=60TFLOPS, bw=600GB/s)
  device host : cpu(cores=8, mem=64GiB)
  link gpu0 <-> host : pcie(bw=25GB/s, latency=10us)
}
"""
WHOLE = f"""dfc 1
data calib, val
metric top1 on val, higher is better
{TARGET}
recipe small for edge {{
  "the smallest that keeps its accuracy"
  minimize latency(p50)
  require top1 >= baseline - 0.5pp
  require peak_memory(gpu0) <= 12GiB
  apply simplify
  apply rules(attention, norms) except "head.**", op(layer_norm)
  q: cse with limit=tune(3, 4)
  when latency(q) > latency(simplify) {{
    revert q
  }} else {{
    dce
  }}
  keep q if faster
  verify each with atol=1e-3, samples=8
  emit onnx with opset=21, contrib=no
}}
"""


def read(body: str, **more: Any) -> p.Plan:
    return resolve(Source(f"dfc 1\n{body}", "t.dfc"), **more)


def steps(body: str, **more: Any) -> list[str]:
    return [str(x) for x in read(f"recipe r {{\n{body}\n}}", **more).steps]


def problems(text: str, **more: Any) -> list[str]:
    found, wrong = resolve_all(Source(f"dfc 1\n{text}", "t.dfc"), **more)
    assert found is not None or wrong
    return [f"{d.code} {d.message}" for d in wrong]


# What is read


def test_a_whole_recipe_becomes_a_plan() -> None:
    plan = resolve(Source(WHOLE, "t.dfc"))
    assert plan.name == "small" and plan.data == ("calib", "val")
    assert [str(g) for g in plan.goals] == ["minimize latency(p50)"]
    assert [str(r) for r in plan.requirements] == [
        "top1 >= baseline - 0.5pp", "peak_memory(gpu0) <= 12GiB",
    ]  # fmt: skip
    assert plan.target is not None
    assert [d.name for d in plan.target.devices] == ["gpu0", "host"]
    assert plan.target.devices[0].facts["mem"].value == 16 * 2**30
    assert [h.name for h in plan.holes] == ["q.limit"] and plan.holes[0].choices == (3, 4)
    fuse = next(x for x in plan.passes() if x.name == "fuse")
    assert fuse.options["rules"] == ("attention", "norms")
    assert str(fuse.options["exclude"]) == '"head.**" | op(layer_norm)'
    assert plan.steps[-1] == p.EmitStep("onnx", {"opset": 21, "contrib": False})


def test_resolved_text_reads_back_to_an_equal_plan() -> None:
    plan = resolve(Source(WHOLE, "t.dfc"))
    again = resolve(Source(str(plan), "again.dfc"))
    assert again == plan and str(again) == str(plan)


# Labels


def test_a_recipe_can_be_applied_twice() -> None:
    text = "apply simplify\napply rules(norms)\napply simplify\nrevert simplify"
    made = steps(text)
    assert "noops_again: remove_noops" in made and "noops_again_2: remove_noops" in made
    assert made[-1] == "revert canonicalize_2"  # the name stands for what it named last
    assert steps("\n".join(made)) == made


def test_labels_of_one_recipe_are_not_those_of_another() -> None:
    inner = "recipe a { q: cse\nwhen size(q) > size(baseline) { revert q } }"
    plan = read(f"{inner}\nrecipe b {{ q: dce\napply a\nrevert q }}", name="b")
    made = [str(x) for x in plan.steps]
    assert made[0] == "q: dce" and made[1] == "q_2: cse" and made[-1] == "revert q"
    assert "revert q_2" in made[2] and "size(q_2)" in made[2]


def test_a_verb_that_stands_twice_needs_a_label() -> None:
    assert problems("recipe r { cse\ncse\nrevert cse }") == ["Q014 `cse` stands 2 times"]
    assert steps("cse\nagain: cse\nrevert cse")[-1] == "revert cse"


# Inheritance


def test_a_labelled_step_replaces_that_of_a_base() -> None:
    text = """
recipe base for edge {
  minimize latency
  require size <= 100MiB
  require error <= 0.1
  q: cse with limit=3
  dce
  when size(q) > size(baseline) { revert q }
}
recipe fast extends base {
  maximize throughput
  require size <= 200MiB
  q: cse with limit=7
  canonicalize
}
"""
    plan = read(TARGET + text, name="fast")
    assert [str(x) for x in plan.steps][:2] == ["q: cse with limit=7", "dce"]
    assert str(plan.steps[-1]) == "canonicalize"
    assert plan.target is not None and plan.target.name == "edge"
    assert [str(g) for g in plan.goals] == ["maximize throughput"]
    assert [str(r) for r in plan.requirements] == ["error <= 0.1", "size <= 200MiB"]


def test_applying_takes_the_steps_and_not_the_goals() -> None:
    text = "recipe a { minimize latency\nrequire size <= 1MiB\ncse }\nrecipe b { apply a }"
    plan = read(text, name="b")
    assert (plan.goals, plan.requirements) == ((), ()) and len(plan.steps) == 1


# Settings


def test_settings_reach_a_label_or_every_step_of_a_pass() -> None:
    text = "a: cse\ncse\ndce"
    assert steps(text, settings={"a.limit": "3"})[:2] == ["a: cse with limit=3", "cse"]
    made = steps(text, settings={"cse.limit": "3"})
    assert made[:2] == ["a: cse", "cse with limit=3"]  # a label wins over a pass
    assert steps("a: cse\nb: cse", settings={"cse.limit": "tune(1, 2)"}) == [
        "a: cse with limit=tune(1, 2)", "b: cse with limit=tune(1, 2)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "key, value, code",
    [
        ("csee.limit", "3", "Q013"),
        ("limit", "3", "Q013"),
        ("cse.limits", "3", "Q002"),
        ("cse.limit", "yes", "Q012"),
        ("cse.limit", "3GiB(", "P002"),
        ("cse.limit", "3furlongs", "Q010"),
    ],
)
def test_wrong_settings_are_told(key: str, value: str, code: str) -> None:
    with pytest.raises(DfcError) as error:
        steps("cse", settings={key: value})
    assert error.value.code == code


# Presets


def test_presets_are_recipes_by_name() -> None:
    plan = preset("simplify")
    assert plan.name == "simplify" and len(plan.steps) == 7
    with pytest.raises(DfcError, match="did you mean `simplify`"):
        preset("simplfy")
