"""What a recipe's target computes in, and what steps make of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dfc
from dfc.compress.processor import declared, processor_of, this_processor
from dfc.errors import DfcError
from dfc.recipe.sources import plan_of
from dfc.rewrite.pass_ import Context, find_pass

NET = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64)).eval()


def target(device: str, *more: str) -> Any:
    lines = "\n".join(f"  device d{i} : {d}" for i, d in enumerate((device, *more)))
    text = f"dfc 1\ntarget edge {{\n{lines}\n}}\nrecipe r for edge {{ dce }}"
    return plan_of(text).target


@pytest.mark.parametrize(
    ("devices", "kind", "dtypes"),
    [
        (["cpu(dtypes=[f32, i8])"], "cpu", {"f32", "i8"}),
        (["cpu(peak=1TFLOPS, peak_bf16=2TFLOPS)"], "cpu", {"f32", "bf16"}),
        (["cpu(peak=1TFLOPS, peak_bf16=0.3TFLOPS)"], "cpu", {"f32"}),  # it emulates them
        (["cpu(peak=1TFLOPS, peak_i8=2TFLOPS)"], "cpu", {"f32"}),  # pairs in 16 bits
        (["cpu(peak=1TFLOPS, peak_i8=4TFLOPS)"], "cpu", {"f32", "i8"}),
        (["xeon_8480"], "cpu", {"f32", "bf16", "i8"}),
        (["h100"], "cuda", {"f32", "f16", "bf16", "i8", "f8e4m3fn"}),
        (["h100", "a100_80gb"], "cuda", {"f32", "f16", "bf16", "i8"}),
        (["cpu(dtypes=[f32, i8])", "h100"], "cpu", {"f32", "i8"}),
    ],
)
def test_a_target_says_what_it_computes_in(devices: list[str], kind: str, dtypes: set[str]) -> None:
    found = processor_of(target(*devices))
    assert (found.kind, set(found.dtypes)) == (kind, dtypes)
    assert declared(target(*devices)) == found


def test_where_a_target_says_nothing_this_machine_stands_in() -> None:
    assert processor_of(None) is this_processor()
    assert processor_of(target("cpu(cores=8)")).dtypes == this_processor().dtypes
    assert declared(target("cpu(cores=8)")) is None
    assert {"f32", "f16", "i8"} == processor_of(target("cuda")).dtypes


def test_weights_of_four_bits_are_multiplied_in_integers_where_that_is_fast() -> None:
    for device, activations in (("cpu(cores=2)", "int8"), ("h100", "float")):
        graph = dfc.trace(NET, (torch.randn(2, 64),))
        step = find_pass("quantize", {"to": "int4"})
        step.run(graph, Context(target=target(device)))
        found = {n.attributes["activations"] for n in graph.nodes if n.op == "dfc.linear_w4"}
        assert found == {activations}


def test_a_step_for_a_type_that_the_target_has_not_is_refused_before_anything_runs() -> None:
    text = "dfc 1\ntarget edge {{ device soc : {} }}\nrecipe r for edge {{ a: autocast bf16{} }}"
    with pytest.raises(DfcError) as e:
        plan_of(text.format("cpu(dtypes=[f32, i8])", ""))
    message = "`a` needs what target `edge` lacks: device `soc` computes in f32, i8; "
    assert e.value.code == "Q017" and message in e.value.message
    plan_of(text.format("cpu(dtypes=[f32, i8])", " with only_weights=yes"))
    plan_of(text.format("cpu(dtypes=[f32, bf16])", ""))


def test_without_a_target_the_cast_is_made_and_the_doubt_told() -> None:
    graph = dfc.trace(NET, (torch.randn(2, 64),))
    ctx = Context(target=target("cpu(dtypes=[f32])"))
    assert find_pass("autocast").run(graph, ctx) == 3
    (note,) = ctx.products["notes"]
    assert "`d0` computes in f32, not in bf16" in note
