"""Running ONNX in ONNX Runtime with torch tensors in and out, without copies on the CPU.

Weights of a model in memory are handed to the session as they lie: the model names them as
external data, and the session is given the tensors. So there is no 2 GiB limit and no second copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.ir.types import BOOL, FLOAT, INT, TensorType, Type

if TYPE_CHECKING:
    import torch
    from onnxscript import ir

_SHARED_BYTES = 1024  # smaller weights are cheaper inside the model


class Session:
    """A model loaded in ONNX Runtime; `run` takes and gives what `interpret` does.

    `source` is a path, or a model whose initializers are shared with the session. `without` are
    the names of ONNX Runtime's optimizations to leave out; `profile` is where the profile of its
    runs is written, beginning with this path.
    Raises:  DfcError X002 when ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        source: ir.Model | Path | str,
        graph: Graph,
        *,
        level: str = "all",
        threads: int | None = None,
        without: Sequence[str] = (),
        providers: Sequence[str] = ("CPUExecutionProvider",),
        profile: str = "",
    ) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = {
            "none": levels.ORT_DISABLE_ALL, "basic": levels.ORT_ENABLE_BASIC,
            "all": levels.ORT_ENABLE_ALL,
        }[level]  # fmt: skip
        options.log_severity_level = 4  # what is wrong comes as an exception
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        if profile:
            options.enable_profiling = True
            options.profile_file_prefix = profile
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        self._kept: list[Any] = []  # tensors whose memory the session reads
        model: Any = str(source)
        if not isinstance(source, (str, Path)):
            model = self._shared(source, options)
        try:
            self._session = ort.InferenceSession(
                model, options, providers=list(providers), disabled_optimizers=list(without)
            )
        except Exception as e:  # ORT raises classes of its own for each status code
            raise DfcError("X002", f"ONNX Runtime refuses the model: {_first_line(e)}") from e
        self.providers: list[str] = self._session.get_providers()
        self._inputs = [i.name for i in self._session.get_inputs()][: len(graph.inputs)]
        self._outputs = [o.name for o in self._session.get_outputs()]
        self._input_types = [v.type for v in graph.inputs]
        self._types = [v.type for v in graph.result.operands]
        self._core = self._session._sess

    def _shared(self, model: ir.Model, options: Any) -> bytes:
        import torch
        from onnxscript import ir

        replaced: dict[Any, Any] = {}
        names, values = [], []
        for value in model.graph.initializers.values():
            tensor = value.const_value
            raw = getattr(tensor, "raw", None)
            if not isinstance(raw, torch.Tensor) or raw.nbytes < _SHARED_BYTES or raw.is_meta:
                continue
            replaced[value] = tensor
            names.append(value.name)
            values.append(self._wrapped(raw.cpu()))
            value.const_value = ir.ExternalTensor(
                "weights", len(names) * 4096, raw.nbytes, tensor.dtype,  # type: ignore[union-attr]
                shape=tensor.shape, name=value.name or "",  # type: ignore[union-attr, arg-type]
            )  # fmt: skip
        try:
            data = ir.to_proto(model).SerializeToString()
        finally:
            for value, tensor in replaced.items():
                value.const_value = tensor
        if names:
            options.add_external_initializers(names, values)
        return bytes(data)

    def _wrapped(self, tensor: torch.Tensor) -> Any:
        import onnxruntime as ort

        tensor = tensor.contiguous()
        made = ort_value(tensor)
        self._kept.append((tensor, made))
        return ort.OrtValue(made, tensor)

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """The outputs' leaves, then the mutations' values."""
        given = [as_tensor(x, t) for x, t in zip(inputs, self._input_types, strict=True)]
        feeds = {n: ort_value(x) for n, x in zip(self._inputs, given, strict=True)}
        try:
            found = self._core.run_with_ort_values(feeds, self._outputs, None)
        except Exception as e:  # ORT raises classes of its own for each status code
            raise DfcError("K021", f"ONNX Runtime failed: {_first_line(e)}") from e
        return [from_ort(v, t) for v, t in zip(found, self._types, strict=True)]

    @property
    def inputs(self) -> list[str]:
        """The names of the inputs."""
        return list(self._inputs)

    @property
    def outputs(self) -> list[str]:
        """The names of the outputs, then of the mutations."""
        return list(self._outputs)

    def end_profiling(self) -> str:
        """Where the profile is."""
        return str(self._session.end_profiling())

    def run_on_device(self, inputs: Sequence[Any], device: str) -> list[Any]:
        """As `run`, with tensors that stay on the device."""
        binding = self._session.io_binding()
        kept = []
        for n, x, t in zip(self._inputs, inputs, self._input_types, strict=True):
            value = ort_value(as_tensor(x, t))
            kept.append(value)
            binding._iobinding.bind_ortvalue_input(n, value)
        for n in self._outputs:
            binding.bind_output(n, device)
        self._session.run_with_iobinding(binding)
        found = binding._iobinding.get_outputs()
        return [from_ort(v, t) for v, t in zip(found, self._types, strict=True)]


