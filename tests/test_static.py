"""Static int8: what runs in integers, how close it stays, and what ONNX Runtime makes of it."""

from __future__ import annotations

import collections

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dfc
from dfc.errors import DfcError
from dfc.ir.interpret import interpret
from dfc.rewrite.pass_ import Context, find_pass
from tests.static_nets import Net, data, distance, quantized, ran, tiny, traced

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


@pytest.mark.parametrize("cut", ["chunk", "split", "unbind"])
def test_layers_read_any_part_of_what_is_cut(cut, tmp_path):
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(16, 8, 1)

        def forward(self, x):
            x = torch.relu(self.a(x))
            left, right = {
                "chunk": lambda: x.chunk(2, 1),
                "split": lambda: x.split([8, 8], 1),
                "unbind": lambda: x.view(-1, 2, 8, *x.shape[2:]).unbind(1),
            }[cut]()
            return self.c(torch.cat([left[..., 2:, 2:], self.b(right)], 1))

    graph = traced(Parts(), 3, 12, 12)
    made = quantized(graph, data(3, 12, 12))
    (x,) = data(3, 12, 12, n=1)
    assert distance(graph, made, x) < 1e-3
    got, ops = ran(made, x, tmp_path)
    assert ops["QLinearConv"] == 3
    torch.testing.assert_close(got, interpret(made, [x])[0], rtol=0, atol=0.02)


def test_branches_whose_activations_follow_together():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 8, k, padding=k // 2) for k in (1, 3, 5))
            self.head = nn.Conv2d(24, 8, 1)

        def forward(self, x):
            found = [conv(x) for conv in self.convs]
            return self.head(torch.cat([torch.relu(y) for y in found], 1))

    graph = traced(Branches(), 3, 12, 12)
    made = quantized(graph, data(3, 12, 12))
    assert distance(graph, made, data(3, 12, 12)[0]) < 1e-3


def test_a_layer_of_constants_stays_in_floats():
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.places = nn.Buffer(torch.randn(16, 4))
            self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.down(x + self.up(self.places))

    graph = dfc.trace(Biased().eval(), (torch.randn(16, 16),))
    ctx = Context(data={"calib": [torch.randn(16, 16)]}, decisions=[])
    step = find_pass("quantize", {"data": "calib", "scheme": "static"})
    assert step.run(graph, ctx) == 1
    assert any(d.reason == "what it reads is constant" for d in ctx.decisions)


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


# Bad input


def test_activations_that_are_no_numbers_are_named():
    class Divides(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(1 / (self.a(x) * 0))

    with pytest.raises(DfcError, match=r"\d+ numbers that are NaN or infinite in %\w+"):
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


def test_a_recipe_does_not_go_on_without_the_layer_that_reads_no_numbers():
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    x = torch.full((4, 16), 1e38)
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    recipe = "dfc 1\ndata d\nrecipe q { quantize int8 using d with scheme=static }"
    with pytest.raises(DfcError, match=r"128 numbers that are NaN or infinite in %\w+ of `1`") as e:
        dfc.compile(net, (x / 1e38,), recipe=recipe, data={"d": [x]}, engine="eager")
    assert e.value.code == "D090"
