"""Packed weights by content: once in a process, and in a folder of the user's own for the next one.

A file is named by what it was packed from (digests of codes, scales, zeros), the shape, and the
layout's version. The folder is passed by where it belongs to somebody else or cannot be written,
and a file that is not whole is written anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from dfc.errors import DfcError
from dfc.publish import publish_file
from dfc.rewrite.proofs import cache_folder
from dfc.runtime.kernels.grouped import are_packed
from dfc.runtime.kernels.library import VERSION
from dfc.runtime.kernels.linear import is_packed
from dfc.runtime.kernels.memory import huge

LEAST_BYTES = 1 << 20  # smaller weights are packed faster than a file is opened
MOST_BYTES = 16 << 30  # of all files together; those that were not used for longest go first
SPARE = 4  # a file is written only where so many times its size is free
_held: weakref.WeakValueDictionary[str, Tensor] = weakref.WeakValueDictionary()


def packed_weight(
    digests: tuple[str, ...], bits: int, n: int, k: int, group: int, pack: Callable[[], Tensor],
    experts: int | None = None,
) -> Tensor:  # fmt: skip
    """The packed weight of these digests: held, read, or packed now and kept. That of `experts` is
    one for each, in one piece.
    """
    of_experts = () if experts is None else (f"{experts} experts",)
    key = _key((*digests, *of_experts), bits, n, k, group)
    found = _held.get(key)
    if found is None:
        found = _from_disk(key, bits, n, k, group, pack, experts)
        _held[key] = found
    return found


def packed_file(
    digests: tuple[str, ...], bits: int, n: int, k: int, group: int, pack: Callable[[], Tensor]
) -> Path | None:
    """The file of a packed weight, whole, and nothing in memory; None where none is kept."""
    file = _file(_key(digests, bits, n, k, group), bits, n, k)
    if file is None:
        return None
    found = _read(file)
    if found is None or not is_packed(found, bits, n, k, group):
        _write(file, pack())
    return file if file.exists() else None


def _key(digests: tuple[str, ...], bits: int, n: int, k: int, group: int) -> str:
    words = (VERSION, platform.machine(), bits, n, k, group, *digests)
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def _file(key: str, bits: int, n: int, k: int) -> Path | None:
    """Where a weight is kept; None for a small one, or where nothing can be kept."""
    large = n * k * bits // 8 >= LEAST_BYTES
    folder = cache_folder("packed") if large else None
    return None if folder is None else folder / f"{key}.packed"


def _from_disk(
    key: str, bits: int, n: int, k: int, group: int, pack: Callable[[], Tensor],
    experts: int | None,
) -> Tensor:  # fmt: skip
    file = _file(key, bits, n * (experts or 1), k)
    if file is None:
        return pack()
    found = _read(file)
    if found is not None and (
        is_packed(found, bits, n, k, group) if experts is None
        else are_packed(found, bits, experts, n, k, group)
    ):  # fmt: skip
        return found
    made = pack()
    _write(file, made)
    return made


def _read(file: Path) -> Tensor | None:
    """The file's bytes. Why: mapped, they would lie on small pages, at half the speed."""
    try:
        with file.open("rb", buffering=0) as f:
            found = huge(os.fstat(f.fileno()).st_size)
            if f.readinto(found.numpy().data) != found.numel():
                return None
        os.utime(file)
    except OSError:
        return None
    return found


def _write(file: Path, packed: Tensor) -> None:
    size = packed.numel()
    try:
        if shutil.disk_usage(file.parent).free < SPARE * size:
            return
        with publish_file(file, force=True, expect_bytes=size) as temp:
            packed.numpy().tofile(temp)
        _tidy(file.parent)
    except (DfcError, OSError):
        return  # a full disk is no reason to fail: the weight is at hand


def _tidy(folder: Path) -> None:
    kept = 0
    files = [(p, p.stat()) for p in folder.glob("*.packed")]
    for file, facts in sorted(files, key=lambda f: -f[1].st_mtime):
        kept += facts.st_size
        if kept > MOST_BYTES:
            with contextlib.suppress(OSError):
                file.unlink()
