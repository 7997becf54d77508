"""Quantized layers in ONNX Runtime: which kernels really run, and that they add whole numbers.

Scales are powers of two and rows have the largest code 127, so that floats are exact too: what the
kernel gives must equal the op's meaning in every bit, at the largest codes included.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnxscript import ir

from dfc.emit.onnx import build_onnx, export_onnx
from dfc.ir.graph import Graph
from dfc.ir.interpret import interpret
from dfc.ir.types import TensorType
from dfc.ops.builder import Builder
from dfc.ops.codes import pack4
from dfc.runtime.engines import find_engine


def layer(op: str, x: torch.Tensor, tensors: list[torch.Tensor | None], **attributes: Any) -> Graph:
    """One layer with constant weights."""
    graph = Graph("layer")
    b = Builder(graph)
    given = graph.add_input("x", TensorType.of(x))
    constants = [None if t is None else graph.add_constant(f"w{i}", t)
                 for i, t in enumerate(tensors)]  # fmt: skip
    graph.set_outputs([b(op, given, *constants, **attributes)])
    return graph


def run(graph: Graph, x: torch.Tensor, folder: Path, **options: Any) -> tuple[Any, Counter[str]]:
    """The result, and the kernels of ONNX Runtime's optimised graph."""
    import onnxruntime

    model = ir.serde.serialize_model(build_onnx(graph, opset=21, **options))
    session = onnxruntime.SessionOptions()
    session.intra_op_num_threads = 1
    session.log_severity_level = 3
    session.optimized_model_filepath = str(folder / "optimised.onnx")
    runs = onnxruntime.InferenceSession(
        model.SerializeToString(), session, providers=["CPUExecutionProvider"]
    )
    (found,) = runs.run(None, {"x": x.numpy()})
    kernels = onnx.load(folder / "optimised.onnx", load_external_data=False).graph.node
    return torch.from_numpy(found), Counter(n.op_type for n in kernels)


