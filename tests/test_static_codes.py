"""Static int8: the codes of weights, and where engines may differ in those of activations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dfc
from dfc.compiled import Compiled
from dfc.compress import integers
from dfc.compress.integers import encoded, scales_of
from dfc.compress.processor import Processor
from dfc.emit import onnx_export
from dfc.errors import DfcError
from dfc.ir.interpret import interpret
from dfc.recipe.bench import Ready
from dfc.recipe.plan import Device, Target
from dfc.report import Report
from dfc.rewrite.agree import Verdict
from dfc.rewrite.pass_ import Context
from dfc.runtime.engines import find_engine
from tests.static_nets import data, quantized, ran, tiny, traced


def test_no_pair_of_neighbours_saturates_sixteen_bits():
    torch.manual_seed(0)
    for shape in ((8, 7, 3, 3), (8, 16, 1, 1), (5, 33)):
        w = torch.randn(shape)
        codes = encoded(w, scales_of(w, "pairs", True)).codes.int()
        for rows in (codes.flatten(1), codes.movedim(1, -1).flatten(1)):
            rows = F.pad(rows, (0, rows.shape[1] % 2))
            for sign in (rows.clamp(min=0), rows.clamp(max=0)):
                sums = 255 * (sign[:, 0::2] + sign[:, 1::2])
                assert int(sums.min()) >= -32768 and int(sums.max()) <= 32767


def test_pairs_keep_more_than_seven_bits_do():
    torch.manual_seed(0)
    w = torch.randn(32, 64, 1, 1)
    errors = {}
    for bits in ("full", "pairs", "seven"):
        found = encoded(w, scales_of(w, bits, True)).weight
        errors[bits] = float((found - w).square().mean())
    assert errors["full"] < errors["pairs"] < 0.75 * errors["seven"]


def cpu(*dtypes):
    """A target that computes in these."""
    return Target("edge", (Device("soc", "cpu", {"dtypes": dtypes}),))


@pytest.mark.parametrize("dots", [True, False])
def test_the_target_decides_which_codes(dots):
    ctx = Context(data={"calib": data()}, decisions=[], target=cpu("f32", *["i8"] * dots))
    quantized(tiny(), ctx=ctx)
    said = [d.reason for d in ctx.decisions if d.outcome == "quantized"]
    told = [r for r in said if "`soc`" in r]  # a depthwise layer's kernels widen on any
    assert len(said) == 4 and len(told) == (4 if dots else 3)
    assert all(("`full`" if dots else "`pairs`") in r for r in told)


def test_dead_channels_and_large_biases_are_kept(tmp_path):
    conv = nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        conv.weight[0] = 0
        conv.weight[1] *= 1e-9
        conv.bias[:] = torch.tensor([3.0, 100.0, 0.0, -2.0])
    x = data(3, 4, 4)
    graph = quantized(traced(conv, 3, 4, 4), x, correct=False)
    (want,) = interpret(traced(conv, 3, 4, 4), x[:1])
    (got,) = interpret(graph, x[:1])
    torch.testing.assert_close(got, want, rtol=0, atol=0.5)
    assert ran(graph, x[0], tmp_path)[1]["QLinearConv"] == 1


@pytest.mark.parametrize("engine", ["eager", "onnxruntime"])
def test_a_decoders_codes_differ_between_engines_at_their_edges_alone(engine):
    """What is rounded the other way was in the middle between two codes, up to float32's rounding;
    from there on other numbers are rounded.
    """
    from tests.tiny_models import run_step, tiny_llama, tokens

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny_llama()

        def forward(self, x):
            return self.model(x).logits

    graph = dfc.trace(Logits(), (tokens(),))
    graph, _, _ = run_step(graph, "quantize int8 using calib with scheme=static")
    rounded = [n for n in graph.nodes if n.op == "dfc.quantize"]
    scales = [n.inputs[1].data.tensor().double() for n in rounded]
    graph.set_outputs([v for n in rounded for v in (n.result, n.inputs[0])])
    want = interpret(graph, [tokens(seed=9)], double=True)
    got = find_engine(engine).build(graph)([tokens(seed=9)])
    assert len(rounded) == 8
    for codes, same, x, scale in zip(want[::2], got[::2], want[1::2], scales, strict=True):
        steps = (x[codes != same] / scale).abs()
        assert torch.all((steps % 1 - 0.5).abs() < 1e-3)
        if len(steps):
            break


@pytest.mark.parametrize("dots", [True, False])
def test_where_codes_saturate_is_said_with_what_to_do(monkeypatch, dots):
    """A wrong result of a runtime says little of where it comes from."""
    here = Processor("this processor", "cpu", frozenset({"f32", *["i8"] * dots}))
    monkeypatch.setattr(integers, "this_processor", lambda: here)
    assert not integers.saturating(quantized(tiny(), codes="pairs"))
    told = integers.saturating(quantized(tiny(), codes="full"))
    assert bool(told) != dots
    wrong = Verdict(0.5, "off by 0.5")
    graph, engine = quantized(tiny(), codes="full"), find_engine("onnxruntime")
    assert str(Ready(graph, engine, None, wrong).wrong).endswith(told)
    if told:
        assert "of layer %conv2d" in told and "`codes=pairs`" in told
        failed = DfcError("X003", "another result", notes=("probe 0",))
        monkeypatch.setattr(onnx_export, "export_onnx", raising(failed))
        with pytest.raises(DfcError) as refused:
            Compiled(graph, engine, None, Report()).export("m.onnx")
        assert refused.value.diagnostics[0].notes == ("probe 0", told)


def raising(error):
    def function(*args, **options):
        raise error

    return function
