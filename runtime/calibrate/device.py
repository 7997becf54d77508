"""What one device does: rates by dtype and class of operator, bandwidths, times to start."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dfc.errors import DfcError
from dfc.runtime.calibrate.chains import Chain
from dfc.runtime.calibrate.sampling import Reading, sample_all

_LAUNCHED = {  # classes of operators, tiny: what is left is the time to start them
    "launch": Chain(("relu", "add"), (8, 8), (8, 8), length=8),
    "launch_view": Chain(("transpose",), (8, 8), length=16),
    "launch_matmul": Chain(("linear",), (8, 8), (8, 8), length=8),
    "launch_conv": Chain(("conv",), (1, 4, 4, 4), (4, 4, 3, 3), length=4),
    "launch_norm": Chain(("softmax", "layer_norm"), (8, 8), (8,), length=4),
    "launch_attention": Chain(("attention",), (1, 1, 8, 8), length=4),
}
_DTYPES = {"peak": "f32", "peak_f16": "f16", "peak_bf16": "bf16", "peak_f64": "f64"}
_GRAIN_SIDE = 32  # of a product that shows what small sides cost


@dataclass(frozen=True)
class Sizes:
    """How large what is measured is: a processor's caches and rates are not a GPU's."""

    side: int  # of a matrix product near the peak
    few: int  # elements that fit the nearest cache; and many, which fit none
    many: int
    image: int  # side of the image of a convolution
    tokens: int


CPU = Sizes(side=512, few=1 << 16, many=6 << 20, image=28, tokens=128)
GPU = Sizes(side=4096, few=1 << 20, many=1 << 28, image=56, tokens=1024)
QUICK = Sizes(side=192, few=1 << 15, many=3 << 20, image=14, tokens=64)


@dataclass(frozen=True)
class Measured:
    """The facts of one device, by the names that a target has for them."""

    name: str
    kind: str
    facts: Mapping[str, float]  # known, not measured: cores, memory, cache
    readings: Mapping[str, Reading]
    lacks: tuple[str, ...] = ()  # facts of dtypes that this device does not compute in


def measure_device(
    name: str,
    device: str,
    *,
    quick: bool = False,
    seconds: float = 40.0,
    say: Callable[[str], None] = lambda what: None,
) -> Measured:
    """Measure one device, `cpu` or `cuda:N`, on the eager engine.

    Cost:    `seconds` and a warm-up; with `quick` a quarter of it, and less exact.
    """
    sizes = QUICK if quick else GPU if device.startswith("cuda") else CPU
    runs, lacks = _runners(_chains(sizes), device)
    took = sample_all(
        runs, rounds=7 if quick else 41, seconds=seconds / 4 if quick else seconds,
        say=lambda what: say(f"{name}: {what}"),
    )  # fmt: skip
    readings = _readings(took, sizes)
    known = _known(device)
    return Measured(name, device.split(":")[0], known, readings, tuple(lacks))


def _chains(sizes: Sizes) -> dict[str, Chain]:
    side, image = sizes.side, sizes.image
    square = Chain(("mm",), (side, side), (side, side))
    few, many = sizes.few // 256, sizes.many // 256
    small = (_GRAIN_SIDE, _GRAIN_SIDE)
    return {
        **_LAUNCHED,
        **{fact: replace(square, dtype=dtype) for fact, dtype in _DTYPES.items()},
        "grain": Chain(("linear",), small, small, length=4),
        "rate_conv": Chain(("conv",), (1, 64, image, image), (64, 64, 3, 3)),
        "rate_attention": Chain(("attention",), (1, 8, sizes.tokens, 64)),
        "rate_math": Chain(("exp",), (few, 256)),
        "bw_cache": Chain(("add",), (few, 256), (few, 256), length=2),
        "bw": Chain(("add",), (many, 256), (many, 256)),
    }


def _runners(
    chains: Mapping[str, Chain], device: str
) -> tuple[dict[str, Callable[[], None]], list[str]]:
    """What can run on a device; a dtype that its kernels do not take is left out."""
    runs: dict[str, Callable[[], None]] = {}
    lacks = []
    for fact, chain in chains.items():
        run = chain.runner(device)
        try:
            run()
        except (RuntimeError, DfcError):
            if chain.dtype == "f32":
                raise
            lacks.append(fact)
            continue
        runs[fact] = run
    whole = _whole_numbers(device, max(c.shape[0] for f, c in chains.items() if f == "peak"))
    try:
        whole()
        runs["peak_i8"] = whole
    except RuntimeError:
        lacks.append("peak_i8")
    return runs, lacks


def _whole_numbers(device: str, side: int) -> Callable[[], None]:
    """A product of int8 matrices in int32: no operator of a graph, but what kernels use."""
    import torch

    made = torch.randint(-9, 9, (side, side), generator=torch.Generator().manual_seed(0))
    x = made.to(torch.int8).to(device)

    def run() -> None:
        torch._int_mm(x, x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    return run


def _readings(took: Mapping[str, Reading], sizes: Sizes) -> dict[str, Reading]:
    """The facts that times tell: starting is taken off where it is a part of them."""
    found = {f: _each(took[f], chain.operators) for f, chain in _LAUNCHED.items()}
    start = {f: r.value for f, r in found.items()}
    found["grain"] = _grain(took["grain"], took["peak"], start["launch_matmul"], sizes.side)
    g = found["grain"].value
    matmul = 2.0 * (sizes.side + g) ** 3
    for fact in (*_DTYPES, "peak_i8"):
        if fact in took:
            found[fact] = _rate(took[fact], matmul, start["launch_matmul"])
    conv = 2.0 * 64 * 64 * 9 * sizes.image**2
    attention = 8.0 * (sizes.tokens + g) ** 2 * (4 * 64 + 12) * (1 + g / 64)
    found["rate_conv"] = _rate(took["rate_conv"], conv, start["launch_conv"])
    found["rate_attention"] = _rate(took["rate_attention"], attention, start["launch_attention"])
    found["rate_math"] = _rate(took["rate_math"], 8.0 * sizes.few, start["launch"])
    found["bw_cache"] = _rate(_each(took["bw_cache"], 2), 12.0 * sizes.few, start["launch"])
    found["bw"] = _rate(took["bw"], 12.0 * sizes.many, start["launch"])
    return found


def _each(r: Reading, count: int) -> Reading:
    return replace(r, value=r.value / count)


def _rate(r: Reading, work: float, start: float) -> Reading:
    """Work a second, without the time to start; that is never more than nine tenths."""
    return replace(r, value=max(r.value - start, r.value / 10)).per(work)


def _grain(small: Reading, large: Reading, start: float, side: int) -> Reading:
    """The g with which products of two sides take 2 (n + g)^3 / p both, for one p."""
    seconds = max(small.value / 4 - start, small.value / 40)
    ratio = (seconds / max(large.value - start, large.value / 10)) ** (
        1 / 3
    )  # (small side + g) / (large side + g)
    g = (ratio * side - _GRAIN_SIDE) / max(1 - ratio, 0.1)
    return Reading(min(max(g, 0.0), float(side)), small.spread, small.samples)


def _known(device: str) -> dict[str, float]:
    """What the system says: memory, cores, the largest cache."""
    import torch

    if device.startswith("cuda"):
        found: Any = torch.cuda.get_device_properties(device)
        cache = float(getattr(found, "L2_cache_size", 0) or 40e6)
        return {"index": torch.device(device).index or 0, "mem": float(found.total_memory),
                "cache": cache}  # fmt: skip
    return {"cores": torch.get_num_threads(), "mem": _memory_bytes(), "cache": _cache_bytes()}


def _memory_bytes() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _cache_bytes() -> float:
    """The largest cache of the first core; 8 MB where the system does not tell."""
    found = [0.0]
    for index in range(6):
        try:
            with open(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size") as f:
                text = f.read().strip()
        except OSError:
            break
        found.append(float(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}[text[-1]])
    return max(found) or 8e6
