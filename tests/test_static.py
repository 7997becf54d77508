"""Static int8: what runs in integers, how close it stays, and what ONNX Runtime makes of it."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from functools import cache

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dfc
from dfc.compress.bias import first_samples
from dfc.compress.equalizing import LAYERS
from dfc.compress.integers import encoded, scales_of
from dfc.compress.static import apply
from dfc.emit.onnx_export import export_onnx
from dfc.errors import DfcError
from dfc.ir.interpret import interpret
from dfc.ir.verify import verify
from dfc.recipe.plan import Device, Target
from dfc.rewrite.driver import run_passes
from dfc.rewrite.pass_ import Context, find_pass
from dfc.runtime.engines import find_engine

TIDY = ("fold_constants", "fold_batch_norm", "remove_noops", "cse", "dce")


class Net(nn.Module):
    """Each thing that can stand between layers: padding, clips, a shortcut, pools, a concat."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, 2, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.b = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.c = nn.Conv2d(16, 16, 1)
        self.d = nn.Linear(32, 10)

    def forward(self, x):
        y = self.norm(self.a(F.pad(x, (0, 1, 0, 1)))).relu()
        z = self.c(F.relu6(self.b(y))) + y
        z = torch.cat([F.max_pool2d(z, 2), F.avg_pool2d(y, 2)], 1)
        return self.d(F.adaptive_avg_pool2d(z, 1).flatten(1))


def traced(net, *shape):
    torch.manual_seed(0)
    x = torch.randn(4, *shape)
    graph = dfc.trace(net.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("B", min=1)},))
    return run_passes(graph, [find_pass(n) for n in TIDY], mode="none").graph


@cache
def tiny():
    torch.manual_seed(0)
    return traced(Net(), 3, 16, 16)


def data(*shape, n=4):
    g = torch.Generator().manual_seed(7)
    return [torch.randn(8, *(shape or (3, 16, 16)), generator=g) for _ in range(n)]


@dataclass
class Step:
    """What a step says."""

    data: str = "calib"
    range: str = "auto"
    per: str = "channel"
    codes: str = "auto"
    correct: bool = True


def quantized(graph, batches=None, ctx=None, but=(), **options):
    made = graph.copy()
    ctx = ctx or Context(data={"calib": batches or data()})
    layers = [n for n in made.nodes if n.op in LAYERS and n.results[0].name not in but]
    assert apply(made, layers, Step(**options), ctx) == len(layers) > 0
    verify(made)
    return made


def distance(one, other, x):
    """Relative mean square error."""
    (a,), (b,) = interpret(one, [x]), interpret(other, [x])
    return float((a - b).square().mean() / a.square().mean())


