"""The compiled kernels as a library of the process: whether they are there, and their functions."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dfc.runtime.kernels.build import FOLDER, NAME, compiler

VERSION = 4  # of the interface and of the layout of packed weights: kernels.h
HEADER = 64  # bytes before the panels
HALF_SCALES, ZEROS, LANES_OF_2, LANES_OF_4 = 1, 2, 4, 8
OFF = "DFC_KERNELS"  # the variable: "off", or the name of a path, for tests and to compare

_I32, _I64, _U32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32
_TEXT, _MEMORY = ctypes.c_char_p, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "dfc_kernels_version": (_I32, ()),
    "dfc_kernels_path": (_TEXT, (_I32,)),
    "dfc_kernels_use_openmp": (None, (_MEMORY,)),
    "dfc_lanes": (_U32, (_I64, _I64, _MEMORY, ctypes.POINTER(_I64))),
    "dfc_packed_bytes": (_I64, (_I32, _I64, _I64, _I64, _U32, _I64)),
    "dfc_packed_check": (_I32, (_MEMORY, _I64, _I32, _I64, _I64, _I64)),
    "dfc_pack": (
        _I32,
        (_I32, _I64, _I64, _I64, _U32, _I64, _MEMORY, _MEMORY, _MEMORY, _MEMORY, _I64, _I32),
    ),
    "dfc_linear": (
        _I32,
        (_MEMORY, _I64, _MEMORY, *[_I64] * 3, _MEMORY, _MEMORY, _I64, _I32, _I32, _TEXT),
    ),
    "dfc_add_norm": (
        _I32,
        (*[_MEMORY] * 5, _I64, _I64, ctypes.c_float, _I32, _TEXT),
    ),
    "dfc_attends": (_I32, ()),
    "dfc_attention": (_I32, (_TEXT, _I32)),
}


@dataclass(frozen=True)
class State:
    """Whether kernels are there, which ones, and what to do about it."""

    built: bool
    paths: tuple[str, ...]  # that this CPU can run, best first
    path: str | None  # the one that is taken
    shares_threads: bool  # with PyTorch's pool; else one thread
    reason: str  # a sentence for people
    advice: str | None


class Library:
    """The C functions of one compiled library.

    Raises:  OSError when it does not load, AttributeError and ValueError when it is another one.
    """

    def __init__(self, path: Path) -> None:
        self.file = path
        self.c = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.c, name)
            function.restype, function.argtypes = result, arguments
        if self.c.dfc_kernels_version() != VERSION:
            raise ValueError(f"{path.name} is of version {self.c.dfc_kernels_version()}")
        self.paths = self._paths()
        wanted = os.environ.get(OFF, "")
        self.path = wanted if wanted in self.paths else self.paths[0]
        self.shares_threads = self._share_threads()

    def _paths(self) -> tuple[str, ...]:
        found: list[str] = []
        while (name := self.c.dfc_kernels_path(len(found))) is not None:
            found.append(name.decode())
        return tuple(found)

    def _share_threads(self) -> bool:
        """Hand over the OpenMP that torch runs on: it is in the process's own table of symbols.

        Why:  linked by name, another libgomp could come along, with a pool of its own.
        """
        import torch  # noqa: F401 (loads its OpenMP library for the whole process)

        start = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
        if start is not None:
            self.c.dfc_kernels_use_openmp(ctypes.cast(start, ctypes.c_void_p))
        return start is not None


@cache
def library() -> Library | None:
    """The kernels; None where they are not built, do not load, or are turned off."""
    return _load()[0]


@cache
def _load() -> tuple[Library | None, str]:
    if os.environ.get(OFF, "").lower() in ("off", "0", "no"):
        return None, f"turned off by {OFF}"
    file = FOLDER / NAME
    if not file.exists():
        return None, "not built"
    try:
        found = Library(file)
    except (OSError, AttributeError, ValueError) as e:
        return None, f"{NAME} does not load: {e}"
    return found, "built"


def state() -> State:
    """For `dfc doctor`."""
    found, reason = _load()
    if found is None:
        return State(
            False, (), None, False, f"{reason}: the engines' own are used", _advice(reason)
        )
    threads = "PyTorch's threads" if found.shares_threads else "one thread: torch has no OpenMP"
    text = f"{found.path} of {', '.join(found.paths)}; {threads}"
    return State(True, found.paths, found.path, found.shares_threads, text, None)


def _advice(reason: str) -> str | None:
    if reason.startswith("turned off"):
        return f"unset {OFF}"
    build = "python -m dfc.runtime.kernels.build"
    return build if compiler() else f"apt-get install g++, then {build}"