def as_tensor(x: Any, type: Type) -> torch.Tensor:
    """An input as the tensor that the ONNX model takes."""
    import torch

    if not isinstance(type, TensorType):
        dtype = {INT: torch.int64, FLOAT: torch.float64, BOOL: torch.bool}[type]  # type: ignore[index]
        return torch.tensor(x, dtype=dtype)
    tensor = x.detach().contiguous()
    assert isinstance(tensor, torch.Tensor)
    wanted = type.dtype.to_torch()
    if tensor.dtype != wanted:
        raise DfcError("K012", f"an input must be {type.dtype}, got {tensor.dtype}", status=2)
    return tensor


def ort_value(tensor: torch.Tensor) -> Any:
    """The tensor as ONNX Runtime's value; they share memory.

    Needs:  one of float8 is contiguous, and lives as long as the value, which does not keep it.
    """
    import torch.utils.dlpack
    from onnxruntime.capi import onnxruntime_pybind11_state as core

    to_dlpack = torch.utils.dlpack.to_dlpack  # type: ignore[attr-defined]

    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bool:
        return core.OrtValue.from_dlpack(to_dlpack(tensor.view(torch.uint8)), True)
    if tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point:
        from dfc.emit.onnx_types import ONNX_DTYPES
        from dfc.ir.types import dtype_of

        code = int(ONNX_DTYPES[dtype_of(tensor.dtype).name])
        array = tensor.view(torch.uint8).numpy()
        return core.OrtValue.ortvalue_from_numpy_with_onnx_type(array, code)
    return core.OrtValue.from_dlpack(to_dlpack(tensor), False)


def from_ort(value: Any, type: Type) -> Any:
    """ONNX Runtime's value as a tensor or number of the graph's type."""
    import torch
    from torch.utils.dlpack import from_dlpack

    if isinstance(type, TensorType) and type.dtype.is_float and type.dtype.bits == 8:
        return _float8(value).view(type.dtype.to_torch())
    tensor = from_dlpack(value.to_dlpack())
    if not isinstance(type, TensorType):
        return tensor.item()
    if type.dtype.name == "bool":
        return tensor.view(torch.bool) if tensor.dtype == torch.uint8 else tensor
    if type.dtype.is_complex:
        return torch.view_as_complex(tensor)
    return tensor


def _float8(value: Any) -> torch.Tensor:
    """The bytes of a value on the CPU: neither numpy nor dlpack knows its element type."""
    import ctypes
    import math

    import torch

    shape = value.shape()
    if 0 in shape:
        return torch.empty(shape, dtype=torch.uint8)
    memory = ctypes.string_at(value.data_ptr(), math.prod(shape))
    return torch.frombuffer(bytearray(memory), dtype=torch.uint8).reshape(shape)


def _first_line(e: BaseException) -> str:
    text = str(e).strip()
    return text.splitlines()[0][:900] if text else type(e).__name__
