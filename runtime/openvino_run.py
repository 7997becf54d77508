"""Running ONNX in OpenVINO with torch tensors in and out, without copies where sizes are known."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfc.emit.onnx_run import as_tensor
from dfc.errors import DfcError
from dfc.ir.expr import Expr, evaluate
from dfc.ir.graph import Graph
from dfc.ir.interpret import bind_inputs
from dfc.ir.types import TensorType, Type
from dfc.runtime.openvino_trial import survived

if TYPE_CHECKING:
    import torch
    from onnxscript import ir

_INLINE_BYTES = 256 << 20  # more weights go through a file, which OpenVINO maps: one copy less
_INT32 = 2**31


class Session:
    """A model compiled for the CPU; `run` takes and gives what `interpret` does.

    Requests are kept for the next call, one for each call that runs at the same time.
    Raises:  DfcError K003 when OpenVINO refuses the model.
    """

    def __init__(self, model: ir.Model, graph: Graph, threads: int, precision: str) -> None:
        try:
            self._compiled = _compile(model, _options(threads, precision))
        except RuntimeError as e:
            raise DfcError("K003", f"engine `openvino` refuses the model: {_reason(e)}") from e
        self._graph = graph
        self._ports = _ports(self._compiled, [v.name or "" for v in model.graph.inputs])
        self._input_types = [v.type for v in graph.inputs]
        self._types = [v.type for v in graph.result.operands]
        self._is_static = all(_is_static(t) for t in self._types)
        self._idle: list[Any] = []

    @property
    def precision(self) -> str:
        """What it computes in, by its own word: a hint that the processor cannot follow is none."""
        found = self._compiled.get_property("INFERENCE_PRECISION_HINT")
        return str(found.get_type_name())

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """The outputs' leaves, then the mutations' values."""
        request = self._idle.pop() if self._idle else self._compiled.create_infer_request()
        try:
            found = self._infer(request, inputs)
        except RuntimeError as e:
            raise DfcError("K021", f"OpenVINO failed: {_reason(e)}") from e
        self._idle.append(request)
        return [_value(x, t) for x, t in zip(found, self._types, strict=True)]

    def _infer(self, request: Any, inputs: Sequence[Any]) -> list[torch.Tensor]:
        kept = []  # a request does not keep the memory of its tensors
        for port, x, type in zip(self._ports, inputs, self._input_types, strict=True):
            if port is not None:
                tensor = as_tensor(x, type)
                _require_narrow(tensor)
                kept.append(shared(tensor))
                request.set_input_tensor(port, kept[-1])
        results = self._results(inputs)
        for i, result in enumerate(results):
            if result is not None:
                kept.append(shared(result))
                request.set_output_tensor(i, kept[-1])
        request.infer()
        return [
            _copied(request.get_output_tensor(i), t) if r is None else r
            for i, (r, t) in enumerate(zip(results, self._types, strict=True))
        ]

    def _results(self, inputs: Sequence[Any]) -> list[torch.Tensor | None]:
        """Memory for the results, None for those whose size only the run tells."""
        bindings: Mapping[str, Any] = {}
        if not self._is_static:
            bindings = bind_inputs(self._graph, inputs)
        return [_memory(t, bindings) for t in self._types]


@cache
def _core() -> Any:
    """The one that all models of this process share, until it ends.

    Why:  each gives its thread a stack for signals, and as it goes the stack of the one before it:
          after two that went in the order in which they came, Ctrl-C was a segmentation fault.
    """
    import openvino as ov

    return ov.Core()


def _compile(model: ir.Model, options: Mapping[str, Any]) -> Any:
    from onnxscript import ir

    core = _core()
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    with tempfile.TemporaryDirectory(prefix="dfc-openvino-") as folder:
        path = Path(folder) / "model.onnx"
        if size > _INLINE_BYTES:
            ir.save(model, path, external_data="weights", size_threshold_bytes=1024)
            return core.compile_model(core.read_model(path), "CPU", survived(path, options))
        path.write_bytes(proto := ir.to_proto(model).SerializeToString())
        return core.compile_model(core.read_model(proto), "CPU", survived(path, options))


def _options(threads: int, precision: str) -> dict[str, Any]:
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "KV_CACHE_PRECISION": "f32",
        "CPU_DENORMALS_OPTIMIZATION": False,
        "ENABLE_CPU_PINNING": False,  # pinned threads meet those of other engines on one core
    }


def _ports(compiled: Any, names: Sequence[str]) -> list[int | None]:
    """The number of each input's port; None for an input that nothing reads and that is gone."""
    found = {name: i for i, port in enumerate(compiled.inputs) for name in port.get_names()}
    return [found.get(name) for name in names]


