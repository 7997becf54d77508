"""The devices of this host as a machine, by what the system tells: rough figures, for planning
without a target. A measured target says more.
"""

from __future__ import annotations

import os
from dataclasses import replace

from dfc.planning.catalogue import CATALOGUE
from dfc.planning.host import cpu_features, this_machine
from dfc.planning.machine import EFFICIENCY, Device, Machine, Wire

_HERTZ = 2.5e9
_FLOPS = {"avx512f": 64, "avx2": 32}  # f32 operations a cycle and core
_CORE_BANDWIDTH, _MOST_BANDWIDTH = 10e9, 200e9
_PCIE = Wire(25e9, 10e-6)


def here() -> Machine:
    """GPUs as `gpu0`, `gpu1`, ..., then the processors as `host`."""
    devices = [*_gpus(), _host()]
    pairs = [(i, j) for i in range(len(devices)) for j in range(len(devices)) if i != j]
    return Machine("this host", tuple(devices), dict.fromkeys(pairs, _PCIE))


def _host() -> Device:
    cores = int(this_machine()["cores"])
    features = cpu_features().split()
    each = next((n for name, n in _FLOPS.items() if name in features), 8)
    peak = cores * _HERTZ * each * EFFICIENCY
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    bandwidth = min(cores * _CORE_BANDWIDTH, _MOST_BANDWIDTH)
    return Device("host", "cpu", memory, bandwidth, {"f32": peak, "f64": peak / 2}, 1e-6,
                  f"{cores} cores at a nominal {_HERTZ / 1e9:g} GHz", cores=cores)  # fmt: skip


def _gpus() -> list[Device]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [_gpu(i) for i in range(count)]


def _gpu(index: int) -> Device:
    """By its name in the catalogue, else as the slowest of it; the memory is its own."""
    import torch

    found = torch.cuda.get_device_properties(index)
    said = found.name.lower().replace(" ", "")
    known = [d for d in CATALOGUE.values() if d.kind == "cuda"]
    like = next((d for d in known if d.name.partition("_")[0] in said), None)
    like = like or min(known, key=lambda d: d.bandwidth)
    return replace(
        like, name=f"gpu{index}", memory=float(found.total_memory),
        bandwidth=like.bandwidth * EFFICIENCY,
        peaks={k: v * EFFICIENCY for k, v in like.peaks.items()}, source=f"like {like.name}",
    )  # fmt: skip
