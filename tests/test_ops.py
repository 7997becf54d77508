"""Each declared op means one thing: type rule, meaning, decomposition and an outside witness agree.

The witnesses are written from the specifications that the ops name, in numpy and float64, element
by element where that is plainer; ONNX Runtime's own kernels are a second opinion.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import dfc
import dfc.ops
from dfc.emit.fx import to_fx
from dfc.errors import DfcError
from dfc.ir.expr import Expr
from dfc.ir.graph import Graph
from dfc.ir.interpret import interpret
from dfc.ir.op import Cost, DeclaredOp, Op, OpRefused, declare, declared_ops
from dfc.ir.types import DTYPES, TensorType
from dfc.ir.verify import verify
from dfc.ops.builder import Builder
from dfc.rewrite.agree import judge
from dfc.rewrite.pass_ import Context, find_pass
from dfc.testing import SIZES, Case
from tests.quantized_witnesses import QUANTIZED, in_onnxruntime_quantized


def cases() -> list[Case]:
    return [Case(info, text) for info in declared_ops() for text in info.cls.cases]


def rejects() -> list[Case]:
    return [
        Case(info, text.split(" ", 1)[1], text.split(" ", 1)[0])
        for info in declared_ops()
        for text in info.cls.rejects
    ]


def as_tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def close(got: Any, want: Any, rtol: float = 1e-5) -> None:
    for a, b in zip(as_tuple(got), as_tuple(want), strict=True):
        a = a.double() if isinstance(a, torch.Tensor) else a  # numpy knows no float8 of torch's
        a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
        assert a.shape == b.shape
        if a.size:
            assert np.abs(a - b).max() <= rtol * max(np.abs(b).max(), 1.0)


# Witnesses: numpy, float64, from the specification


def witness_linear_gelu(x: Any, weight: Any, bias: Any = None, *, approximate: str) -> Any:
    y = np.einsum("...k,nk->...n", x, weight) + (0 if bias is None else bias)
    if approximate == "tanh":
        return 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    return y * np.vectorize(lambda v: 0.5 * math.erfc(-v / math.sqrt(2)), otypes=[float])(y)


def witness_skip_layer_norm(
    x: Any, skip: Any, gamma: Any, beta: Any = None, bias: Any = None, *, eps: float
) -> Any:
    total = x + skip + (0 if bias is None else bias)
    centred = total - total.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return normal * gamma + (0 if beta is None else beta), total


def witness_rotary_embedding(
    x: Any, cos: Any, sin: Any, positions: Any = None, *, interleaved: bool
) -> Any:
    """A pair is a complex number, turned by multiplying with `cos + i sin`."""
    half, y = cos.shape[-1], x.copy()
    for b, h, t, i in itertools.product(*map(range, (*x.shape[:3], half))):
        row = (b, t) if positions is None else (int(positions[b, t]),)
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        turned = complex(x[b, h, t, first], x[b, h, t, second]) * complex(
            cos[(*row, i)], sin[(*row, i)]
        )
        y[b, h, t, first], y[b, h, t, second] = turned.real, turned.imag
    return y


def witness_skip_rms_norm(x: Any, skip: Any, gamma: Any, *, eps: float) -> Any:
    total = x + skip
    return total / np.sqrt((total**2).mean(-1, keepdims=True) + eps) * gamma, total


def witness_multi_head_attention(
    q: Any, k: Any, v: Any, mask: Any = None, *, num_heads: int, num_kv_heads: int,
    scale: float | None, is_causal: bool,
) -> Any:  # fmt: skip
    """One row of scores at a time."""
    (batch, rows, width), columns = q.shape, k.shape[1]
    d, e, group = width // num_heads, v.shape[2] // num_kv_heads, num_heads // num_kv_heads
    y = np.zeros((batch, rows, num_heads * e))
    if mask is not None:
        mask = np.broadcast_to(mask, (batch, num_heads, rows, columns))
    for b, h, i in itertools.product(range(batch), range(num_heads), range(rows)):
        g = h // group
        scores = k[b, :, g * d : (g + 1) * d] @ q[b, i, h * d : (h + 1) * d]
        scores = scores * (1 / math.sqrt(d) if scale is None else scale)
        if is_causal:
            scores[i + 1 :] = -np.inf
        if mask is not None and mask.dtype == bool:
            scores = np.where(mask[b, h, i], scores, -np.inf)
        elif mask is not None:
            scores = scores + mask[b, h, i]
        if not np.isfinite(scores).any():
            continue
        weights = np.exp(scores - scores.max())
        y[b, i, h * e : (h + 1) * e] = weights / weights.sum() @ v[b, :, g * e : (g + 1) * e]
    return y


WITNESSES: dict[str, Callable[..., Any]] = {
    "dfc.multi_head_attention": witness_multi_head_attention,
    "dfc.skip_rms_norm": witness_skip_rms_norm,
    "dfc.linear_gelu": witness_linear_gelu,
    **QUANTIZED,
    "dfc.skip_layer_norm": witness_skip_layer_norm,
    "dfc.rotary_embedding": witness_rotary_embedding,
}


@pytest.mark.parametrize("case", cases(), ids=str)
def test_op_means_one_thing(case: Case) -> None:
    for seed, scale in ((0, 1.0), (1, 1e-3), (2, 30.0)):
        arrays = case.arrays(seed, scale)
        got = as_tuple(case.op.reference(*arrays))
        assert tuple(map(TensorType.of, got)) == as_tuple(case.op.infer(*case.static))
        symbolic = [t.substitute(SIZES) for t in as_tuple(case.op.infer(*case.types))]
        assert list(map(TensorType.of, got)) == symbolic
        wide = [a.double().numpy() if a is not None and a.is_floating_point() else
                None if a is None else a.numpy() for a in arrays]  # fmt: skip
        # exp turns the rounding error of a score, which grows with its size, into a relative one
        rtol = 1e-5 * (max(scale, 1) ** 2 if "attention" in case.info.name else 1)
        close(got, as_tuple(WITNESSES[case.info.name](*wide, **case.attributes)), rtol)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_decomposition_equals_the_op(case: Case) -> None:
    graph = case.graph()
    before = graph.copy()
    find = find_pass("decompose")
    assert find.run(graph, Context()) == 1
    assert all(n.op.startswith("aten.") for n in graph.nodes)
    assert [v.type for v in graph.outputs] == [v.type for v in before.outputs]
    verify(graph)
    assert find.run(graph, Context()) == 0
    for seed in range(3):
        arrays = [a for a in case.arrays(seed) if a is not None]
        original, witness = interpret(before, arrays), interpret(before, arrays, double=True)
        verdict = judge(interpret(graph, arrays), original, witness, rtol=find.numerics.rtol)
        assert verdict.agrees, str(verdict.difference)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_op_works_in_a_graph(case: Case) -> None:
    graph = case.graph()
    verify(graph)
    again = dfc.parse(str(graph))
    assert again == graph and str(again) == str(graph)
    verify(again)
    arrays = [a for a in case.arrays() if a is not None]
    want = as_tuple(case.op.reference(*case.arrays()))
    for got in (interpret(again, arrays), to_fx(graph)(*arrays)):
        torch.testing.assert_close(list(got), list(want), rtol=0, atol=0)


@pytest.mark.parametrize("opset, contrib", [(20, False), (23, False), (23, True)])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_onnx_equals_the_op(case: Case, opset: int, contrib: bool) -> None:
    from dfc.emit.onnx import build_onnx
    from dfc.emit.onnx_run import Session

    graph = case.graph()
    model = build_onnx(graph, opset=opset, contrib=contrib)
    assert contrib or {n.domain for n in model.graph} == {""}
    session = Session(model, graph, threads=1)
    for seed in range(2):
        arrays = [a for a in case.arrays(seed) if a is not None]
        original, witness = interpret(graph, arrays), interpret(graph, arrays, double=True)
        verdict = judge(session.run(arrays), original, witness)
        assert verdict.agrees, str(verdict.difference)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_cost_counts_every_byte(case: Case) -> None:
    cost = case.op.cost(*case.types)
    assert isinstance(cost, Cost)
    arrays = case.arrays()
    counted = case.op.cost(*case.static)
    assert counted.bytes_read == sum(a.nbytes for a in arrays if a is not None)
    assert counted.bytes_written == sum(a.nbytes for a in as_tuple(case.op.reference(*arrays)))
    assert counted.flops >= 0
    for symbolic, number in zip(vars(cost).values(), vars(counted).values(), strict=True):
        from dfc.ir.expr import evaluate

        assert evaluate(symbolic, SIZES) == number
    assert case.symbols.isdisjoint(SIZES) or isinstance(cost.bytes_read, Expr)


@pytest.mark.parametrize("case", rejects(), ids=str)
def test_op_refuses_by_label(case: Case) -> None:
    with pytest.raises(OpRefused) as refused:
        case.op.infer(*case.types)
    assert refused.value.label == case.label
    with pytest.raises(DfcError) as error:
        case.graph()
    assert error.value.code == "V020"
    assert case.label in error.value.message


@pytest.mark.parametrize("info", declared_ops(), ids=lambda i: i.name)
def test_labels_stand_in_docstring_requires_and_rejects(info: DeclaredOp) -> None:
    in_docstring = re.findall(r"^\s*(C\d+):", info.cls.__doc__ or "", re.MULTILINE)
    in_requires = re.findall(r'require\(\s*"(C\d+)"', inspect.getsource(info.cls))
    in_rejects = [text.split()[0] for text in info.cls.rejects]
    assert in_docstring == [f"C{i + 1}" for i in range(len(in_docstring))]
    assert set(in_docstring) == set(in_requires) == set(in_rejects)


def test_facets_take_the_same_operands_in_the_same_order() -> None:
    for info in declared_ops():
        names = [o.name for o in info.operands]
        for facet in ("infer", "reference", "decompose", "cost", "to_onnx"):
            function = getattr(info.cls, facet, None)
            if function is None:
                continue
            found = list(inspect.signature(function).parameters)[1:]
            assert found[1:] == names if facet in ("decompose", "to_onnx") else found == names


def test_every_op_has_a_witness() -> None:
    assert set(WITNESSES) == {info.name for info in declared_ops()}


# A second opinion: the kernels whose semantics the ops claim


def run_onnxruntime(
    op: str, domain: str, arrays: list[Any], attributes: dict[str, Any], outputs: list[str],
    result: int = 1,
) -> list[Any]:  # fmt: skip
    import onnxruntime
    from onnx import helper, numpy_helper

    names = [f"i{i}" if a is not None else "" for i, a in enumerate(arrays)]
    element = helper.np_dtype_to_tensor_dtype
    given = [(n, a) for n, a in zip(names, arrays, strict=True) if a is not None]
    constant = given[1:] if op == "MatMulNBits" else []  # it packs weights, if they are constant
    graph = helper.make_graph(
        [helper.make_node(op, names, outputs, domain=domain, **attributes)],
        "g",
        [
            helper.make_tensor_value_info(n, element(a.dtype), a.shape)
            for n, a in given[: len(given) - len(constant)]
        ],
        [helper.make_tensor_value_info(o, result, None) for o in outputs if o],
        [numpy_helper.from_array(a, n) for n, a in constant],
    )
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, dict(given[: len(given) - len(constant)]))


def in_onnxruntime(case: Case, arrays: list[Any]) -> list[Any]:
    a = dict(itertools.zip_longest([o.name for o in case.info.operands], arrays))
    if case.info.name in QUANTIZED:
        return run_onnxruntime(*in_onnxruntime_quantized(case.info.name, a, case.attributes))
    if case.info.name == "dfc.skip_layer_norm":
        inputs = [a["x"], a["skip"], a["gamma"], a["beta"], a["bias"]]
        attributes = {"epsilon": case.attributes["eps"]}
        outputs = ["y", "", "", "total"]
        return run_onnxruntime(
            "SkipLayerNormalization", "com.microsoft", inputs, attributes, outputs
        )
    if case.info.name == "dfc.skip_rms_norm":
        attributes = {"epsilon": case.attributes["eps"]}
        outputs = ["y", "", "", "total"]
        return run_onnxruntime(
            "SkipSimplifiedLayerNormalization", "com.microsoft", list(a.values()), attributes,
            outputs,
        )  # fmt: skip
    if case.info.name == "dfc.multi_head_attention":
        mask = a["mask"]
        if mask is not None:  # the kernel broadcasts no rows
            mask = np.ascontiguousarray(
                np.broadcast_to(mask, (*mask.shape[:-2], a["q"].shape[1], a["k"].shape[1]))
            )
        attributes = {k: v for k, v in case.attributes.items() if v is not None}
        attributes = {
            "q_num_heads": attributes.pop("num_heads"),
            "kv_num_heads": attributes.pop("num_kv_heads"),
            **attributes,
            "is_causal": int(attributes["is_causal"]),
        }
        return run_onnxruntime("Attention", "", [a["q"], a["k"], a["v"], mask], attributes, ["y"])
    inputs = [a["x"], a["cos"], a["sin"], a["positions"]]
    attributes = {"interleaved": int(case.attributes["interleaved"])}
    r = 2 * a["cos"].shape[-1]
    if r != a["x"].shape[-1]:
        attributes |= {"rotary_embedding_dim": r, "num_heads": a["x"].shape[1]}
    return run_onnxruntime("RotaryEmbedding", "", inputs, attributes, ["y"])


def kernel_cases() -> list[Case]:
    """What the kernels take: float32, and a batch. Of some ops ONNX makes several nodes."""
    several = ("dfc.linear_gelu", "dfc.linear_f8", "dfc.embedding_w8", "dfc.embedding_w4")
    return [
        c
        for c in cases()
        if c.info.name not in several
        and "grouped" not in c.info.name
        and not any(word in c.text for word in ("f64", "low=", "f8"))
        and c.types[0].rank >= 2  # type: ignore[union-attr]
        and not (c.info.name == "dfc.linear_w8" and c.attributes["group"] is None)
    ]


@pytest.mark.parametrize("case", kernel_cases(), ids=str)
def test_onnxruntimes_kernel_agrees(case: Case) -> None:
    arrays = case.arrays(7)
    got = in_onnxruntime(case, [None if a is None else a.numpy() for a in arrays])
    close(tuple(got), as_tuple(case.op.reference(*arrays)), rtol=2e-5)


# Declaring and building


def test_declare_refuses_a_string_for_a_tuple() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Wrong(Op):
        name = "wrong"
        cases = "x=f32[2]"  # type: ignore[assignment]

    with pytest.raises(TypeError, match="tuple of strings"):
        declare(Wrong)
    with pytest.raises(TypeError, match="frozen dataclass"):
        declare(type("Loose", (Op,), {"name": "loose", "cases": ()}))


def test_builder_fills_in_defaults_and_refuses_unknown_attributes() -> None:
    graph = Graph()
    x = graph.add_input("x", TensorType(DTYPES["f32"], (2, 3)))
    b = Builder(graph)
    node = b.node("aten.softmax.int", x, dim=1)
    assert dict(node.attributes) == {"dim": 1, "dtype": None}
    assert b.node("dfc.linear_gelu", x, x).attributes["approximate"] == "none"
    for op, given in (("aten.relu.default", {"dim": 0}), ("dfc.linear_gelu", {"dim": 0})):
        with pytest.raises(DfcError) as error:
            b(op, x, x, **given)
        assert error.value.code == "V011"
    with pytest.raises(DfcError, match="needs the attribute `dim`"):
        b("aten.softmax.int", x)


def test_decompose_takes_names_and_keeps_stage_and_place() -> None:
    from dfc.ir.graph import Loc

    graph = Graph()
    f32 = DTYPES["f32"]
    x, w = (graph.add_input(n, TensorType(f32, (4, 4))) for n in "xw")
    place = Loc("net.py", 31, "mlp")
    node = graph.add(
        "dfc.linear_gelu", [x, w], {"approximate": "none"}, names=["y"], stage=2, loc=place
    )
    g = TensorType(f32, (4,))
    gamma = graph.add_parameter("g", g)
    normal = graph.add("dfc.skip_layer_norm", [node.result, x, gamma, None, None], {"eps": 1e-5})
    graph.set_outputs(normal.results)
    chosen = find_pass("decompose", {"ops": ("linear_gelu",)})
    assert chosen.run(graph, Context()) == 1
    ops = [n.op for n in graph.nodes]
    assert ops == ["aten.linear.default", "aten.gelu.default", "dfc.skip_layer_norm"]
    gelu = list(graph.nodes)[1]
    assert (gelu.result.name, gelu.stage, gelu.loc) == ("y", 2, place)
    verify(graph)
