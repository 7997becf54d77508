"""A chain of linear layers in each engine: what benchmarks/linear_layers.py times."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

Run = Callable[[np.ndarray], np.ndarray]  # f32[rows, K] -> f32[rows, N]
GROUP = 32


@dataclass(frozen=True)
class Weight:
    """Random codes of one layer; scales keep the size of what passes through, exact as float16."""

    bits: int
    n: int
    k: int
    seed: int

    @cached_property
    def packed(self) -> np.ndarray:
        """int4: u8[N, K/2], two codes with offset 8 a byte, low first. int8: i8[N, K]."""
        random = np.random.default_rng(self.seed)
        data = random.integers(0, 256, (self.n, self.k * self.bits // 8), dtype=np.uint8)
        # The lowest code becomes 0: with a mean, what passes through grows from layer to layer.
        if self.bits == 8:
            return np.where(data == 128, 0, data).astype(np.uint8).view(np.int8)
        low, high = data & 15, data & 0xF0
        return np.where(low == 0, 8, low) | np.where(high == 0, 0x80, high)

    @property
    def scale(self) -> np.float16:
        spread = 4.18 if self.bits == 4 else 73.6  # of the codes
        return np.float16(1 / (spread * self.k**0.5))

    @property
    def codes(self) -> np.ndarray:
        """i8[N, K], centred."""
        if self.bits == 8:
            return self.packed
        low, high = (self.packed & 15).astype(np.int8) - 8, (self.packed >> 4).astype(np.int8) - 8
        return np.stack([low, high], -1).reshape(self.n, self.k)

    @property
    def bytes(self) -> int:
        """Of codes and one float16 scale for each group of 32."""
        return self.n * self.k * self.bits // 8 + self.n * self.k // GROUP * 2


def torch_chain(weights: Sequence[Weight], dtype: torch.dtype) -> Run:
    held = [torch.from_numpy(w.codes).to(dtype) * float(w.scale) for w in weights]

    def run(x: np.ndarray) -> np.ndarray:
        y = torch.from_numpy(x).to(dtype)
        with torch.no_grad():
            for w in held:
                y = torch.nn.functional.linear(y[:, : w.shape[1]], w)
        return y.float().numpy()

    return run


def dfc_chain(weights: Sequence[Weight], group: int | None) -> Run:
    """The graph as any package has it, run by the eager engine."""
    from dfc.ir.expr import symbol
    from dfc.ir.graph import Graph
    from dfc.ir.types import DTYPES, TensorType
    from dfc.ops.builder import Builder
    from dfc.runtime.engines import find_engine

    graph = Graph("chain", ranges={"B": (1, None)})
    b = Builder(graph)
    x = graph.add_input("x", TensorType(DTYPES["f32"], (symbol("B"), weights[0].k)))
    for i, w in enumerate(weights):
        if x.tensor_type.shape[-1] != w.k:
            x = b("aten.slice.Tensor", x, dim=1, start=0, end=w.k)
        codes = graph.add_constant(f"codes{i}", torch.from_numpy(w.packed))
        shape = (w.n, w.k // group) if group else (w.n,)
        scale = graph.add_constant(f"scale{i}", torch.full(shape, float(w.scale)))
        given = (x, codes, scale, None, None) if w.bits == 4 else (x, codes, scale, None)
        x = b(f"dfc.linear_w{w.bits}", *given, group=group, activations="int8")
    graph.set_outputs([x])
    runner = find_engine("eager").build(graph)
    return lambda x: runner([torch.from_numpy(x)])[0].numpy()  # type: ignore[no-any-return]


def onnxruntime_chain(weights: Sequence[Weight], threads: int) -> Run:
    """MatMulNBits with int8 activations; its threads do not spin while others are measured."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    nodes, held, last, width = [], [], "x", weights[0].k
    for i, w in enumerate(weights):
        if width != w.k:
            ends = [np.array(v, np.int64) for v in ([0], [w.k], [1])]
            names = [f"s{i}_{j}" for j in range(3)]
            held += [numpy_helper.from_array(a, n) for a, n in zip(ends, names, strict=True)]
            nodes.append(helper.make_node("Slice", [last, *names], [f"cut{i}"]))
            last = f"cut{i}"
        codes = w.packed if w.bits == 4 else (w.packed.view(np.uint8) ^ 128)
        blocks = codes.reshape(w.n, w.k // GROUP, GROUP * w.bits // 8)
        scales = np.full(w.n * w.k // GROUP, w.scale, np.float32)
        held += [numpy_helper.from_array(blocks, f"w{i}"), numpy_helper.from_array(scales, f"c{i}")]
        nodes.append(
            helper.make_node(
                "MatMulNBits", [last, f"w{i}", f"c{i}"], [f"y{i}"], domain="com.microsoft",
                K=w.k, N=w.n, bits=w.bits, block_size=GROUP, accuracy_level=4,
            )
        )  # fmt: skip
        last, width = f"y{i}", w.n
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", weights[0].k])
    y = helper.make_tensor_value_info(last, TensorProto.FLOAT, ["B", width])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "chain", [x], [y], held)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    data = model.SerializeToString()
    del model, graph, held
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    assert isinstance(onnx.__version__, str)
    return lambda x: session.run(None, {"x": x})[0]  # type: ignore[no-any-return]


def openvino_chain(weights: Sequence[Weight], threads: int, dynamic: int) -> Run:
    """Compressed weights; activations in int8 groups of `dynamic`, 0 for floats."""
    import openvino as ov
    from openvino import opset13 as op

    x = last = op.parameter([-1, weights[0].k], ov.Type.f32)
    width = weights[0].k
    for w in weights:
        if width != w.k:
            last = op.slice(last, np.array([0]), np.array([w.k]), np.array([1]), np.array([1]))
        if w.bits == 4:
            shape = [w.n, w.k // GROUP, GROUP]
            codes = op.constant(ov.Tensor(w.packed, ov.Shape(shape), ov.Type.u4))
            eight = op.constant(
                ov.Tensor(np.array([0x08], np.uint8), ov.Shape([1, 1, 1]), ov.Type.u4)
            )
            wide = op.subtract(op.convert(codes, "f16"), op.convert(eight, "f16"))
            scale = op.constant(np.full((w.n, w.k // GROUP, 1), w.scale, np.float16))
            weight = op.reshape(op.multiply(wide, scale), np.array([w.n, w.k]), False)
        else:
            scale = op.constant(np.full((w.n, 1), w.scale, np.float16))
            weight = op.multiply(op.convert(op.constant(w.packed), "f16"), scale)
        last = op.matmul(last, op.convert(weight, "f32"), False, True)
        width = w.n
    model = ov.Model([last], [x], "chain")
    config = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": dynamic,
    }
    request = ov.Core().compile_model(model, "CPU", config).create_infer_request()
    shared = tuple(weights)  # OpenVINO reads their memory, and does not keep them

    def run(x: np.ndarray) -> np.ndarray:
        assert shared
        return request.infer({0: x}, share_inputs=True)[0]  # type: ignore[no-any-return]

    return run


class Ggml:
    """llama.cpp's own library, by its C interface: weights Q4_0 or Q8_0 in its CPU's layout."""

    def __init__(self, folder: Path, threads: int) -> None:
        """`folder` has libggml-base.so, libggml*.so and libggml-cpu-NAME.so of one release."""
        pointer = ctypes.c_void_p
        mode = ctypes.RTLD_GLOBAL
        self.c = ctypes.CDLL(str(folder / "libggml-base.so"), mode)
        (loader,) = (p for p in folder.glob("libggml.*so") if "base" not in p.name)
        self.loader = ctypes.CDLL(str(loader), mode)
        for name in (
            "ggml_init", "ggml_mul_mat", "ggml_new_tensor_2d", "ggml_new_graph_custom",
            "ggml_backend_alloc_ctx_tensors_from_buft", "ggml_gallocr_new", "ggml_view_2d",
            "ggml_cont", "ggml_backend_dev_buffer_type", "ggml_backend_dev_init",
            "ggml_backend_reg_dev_get", "ggml_backend_reg_get_proc_address",
        ):  # fmt: skip
            getattr(self.c, name).restype = pointer
        self.loader.ggml_backend_load.restype = pointer
        cpu = folder / f"libggml-cpu-{_ggml_cpu()}.so"
        registry = pointer(self.loader.ggml_backend_load(str(cpu).encode()))
        assert registry.value, f"{cpu} does not load"
        self.device = pointer(self.c.ggml_backend_reg_dev_get(registry, ctypes.c_size_t(0)))
        self.backend = pointer(self.c.ggml_backend_dev_init(self.device, None))

        def address(name: bytes) -> int:
            return int(self.c.ggml_backend_reg_get_proc_address(registry, name))

        set_threads = ctypes.CFUNCTYPE(None, pointer, ctypes.c_int)
        set_threads(address(b"ggml_backend_set_n_threads"))(self.backend, threads)
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)
        kinds = extra(address(b"ggml_backend_dev_get_extra_bufts"))(self.device)
        self.plain = pointer(self.c.ggml_backend_dev_buffer_type(self.device))
        self.repacked = pointer(kinds[0]) if kinds and kinds[0] else self.plain

    def chain(self, weights: Sequence[Weight], rows: int) -> Run:
        c, size, pointer = self.c, ctypes.c_int64, ctypes.c_void_p
        held, work = self._context(), self._context()
        tensors = []
        for w in weights:
            kind = 2 if w.bits == 4 else 8
            new = c.ggml_new_tensor_2d(held, ctypes.c_int(kind), size(w.k), size(w.n))
            tensors.append(pointer(new))
        kind_of_memory = self.repacked if weights[0].bits == 4 else self.plain  # as llama.cpp
        assert c.ggml_backend_alloc_ctx_tensors_from_buft(held, kind_of_memory)
        for w, t in zip(weights, tensors, strict=True):
            data = _ggml_blocks(w)
            at = data.ctypes.data_as(pointer)
            c.ggml_backend_tensor_set(t, at, ctypes.c_size_t(0), ctypes.c_size_t(data.nbytes))
        f32, width = ctypes.c_int(0), weights[0].k
        x = last = pointer(c.ggml_new_tensor_2d(work, f32, size(width), size(rows)))
        c.ggml_set_input(x)
        for w, t in zip(weights, tensors, strict=True):
            if width != w.k:
                step = ctypes.c_size_t(width * 4)
                cut = c.ggml_view_2d(work, last, size(w.k), size(rows), step, ctypes.c_size_t(0))
                last = pointer(c.ggml_cont(work, pointer(cut)))
            last, width = pointer(c.ggml_mul_mat(work, t, last)), w.n
        c.ggml_set_output(last)
        graph = pointer(c.ggml_new_graph_custom(work, ctypes.c_size_t(2048), False))
        c.ggml_build_forward_expand(graph, last)
        allocator = pointer(c.ggml_gallocr_new(self.plain))
        assert c.ggml_gallocr_alloc_graph(allocator, graph)
        y = np.empty((rows, width), np.float32)

        def run(given: np.ndarray) -> np.ndarray:
            zero = ctypes.c_size_t(0)
            start = given.ctypes.data_as(pointer)
            c.ggml_backend_tensor_set(x, start, zero, ctypes.c_size_t(given.nbytes))
            assert c.ggml_backend_graph_compute(self.backend, graph) == 0
            c.ggml_backend_tensor_get(
                last, y.ctypes.data_as(pointer), zero, ctypes.c_size_t(y.nbytes)
            )
            return y

        return run

    def _context(self) -> ctypes.c_void_p:
        class Parameters(ctypes.Structure):
            _fields_ = (
                ("bytes", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("empty", ctypes.c_bool)
            )  # fmt: skip

        self.c.ggml_init.argtypes = [Parameters]
        return ctypes.c_void_p(self.c.ggml_init(Parameters(8 << 20, None, True)))


def _ggml_cpu() -> str:
    """Which of its builds llama.cpp would choose here: the newest that the CPU can run."""
    flags = cpu_flags()
    for name, needs in (
        ("sapphirerapids", ("avx512f", "avx512_vnni", "avx512_bf16", "avx512_vbmi", "amx_int8")),
        ("zen4", ("avx512f", "avx512_vnni", "avx512_bf16", "avx512_vbmi")),
        ("icelake", ("avx512f", "avx512_vnni", "avx512_vbmi")),
        ("cascadelake", ("avx512f", "avx512_vnni")),
        ("alderlake", ("avx2", "avx_vnni")),
        ("haswell", ("avx2", "fma", "f16c", "bmi2")),
    ):
        if flags.issuperset(needs):
            return name
    return "x64"


def cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((x for x in lines if x.startswith("flags")), "").split())


def _ggml_blocks(w: Weight) -> np.ndarray:
    """Q4_0: f16, then 16 bytes with element j low and j + 16 high; Q8_0: f16, then 32 int8."""
    codes = w.codes.reshape(-1, GROUP)
    if w.bits == 4:
        shifted = (codes + 8).astype(np.uint8)
        body = shifted[:, :16] | (shifted[:, 16:] << 4)
    else:
        body = codes.view(np.uint8)
    head = np.full((len(body), 1), w.scale, np.float16).view(np.uint8)
    return np.ascontiguousarray(np.concatenate([head, body], axis=1))


def threads_of_this_process() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
