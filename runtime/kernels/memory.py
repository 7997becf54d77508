"""Memory for packed weights, on huge pages where the system has them.

A row of a model reads every weight once. On pages of 4 KiB that is limited by looking up pages, and
not by memory: 24 instead of 48 GB/s were measured on one machine (Linux, two threads).
"""

from __future__ import annotations

import contextlib
import mmap
import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HUGE = 1 << 21  # bytes of a huge page
CHUNK = 1 << 25  # weights share chunks, so that none of them pads a page of its own
LINE = 64

_lock = threading.Lock()
_rest: Tensor | None = None  # of the last chunk


def huge(size: int) -> Tensor:
    """`size` bytes, aligned to 64; the memory goes back when all weights of its chunk are gone."""
    global _rest
    room = -(-size // LINE) * LINE
    if room >= CHUNK // 2:
        return _chunk(room)[:size]
    with _lock:
        if _rest is None or _rest.numel() < room:
            _rest = _chunk(CHUNK)
        found, _rest = _rest[:size], _rest[room:]
    return found


def _chunk(size: int) -> Tensor:
    return torch.from_numpy(pages(size))


def pages(size: int) -> NDArray[np.uint8]:
    """At least `size` bytes of fresh memory: whole huge pages, where the system has them."""
    # Private: what could be shared with a child is never on huge pages.
    block = mmap.mmap(-1, -(-size // HUGE) * HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(block, np.uint8)
