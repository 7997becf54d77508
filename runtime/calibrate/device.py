"""What one device does: rates by dtype and class of operator, bandwidths, times to start."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dfc.errors import DfcError
from dfc.planning.facts import device_of
from dfc.runtime.calibrate.blocks import blocks, stretch
from dfc.runtime.calibrate.chains import Chain
from dfc.runtime.calibrate.sampling import Reading, sample_all

_LAUNCHED = {  # classes of operators, tiny: what is left is the time to start them
    "launch": Chain(("relu", "add"), (2, 4, 8), ((2, 4, 8),), length=8),
    "launch_view": Chain(("view", "transpose"), (2, 4, 4, 8), length=8),
    "launch_matmul": Chain(("linear",), (2, 4, 8), ((8, 8), (8,)), length=8),
    "launch_conv": Chain(("conv",), (2, 8, 4, 4), ((8, 8, 3, 3),), length=4),
    "launch_unfold": Chain(("conv",), (1, 8, 4, 4), ((8, 8, 3, 3),), length=4),
    "launch_norm": Chain(("layer_norm",), (2, 4, 8), ((8,),), length=8),
    "launch_attention": Chain(("attention",), (2, 4, 8, 8), length=4),
}
_DTYPES = {"peak_f16": "f16", "peak_bf16": "bf16", "peak_f64": "f64"}


@dataclass(frozen=True)
class Sizes:
    """How large what is measured is: a processor's caches and rates are not a GPU's."""

    side: int  # of a matrix product near the peak, and of other dtypes, which may be far slower
    other: int
    small: int  # of a product that shows what small sides cost
    few: int  # elements that fit the nearest cache; and many, which fit none
    many: int
    image: int  # side of the image of a convolution
    tokens: int


CPU = Sizes(side=512, other=128, small=64, few=1 << 16, many=6 << 20, image=28, tokens=128)
GPU = Sizes(side=4096, other=4096, small=512, few=1 << 20, many=1 << 28, image=56, tokens=1024)
QUICK = Sizes(side=192, other=64, small=48, few=1 << 15, many=3 << 20, image=14, tokens=64)


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
    runs, lacks = _runners(_chains(sizes), device, sizes.other)
    mixed = blocks()
    runs.update((name, block.runner(device)) for name, block in mixed.items())
    took = sample_all(
        runs, rounds=7 if quick else 41, seconds=seconds / 4 if quick else seconds,
        say=lambda what: say(f"{name}: {what}"),
    )  # fmt: skip
    known = _known(device)
    readings = _readings(took, sizes, known["cache"])
    kind = device.split(":")[0]
    alone = device_of(name, kind, {**known, **{f: r.value for f, r in readings.items()}})
    works = {name: block.works() for name, block in mixed.items()}
    readings = _stretched(readings, *stretch(alone, works, took))
    return Measured(name, kind, known, readings, tuple(lacks))


def _stretched(readings: Mapping[str, Reading], plain: float, conv: float) -> dict[str, Reading]:
    """Times to start as in a model of mixed operators."""
    return {
        f: replace(r, value=r.value * (conv if f == "launch_conv" else plain))
        if f.startswith("launch") and f != "launch_each" else r
        for f, r in readings.items()
    }  # fmt: skip


def _chains(sizes: Sizes) -> dict[str, Chain]:
    side, image = sizes.side, sizes.image
    square, other = (Chain(("mm",), (n, n), ((n, n),)) for n in (side, sizes.other))
    few, many = (sizes.few // 256, 256), (sizes.many // 256, 256)
    n = sizes.small
    return {
        **_LAUNCHED,
        "peak": square,
        **{fact: replace(other, dtype=dtype) for fact, dtype in _DTYPES.items()},
        "grain": Chain(("linear",), (1, n, n), ((n, n), (n,)), length=4),
        "rate_conv": Chain(("conv",), (2, 64, image, image), ((64, 64, 3, 3),)),
        "bw_conv": Chain(("conv",), (16, 8, image, image), ((8, 8, 1, 1),)),
        "rate_attention": Chain(("attention",), (1, 8, sizes.tokens, 64)),
        "launch_each": Chain(("attention",), (16, 8, 8, 8)),
        "rate_math": Chain(("exp",), few),
        "bw_cache": Chain(("add",), few, (few,), length=2),
        "bw": Chain(("add",), many, (many,)),
    }


def _runners(
    chains: Mapping[str, Chain], device: str, side: int
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
    whole = _whole_numbers(device, side)
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


def _readings(took: Mapping[str, Reading], sizes: Sizes, cache: float) -> dict[str, Reading]:
    """The facts that times tell: starting is taken off where it is a part of them."""
    found = {f: _each(took[f], chain.operators) for f, chain in _LAUNCHED.items()}
    start = {f: r.value for f, r in found.items()}
    found["grain"] = _grain(took["grain"], took["peak"], start["launch_matmul"], sizes)
    g = found["grain"].value
    for fact in ("peak", *_DTYPES, "peak_i8"):
        if fact in took:
            side = sizes.side if fact == "peak" else sizes.other
            found[fact] = _rate(took[fact], 2.0 * (side + g) ** 3, start["launch_matmul"])
    attention = 8.0 * (sizes.tokens + g) ** 2 * (4 * 64 + 12) * (1 + g / 64)
    found.update(_convolutions(took, sizes, start["launch_conv"], g))
    found["rate_attention"] = _rate(took["rate_attention"], attention, start["launch_attention"])
    head = max(took["launch_each"].value - start["launch_attention"], 0.0) / _HEADS
    alone = max(start["launch_attention"] - 2 * 4 * head, start["launch"])
    found["launch_attention"] = replace(found["launch_attention"], value=alone)
    arithmetic = 8.0 * 8 * (4 * 8 + 12) * (1 + g / 8) ** 3 / found["rate_attention"].value
    found["launch_each"] = replace(took["launch_each"], value=max(head - arithmetic, 0.0))
    found["rate_math"] = _rate(took["rate_math"], 8.0 * sizes.few, start["launch"])
    found["bw_cache"] = _rate(_each(took["bw_cache"], 2), 12.0 * sizes.few, start["launch"])
    found["bw"] = _beyond(took["bw"], 12.0 * sizes.many, cache, found["bw_cache"].value)
    return found


_HEADS = 16 * 8 - 2 * 4  # how many more than in the chain that tells the time to start


def _convolutions(
    took: Mapping[str, Reading], sizes: Sizes, start: float, g: float
) -> dict[str, Reading]:
    """Rate and layout bandwidth from two convolutions, one of many flops and one of many bytes.

    Each takes flops / rate + bytes / bandwidth: two equations for two unknowns.
    """
    import numpy as np

    places, names = sizes.image**2, ("rate_conv", "bw_conv")
    work = np.array([
        [2 * 2.0 * places * (64 + g) * (576 + g), 4.0 * (2 * 2 * 64 * places + 64 * 576)],
        [2 * 16.0 * places * (8 + g) * (8 + g), 4.0 * (2 * 16 * 8 * places + 64)],
    ])  # fmt: skip
    places_each = np.array([1 + g / (2 * places), 1 + g / (16 * places)])
    work[:, 0] *= places_each
    seconds = [max(took[f].value - start, took[f].value / 10) for f in names]
    per_unit = np.linalg.solve(work, seconds)
    # Where noise leaves one of them nothing, it takes a tenth of the time.
    least = np.array([seconds[i] / work[i, i] / 10 for i in range(2)])
    rates = 1 / np.maximum(per_unit, least)
    return {f: replace(took[f], value=float(r)) for f, r in zip(names, rates, strict=True)}


def _each(r: Reading, count: int) -> Reading:
    return replace(r, value=r.value / count)


def _rate(r: Reading, work: float, start: float) -> Reading:
    """Work a second, without the time to start; that is never more than nine tenths."""
    return replace(r, value=max(r.value - start, r.value / 10)).per(work)


def _beyond(r: Reading, size: float, cache: float, cache_bandwidth: float) -> Reading:
    """Bytes a second of what did not fit the cache."""
    near = min(cache, size / 2)
    return replace(r, value=max(r.value - near / cache_bandwidth, r.value / 10)).per(size - near)


def _grain(small: Reading, large: Reading, start: float, sizes: Sizes) -> Reading:
    """The g with which products of two sides take 2 (n + g)^3 / p both, for one p."""
    seconds = max(small.value / 4 - start, small.value / 40)
    ratio = (seconds / max(large.value - start, large.value / 10)) ** (
        1 / 3
    )  # (small side + g) / (large side + g)
    g = (ratio * sizes.side - sizes.small) / max(1 - ratio, 0.1)
    return Reading(min(max(g, 0.0), float(sizes.side)), small.spread, small.samples)


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
