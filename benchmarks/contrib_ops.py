"""Is an ONNX Runtime contrib op, or one of a newer opset, faster than the plain ONNX for it?

    python benchmarks/contrib_ops.py [seconds]       seconds for each way of each row, default 0.4

Each row is one op on shapes of BERT-base or of a small Llama with grouped heads. The base is what
dfc writes without contrib ops at its default opset, run by ONNX Runtime with all its optimizations
(it fuses much by itself). The ways alternate in one process. A ratio below 1 is faster than the
base; `!` marks a result that `dfc.rewrite.agree` refuses, judged against float64. `kept` is what
the onnxruntime engine runs. The table goes to benchmarks/results/contrib-cpu.txt as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from onnx import numpy_helper

import dfc.ops  # noqa: F401
from dfc.emit.onnx import build_onnx
from dfc.emit.onnx_run import Session, as_tensor, from_ort, ort_value
from dfc.ir.graph import Argument, Graph
from dfc.ir.interpret import interpret
from dfc.ir.tree import LEAF
from dfc.ir.types import TensorType
from dfc.ir.weights import TensorData
from dfc.ops.builder import Builder
from dfc.rewrite.agree import judge
from dfc.runtime.engines import find_engine
from dfc.runtime.measure import measure

RESULTS = Path(__file__).parent / "results" / "contrib-cpu.txt"
LETTERS = {"float": torch.float32, "bool": torch.bool, "uint8": torch.uint8, "int32": torch.int32}


@dataclass
class Task:
    """One op on one shape: tensors by name, which of them are weights, and the ways to write it."""

    title: str
    op: str
    tensors: dict[str, torch.Tensor | None]
    attributes: dict[str, Any]
    weights: tuple[str, ...] = ()
    ways: dict[str, str] = field(default_factory=dict)  # ONNX text, after the opset

    def graph(self) -> Graph:
        graph = Graph("op")
        values = []
        for name, tensor in self.tensors.items():
            if tensor is None:
                values.append(None)
            elif name in self.weights:
                type, data = TensorType.of(tensor), TensorData(name, tensor)
                values.append(graph.add_parameter(name, type, data=data))
            else:
                values.append(graph.add_input(name, TensorType.of(tensor)))
        graph.arguments = tuple(Argument(v.name, LEAF) for v in graph.inputs)
        graph.set_outputs(Builder(graph).node(self.op, *values, **self.attributes).results)
        return graph

    def inputs(self) -> list[torch.Tensor]:
        return [t for n, t in self.tensors.items() if t is not None and n not in self.weights]

    def text_model(self, text: str, outputs: int) -> bytes:
        opset, _, body = text.partition("|")
        given = {n: t for n, t in self.tensors.items() if t is not None}
        types = {v: k for k, v in LETTERS.items()}
        inputs = ", ".join(
            f"{types[t.dtype]}[{','.join(map(str, t.shape))}] {n}" for n, t in given.items()
        )
        results = ", ".join(f"float[{','.join(f'd{i}{j}' for j in range(9))}] y{i}"
                            for i in range(outputs))  # fmt: skip
        header = f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]>'
        model = onnx.parser.parse_model(f"{header} g ({inputs}) => ({results}) {{ {body} }}")
        for o in model.graph.output:
            o.type.tensor_type.ClearField("shape")
        for name in self.weights:
            if given.get(name) is not None:
                data = numpy_helper.from_array(given[name].numpy(), name)
                model.graph.initializer.append(data)
        kept = [i for i in model.graph.input if i.name not in self.weights]
        del model.graph.input[:]
        model.graph.input.extend(kept)
        return model.SerializeToString()


def text_runner(task: Task, graph: Graph, text: str) -> Callable[[Any], list[Any]]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    types = [v.type for v in graph.inputs]
    results = [v.type for v in graph.outputs]
    model = task.text_model(text, len(results))
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    outputs = [o.name for o in session.get_outputs()]

    def run(inputs: Any) -> list[Any]:
        feeds = {
            n: ort_value(as_tensor(x, t)) for n, x, t in zip(names, inputs, types, strict=True)
        }
        found = session._sess.run_with_ort_values(feeds, outputs, None)
        return [from_ort(v, t) for v, t in zip(found, results, strict=True)]

    return run


def compare(task: Task, seconds: float) -> str:
    graph, inputs = task.graph(), task.inputs()
    threads = torch.get_num_threads()
    runners: dict[str, Any] = {
        "base": Session(build_onnx(graph), graph, threads=threads).run,
        "kept": find_engine("onnxruntime").build(graph),
    }
    failed = {}
    for name, text in task.ways.items():
        try:
            runners[name] = text_runner(task, graph, text)
            runners[name](inputs)
        except Exception as e:  # noqa: BLE001 (ORT raises classes of its own for each status code)
            failed[name] = " ".join(str(e).split())[-60:]
            runners.pop(name, None)
    original = interpret(graph, inputs)
    witness = interpret(graph, inputs, double=True)
    verdicts = {n: judge(run(inputs), original, witness) for n, run in runners.items()}
    times = measure(runners, inputs, seconds=seconds, most=2000)
    base = times["base"].p50_ms
    spread = times["base"].spread_ms / base
    row = [f"{task.title:<46} {base:>9.3f} ms ±{spread:>4.0%}"]
    for name in runners:
        verdict = verdicts[name]
        mark = "" if verdict.agrees else "!"
        ratio = "" if name == "base" else f" {times[name].p50_ms / base:.2f}"
        row.append(f"{name}{ratio}{mark} ({verdict.worst:.0e})")
    row += [f"{name} fails: {reason}" for name, reason in failed.items()]
    return "  ".join(row)


# The tasks


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def rows(width: int) -> Iterator[tuple[str, tuple[int, int, int]]]:
    for batch, tokens in ((1, 1), (1, 128), (1, 512), (8, 128)):
        yield f"[{batch},{tokens},{width}]", (batch, tokens, width)


def norms() -> Iterator[Task]:
    for text, shape in rows(768):
        h = shape[-1]
        x, skip, gamma, beta = normal(*shape), normal(*shape), normal(h), normal(h)
        attributes = {"normalized_shape": (h,), "eps": 1e-6}
        yield Task(
            f"rms_norm {text}", "aten.rms_norm.default", {"x": x, "g": gamma}, attributes, ("g",),
            {"opset 23": "23| y0 = RMSNormalization<axis=-1, epsilon=1e-6>(x, g)",
             "simplified": "20| y0 = SimplifiedLayerNormalization<axis=-1, epsilon=1e-6>(x, g)"},
        )  # fmt: skip
        yield Task(
            f"skip_rms_norm {text}", "dfc.skip_rms_norm", {"x": x, "s": skip, "g": gamma},
            {"eps": 1e-6}, ("g",),
            {"opset 23": "23| y1 = Add(x, s) y0 = RMSNormalization<axis=-1, epsilon=1e-6>(y1, g)",
             "contrib": "20| y0, a, b, y1 = com.microsoft.SkipSimplifiedLayerNormalization"
                        "<epsilon=1e-6>(x, s, g)"},
        )  # fmt: skip
        yield Task(
            f"skip_layer_norm {text}", "dfc.skip_layer_norm",
            {"x": x, "s": skip, "g": gamma, "be": beta}, {"eps": 1e-12}, ("g", "be"),
            {"contrib": "20| y0, a, b, y1 = com.microsoft.SkipLayerNormalization"
                        "<epsilon=1e-12>(x, s, g, be)"},
        )  # fmt: skip


def activations() -> Iterator[Task]:
    for text, shape in rows(3072):
        x = normal(*shape)
        yield Task(
            f"gelu tanh {text}", "aten.gelu.default", {"x": x}, {"approximate": "tanh"}, (),
            {"FastGelu": "20| y0 = com.microsoft.FastGelu(x)"},
        )  # fmt: skip
        yield Task(
            f"gelu {text}", "aten.gelu.default", {"x": x}, {"approximate": "none"}, (),
            {"contrib": "20| y0 = com.microsoft.Gelu(x)"},
        )  # fmt: skip
        yield Task(
            f"silu {text}", "aten.silu.default", {"x": x}, {}, (),
            {"QuickGelu": "20| y0 = com.microsoft.QuickGelu<alpha=1.0>(x)",
             "Swish": "24| y0 = Swish(x)"},
        )  # fmt: skip
    for text, shape in rows(768):
        x, w, bias = normal(*shape), normal(3072, 768) / 28, normal(3072)
        for approximate, kind in (("none", "BiasGelu"), ("tanh", "FastGelu")):
            yield Task(
                f"linear_gelu {approximate} {text}x3072", "dfc.linear_gelu",
                {"x": x, "w": w, "b": bias}, {"approximate": approximate}, ("w", "b"),
                {kind: "20| t = Transpose<perm=[1,0]>(w) m = MatMul(x, t) "
                       f"y0 = com.microsoft.{kind}(m, b)"},
            )  # fmt: skip


def attentions() -> Iterator[Task]:
    shapes = [(1, 1, 128), (1, 1, 512), (1, 128, 128), (1, 512, 512), (8, 128, 128)]
    kinds = [("bert", 12, 12, 64), ("llama", 16, 4, 64)]
    for kind, h, g, d in kinds:
        for batch, s, t in shapes:
            q, k, v = normal(batch, s, h * d), normal(batch, t, g * d), normal(batch, t, g * d)
            padding = torch.ones(batch, 1, s, t, dtype=torch.bool).tril(t - s)
            padding[..., -t // 4 :] = False
            heads = {"num_heads": h, "num_kv_heads": g}
            both = f"q_num_heads={h}, kv_num_heads={g}"
            masks = [("", None), (" mask", padding)]
            masks += [(" float mask", torch.where(padding, 0.0, -torch.inf))]
            masks += [(" padding", padding[:, :, -1:].contiguous())] if kind == "bert" else []
            for name, mask in masks:
                given = {"q": q, "k": k, "v": v, "m": mask}
                yield Task(
                    f"attention {kind}{name} [{batch},{s},{t}]", "dfc.multi_head_attention",
                    given, heads, (), attention_ways(name, h, g, both),
                )  # fmt: skip
            if s == t:
                yield Task(
                    f"attention {kind} causal [{batch},{s},{t}]", "dfc.multi_head_attention",
                    {"q": q, "k": k, "v": v, "m": None}, {**heads, "is_causal": True}, (),
                    causal_ways(batch, t, h, g, both),
                )  # fmt: skip


def attention_ways(name: str, h: int, g: int, both: str) -> dict[str, str]:
    if not name:
        ways = {"opset 23": f"23| y0 = Attention<{both}>(q, k, v)"}
        bias = ""
    elif name == " padding":
        ways = {
            "opset 23": "23| s = Shape<start=1, end=2>(q) t = Shape<start=1, end=2>(k) "
            "o = Constant<value_ints=[1]>() z = Concat<axis=0>(o, o, s, t) "
            f"w = Expand(m, z) y0 = Attention<{both}>(q, k, v, w)",
            "key mask": "20| a = Constant<value_ints=[1,2]>() i = Squeeze(m, a) "
            f"p = Cast<to=6>(i) y0 = com.microsoft.MultiHeadAttention<num_heads={h}, "
            "mask_filter_value=-3.4028234663852886e38>(q, k, v, , p)",
        }
        bias = ""
    else:
        ways = {"opset 23": f"23| y0 = Attention<{both}>(q, k, v, m)"}
        bias = ", , , m" if name == " float mask" else ", , , w"
    if h == g and name != " padding":
        where = (
            "e = Constant<value_float=0.0>() n = Constant<value_float=-inf>() w = Where(m, e, n)"
            if name == " mask"
            else ""
        ).replace("-inf", "-3.4028234663852886e38")
        ways["MHA"] = (
            f"20| {where} y0 = com.microsoft.MultiHeadAttention<num_heads={h}>(q, k, v{bias})"
        )
    return ways


def causal_ways(batch: int, t: int, h: int, g: int, both: str) -> dict[str, str]:
    ways = {
        "opset 23": f"23| y0 = Attention<{both}, is_causal=1>(q, k, v)",
        "GQA": f"20| l = Constant<value = int32[{batch}] {{{','.join([str(t - 1)] * batch)}}}>() "
        f"n = Constant<value = int32 {{{t}}}>() y0, pk, pv = com.microsoft.GroupQueryAttention"
        f"<num_heads={h}, kv_num_heads={g}>(q, k, v, , , l, n)",
    }
    if h == g:
        ways["MHA"] = (
            f"20| y0 = com.microsoft.MultiHeadAttention<num_heads={h}, unidirectional=1>(q, k, v)"
        )
    return ways


def others() -> Iterator[Task]:
    for batch, tokens in ((1, 1), (1, 128), (1, 512), (8, 128)):
        for interleaved in (False, True):
            x, angle = normal(batch, 16, tokens, 64), normal(batch, tokens, 32)
            yield Task(
                f"rotary {'pairs' if interleaved else 'halves'} [{batch},16,{tokens},64]",
                "dfc.rotary_embedding",
                {"x": x, "c": angle.cos(), "s": angle.sin()}, {"interleaved": interleaved}, (),
                {"opset 23": f"23| y0 = RotaryEmbedding<interleaved={int(interleaved)}>(x, c, s)"},
            )  # fmt: skip
    for tokens in (1, 128):
        for group in (32, 128):
            x, packed = normal(1, tokens, 1024), torch.randint(0, 256, (2816, 512)).to(torch.uint8)
            scale = normal(2816, 1024 // group)
            blocks = f"s = Constant<value_ints=[2816, {1024 // group}, {group // 2}]>() "
            yield Task(
                f"linear_w4 group {group} [1,{tokens},1024]x2816", "dfc.linear_w4",
                {"x": x, "p": packed, "c": scale}, {"group": group}, ("p", "c"),
                {f"accuracy {level}": f"20| {blocks} b = Reshape(p, s) y0 = "
                 "com.microsoft.MatMulNBits<K=1024, N=2816, bits=4, "
                 f"block_size={group}, accuracy_level={level}>(x, b, c)" for level in (0, 1, 4)},
            )  # fmt: skip


def main(seconds: float) -> None:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    lines = [
        f"ONNX Runtime {ort.__version__}, CPU, {threads} thread(s) of {os.cpu_count()}; median of "
        "alternating runs: time of the base, then each way's time by the base's (largest error)",
    ]
    print(lines[0])
    for tasks in (norms(), activations(), attentions(), others()):
        for task in tasks:
            lines.append(compare(task, seconds))
            print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 0.4)
