"""Which machine this is, as far as timings depend on it: they are of no use on another one."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping

_TELLING = ("cpu", "features", "cores", "gpu")  # what differs between machines


def this_machine(device: str = "cpu") -> dict[str, str]:
    """The processor, what it can do, how many threads torch uses, and the GPU if one is meant."""
    import torch

    found = {
        "cpu": cpu_name(),
        "features": cpu_features(),
        "cores": str(_cores()),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(torch.device(device))
    return found


def is_another(measured: Mapping[str, str], here: Mapping[str, str]) -> bool:
    """Whether timings of one machine say nothing about the other."""
    return bool(measured) and any(measured.get(k) != here.get(k) for k in _TELLING)


def machine_text(machine: Mapping[str, str]) -> str:
    """In one line: `AMD EPYC, avx2 fma, 2 cores, 2 threads`."""
    if not machine:
        return "not measured"
    parts = [machine.get("gpu", ""), machine.get("cpu", ""), machine.get("features", "")]
    counts = [f"{machine[k]} {k}" for k in ("cores", "threads") if k in machine]
    return ", ".join(filter(None, [*parts, *counts]))


def cpu_name() -> str:
    for line in _cpuinfo("model name"):
        return line
    return platform.processor() or platform.machine()


def cpu_features() -> str:
    """The instruction sets that decide how fast kernels are."""
    flags = set(next(iter(_cpuinfo("flags")), "").split())
    known = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16")
    found = [f for f in known if f in flags]
    if found:
        return " ".join(found)
    import torch

    return torch.backends.cpu.get_cpu_capability()


def _cpuinfo(key: str) -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return [x.partition(":")[2].strip() for x in f if x.startswith(key)]
    except OSError:
        return []


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