def shared(tensor: torch.Tensor) -> Any:
    """The tensor as OpenVINO's; they share memory."""
    import openvino as ov
    import torch

    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    tensor = tensor.contiguous()
    kind = _narrow_float(tensor.dtype)
    if kind is None:
        return ov.Tensor(tensor.numpy(), shared_memory=True)
    raw = torch.int16 if tensor.element_size() == 2 else torch.uint8
    return ov.Tensor(tensor.view(raw).numpy(), list(tensor.shape), kind)


def _narrow_float(dtype: torch.dtype) -> Any:
    """OpenVINO's name of an element type that numpy does not have, else None."""
    import openvino as ov
    import torch

    return {
        torch.bfloat16: ov.Type.bf16,
        torch.float8_e4m3fn: ov.Type.f8e4m3,
        torch.float8_e5m2: ov.Type.f8e5m2,
    }.get(dtype)


def _require_narrow(tensor: torch.Tensor) -> None:
    """The CPU plugin keeps the low 32 bits of an integer, whatever is lost.

    Raises:  DfcError K021 for a number that does not fit.
    """
    import torch

    if tensor.dtype == torch.int64 and tensor.numel():
        low, high = tensor.aminmax()
        if int(low) < -_INT32 or int(high) >= _INT32:
            message = "an input has integers beyond 32 bits, which OpenVINO would cut off"
            raise DfcError("K021", message, help="use another engine", status=2)


def _is_static(type: Type) -> bool:
    return not isinstance(type, TensorType) or all(isinstance(s, int) for s in type.shape)


def _memory(type: Type, bindings: Mapping[str, Any]) -> torch.Tensor | None:
    import torch

    if not isinstance(type, TensorType):
        return None
    sizes = [evaluate(s, bindings) for s in type.shape]
    if any(isinstance(s, Expr) for s in sizes):
        return None
    return torch.empty(sizes, dtype=type.dtype.to_torch())  # type: ignore[arg-type]


def _copied(found: Any, type: Type) -> torch.Tensor:
    """A result out of the request's own memory, which the next run overwrites."""
    import torch

    shape = list(found.shape)
    if not isinstance(type, TensorType):
        return torch.from_numpy(found.data.copy())
    dtype = type.dtype.to_torch()
    result = torch.empty(shape[:-1] if type.dtype.is_complex else shape, dtype=dtype)
    if result.numel():  # 2026.4 copies from nowhere else, and takes the process with it
        found.copy_to(shared(result))
    return result


def _value(x: torch.Tensor, type: Type) -> Any:
    return x if isinstance(type, TensorType) else x.item()


def _reason(e: BaseException) -> str:
    """What OpenVINO has to say, without where in its sources it said so."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    telling = [
        x.removeprefix("-- ") + (f" {y}" if x.endswith(":") else "")
        for x, y in zip(lines, [*lines[1:], ""], strict=True)
        if x.startswith("-- ")
    ]
    plain = [x for x in lines if not x.startswith(("Exception from ", "Check ", "While "))]
    return ((telling or plain or lines)[0])[:400] if lines else type(e).__name__
