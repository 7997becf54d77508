"""Common devices, with the source of each figure: what a target may name instead of measuring.

Peaks are dense (no sparsity), in flops a second; a planner takes 70 % of what was not measured.
"""

from __future__ import annotations

from dfc.errors import DfcError, did_you_mean
from dfc.planning.machine import Device

GB, TB, T = 1e9, 1e12, 1e12


def _gpu(
    name: str, memory: float, bandwidth: float, source: str, **peaks: float
) -> tuple[str, Device]:
    rates = {k: v * T for k, v in peaks.items()}
    return name, Device(name, "cuda", memory * GB, bandwidth * GB, rates, 7e-6, source)


def _cpu(
    name: str, memory: float, bandwidth: float, source: str, **peaks: float
) -> tuple[str, Device]:
    rates = {k: v * T for k, v in peaks.items()}
    return name, Device(name, "cpu", memory * GB, bandwidth * GB, rates, 1e-6, source)


CATALOGUE: dict[str, Device] = dict(
    (
        _gpu("a100_40gb", 40, 1555, "NVIDIA A100 datasheet (SXM, 40 GB)",
             f32=19.5, f16=312, bf16=312, i8=624, f64=9.7),
        _gpu("a100_80gb", 80, 2039, "NVIDIA A100 datasheet (SXM, 80 GB)",
             f32=19.5, f16=312, bf16=312, i8=624, f64=9.7),
        _gpu("h100", 80, 3350, "NVIDIA H100 datasheet (SXM)",
             f32=67, f16=989.5, bf16=989.5, i8=1979, f8e4m3fn=1979, f64=34),
        _gpu("h200", 141, 4800, "NVIDIA H200 datasheet (SXM)",
             f32=67, f16=989.5, bf16=989.5, i8=1979, f8e4m3fn=1979, f64=34),
        _gpu("mi300x", 192, 5300, "AMD Instinct MI300X data sheet",
             f32=163.4, f16=1307.4, bf16=1307.4, i8=2614.9, f8e4m3fn=2614.9, f64=81.7),
        _gpu("l4", 24, 300, "NVIDIA L4 datasheet (half of the figures with sparsity)",
             f32=30.3, f16=121, bf16=121, i8=242.5, f8e4m3fn=242.5),
        _gpu("rtx4090", 24, 1008, "NVIDIA Ada architecture whitepaper (f16 summed in f32)",
             f32=82.6, f16=165.2, bf16=165.2, i8=660.6, f8e4m3fn=330.3),
        _cpu("epyc_9654", 768, 460.8,
             "AMD EPYC 9654: 96 cores x 2.4 GHz x 32 flops a cycle; 12 x DDR5-4800",
             f32=7.37, bf16=14.7, f64=3.69),
        _cpu("xeon_8480", 512, 307.2,
             "Intel Xeon 8480+: 56 cores x 2.0 GHz x 64 flops a cycle, AMX 1024; 8 x DDR5-4800",
             f32=7.17, bf16=114.7, i8=229.4, f64=3.58),
        _cpu("graviton3", 256, 307.2,
             "AWS Graviton3: 64 cores x 2.6 GHz x 32 flops a cycle; 8 x DDR5-4800",
             f32=5.32, bf16=21.3, f64=2.66),
    )
)  # fmt: skip


def known_device(name: str) -> Device:
    """A device of the catalogue.

    Raises:  DfcError N044 for an unknown name.
    """
    found = CATALOGUE.get(name)
    if found is None:
        help = did_you_mean(name, list(CATALOGUE)) or f"there are {', '.join(CATALOGUE)}"
        raise DfcError("N044", f"the catalogue has no device `{name}`", help=help)
    return found
