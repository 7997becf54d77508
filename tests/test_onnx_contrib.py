"""Fast operators in ONNX: each form means what PyTorch means, or is not used.

Three forms of every graph: standard operators of opset 20 and 23, and what the engine runs.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dfc
import dfc.ops
from dfc.emit.onnx import ENGINE_OPSET, build_onnx
from dfc.emit.onnx_export import export_onnx, ir_to_proto
from dfc.emit.onnx_run import Session
from dfc.ir.expr import symbol
from dfc.ir.graph import Argument, Graph
from dfc.ir.interpret import interpret
from dfc.ir.tree import LEAF
from dfc.ir.types import DTYPES, TensorType
from dfc.ir.weights import TensorData
from dfc.ops.builder import Builder
from dfc.rewrite.agree import judge
from dfc.runtime.engines.onnxruntime_ import ENGINE

FORMS = {"20": (20, False), "23": (23, False), "engine": (ENGINE_OPSET, True)}
LOWEST, INF = torch.finfo(torch.float32).min, math.inf


@pytest.fixture(autouse=True)
def equal_numbers() -> None:
    torch.manual_seed(0)


def graph_of(
    op: str, tensors: list[Any], attributes: dict[str, Any], shapes: dict[int, tuple[Any, ...]]
) -> Graph:
    """One op on inputs like the tensors; `shapes` overrides those that are dynamic."""
    names = {s for shape in shapes.values() for x in shape if hasattr(x, "symbols")
             for s in x.symbols}  # fmt: skip
    graph = Graph("op", ranges={n: (1, None) for n in sorted(names)})
    values = []
    for i, t in enumerate(tensors):
        type = None if t is None else TensorType.of(t)
        if type is not None and i in shapes:
            type = type.with_shape(shapes[i])
        values.append(None if type is None else graph.add_input(f"x{i}", type))
    graph.arguments = tuple(Argument(v.name, LEAF) for v in graph.inputs)
    graph.set_outputs(Builder(graph).node(op, *values, **attributes).results)
    return graph


def kinds(graph: Graph, opset: int, contrib: bool) -> Counter[str]:
    return Counter(n.op_type for n in build_onnx(graph, opset=opset, contrib=contrib).graph)


def agrees(graph: Graph, *calls: list[torch.Tensor], rtol: float = 0.0) -> None:
    """Every form, optimized or not, and the engine itself give what PyTorch gives."""
    runners = {}
    for name, (opset, contrib) in FORMS.items():
        model = build_onnx(graph, opset=opset, contrib=contrib)
        assert contrib or {n.domain for n in model.graph} == {""}
        for level in ("none", "all"):
            runners[f"{name} {level}"] = Session(model, graph, level=level, threads=1).run
    runners["engine"] = ENGINE.build(graph)
    for inputs in calls:
        original, witness = interpret(graph, inputs), interpret(graph, inputs, double=True)
        for name, run in runners.items():
            verdict = judge(run(inputs), original, witness, rtol=rtol)
            assert verdict.agrees, f"{name}: {verdict.difference}"


def qkv(
    s: int = 5, t: int = 7, h: int = 4, g: int = 4, d: int = 8, e: int = 8, batch: int = 2,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:  # fmt: skip
    shapes = ((batch, s, h * d), (batch, t, g * d), (batch, t, g * e))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def heads(tensors: list[torch.Tensor], h: int, g: int) -> list[torch.Tensor]:
    """The same with the heads in the second dimension, as ATen wants them."""
    return [
        x.unflatten(2, (n, -1)).transpose(1, 2) for x, n in zip(tensors, (h, g, g), strict=True)
    ]


def both(
    tensors: list[torch.Tensor], mask: torch.Tensor | None = None, h: int = 4, g: int = 4,
    rtol: float = 0.0, **options: Any,
) -> tuple[Graph, Graph]:  # fmt: skip
    """Check dfc's op and ATen's on equal inputs; the graphs."""
    ours = graph_of("dfc.multi_head_attention", [*tensors, mask],
                    {"num_heads": h, "num_kv_heads": g, **options}, {})  # fmt: skip
    split = heads(tensors, h, g)
    theirs = graph_of("aten.scaled_dot_product_attention.default", [*split, mask],
                      {"enable_gqa": h != g, **options}, {})  # fmt: skip
    given = [] if mask is None else [mask]
    agrees(ours, [*tensors, *given], rtol=rtol)
    agrees(theirs, [*split, *given], rtol=rtol)
    return ours, theirs


def uses_attention(*graphs: Graph) -> set[bool]:
    return {"Attention" in kinds(g, *FORMS[f]) for g in graphs for f in ("23", "engine")}


MASKS = [(2, 1, 5, 7), (2, 4, 5, 7), (1, 1, 5, 7), (1, 4, 5, 7), (5, 7), (4, 5, 7), (1, 5, 7),
         (2, 1, 1, 7), (2, 4, 5, 1), (1, 7)]  # fmt: skip


@pytest.mark.parametrize("shape", MASKS, ids=str)
@pytest.mark.parametrize("kind", ["bool", "-inf", "lowest", "mixed", "numbers"])
def test_masks_of_every_shape_with_rows_that_see_nothing(shape: tuple[int, ...], kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(shape, generator=generator) > 0.4
    mask[..., 0] = True
    if shape[-2] > 1:
        mask[..., 1, :] = False
    elif shape[0] == 2:
        mask[0] = False
    if kind == "-inf":
        mask = torch.where(mask, 0.0, -INF)
    elif kind == "lowest":
        mask = torch.where(mask, 0.0, LOWEST)
    elif kind == "mixed":
        mask = torch.where(mask, 0.0, LOWEST)
        mask[..., 3:] = -INF
    elif kind == "numbers":
        mask = torch.where(mask, torch.randn(shape, generator=generator), -INF)
    graphs = both(qkv(), mask)
    assert uses_attention(graphs[1]) == {True}


def test_a_mask_by_head_is_split_from_flat_heads_in_standard_files() -> None:
    mask = torch.rand(2, 4, 5, 7) > 0.4
    ours, _ = both(qkv(), mask)
    node = next(n for n in build_onnx(ours, opset=23).graph if n.op_type == "Attention")
    assert "q_num_heads" not in node.attributes
    node = next(n for n in build_onnx(ours, opset=23, contrib=True).graph
                if n.op_type == "Attention")  # fmt: skip
    assert node.attributes["q_num_heads"].as_int() == 4


@pytest.mark.parametrize("s, t", [(5, 5), (1, 1), (5, 7), (1, 7), (7, 5)])
def test_causal_is_aligned_at_the_first_key(s: int, t: int) -> None:
    graphs = both(qkv(s, t), is_causal=True)
    assert uses_attention(*graphs) == {s == t}


@pytest.mark.parametrize("g", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_heads_share_keys_in_groups(g: int, masked: bool) -> None:
    mask = torch.rand(2, 1, 5, 7) > 0.3 if masked else None
    graphs = both(qkv(g=g), mask, g=g)
    assert uses_attention(*graphs) == {True}
    both(qkv(5, 5, g=g), g=g, is_causal=True)


def test_values_may_be_narrower_or_wider_than_keys() -> None:
    for e in (3, 16):
        assert uses_attention(*both(qkv(e=e))) == {True}


@pytest.mark.parametrize("scale", [None, 0.5, 3.0, 0.0, -0.7])
def test_scale_none_is_not_zero(scale: float | None) -> None:
    graphs = both(qkv(), scale=scale)
    assert uses_attention(*graphs) == {scale is None or scale > 0}


@pytest.mark.parametrize("name", ["f16", "bf16", "f64"])
def test_other_floats(name: str) -> None:
    dtype = DTYPES[name].to_torch()
    mask = torch.rand(2, 1, 5, 7) > 0.3
    mask[:, :, 2] = False
    graphs = both(qkv(dtype=dtype), mask)
    assert uses_attention(*graphs) == {name == "bf16"}
    both(qkv(dtype=dtype), torch.where(mask, 0.0, -INF).to(dtype))


def test_large_scores_and_infinite_values() -> None:
    both([30 * x for x in qkv()], rtol=1e-4)  # scores in the thousands: exp magnifies their ULPs
    q, k, v = qkv()
    v[0, 6], v[1, 6] = INF, math.nan
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[:, 6] = False
    both([q, k, v], mask)
    both([q, k, v], torch.where(mask, 0.0, -INF))


def test_sizes_that_vary() -> None:
    b, s, t = symbol("B"), symbol("S"), symbol("T")
    options = {"num_heads": 4, "num_kv_heads": 2}
    tensors = qkv(g=2)
    shapes = {0: (b, s, 32), 1: (b, t, 16), 2: (b, t, 16), 3: (b, 1, 1, t)}
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    graph = graph_of("dfc.multi_head_attention", [*tensors, mask], options, shapes)
    assert uses_attention(graph) == {True}
    calls = []
    for batch, rows, columns in ((2, 5, 7), (1, 1, 1), (3, 1, 9), (1, 6, 2)):
        m = torch.rand(batch, 1, 1, columns) > 0.5
        calls.append([*qkv(rows, columns, g=2, batch=batch), m])
    agrees(graph, *calls)
    causal = {k: v for k, v in shapes.items() if k < 3}
    graph = graph_of("dfc.multi_head_attention", tensors, {**options, "is_causal": True}, causal)
    assert uses_attention(graph) == {False}  # there may be more keys than rows
    agrees(graph, *(call[:3] for call in calls))
    square = {0: (b, s, 32), 1: (b, s, 16), 2: (b, s, 16)}
    tensors = qkv(5, 5, g=2)
    graph = graph_of("dfc.multi_head_attention", tensors, {**options, "is_causal": True}, square)
    assert uses_attention(graph) == {True}
    agrees(graph, tensors, qkv(1, 1, g=2, batch=1), qkv(9, 9, g=2, batch=3))


def test_sizes_of_zero_are_spelled_out() -> None:
    for batch, s, t in ((0, 5, 7), (2, 0, 7), (2, 5, 0)):
        assert uses_attention(*both(qkv(s, t, batch=batch))) == {False}
        both(qkv(s, t, batch=batch), torch.ones(batch, 1, s, t, dtype=torch.bool))
    b, t = symbol("B"), symbol("T")
    shapes = {0: (b, 5, 32), 1: (b, t, 32), 2: (b, t, 32)}
    options = {"num_heads": 4, "num_kv_heads": 4}
    graph = graph_of("dfc.multi_head_attention", qkv(), options, shapes)
    assert uses_attention(graph) == {True}
    graph.ranges["T"] = (0, None)
    assert uses_attention(graph) == {False}
    agrees(graph, qkv(), qkv(t=0), qkv(t=0, batch=1))
    later = {**shapes, 1: (b, t + 1, 32), 2: (b, t + 1, 32)}  # a cache that may be empty
    graph = graph_of("dfc.multi_head_attention", qkv(), options, later)
    graph.ranges["T"] = (0, None)
    assert uses_attention(graph) == {True}
    agrees(graph, qkv(), qkv(t=1))


def test_standard_attention_means_what_the_specification_says() -> None:
    """The reference evaluator of the onnx package as an outside witness."""
    import numpy as np
    from onnx.reference import ReferenceEvaluator

    mask = torch.rand(2, 1, 5, 7) > 0.4
    mask[:, :, 2] = False
    cases: list[tuple[list[torch.Tensor], torch.Tensor | None, dict[str, Any]]] = [
        (qkv(), None, {}), (qkv(e=3), mask, {}), (qkv(), torch.where(mask, 0.0, -INF), {}),
        (qkv(5, 5), None, {"is_causal": True}), (qkv(g=2), mask[:, :, :1], {"scale": 0.3}),
    ]  # fmt: skip
    for tensors, m, options in cases:
        g = tensors[1].shape[2] // 8
        graph = graph_of("dfc.multi_head_attention", [*tensors, m],
                         {"num_heads": 4, "num_kv_heads": g, **options}, {})  # fmt: skip
        assert uses_attention(graph) == {True}
        inputs = [x for x in (*tensors, m) if x is not None]
        model = ir_to_proto(build_onnx(graph, opset=23))
        feeds = {f"x{i}": x.numpy() for i, x in enumerate(inputs)}
        with np.errstate(invalid="ignore"):  # it computes the rows that are then set to zero
            (got,) = ReferenceEvaluator(model).run(None, feeds)
        (want,) = interpret(graph, inputs)
        torch.testing.assert_close(torch.from_numpy(got), want)


# Norms and rotary embedding


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "f64"])
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_rms_norm(name: str, eps: float | None) -> None:
    dtype = DTYPES[name].to_torch()
    for scale in (1.0, 1e-3):
        x = (torch.randn(2, 3, 8) * scale).to(dtype)
        for weight in (torch.randn(8).to(dtype), None):
            options = {"normalized_shape": (8,), "eps": eps}
            graph = graph_of("aten.rms_norm.default", [x, weight], options, {})
            agrees(graph, [x] if weight is None else [x, weight])
            found = kinds(graph, *FORMS["engine"])
            assert ("RMSNormalization" in found) == (name != "f64")
            assert "RMSNormalization" not in kinds(graph, *FORMS["20"])


@pytest.mark.parametrize("op", ["dfc.skip_layer_norm", "dfc.skip_rms_norm"])
@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "f64"])
def test_skip_norms(op: str, name: str) -> None:
    dtype = DTYPES[name].to_torch()
    x, skip, gamma = (torch.randn(s).to(dtype) for s in ((2, 3, 8), (2, 3, 8), (8,)))
    b = symbol("B")
    graph = graph_of(op, [x, skip, gamma], {"eps": 1e-6}, {0: (b, 3, 8), 1: (b, 3, 8)})
    agrees(graph, [x, skip, gamma], [x[:1], skip[:1], gamma], [x[:0], skip[:0], gamma])


def test_the_engine_leaves_out_a_fusion_that_is_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx
    import onnxruntime

    class Options(onnxruntime.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.optimized_model_filepath = str(tmp_path / "optimized.onnx")

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    graph = Graph("norm")
    x, skip = (graph.add_input(n, TensorType(DTYPES["f32"], (2, 3, 8))) for n in "xs")
    data = TensorData("g", torch.randn(8))
    gamma = graph.add_parameter("g", TensorType(DTYPES["f32"], (8,)), data=data)
    graph.arguments = (Argument("x", LEAF), Argument("s", LEAF))
    graph.set_outputs(Builder(graph).node("dfc.skip_layer_norm", x, skip, gamma, gamma).results[:1])
    found = []
    for build in (lambda: ENGINE.build(graph), lambda: Session(build_onnx(graph), graph)):
        build()
        model = onnx.load(tmp_path / "optimized.onnx")
        found.append("SkipLayerNormalization" in {n.op_type for n in model.graph.node})
    assert found == [False, True]


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "f64"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding(name: str, interleaved: bool) -> None:
    dtype = DTYPES[name].to_torch()
    b = symbol("B")
    for half in (4, 3):
        x, angle = torch.randn(2, 3, 5, 8).to(dtype), torch.randn(2, 5, half)
        tensors = [x, angle.cos().to(dtype), angle.sin().to(dtype)]
        options = {"interleaved": interleaved}
        shapes = {0: (b, 3, 5, 8), 1: (b, 5, half), 2: (b, 5, half)}
        graph = graph_of("dfc.rotary_embedding", tensors, options, shapes)
        agrees(graph, tensors, [t[:1] for t in tensors], [t[:0] for t in tensors])
        assert ("RotaryEmbedding" in kinds(graph, *FORMS["23"])) == (name != "f64")
        positions = torch.tensor([[0, 1, 2, 3, 4], [4, 3, 3, 0, 1]], dtype=torch.int32)
        rows = [t[0].contiguous() for t in tensors[1:]]
        graph = graph_of("dfc.rotary_embedding", [x, *rows, positions], options, {})
        agrees(graph, [x, *rows, positions])


# Files


def model_of_everything() -> tuple[Graph, list[torch.Tensor]]:
    """One graph that holds every op with a fast form."""
    torch.manual_seed(0)
    graph = Graph("everything")
    x = graph.add_input("x", TensorType(DTYPES["f32"], (2, 5, 64)))
    mask = graph.add_input("mask", TensorType(DTYPES["bool"], (2, 1, 1, 5)))
    graph.arguments = (Argument("x", LEAF), Argument("mask", LEAF))

    def weight(name: str, tensor: torch.Tensor) -> Any:
        return graph.add_parameter(name, TensorType.of(tensor), data=TensorData(name, tensor))

    b = Builder(graph)
    gamma = weight("gamma", torch.randn(64))
    packed = weight("packed", torch.randint(0, 256, (64, 32)).to(torch.uint8))
    scale = weight("scale", torch.rand(64, 2) / 16)
    angle = torch.randn(2, 5, 8)
    cos, sin = weight("cos", angle.cos()), weight("sin", angle.sin())
    q = b("dfc.linear_w4", x, packed, scale, group=32)
    split = b("aten.transpose.int", b("aten.view.default", q, size=(2, 5, 4, 16)), dim0=1, dim1=2)
    turned = b("dfc.rotary_embedding", split, cos, sin)
    q = b("aten.view.default", b("aten.transpose.int", turned, dim0=1, dim1=2), size=(2, 5, 64))
    y = b("dfc.multi_head_attention", q, x, x, mask, num_heads=4, num_kv_heads=4)
    y, total = b.node("dfc.skip_rms_norm", x, y, gamma).results
    y, total = b.node("dfc.skip_layer_norm", y, total, gamma, gamma).results
    y = b("dfc.linear_gelu", y, weight("up", torch.randn(32, 64) / 8), weight("b", torch.randn(32)))
    y = b("aten.silu.default", b("aten.gelu.default", y, approximate="tanh"))
    graph.set_outputs([y, total])
    return graph, [torch.randn(2, 5, 64), torch.rand(2, 1, 1, 5) > 0.3]


def test_files_are_standard_unless_asked(tmp_path: Path) -> None:
    import onnx

    graph, inputs = model_of_everything()
    probes = [(inputs, interpret(graph, inputs))]
    found = {}
    for name, options in {
        "usual": {}, "newer": {"opset": 23}, "contrib": {"contrib": True},
    }.items():  # fmt: skip
        path = tmp_path / f"{name}.onnx"
        written = export_onnx(graph, path, probes=probes, **options)
        assert written.proved
        model = onnx.load(path)
        if name != "contrib":
            assert {n.domain for n in model.graph.node} == {""}
            assert [i.domain for i in model.opset_import] == [""]
            onnx.checker.check_model(model, full_check=True)
        found[name] = {n.op_type for n in model.graph.node}
        opset = next(i.version for i in model.opset_import if not i.domain)
        assert opset == {"usual": 20, "newer": 23, "contrib": ENGINE_OPSET}[name]
    new = {"Attention", "RMSNormalization", "RotaryEmbedding"}
    assert not found["usual"] & new
    assert found["newer"] >= new and "MatMulNBits" not in found["newer"]
    assert found["contrib"] >= new | {"MatMulNBits"}
    agrees(graph, inputs, rtol=1e-5)


def test_a_compiled_model_and_the_command_line_take_contrib(tmp_path: Path) -> None:
    import onnx
    from typer.testing import CliRunner

    from dfc.cli.command import app

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    x = torch.randn(1, 2, 5, 8)
    compiled = dfc.compile(Net(), (x,), engine="eager")
    for contrib in (False, True):
        path = tmp_path / f"{contrib}.onnx"
        compiled.export(path, contrib=contrib)
        types = [n.op_type for n in onnx.load(path).graph.node]
        assert ("Attention" in types) == contrib
    out = tmp_path / "cli.onnx"
    source = tmp_path / "net.py"
    source.write_text(
        "import torch\nimport torch.nn.functional as F\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x):\n        return F.scaled_dot_product_attention(x, x, x)\n"
        "def build():\n    return Net(), (torch.randn(1, 2, 5, 8),)\n"
    )
    for flag in ("--contrib", "--no-contrib"):
        arguments = ["compile", f"{source}:build", "--onnx", str(out), flag, "--force",
                     "--engine", "eager"]  # fmt: skip
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        types = [n.op_type for n in onnx.load(out).graph.node]
        assert ("Attention" in types) == (flag == "--contrib")
