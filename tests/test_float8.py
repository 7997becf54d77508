"""`quantize fp8`: what is stored in eight-bit floats, how near it is, what ONNX and engines do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import dfc
from dfc.emit.fx import to_fx
from dfc.emit.onnx import build_onnx
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.ir.interpret import interpret
from dfc.ops.linear_f8 import round_rows_f8
from dfc.recipe.sources import plan_of
from dfc.rewrite.pass_ import Context, find_pass
from dfc.runtime.kernels.graph import kernels


class Net(nn.Module):
    """A table, two layers, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(500, 64)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64, bias=False)
        self.conv = nn.Conv1d(64, 64, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        return self.conv((x + self.down(torch.relu(self.up(x)))).transpose(1, 2))


IDS = torch.arange(32).reshape(2, 16)


def quantized(**options: Any) -> tuple[Graph, Context]:
    graph, ctx = dfc.trace(Net().eval(), (IDS,)), Context(decisions=[])
    step = find_pass("quantize", {"to": "fp8", **options})
    assert step.run(graph, ctx) == 4
    assert step.run(graph, Context()) == 0
    assert dfc.parse(str(graph)) == graph
    return graph, ctx


@pytest.mark.parametrize(
    ("options", "codes", "error"),
    [
        ({}, "f8e4m3fn", 0.03),
        ({"per": "tensor"}, "f8e4m3fn", 0.03),
        ({"format": "e5m2"}, "f8e5m2", 0.06),
        ({"scheme": "dynamic"}, "f8e4m3fn", 0.04),
    ],
)
def test_what_multiplies_is_stored_in_eight_bit_floats(
    options: dict[str, Any], codes: str, error: float
) -> None:
    graph, ctx = quantized(**options)
    types = Counter(str(p.tensor_type.dtype) for p in graph.parameters.values())
    assert types[codes] == 3 and types["i8"] == 1  # the table: as many bytes, and nearer
    assert sum(d.outcome == "quantized" for d in ctx.decisions or ()) == 4
    (got,), (want,) = interpret(graph, [IDS]), interpret(dfc.trace(Net().eval(), (IDS,)), [IDS])
    assert 0.005 < float((got - want).norm() / want.norm()) < error


def test_every_weight_is_a_value_of_the_format_nearest_to_it() -> None:
    graph, _ = quantized()
    weight = Net().up.weight.detach()
    codes = graph.parameters["up.weight.codes"].data.tensor().float()  # type: ignore[union-attr]
    scale = graph.parameters["up.weight.scale"].data.tensor().float()[:, None]  # type: ignore[union-attr]
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    nearest = (weight / scale)[..., None].sub(every).abs().amin(-1)
    assert torch.equal((weight / scale - codes).abs(), nearest)
    assert codes.abs().amax(1).eq(448).all()  # each row reaches the largest value


def test_files_shrink_and_onnxruntime_gives_what_the_ops_mean(tmp_path: Path) -> None:
    sizes: dict[str, int] = {}
    for name, step in (("plain", "dce"), ("fp8", "quantize fp8"),
                       ("e5m2", "quantize fp8 with format=e5m2")):  # fmt: skip
        recipe = f"dfc 1\nrecipe r {{ {step} }}"
        compiled = dfc.compile(Net().eval(), (IDS,), recipe=recipe, engine="onnxruntime")
        compiled.save(tmp_path / f"{name}.dfcpkg")
        compiled.export(tmp_path / f"{name}.onnx")  # proved in stock ONNX Runtime
        sizes[name] = (tmp_path / f"{name}.onnx").stat().st_size
        loaded = dfc.load(tmp_path / f"{name}.dfcpkg")
        assert torch.equal(loaded(IDS), compiled(IDS))
    assert sizes["fp8"] < 0.3 * sizes["plain"] and sizes["e5m2"] < 0.3 * sizes["plain"]
    model = onnx.load(tmp_path / "fp8.onnx")
    kinds = Counter(t.data_type for t in model.graph.initializer)
    assert kinds[onnx.TensorProto.FLOAT8E4M3FN] >= 3
    nodes = Counter(n.op_type for n in model.graph.node)
    assert nodes["DequantizeLinear"] == 3 and {o.domain for o in model.opset_import} == {""}


@pytest.mark.parametrize("codes", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_onnxruntime_dequantizes_every_code_to_the_same_bits(
    codes: torch.dtype, tmp_path: Path
) -> None:
    import onnxruntime

    from dfc.ir.types import TensorType
    from dfc.ops.builder import Builder

    every = torch.arange(256, dtype=torch.uint8).view(codes)
    weight = torch.where(every.float().isfinite(), every.float(), 0).to(codes).reshape(16, 16)
    graph = Graph("eye")
    x = torch.eye(16)
    b, given = Builder(graph), graph.add_input("x", TensorType.of(x))
    scale = graph.add_constant("s", torch.rand(16, generator=torch.Generator().manual_seed(0)))
    graph.set_outputs([b("dfc.linear_f8", given, graph.add_constant("w", weight), scale)])
    proto = onnx.load_from_string(_bytes(graph))
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    (found,) = session.run(None, {"x": x.numpy()})
    assert torch.equal(torch.from_numpy(found), interpret(graph, [x])[0])


def _bytes(graph: Graph) -> bytes:
    from onnxscript import ir

    return bytes(ir.to_proto(build_onnx(graph)).SerializeToString())


def test_eager_unpacks_weights_once() -> None:
    graph, _ = quantized()
    module = to_fx(graph, kernels=kernels("cpu"))
    assert not any(b.dtype == torch.float8_e4m3fn for b in module.buffers())
    torch.testing.assert_close(module(IDS)[0], interpret(graph, [IDS])[0], rtol=0, atol=1e-5)


def test_rows_are_rounded_to_nearest_and_saturate() -> None:
    x = torch.tensor([[448.0, -448.0, 17.0, 19.0], [0.0, 0.0, 0.0, 0.0]])
    codes, scale = round_rows_f8(x)
    assert codes.float().tolist() == [[448, -448, 16, 20], [0, 0, 0, 0]]  # ties to even
    assert scale.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group": 32}, "`group` is for int8 and int4"),
        ({"method": "gptq", "data": "calib"}, "rounded to nearest"),
        ({"scheme": "static", "data": "calib"}, "`scheme=static` is for int8"),
        ({"symmetric": False}, "fp8 weights have no zero point"),
        ({"to": "int8", "format": "e5m2"}, "`format` is for fp8, not for int8"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DfcError) as e:
        quantized(**options)
    assert e.value.code == "D097" and words in e.value.message


def test_a_target_decides_whether_rows_are_rounded_too() -> None:
    text = "dfc 1\ntarget t {{ device d : {} }}\nrecipe r for t {{ q: quantize fp8{} }}"
    for device, activations in (("cpu(cores=2)", "float"), ("a100_80gb", "float"), ("h100", "f8")):
        target = plan_of(text.format(device, "")).target
        graph = dfc.trace(Net().eval(), (IDS,))
        find_pass("quantize", {"to": "fp8"}).run(graph, Context(target=target))
        found = {n.attributes["activations"] for n in graph.nodes if n.op == "dfc.linear_f8"}
        assert found == {activations}
    with pytest.raises(DfcError) as e:
        plan_of(text.format("a100_80gb", " with scheme=dynamic"))
    assert e.value.code == "Q017" and "not in f8e4m3fn" in e.value.message


def test_an_opset_without_the_type_is_refused_by_the_weights_name() -> None:
    graph, _ = quantized()
    with pytest.raises(DfcError) as e:
        build_onnx(graph, opset=18)
    assert e.value.code == "X001" and "opset 18 has no f8e4m3fn, which !up.w" in e.value.message