def ran(graph, x, tmp_path, optimized=True):
    """What ONNX Runtime gives, and the ops of the graph that it made."""
    path, seen = tmp_path / "m.onnx", tmp_path / "seen.onnx"
    export_onnx(graph, path, force=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(seen)
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    ops = collections.Counter(n.op_type for n in onnx.load(seen).graph.node)
    return torch.from_numpy(found), ops


# What runs in integers


def test_onnx_runtime_makes_integer_kernels_of_all_layers(tmp_path):
    graph = quantized(tiny())
    (want,) = interpret(graph, data()[:1])
    got, ops = ran(graph, data()[0], tmp_path)
    assert ops["QLinearConv"] == 3 and ops["QGemm"] == 1
    kernels = ("QLinearAdd", "QLinearConcat", "QLinearAveragePool", "QLinearGlobalAveragePool")
    assert all(ops[op] == 1 for op in kernels)
    floats = ("Conv", "FusedConv", "Gemm", "MatMul", "Add", "Concat", "DequantizeLinear")
    assert not any(ops[op] for op in floats) and ops["QuantizeLinear"] == 1
    assert ops["Pad"] == 1  # the fourth channel, of codes: those around pictures are the kernels'
    torch.testing.assert_close(got, want, rtol=0, atol=0.01 * float(want.abs().max()))


@pytest.mark.parametrize(
    "conv, channels",
    [
        (nn.Conv2d(3, 16, 3, 2, 1), 4),
        (nn.Conv2d(6, 20, (1, 3), bias=False), 8),
        (nn.Conv2d(3, 16, 1), 3),  # its kernel reads pixels where they are
        (nn.Conv2d(3, 10, 3), 3),  # no kernel of sums of four makes 10 channels
        (nn.Conv2d(6, 32, 3, groups=2), 3),
        (nn.Conv2d(8, 16, 3), 8),
    ],
    ids=str,
)
def test_onnx_runtime_reads_channels_by_four(conv, channels, tmp_path):
    shape = (conv.in_channels, 9, 9)
    graph = quantized(traced(conv, *shape), data(*shape))
    x = data(*shape)[0]
    (want,) = interpret(graph, [x])
    got, ops = ran(graph, x, tmp_path)
    assert ops["QLinearConv"] == 1
    held = onnx.load(tmp_path / "m.onnx").graph.initializer
    (weight,) = [i for i in held if len(i.dims) == 4]  # nothing is stored twice
    assert weight.dims[1] == channels and ops["Pad"] == (channels != conv.weight.shape[1])
    assert float((got - want).abs().max()) <= 1.01 * float((want.unique().diff()).min())


def test_an_activation_is_the_end_of_a_range():
    graph = quantized(tiny())
    assert not any(n.op in ("aten.relu.default", "aten.relu6.default") for n in graph.nodes)


def test_values_in_one_concat_have_one_scale():
    graph = quantized(tiny())
    cat = next(n for n in graph.nodes if n.op == "aten.cat.default")
    (after,) = cat.results[0].users
    scales = {v.node.inputs[1] for v in cat.operands} | {after.inputs[1]}
    assert len(scales) == 1


@pytest.mark.parametrize("clip", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(0, 2)], ids=str)
def test_what_shares_a_scale_is_clipped_all_the_same(clip, tmp_path):
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(19, 16, 1)

        def forward(self, x):
            return self.b(torch.cat([x, clip(self.a(x))], 1))

    shape = (3, 8, 8)
    batches = [9 * x for x in data(*shape)]
    graph = traced(Joined(), *shape)
    made = quantized(graph, batches)
    assert distance(graph, made, batches[0]) < 1e-3
    (want,) = interpret(made, batches[:1])
    got, ops = ran(made, batches[0], tmp_path)
    assert ops["QLinearConv"] == 2 and not ops["Conv"]
    torch.testing.assert_close(got, want, rtol=0, atol=0.01 * float(want.abs().max()))


def test_no_float_weight_is_left():
    graph = quantized(tiny())
    sizes = {p.name: p for p in graph.parameters.values() if p.tensor_type.dtype.is_float}
    assert all(p.tensor_type.numel <= 16 for p in sizes.values())
    codes = [p for p in graph.parameters.values() if str(p.tensor_type.dtype) == "i8"]
    assert sum(int(p.tensor_type.numel) for p in codes) == 16 * 27 + 16 * 9 + 256 + 320


def test_results_stay_close():
    x = data(n=1)[0]
    assert distance(tiny(), quantized(tiny()), x) < 1e-3


def test_a_layer_that_is_left_out_stays_float():
    graph = quantized(tiny(), but=("conv2d_1",))
    assert any(str(p.tensor_type) == "f32[16, 1, 3, 3]" for p in graph.parameters.values())
    assert distance(tiny(), graph, data()[0]) < 1e-3


def test_what_is_no_layer_is_not_rounded_at_the_end():
    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return (self.c(x) + 1).softmax(1)

    graph = quantized(traced(Ends(), 3, 8, 8), data(3, 8, 8))
    ops = collections.Counter(n.op for n in graph.nodes)
    assert ops["dfc.quantize"] == 2  # what the convolution reads, and what it gives


class Residual(nn.Module):
    """As ResNets begin and end: a padded pool, a mean over the picture."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 7, 2, 3), nn.Conv2d(16, 16, 3, 1, 1)
        self.c, self.d = nn.Conv2d(16, 16, 3, 1, 1), nn.Linear(16, 5)

    def forward(self, x):
        x = F.max_pool2d(self.a(x).relu(), 3, 2, 1)
        x = (self.c(self.b(x).relu()) + x).relu()
        return self.d(x.mean((2, 3)))


class Perceptron(nn.Module):
    """As transformers have them: sequences between norms."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.b(self.a(self.norm(x)).relu())


