"""Where a parameter's numbers are: a tensor of the process, or an entry of a safetensors file."""

from __future__ import annotations

import hashlib
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from dfc.errors import DfcError
from dfc.ir.graph import ParameterData

if TYPE_CHECKING:
    import torch


class TensorData(ParameterData):
    """A tensor that the model owns, shared and not copied.

    It is a snapshot: reading fails when the tensor was written to since.
    """

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self._name = name
        self._tensor = tensor.detach()
        self._watched = tensor
        self._version = _version(tensor)
        self._digest: str | None = None

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
