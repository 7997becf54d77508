"""Engines agree with the model: Inductor on eight representative ones, because it compiles long."""

from __future__ import annotations

import copy

import pytest
import torch

import dfc
from dfc.runtime.engines import engine_names, find_engine
from tests.zoo import cases
from tests.zoo.coverage import compare

EIGHT = ("bert", "llama", "resnet18", "unet", "lstm", "scatters", "reductions", "key_value_buffer")


@pytest.mark.parametrize("name", EIGHT)
@pytest.mark.parametrize("engine", ["inductor", "onnxruntime"])
def test_engine_gives_the_models_results(engine, name):
    (case,) = [c for c in cases() if c.name == name]
    built, reference = case.build(), case.build()
    compiled = dfc.compile(
        built.model, built.args, built.kwargs, built.dynamic_shapes, engine=engine, verify="end"
    )
    for args, kwargs in [(built.args, built.kwargs), *built.calls]:
        with torch.no_grad():
            expected = reference.model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        try:
            got = compiled(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        except dfc.DfcError as e:
            assert e.status == 2 and compiled.report.notes
            continue
        compare(got, expected)


def test_unknown_engine_is_refused_with_the_nearest_name():
    with pytest.raises(dfc.DfcError, match="did you mean `eager`"):
        find_engine("eagre")


def test_every_engine_says_what_it_runs_on():
    for name in engine_names():
        assert "cpu" in find_engine(name).devices


def test_inductor_refuses_control_flow_by_name():
    class Choice(torch.nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    with pytest.raises(dfc.DfcError, match=r"cannot run `torch\.cond`"):
        dfc.compile(Choice(), (torch.ones(3),), engine="inductor")


def test_results_share_no_memory_with_inputs_or_weights():
    class Views(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x.view(-1), self.w, x

    compiled = dfc.compile(Views(), (torch.ones(3),), engine="eager")
    x = torch.ones(3)
    for y in compiled(x):
        y.detach().zero_()
    assert torch.equal(x, torch.ones(3))
    assert torch.equal(compiled(x)[1], torch.ones(3))


class _ReturnsOld(torch.nn.Module):
    def forward(self, x):
        old = x.clone()
        x.add_(1)
        return old


class _Swaps(torch.nn.Module):
    def forward(self, x, y):
        t = x.clone()
        x.copy_(y)
        y.copy_(t)
        return x + y


@pytest.mark.parametrize("engine", ["eager", "onnxruntime"])
@pytest.mark.parametrize("model, count", [(_ReturnsOld(), 1), (_Swaps(), 2)])
def test_a_result_is_taken_before_the_inputs_are_written(engine, model, count):
    compiled = dfc.compile(model, tuple(torch.randn(3) for _ in range(count)), engine=engine)
    mine = [torch.randn(3) for _ in range(count)]
    theirs = [x.clone() for x in mine]
    torch.testing.assert_close(compiled(*mine), model(*theirs))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
