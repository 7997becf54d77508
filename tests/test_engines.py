"""Engines agree with the model: Inductor on eight representative ones, because it compiles long."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

import dfc
from dfc.runtime.engines import engine_names, find_engine
from tests.zoo import cases
from tests.zoo.coverage import compare

EIGHT = ("bert", "llama", "resnet18", "unet", "lstm", "scatters", "reductions", "key_value_buffer")
REFUSED = {
    ("openvino", "reductions"): "computes f64 in 32 bits",
    ("openvino", "scatters"): "tensor .* are incompatible",  # it wants as many indices as rows
}


@pytest.mark.parametrize("name", EIGHT)
@pytest.mark.parametrize("engine", ["inductor", "onnxruntime", "openvino"])
def test_engine_gives_the_models_results(engine, name):
    (case,) = [c for c in cases() if c.name == name]
    built, reference = case.build(), case.build()
    if (engine, name) in REFUSED:
        with pytest.raises(dfc.DfcError, match=REFUSED[engine, name]):
            _compile(built, engine)
        return
    compiled = _compile(built, engine)
    for args, kwargs in [(built.args, built.kwargs), *built.calls]:
        with torch.no_grad():
            expected = reference.model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        try:
            got = compiled(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        except dfc.DfcError as e:
            assert e.status == 2 and compiled.report.notes
            continue
        compare(got, expected)


def _compile(built, engine):
    return dfc.compile(
        built.model, built.args, built.kwargs, built.dynamic_shapes, engine=engine, verify="end"
    )


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


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino"])
@pytest.mark.parametrize("model, count", [(_ReturnsOld(), 1), (_Swaps(), 2)])
def test_a_result_is_taken_before_the_inputs_are_written(engine, model, count):
    compiled = dfc.compile(model, tuple(torch.randn(3) for _ in range(count)), engine=engine)
    mine = [torch.randn(3) for _ in range(count)]
    theirs = [x.clone() for x in mine]
    torch.testing.assert_close(compiled(*mine), model(*theirs))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


# OpenVINO's CPU plugin narrows 64-bit numbers, and fails on tensors without elements


class _Adds(torch.nn.Module):
    def forward(self, x):
        return x + 1


@pytest.mark.parametrize(
    "x, reason",
    [
        (torch.ones(3, dtype=torch.float64), "computes f64 in 32 bits"),
        (torch.ones(3, dtype=torch.complex128), "computes c128 in 32 bits"),
        (torch.ones(0, 3), "tensors without elements"),
    ],
)
def test_openvino_refuses_what_it_would_do_wrong(x, reason):
    with pytest.raises(dfc.DfcError, match=reason) as e:
        dfc.compile(_Adds(), (x,), engine="openvino", verify="none")
    assert e.value.code == "K003"


def test_openvino_cuts_no_integers_off():
    compiled = dfc.compile(_Adds(), (torch.tensor([1, 2]),), engine="openvino")
    assert compiled(torch.tensor([3, -(2**31)])).tolist() == [4, 1 - 2**31]
    with pytest.raises(dfc.DfcError, match="beyond 32 bits"):
        compiled(torch.tensor([1, 2**31]))

    class Table(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("big", torch.tensor([2**40, 1]))

        def forward(self, x):
            return self.big[x]

    with pytest.raises(dfc.DfcError, match="cannot take `big`: it has numbers beyond 32 bits"):
        dfc.compile(Table(), (torch.tensor([1]),), engine="openvino", verify="none")


class _Grows(torch.nn.Module):
    """One output of a known size, one whose size only the data tell, one of half precision."""

    def forward(self, x):
        return x * 2, x[x > 0], (x.bfloat16() * 2), x.shape[0] * 3


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_results_stay_as_they_are_when_the_engine_runs_again(engine):
    sizes = ({0: torch.export.Dim("N", max=100)},)
    compiled = dfc.compile(
        _Grows(), (torch.randn(5),), dynamic_shapes=sizes, engine=engine, verify="end"
    )
    calls = [torch.randn(n) for n in (5, 3, 5, 7, 3)]
    found = [compiled(x) for x in calls]
    for x, got in zip(calls, found, strict=True):
        compare(got, _Grows()(x))


def test_an_engine_serves_several_threads_at_once():
    from concurrent.futures import ThreadPoolExecutor

    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 8))
    for engine in ("onnxruntime", "openvino"):
        compiled = dfc.compile(model, (torch.randn(32, 64),), engine=engine)
        calls = [torch.randn(32, 64) for _ in range(24)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(compiled, calls))
        with torch.no_grad():
            for x, got in zip(calls, found, strict=True):
                compare(got, model(x))


def test_a_missing_library_says_how_to_get_it():
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'openvino' else find(n, *a)\n"
        "from dfc.runtime.engines import find_engine, installed_engines\n"
        "print(installed_engines())\n"
        "try: find_engine('openvino')\n"
        "except Exception as e: print(e.status, e)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("['eager', 'inductor', 'onnxruntime']\n7 ")
    assert "pip install 'dfc-compiler[openvino]'" in run.stdout