@pytest.mark.parametrize(
    ("net", "shape", "kernels"),
    [
        (Residual, (3, 16, 16), {"QLinearConv": 3, "QLinearAdd": 1, "QGemm": 1,
                                 "QLinearGlobalAveragePool": 1, "DequantizeLinear": 0}),
        (Perceptron, (7, 16), {"MatMulIntegerToFloat": 2, "MatMul": 0, "Gemm": 0}),
    ],
)  # fmt: skip
def test_other_shapes_of_network_are_integer_kernels_too(net, shape, kernels, tmp_path):
    torch.manual_seed(0)
    graph = traced(net(), *shape)
    x = data(*shape)
    made = quantized(graph, x)
    assert distance(graph, made, x[0]) < 1e-3
    (want,) = interpret(made, x[:1])
    got, ops = ran(made, x[0], tmp_path)
    torch.testing.assert_close(got, want, rtol=0, atol=0.02 * float(want.abs().max()))
    assert {op: ops[op] for op in kernels} == kernels


# Weights


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
    assert len(said) == 4 and any(("`full`" if dots else "`pairs`") in r for r in said)
    assert all("`soc`" in r for r in said if "products" in r)


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


# Correction of biases


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


def test_biases_bring_the_means_back():
    x = data()
    plain, corrected = (quantized(tiny(), x, per="tensor", correct=c) for c in (False, True))

    def shift(graph):
        outs = [(interpret(graph, [b])[0], interpret(tiny(), [b])[0]) for b in x]
        return float(torch.cat([a - b for a, b in outs]).mean(0).abs().max())

    assert shift(corrected) < 0.3 * shift(plain)


