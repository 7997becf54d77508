"""The facts that times of probes tell: starting is taken off where it is a part of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dfc.planning.cost import padding
from dfc.runtime.calibrate.fitting import GRAINS, solve
from dfc.runtime.calibrate.probes import DTYPES, FRESH, HALF, LAUNCHED, PRODUCTS, Sizes
from dfc.runtime.calibrate.sampling import Reading


def readings_of(
    took: Mapping[str, Reading], sizes: Sizes, cache: float, kind: str
) -> dict[str, Reading]:
    """The facts that times tell: starting is taken off where it is a part of them.

    A GPU's operators are started while others run, so that there it is no part; and its kernels
    take all heads and matrices at once.
    """
    found = {f: _each(took[f], chain.operators) for f, chain in LAUNCHED.items()}
    alone = kind == "cpu"
    start = {f: r.value if alone else 0.0 for f, r in found.items()}
    squares = [(took["peak"], sizes.side), (took[HALF], sizes.side // 2)]
    best, side = min(squares, key=lambda square: square[0].value / square[1] ** 3)
    found["grain"] = _grain(took["grain"], sizes.small, best, side, start["launch_matmul"], kind)
    g = found["grain"].value
    found["peak"] = _rate(best, _product(side, g, kind), start["launch_matmul"])
    for fact in (*DTYPES, "peak_i8"):
        if fact in took:
            work = _product(sizes.other, g, kind)
            found[fact] = _rate(took[fact], work, start["launch_matmul"])
    attention = 8.0 * (sizes.tokens + g) ** 2 * (4 * 64 + 12) * (1 + g / 64)
    found.update(_convolutions(took, sizes, start["launch_conv"], g))
    found["rate_attention"] = _rate(took["rate_attention"], attention, start["launch_attention"])
    if alone:
        found["launch_product"] = _per_product(took, start["launch_matmul"], found["peak"], g, kind)
        found.update(_per_head(took, found, g))
    found["rate_math"] = _rate(took["rate_math"], 8.0 * sizes.few, start["launch"])
    found["bw_cache"] = _rate(_each(took["bw_cache"], 2), 12.0 * sizes.few, start["launch"])
    found.update(_memory(took, sizes, cache, found["bw_cache"].value, start["launch"]))
    if "bw_fresh" in took:
        moving = 12.0 * FRESH / found["bw"].value
        found["bw_fresh"] = _rate(took["bw_fresh"], 4.0 * FRESH, moving)
    return found


_HEADS = 16 * 8 - 2 * 4  # how many more than in the chain that tells the time to start


def _per_head(
    took: Mapping[str, Reading], found: Mapping[str, Reading], g: float
) -> dict[str, Reading]:
    """What each small head of attention takes beyond its arithmetic, and what is left to start."""
    four = found["launch_attention"]
    head = took["launch_each"].beyond(four.value, _HEADS).value
    start = max(four.value - 2 * 4 * head, found["launch"].value)
    arithmetic = 8.0 * 8 * (4 * 8 + 12) * (1 + g / 8) ** 3 / found["rate_attention"].value
    each = took["launch_each"].beyond(four.value + _HEADS * arithmetic, _HEADS)
    return {"launch_attention": replace(four, value=start), "launch_each": each}


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
    return r.minus(start).per(work)


def _memory(
    took: Mapping[str, Reading], sizes: Sizes, largest: float, near: float, start: float
) -> dict[str, Reading]:
    """Bytes a second of what no cache holds, and how many bytes move as those of the nearest do.

    Both sizes take cache / near + rest / bw: two equations for two unknowns.
    """
    some, many = 12.0 * sizes.some, 12.0 * sizes.many
    apart = max(took["bw"].value - took["cache"].value, took["bw"].value / 10)
    bandwidth = min((many - some) / apart, near)
    saved = some / bandwidth - (took["cache"].value - start)  # than if all came from memory
    held = saved / max(1 / bandwidth - 1 / near, 1e-3 / near)
    held = min(max(held, 12.0 * sizes.few), largest)
    return {"bw": replace(took["bw"], value=bandwidth), "cache": replace(took["cache"], value=held)}


def _product(side: int, grain: float, kind: str) -> float:
    """The flops that a product of square matrices is charged for."""
    n = float(side)
    return 2 * n**3 * padding(grain, kind, "matmul", (n, n, n))


def _grain(four: Reading, small: int, one: Reading, large: int, start: float, kind: str) -> Reading:
    """The one with which products of two sides, four of the small one, take what they are charged
    for at one rate."""
    seconds = max(four.value / 4 - start, four.value / 40)
    ratio = seconds / max(one.value - start, one.value / 10)

    def charged(g: float) -> float:
        return _product(small, g, kind) / _product(large, g, kind)

    return replace(four, value=solve(charged, ratio, GRAINS[0], float(large)))


def _per_product(
    took: Mapping[str, Reading], start: float, peak: Reading, grain: float, kind: str
) -> Reading:
    """What each small matrix of a batch takes beyond its arithmetic."""
    arithmetic = _product(8, grain, kind) / peak.value
    return took["launch_product"].beyond(start + PRODUCTS * arithmetic, PRODUCTS)