def operands(k: int, group: int | None, low: int, high: int, n: int = 6) -> tuple[Any, Any, Any]:
    """Activations that are codes already, extreme weights, scales that are powers of two."""
    generator = torch.Generator().manual_seed(k)
    x = torch.randint(-127, 128, (5, k), generator=generator).float()
    x[:, :: group or k] = 127
    x[0], x[1] = 127, -127
    weight = torch.randint(low, high + 1, (n, k), generator=generator, dtype=torch.int8)
    weight[0], weight[1] = high, low
    groups = -(-k // group) if group else 1
    # of two sizes: the sums of float32 that follow stay below 2**24, so that they are exact
    scale = 2.0 ** torch.randint(-1, 1, (n, groups), generator=generator)
    return x, weight, scale if group else scale[:, 0]


@pytest.mark.parametrize("contrib", [True, False])
@pytest.mark.parametrize("k", [64, 100, 1536])
def test_rows_of_int8_are_multiplied_as_whole_numbers(
    k: int, contrib: bool, tmp_path: Path
) -> None:
    x, weight, scale = operands(k, None, -128, 127)
    bias = torch.arange(6).float()
    graph = layer("dfc.linear_w8", x, [weight, scale, bias], activations="int8")
    found, kernels = run(graph, x, tmp_path, contrib=contrib)
    assert torch.equal(found, interpret(graph, [x])[0])
    assert kernels["MatMulIntegerToFloat" if contrib else "MatMulInteger"] == 1
    assert not {"MatMul", "Gemm", "FusedMatMul", "Transpose"} & set(kernels)  # folded when loading


@pytest.mark.parametrize("contrib", [True, False])
def test_pairs_that_fit_16_bits_stay_int8_and_are_exact(contrib: bool, tmp_path: Path) -> None:
    x, weight, scale = operands(64, None, -64, 64)
    weight[:4, ::2] = torch.tensor([127, -128, 127, -128], dtype=torch.int8)[:, None]
    weight[:4, 1::2] = torch.tensor([1, 0, -128, 127], dtype=torch.int8)[:, None]
    for codes, signed in ((weight, True), (torch.full_like(weight, 65), False)):
        graph = layer("dfc.linear_w8", x, [codes, scale, None], activations="int8")
        found, _ = run(graph, x, tmp_path, contrib=contrib)
        assert torch.equal(found, interpret(graph, [x])[0])
        written = onnx.load(tmp_path / "optimised.onnx").graph
        (product,) = (n for n in written.node if n.op_type.startswith("MatMulInteger"))
        kinds = {i.name: i.data_type for i in written.initializer}
        assert (kinds[product.input[1]] == onnx.TensorProto.INT8) is signed


def test_the_engine_is_exact_on_the_processor_it_runs_on() -> None:
    """With VNNI weights stay int8, and no sum of them saturates; without it they become bytes."""
    x, weight, scale = operands(64, None, -128, 127)
    graph = layer("dfc.linear_w8", x, [weight, scale, None], activations="int8")
    for saturates in (True, False):
        model = build_onnx(graph, contrib=True, saturates=saturates)
        assert any(n.op_type == "Add" for n in model.graph) is saturates  # 128, to every code
    found = find_engine("onnxruntime").build(graph)([x])[0]
    assert torch.equal(found, interpret(graph, [x])[0])


def test_eight_bit_floats_that_lie_transposed_stay_in_memory() -> None:
    """The session reads a weight where it lies: a copy in order must live as long."""
    codes = torch.arange(96 * 64).reshape(96, 64).remainder(80).to(torch.uint8)
    codes = codes.view(torch.float8_e4m3fn)  # up to 7.5: sums are exact
    x = torch.arange(3 * 96).reshape(3, 96).remainder(7).float() - 3
    graph = layer("dfc.linear_f8", x, [codes.T, torch.ones(64), None])
    engine = find_engine("onnxruntime").build(graph)
    others = [torch.full((96, 64), 0x7F, dtype=torch.uint8) for _ in range(9)]
    assert torch.equal(engine([x])[0], interpret(graph, [x])[0])
    del others


def test_layers_that_read_one_value_round_it_once(tmp_path: Path) -> None:
    x, weight, scale = operands(64, None, -127, 127)
    graph = Graph("two")
    b, given = Builder(graph), graph.add_input("x", TensorType.of(x))
    w, s = graph.add_constant("w", weight), graph.add_constant("s", scale)
    made = [b("dfc.linear_w8", given, w, s, activations="int8") for _ in range(2)]
    graph.set_outputs([b("aten.add.Tensor", *made)])
    _, kernels = run(graph, x, tmp_path, contrib=True)
    assert kernels["QuantizeLinear"] == 1 and kernels["MatMulIntegerToFloat"] <= 2


@pytest.mark.parametrize("group", [16, 32, 128])
@pytest.mark.parametrize("k", [256, 200])
@pytest.mark.parametrize("bits", [8, 4])
def test_groups_are_multiplied_as_whole_numbers_by_one_kernel(
    bits: int, k: int, group: int, tmp_path: Path
) -> None:
    low, high = (-128, 127) if bits == 8 else (-8, 7)
    x, weight, scale = operands(k, group, low, high)
    tensors: list[torch.Tensor | None] = [weight, scale]
    if bits == 4:
        more = scale.shape[1] * group - k
        codes = torch.nn.functional.pad(weight + 8, (0, more), value=8).to(torch.uint8)
        tensors = [pack4(codes), scale, None]
    graph = layer(f"dfc.linear_w{bits}", x, tensors, group=group, activations="int8")
    found, kernels = run(graph, x, tmp_path, contrib=True)
    assert kernels == {"MatMulNBits": 1}
    assert torch.equal(found, interpret(graph, [x])[0])


@pytest.mark.parametrize("group", [16, 32, 128])
@pytest.mark.parametrize("n, k", [(6, 256), (7, 201)])
@pytest.mark.parametrize("bits, zeros", [(8, False), (4, False), (4, True)])
def test_groups_in_standard_onnx_become_the_same_kernel(
    bits: int, n: int, k: int, group: int, zeros: bool, tmp_path: Path
) -> None:
    """Blocked DequantizeLinear of opset 21, without ONNX Runtime's own ops in the file."""
    x, weight, scale = operands(k, group, *((-128, 127) if bits == 8 else (-8, 7)), n=n)
    tensors: list[torch.Tensor | None] = [weight, scale]
    if bits == 4:
        more = scale.shape[1] * group - k
        codes = torch.nn.functional.pad(weight + 8, (0, more), value=8).to(torch.uint8)
        points = torch.arange(n)[:, None] + torch.arange(scale.shape[1]) + 4
        zero = pack4((points % 16).to(torch.uint8)) if zeros else None
        tensors = [pack4(codes), scale, zero]
    tensors.append(torch.arange(n).float())
    graph = layer(f"dfc.linear_w{bits}", x, tensors, group=group, activations="int8")
    model = ir.serde.serialize_model(build_onnx(graph, opset=21))
    onnx.checker.check_model(model, full_check=True)
    assert {o.domain for o in model.opset_import} == {""}
    types = {t.name: t.data_type for t in model.graph.initializer}
    four = onnx.TensorProto.UINT4 if zeros else onnx.TensorProto.INT4
    assert types["w0.columns"] == (onnx.TensorProto.INT8 if bits == 8 else four)
    found, kernels = run(graph, x, tmp_path)
    assert kernels["MatMulNBits"] == 1 and not {"DequantizeLinear", "MatMul"} & set(kernels)
    assert torch.equal(found, interpret(graph, [x])[0])


@pytest.mark.parametrize("clip, bounds", [("relu", {}), ("clamp", {"min": 0, "max": 1000})])
@pytest.mark.parametrize("rank, biased", [(2, False), (2, True), (3, False)])
@pytest.mark.parametrize("bits", [8, 4])
def test_layers_that_are_clipped_become_the_same_kernel(
    bits: int, rank: int, biased: bool, clip: str, bounds: dict[str, Any], tmp_path: Path
) -> None:
    """ONNX Runtime makes no kernel of a product whose Relu or Clip is read by another node."""
    x, weight, scale = operands(64, 32, *((-128, 127) if bits == 8 else (-8, 7)))
    x = x.reshape(*[1] * (rank - 2), 5, 64)
    graph = Graph("clipped")
    b, given = Builder(graph), graph.add_input("x", TensorType.of(x))
    codes = weight if bits == 8 else pack4((weight + 8).to(torch.uint8))
    tensors = [codes, scale, *([None] if bits == 4 else [])]
    tensors.append(torch.arange(6).float() if biased else None)
    held = [None if t is None else graph.add_constant("w", t) for t in tensors]
    y = b(f"dfc.linear_w{bits}", given, *held, group=32, activations="int8")
    graph.set_outputs([b("aten.neg.default", b(f"aten.{clip}.default", y, **bounds))])
    found, kernels = run(graph, x, tmp_path)
    assert kernels["MatMulNBits"] == 1 and kernels["DequantizeLinear"] == 0
    assert torch.equal(found, interpret(graph, [x])[0])


def test_a_table_that_is_a_layers_weight_too_is_written_once() -> None:
    graph = Graph("tied")
    b = Builder(graph)
    ids = graph.add_input("ids", TensorType.of(torch.zeros(3, dtype=torch.int64)))
    table = graph.add_constant("table", torch.randint(-128, 128, (50, 64), dtype=torch.int8))
    scale = graph.add_constant("scale", torch.rand(50, 2))
    rows = b("dfc.embedding_w8", ids, table, scale, group=32)
    graph.set_outputs([b("dfc.linear_w8", rows, table, scale, group=32, activations="int8")])
    held = build_onnx(graph, opset=21).graph.initializers.values()
    assert sum(v.const_value.nbytes for v in held if v.const_value) < 1.2 * 50 * 64 + 50 * 2 * 4


def test_half_precision_scales_are_widened_when_written(tmp_path: Path) -> None:
    """Scales that are computed when loading make the kernel give zeros where nothing folds them."""
    x, weight, scale = operands(64, 32, -8, 7)
    packed = pack4((weight + 8).to(torch.uint8))
    graph = layer("dfc.linear_w4", x, [packed, scale.half(), None], group=32, activations="int8")
    model = build_onnx(graph, contrib=True)
    names = {str(v.dtype) for v in model.graph.initializers.values()}
    assert "FLOAT16" not in names and len(model.graph.initializers) == 2
    found, _ = run(graph, x, tmp_path, contrib=True)
    assert torch.equal(found, interpret(graph, [x])[0])


@pytest.mark.parametrize("contrib", [True, False])
def test_layers_in_half_precision_find_their_kernel_too(contrib: bool, tmp_path: Path) -> None:
    """The scales are cast before the layer; the kernel would give zeros for such."""
    x, w, scale = operands(64, 32, -8, 7)
    packed = pack4((w + 8).to(torch.uint8))
    x = x.bfloat16()
    tensors = [packed, scale.bfloat16(), None, None]
    graph = layer("dfc.linear_w4", x, tensors, group=32, activations="int8")
    model = ir.serde.serialize_model(build_onnx(graph, opset=21, contrib=contrib))
    assert sum(len(t.raw_data) for t in model.graph.initializer) == packed.nbytes + scale.nbytes
    probe = ([x], interpret(graph, [x]))
    export_onnx(graph, tmp_path / "layer.onnx", probes=[probe], opset=21, contrib=contrib)


@pytest.mark.parametrize("bits, zero", [(8, None), (4, None), (4, (6, 1))])
def test_tables_of_bf16_are_computed_in_f32(bits: int, zero: Any, tmp_path: Path) -> None:
    """ONNX Runtime multiplies no bf16, and a decoder in bf16 begins with such a table."""
    kind, columns = (torch.int8, 32) if bits == 8 else (torch.uint8, 16)
    table = torch.arange(6 * columns).reshape(6, columns).to(kind)
    scale = torch.rand(6, 1).bfloat16()
    points = None if zero is None else torch.full(zero, 0x37, dtype=torch.uint8)
    x = torch.tensor([[0, 5], [3, 1]])
    tensors = [table, scale] if bits == 8 else [table, scale, points]
    g = layer(f"dfc.embedding_w{bits}", x, tensors, group=32, dtype="bf16")
    assert str(g.outputs[0].type) == "bf16[2, 2, 32]"
    probe = ([x], interpret(g, [x]))
    export_onnx(g, tmp_path / "m.onnx", probes=[probe])


def test_what_a_translation_gave_up_is_not_written() -> None:
    """Neither nodes that nothing reads nor a second form of the weights."""
    x, w, scale = operands(201, 32, 0, 15, 7)
    more = scale.shape[1] * 32 - 201
    codes = torch.nn.functional.pad(w, (0, more)).to(torch.uint8)
    graph = layer("dfc.linear_w4", x, [pack4(codes), scale, None, None], group=32)
    model = ir.serde.serialize_model(build_onnx(graph, opset=21))
    read = {i for n in model.graph.node for i in n.input} | {o.name for o in model.graph.output}
    assert all(read & set(n.output) for n in model.graph.node)
    assert {t.name for t in model.graph.initializer} <= read


def test_weights_of_dead_nodes_are_not_written() -> None:
    """ONNX Runtime drops them, and cannot be handed their memory then."""
    x, w, scale = operands(64, None, -8, 7, 32)
    graph = layer("dfc.linear_w8", x, [w, scale, None], activations="int8")
    graph.set_outputs([Builder(graph)("aten.neg.default", graph.inputs[0])])
    assert not build_onnx(graph).graph.initializers
    assert torch.equal(find_engine("onnxruntime").build(graph)([x])[0], -x)


def test_quantize_linear_rounds_ties_as_the_op_does(tmp_path: Path) -> None:
    x = torch.arange(-600, 600).float() / 4
    graph = Graph("q")
    b, given = Builder(graph), graph.add_input("x", TensorType.of(x))
    scale = graph.add_constant("s", torch.tensor(0.5))
    zero = graph.add_constant("z", torch.tensor(3, dtype=torch.uint8))
    codes = b("dfc.quantize", given, scale, zero, dtype="u8")
    graph.set_outputs([b("dfc.dequantize", codes, scale, zero)])
    found, kernels = run(graph, x, tmp_path)
    assert torch.equal(found, interpret(graph, [x])[0])
    assert kernels == {"QuantizeLinear": 1, "DequantizeLinear": 1}


@pytest.mark.parametrize("contrib", [True, False])
@pytest.mark.parametrize("bits, zeros, group", [(8, False, 32), (4, False, 32), (4, True, 16)])
def test_16_bit_floats_have_the_kernel_too(
    bits: int, zeros: bool, group: int, contrib: bool, tmp_path: Path
) -> None:
    """Rows that are rounded are computed with as float32, between casts, as the op means it."""
    x, weight, scale = operands(64, group, *((-128, 127) if bits == 8 else (-8, 7)))
    codes = weight if bits == 8 else pack4((weight + 8).to(torch.uint8))
    tensors: list[torch.Tensor | None] = [codes, (scale / 4096).half()]
    if bits == 4:
        points = torch.arange(6 * scale.shape[1]).reshape(6, -1) % 3 + 7
        tensors.append(pack4(points.to(torch.uint8)) if zeros else None)
    graph = layer(f"dfc.linear_w{bits}", x.half(), tensors, group=group, activations="int8")
    found, kernels = run(graph, x.half(), tmp_path, contrib=contrib)
    assert kernels == {"MatMulNBits": 1, "Cast": 2}
    assert torch.equal(found, interpret(graph, [x.half()])[0])


@pytest.mark.parametrize("bits", [8, 4])
def test_16_bit_floats_that_are_not_rounded_go_into_the_kernel_as_they_are(
    bits: int, tmp_path: Path
) -> None:
    _, weight, scale = operands(256, 32, *((-128, 127) if bits == 8 else (-8, 7)))
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).half()
    codes = weight if bits == 8 else pack4((weight + 8).to(torch.uint8))
    more = [None] if bits == 4 else []
    tensors = [codes, (scale / 512).half(), *more, torch.arange(6).half()]
    graph = layer(f"dfc.linear_w{bits}", x, tensors, group=32)
    found, kernels = run(graph, x, tmp_path, contrib=True)
    assert kernels == {"MatMulNBits": 1} and found.dtype == torch.float16
    witness = interpret(graph, [x], double=True)[0]
    assert (found - witness).abs().max() <= 2e-3 * witness.abs().max()


@pytest.mark.parametrize("bits", [8, 4])
def test_products_that_share_a_weight_share_its_codes(bits: int, tmp_path: Path) -> None:
    x, weight, scale = operands(64, 32, *((-128, 127) if bits == 8 else (-8, 7)))
    graph = Graph("shared")
    b, given = Builder(graph), graph.add_input("x", TensorType.of(x))
    w = graph.add_constant("w", weight if bits == 8 else pack4((weight + 8).to(torch.uint8)))
    held = [w, graph.add_constant("s", scale)]
    made = [b(f"dfc.linear_w{bits}", v, *held, group=32, activations="int8")
            for v in (given, b("aten.neg.default", given))]  # fmt: skip
    graph.set_outputs([b("aten.add.Tensor", *made)])
    found, kernels = run(graph, x, tmp_path, contrib=True)
    assert kernels["MatMulNBits"] == 2 and torch.equal(found, interpret(graph, [x])[0])
    model = ir.serde.serialize_model(build_onnx(graph, opset=21, contrib=True))
    assert sorted(t.name for t in model.graph.initializer) == ["s", "w.blocks"]
