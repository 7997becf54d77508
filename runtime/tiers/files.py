"""Where weights lie in files, and reading them without leaving them in the system's cache."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dfc.errors import DfcError
from dfc.ir.graph import Parameter, ParameterData
from dfc.ir.weights import SafetensorsData
from dfc.planning.weight_blocks import weight_bytes

if TYPE_CHECKING:
    from torch import Tensor

REQUEST = 8 << 20  # bytes asked for at once


@dataclass(frozen=True)
class Extent:
    """Bytes of a file."""

    path: Path
    offset: int
    bytes: int
    shared: bool = False  # others may set the file's times; its bytes never change


class FileData(ParameterData):
    """All bytes of a file that is never written to again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def tensor(self) -> Tensor:
        import numpy as np
        import torch

        return torch.from_numpy(np.fromfile(self.path, np.uint8))

    def sha256(self) -> str:
        from dfc.ir.weights import tensor_sha256

        return tensor_sha256(self.tensor())


def extents_of(weights: Iterable[Parameter]) -> dict[Parameter, Extent]:
    """Where each weight is.

    Raises:  DfcError K070 for a weight that is in no file, K071 for a file that lacks its bytes.
    """
    headers: dict[Path, Mapping[str, tuple[int, int]]] = {}
    found = {}
    for w in weights:
        data = w.data
        if isinstance(data, FileData):
            found[w] = Extent(data.path, 0, weight_bytes(w), shared=True)
            continue
        if not isinstance(data, SafetensorsData):
            raise DfcError(
                "K070", f"!{w.name} is in memory already: nothing is saved by streaming it",
                help="save the model as a package and load that, or give dfc.compile a model on "
                "the meta device and `weights=`, a safetensors file", status=2,
            )  # fmt: skip
        if data.path not in headers:
            headers[data.path] = _header(data.path)
        begin, end = headers[data.path].get(data.key, (0, -1))
        if end - begin != weight_bytes(w):
            raise DfcError("K071", f"{data.path}: !{data.key} is not there as {w.type}", status=8)
        found[w] = Extent(data.path, begin, end - begin)
    return found


def _header(path: Path) -> dict[str, tuple[int, int]]:
    """The bytes of each entry: from, to.

    Raises:  DfcError K071.
    """
    try:
        with path.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            entries = json.loads(f.read(length))
    except (OSError, struct.error, ValueError) as e:
        raise DfcError("K071", f"{path} cannot be read as safetensors: {e}", status=8) from e
    entries.pop("__metadata__", None)
    base = 8 + length
    offsets = {key: entry["data_offsets"] for key, entry in entries.items()}
    return {key: (base + a, base + b) for key, (a, b) in offsets.items()}


def _always() -> bool:
    return True


class Files:
    """Files that are open for reading, and must stay as they are."""

    def __init__(self, extents: Iterable[Extent]) -> None:
        self._open: dict[Path, int] = {}
        self._seen: dict[Path, tuple[int, int]] = {}
        shared = {e.path: e.shared for e in extents}
        try:
            for path in shared:
                self._open[path] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                if not shared[path]:
                    self._seen[path] = self._state(path)
        except OSError as e:
            self.close()
            raise DfcError("K071", f"cannot read the weights: {e}", status=8) from e

    def _state(self, path: Path) -> tuple[int, int]:
        facts = os.fstat(self._open[path])
        return facts.st_size, facts.st_mtime_ns

    def check(self) -> None:
        """Raises:  DfcError K071 when a file is not what it was when it was opened."""
        for path, seen in self._seen.items():
            if self._state(path) != seen:
                raise DfcError(
                    "K071", f"{path} has changed since the model was loaded",
                    help="load the model again", status=8,
                )  # fmt: skip

    def read(self, extent: Extent, into: Tensor, goes_on: Callable[[], bool] = _always) -> None:
        """The bytes of an extent into a tensor of bytes, in large requests; all or an error.

        What was read is not kept in the system's cache. `goes_on` is asked between requests.
        Raises:  DfcError K071 when the file ends before.
        """
        file, target = self._open[extent.path], into.numpy().data
        self._advise(file, extent, "POSIX_FADV_WILLNEED")
        done = 0
        while done < extent.bytes:
            part = target[done : min(done + REQUEST, extent.bytes)]
            try:
                got = os.preadv(file, [part], extent.offset + done)
            except OSError as e:
                raise DfcError("K071", f"cannot read {extent.path}: {e}", status=8) from e
            if not got:
                raise DfcError(
                    "K071", f"{extent.path} has become shorter: it ends at "
                    f"{extent.offset + done} bytes", help="load the model again", status=8,
                )  # fmt: skip
            done += got
            if not goes_on():
                return
        self._advise(file, extent, "POSIX_FADV_DONTNEED")

    def _advise(self, file: int, extent: Extent, advice: str) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, extent.offset, extent.bytes, getattr(os, advice))

    def close(self) -> None:
        for file in self._open.values():
            os.close(file)
        self._open.clear()
