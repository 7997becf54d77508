"""Where a parameter's numbers are: a tensor of the process, or an entry of a safetensors file."""

from __future__ import annotations

import hashlib
import json
import struct
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError
from dfc.ir.graph import ParameterData
from dfc.ir.types import TensorType

if TYPE_CHECKING:
    import torch

SAFETENSORS = {
    "f64": "F64", "f32": "F32", "f16": "F16", "bf16": "BF16", "f8e4m3fn": "F8_E4M3",
    "f8e5m2": "F8_E5M2", "i64": "I64", "i32": "I32", "i16": "I16", "i8": "I8", "u8": "U8",
    "u16": "U16", "u32": "U32", "u64": "U64", "bool": "BOOL", "c64": "C64",
}  # fmt: skip


class TensorData(ParameterData):
    """A tensor that the model owns, shared and not copied; of one on a GPU, the copy on the host.

    It is a snapshot: reading fails when the tensor was written to since.
    """

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self._name = name
        self._tensor: torch.Tensor = on_host(tensor.detach())
        self._watched = tensor
        self._version = _version(tensor)
        self._digest: str | None = None

    def __deepcopy__(self, memo: object) -> TensorData:
        return self  # a copy of the tensor would have another version

    def __reduce__(self) -> tuple[Any, ...]:
        return TensorData, (self._name, self.tensor())

    def tensor(self) -> torch.Tensor:
        if _version(self._watched) != self._version:
            raise DfcError(
                "K030",
                f"the weights changed after tracing: `{self._name}` was written to",
                help="compile the model again, or give dfc a copy of it",
            )
        return self._tensor

    def sha256(self) -> str:
        if self._digest is None:
            self._digest = tensor_sha256(self.tensor())
        return self._digest


def on_host(x: Any) -> Any:
    """Where graphs hold their numbers and are proved; what is no tensor of a GPU as it is."""
    return x.cpu() if getattr(x, "is_cuda", False) else x


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class SafetensorsData(ParameterData):
    """An entry of a safetensors file, read when it is asked for.

    It is mapped, and let go when nobody uses it: a model that is only looked at, or of which one
    node after the other is run, is never in memory as a whole.
    """

    def __init__(self, path: Path, key: str, digest: str | None = None) -> None:
        self.path = path
        self.key = key
        self._digest = digest  # None: computed when it is asked for
        self._held: weakref.ref[torch.Tensor] | None = None

    def tensor(self) -> torch.Tensor:
        held = self._held() if self._held is not None else None
        if held is None:
            from safetensors import safe_open

            with safe_open(self.path, framework="pt") as f:
                held = f.get_tensor(self.key)
            self._held = weakref.ref(held)
        return held

    def sha256(self) -> str:
        if self._digest is None:
            self._digest = tensor_sha256(self.tensor())
        return self._digest


def tensor_sha256(tensor: torch.Tensor) -> str:
    """The digest of dtype, shape and the elements' bytes in row-major order."""
    import torch

    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().cpu().reshape(-1)
    if flat.numel() == 1:
        flat = flat.clone(memory_format=torch.contiguous_format)  # one element may have any stride
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_safetensors(
    path: Path,
    types: Mapping[str, TensorType],
    tensors: Iterator[torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors one at a time: the library's own writer copies all of them first."""
    import torch

    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, t in types.items():
        if t.dtype.name not in SAFETENSORS:
            raise DfcError("D043", f"!{name}: a package cannot hold {t.dtype} yet", status=3)
        end = offset + int(t.nbytes)  # type: ignore[arg-type]
        header[name] = {
            "dtype": SAFETENSORS[t.dtype.name],
            "shape": list(t.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for x in tensors:
            flat = x.detach().resolve_conj().resolve_neg().contiguous().cpu().reshape(-1)
            if flat.numel():
                f.write(flat.view(torch.uint8).numpy().data)
