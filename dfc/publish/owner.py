"""Who wrote a file: a process of this boot of this machine, and whether it still runs."""

from __future__ import annotations

import hashlib
import os
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 if unknowable, -1 if it is gone."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (ProcessLookupError, OverflowError):
        return -1
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = stat.rpartition(")")[2].split()
    except OSError:  # no /proc on this system
        return 0
    return -1 if fields[0] in "ZX" else int(fields[19])


@cache
def here() -> str:
    """Eight digits for this boot of this machine and its process numbers (a container's own)."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8"))
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