class Masked(nn.Module):
    """Tokens of which some are padding."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 8)
        with torch.no_grad():
            self.table.weight[7] *= 30  # a token that stands out
            self.table.weight[0] = 300  # padding is far from all tokens

    def forward(self, input_ids, attention_mask):
        y = self.down(F.gelu(self.up(self.table(input_ids))))
        return y * attention_mask.unsqueeze(-1)


def masked():
    torch.manual_seed(0)
    batches = []
    for _ in range(4):
        ids = torch.randint(1, 50, (8, 6))
        mask = (torch.arange(6) < torch.randint(2, 6, (8, 1))).long()
        batches.append((ids * mask, mask))
    sizes = {0: torch.export.Dim("B", min=1), 1: torch.export.Dim("S", min=2, max=64)}
    graph = dfc.trace(Masked().eval(), batches[0], dynamic_shapes=(sizes, sizes))
    return run_passes(graph, [find_pass(n) for n in TIDY], mode="none").graph, batches


def test_padding_moves_no_bias_and_no_range():
    graph, batches = masked()
    tokens = torch.cat([m.reshape(-1) for _, m in batches]) != 0
    want = torch.cat([interpret(graph, list(b))[0].reshape(-1, 8) for b in batches])[tokens]
    shifts = []
    for correct in (False, True):
        made = quantized(graph, batches, correct=correct)
        found = torch.cat([interpret(made, list(b))[0].reshape(-1, 8) for b in batches])[tokens]
        assert (found - want).square().mean() < 5e-3 * want.square().mean()
        shifts.append(float((found - want).mean(0).abs().max()))
    assert shifts[1] < 0.2 * shifts[0]


def scales(graph):
    """Of what is rounded while the model runs, by the name of its constant."""
    nodes = [n for n in graph.nodes if n.op == "dfc.quantize"]
    return {n.inputs[1].name: float(n.inputs[1].data.tensor()) for n in nodes}


def test_what_linear_layers_read_keeps_its_whole_range():
    graph, batches = masked()
    whole, clipped, auto = (
        scales(quantized(graph, batches, range=r)) for r in ("minmax", "mse", "auto")
    )
    assert auto == whole and all(clipped[name] <= whole[name] for name in whole)
    assert clipped != whole
    whole, clipped, auto = (scales(quantized(tiny(), range=r)) for r in ("minmax", "mse", "auto"))
    assert auto == clipped != whole  # its linear layer shares the scale of what is pooled


def test_only_the_samples_that_are_asked_for_are_kept():
    kept = first_samples([[torch.ones(8, 2), torch.ones(3)], [torch.ones(8, 2), torch.ones(3)]], 12)
    assert [x.shape[0] for x, _ in kept] == [8, 4] and [len(m) for _, m in kept] == [3, 3]


def test_biases_are_corrected_again_after_other_changes():
    ctx = Context(data={"calib": data()})
    graph = quantized(tiny(), ctx=ctx, correct=False)
    once = find_pass("correct_bias", {"data": "calib"})
    assert once.run(graph, ctx) == 4
    verify(graph)
    (same,) = interpret(quantized(tiny()), data()[:1])
    torch.testing.assert_close(interpret(graph, data()[:1])[0], same)


def test_there_must_be_means_to_bring_back():
    with pytest.raises(DfcError, match="no means to restore") as e:
        find_pass("correct_bias", {"data": "calib"}).run(tiny().copy(), Context())
    assert e.value.code == "D085"


# Bad input


def test_activations_that_are_no_numbers_are_named():
    class Divides(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(1 / (self.a(x) * 0))

    with pytest.raises(DfcError, match=r"%\w+ has \d+ numbers that are NaN or infinite"):
        quantized(traced(Divides(), 4), data(4))


def test_data_in_which_a_value_never_differs_from_zero_is_said():
    graph, ctx = tiny().copy(), Context(data={"calib": [torch.zeros(4, 3, 16, 16)]})
    find_pass("quantize", {"data": "calib"}).run(graph, ctx)
    assert any("never differed from 0 in data `calib`" in note for note in ctx.products["notes"])


# As a step of a recipe


RECIPE = """dfc 1
data calib
recipe small {
  q: quantize int8 using calib
}
"""


def compiled(recipe, **more):
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(4, 3, 16, 16)
    shapes = ({0: torch.export.Dim("B", min=1)},)
    return dfc.compile(
        net, (x,), dynamic_shapes=shapes, recipe=recipe, data={"calib": data()}, **more
    )


def test_a_recipe_quantizes_with_its_data(tmp_path):
    made = compiled(RECIPE, engine="onnxruntime")
    ops = collections.Counter(n.op for n in made.graph.nodes)
    assert ops["dfc.quantize"] >= 8 and not any("batch_norm" in op for op in ops)
    x = data(n=1)[0]
    (want,) = interpret(tiny(), [x])
    torch.testing.assert_close(made(x), want, rtol=0, atol=0.03 * float(want.abs().max()))
    made.export(tmp_path / "m.onnx")
    made.save(tmp_path / "m.dfcpkg")
    again = dfc.load(tmp_path / "m.dfcpkg")
    torch.testing.assert_close(again(x), made(x))


def test_data_is_needed():
    with pytest.raises(DfcError, match="needs calibration data"):
        find_pass("quantize", {"scheme": "static"}).run(tiny().copy(), Context())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_layers_of_other_floats_are_refused_by_name(dtype):
    """Their scales are f32: the step failed, and was left out as wrong."""
    x = torch.randn(4, 64, dtype=dtype)
    net = nn.Sequential(nn.Linear(64, 64), nn.Conv1d(4, 8, 3, padding=1)).eval().to(dtype)
    text = "dfc 1\ndata calib\nrecipe r {\n  quantize int8 using calib with smallest=1"
    with pytest.raises(DfcError, match="D096") as e:
        dfc.compile(
            net, (x,), recipe=f"{text}, scheme=static\n}}\n", data={"calib": [x]}, engine="eager"
        )
    assert "layer %linear of `0`: it computes with f" in str(e.value)
    made = dfc.compile(net, (x,), recipe=f"{text}\n}}\n", data={"calib": [x]}, engine="eager")
    assert any(n.op == "dfc.linear_w8" for n in made.graph.nodes)
