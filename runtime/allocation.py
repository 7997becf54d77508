"""Memory for results that the process has had before: glibc keeps the pages of what is freed.

By itself glibc gives results over 32 MiB, and smaller ones often, back to the system at once: each
next one is then made of pages that the system clears anew, and that threads of a process wait for
in turn. Engines of this processor whose results PyTorch allocates ask it to keep them when they
are built, so that a process that only imports dfc is left as it is. DFC_KEEP_PAGES=0 turns it off;
what the process was told of malloc otherwise (MALLOC_TRIM_THRESHOLD_ and its like, GLIBC_TUNABLES)
stands.

An arena of a thread has 64 MiB at most, so that results of a thread over some 20 MiB are new pages
still. One arena for all (MALLOC_ARENA_MAX=1) keeps them too: it is not the default, since threads
that make small results then wait for each other, half as long again for each.

Source:  mallopt(3). Measured here on one thread: six convolutions of 16 channels and 8 images of
         128 x 128 in 0.45 of the time, an MLP of 16384 x 1024 in 0.8; peaks of memory up to 15 %
         higher.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

OFF = "DFC_KEEP_PAGES"
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST = 1 << 30  # bytes of a result that is still taken from what was freed
_TOLD = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_pages() -> bool:
    """Let malloc keep what is freed, once for the process; whether it does."""
    return why_not() is None and _kept()


def why_not() -> str | None:
    """Why the process's malloc is left as it is, None where it is not.

    Cost:  nothing: it changes nothing.
    """
    if os.environ.get(OFF, "").lower() in ("0", "off", "no", "false"):
        return f"{OFF} says so"
    if platform.libc_ver()[0] != "glibc":
        return "this is not glibc"
    told = [name for name in _TOLD if name in os.environ]
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        told.append("GLIBC_TUNABLES")
    return f"{' and '.join(told)} says how" if told else None


@cache
def _kept() -> bool:
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(which, _LARGEST) for which in (_MMAP_THRESHOLD, _TRIM_THRESHOLD)])
