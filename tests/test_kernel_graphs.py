"""Compiled graphs call the kernels where they can, and leave the rest to torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dfc
from dfc.emit.fx import to_fx
from dfc.ir.expr import symbol
from dfc.ir.graph import Argument, Graph
from dfc.ir.interpret import interpret
from dfc.ir.tree import LEAF
from dfc.ir.types import DTYPES, TensorType
from dfc.runtime.kernels import linear, packed
from dfc.runtime.kernels.graph import kernels, why_not
from tests.kernel_layers import Layer, needs_kernels


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    needs_kernels()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    packed._held.clear()


def graph_of(layer: Layer, activations: str = "int8", dtype: str = "f32") -> Graph:
    graph = Graph("layer", ranges={"B": (1, None)})
    x = graph.add_input("x", TensorType(DTYPES[dtype], (symbol("B"), layer.x.shape[1])))
    graph.arguments = (Argument("x", LEAF),)
    weight = graph.add_constant("weight", layer.codes)
    scale = graph.add_constant("scale", layer.scale)
    bias = None if layer.bias is None else graph.add_constant("bias", layer.bias)
    if layer.bits == 4:
        zero = None if layer.zero is None else graph.add_constant("zero", layer.zero)
        operands = [x, weight, scale, zero, bias]
    else:
        operands = [x, weight, scale, bias]
    attributes = {"group": layer.group, "activations": activations}
    node = graph.add(f"dfc.linear_w{layer.bits}", operands, attributes)
    graph.set_outputs([node.result])
    return graph


def called(module: torch.fx.GraphModule) -> list[Any]:
    size = torch.ops.aten.sym_size.int
    functions = [n.target for n in module.graph.nodes if n.op == "call_function"]
    return [f for f in functions if f is not size]


@pytest.mark.parametrize("bits, group", [(4, 32), (4, 128), (8, None), (8, 64)])
def test_a_compiled_graph_runs_on_the_kernels(bits: int, group: int | None) -> None:
    layer = Layer(bits, group, (3, 20, 96), zeros=True, bias=True)
    graph = graph_of(layer)
    (target,) = called(to_fx(graph, kernels=kernels("cpu")))
    assert isinstance(target.__self__, linear.Bound)
    module = to_fx(graph, kernels=kernels("cpu", traced=True))
    assert called(module) == [getattr(torch.ops.dfc, f"linear_w{bits}").default]
    assert sum(b.numel() for b in module.buffers()) == layer.pack().numel() + 20  # and bias
    compiled = dfc.compile(graph, (layer.x,), engine="eager")
    torch.testing.assert_close(compiled(layer.x), layer.meaning(), rtol=1e-5, atol=1e-5)
    assert compiled(layer.x[:1]).shape == (1, 20)


def test_a_gelu_that_a_layer_alone_reads_is_left_to_it() -> None:
    layer = Layer(8, None, (3, 20, 96), bias=True)
    graph = graph_of(layer)
    (node,) = graph.nodes
    x = graph.add("aten.mul.Scalar", [graph.inputs[0]], {"other": 2.0}, before=node).result
    gelu = graph.add("aten.gelu.default", [x], {"approximate": "none"}, before=node).result
    graph.set_inputs_of(node, [gelu, *node.inputs[1:]])
    (want,) = to_fx(graph, kernels={})(layer.x)
    mul, target = called(module := to_fx(graph, kernels=kernels("cpu")))
    assert mul is torch.ops.aten.mul.Scalar and target.__self__.before == linear.GELU
    torch.testing.assert_close(module(layer.x)[0], want, rtol=1e-2, atol=1e-2)
    (traced,) = to_fx(graph, kernels=kernels("cpu", traced=True))(layer.x)
    assert torch.equal(traced, module(layer.x)[0])
    graph.set_outputs([node.result, gelu])
    assert len(called(to_fx(graph, kernels=kernels("cpu")))) == 3
    graph.set_outputs([node.result])
    assert len(called(to_fx(graph, kernels=kernels("cpu")))) == 2
    graph.set_attributes(gelu.node, approximate="tanh")
    assert len(called(to_fx(graph, kernels=kernels("cpu")))) == 3


def test_layers_of_one_weight_share_what_is_packed() -> None:
    graph = graph_of(Layer(8, None, (3, 20, 96)))
    (node,) = graph.nodes
    again = graph.add(node.op, node.inputs, node.attributes)
    graph.set_outputs([node.result, again.result])
    assert len(list(to_fx(graph, kernels=kernels("cpu", traced=True)).buffers())) == 1
    one, other = called(to_fx(graph, kernels=kernels("cpu")))
    assert one.__self__.packed is other.__self__.packed


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (torch.nn.Linear(64, n, bias=False) for n in (64, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.q(x) @ torch.cat([self.k(x), self.v(x)], -1).mT, -1)


def test_projections_are_merged_and_then_quantized_for_one_call() -> None:
    recipe = "dfc 1\nrecipe r {\n  fuse\n  quantize int4 with scheme=dynamic, group=32\n}"
    compiled = dfc.compile(Attention(), (torch.randn(1, 5, 64),), recipe=recipe, engine="eager")
    (target,) = [
        f
        for f in called(to_fx(compiled.graph, kernels=kernels("cpu")))
        if isinstance(getattr(f, "__self__", None), linear.Bound)
    ]
    assert (target.__self__.n, target.__self__.k) == (128, 64)


def test_what_kernels_do_not_take_is_left_to_torch() -> None:
    graph = graph_of(Layer(4, 32, (3, 20, 64)), dtype="f64")
    (node,) = graph.nodes
    assert "f64" in str(why_not(node))
    module = to_fx(graph, kernels=kernels("cpu"))
    assert len(list(module.buffers())) == 2  # codes and scales as they are
    assert kernels("xla") == {}


@pytest.mark.parametrize("bits, group", [(4, 32), (4, 128), (8, None), (8, 64)])
def test_weights_that_are_multiplied_as_floats_are_unpacked_once(
    bits: int, group: int | None
) -> None:
    layer = Layer(bits, group, (3, 20, 96), zeros=True, bias=True)
    graph = graph_of(layer, activations="float")
    one, other = (to_fx(graph, kernels=kernels("cpu")) for _ in range(2))
    assert called(one) == [torch.ops.aten.linear.default]
    shapes = sorted(tuple(b.shape) for b in one.buffers())
    assert shapes == [(20,), (20, 96)]  # bias and floats: the codes are let go
    (want,) = interpret(graph, [layer.x])
    assert torch.equal(one(layer.x)[0], want)
    pointers = [{b.data_ptr() for b in m.buffers() if b.dim() == 2} for m in (one, other)]
    assert pointers[0] == pointers[1]


@pytest.mark.slow  # the C++ compiler of torch.compile takes half a minute
def test_inductor_calls_the_kernels() -> None:
    layer = Layer(4, 32, (3, 20, 64), bias=True)
    compiled = dfc.compile(graph_of(layer), (layer.x,), engine="inductor")
    torch.testing.assert_close(compiled(layer.x), layer.meaning(), rtol=1e-5, atol=1e-5)
