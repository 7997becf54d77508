"""What one device does: rates by dtype and class of operator, bandwidths, times to start."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from dfc.errors import DfcError
from dfc.planning.facts import LAUNCHES, device_of, facts_of
from dfc.runtime.calibrate.blocks import Block, blocks
from dfc.runtime.calibrate.chains import Chain
from dfc.runtime.calibrate.equations import readings_of
from dfc.runtime.calibrate.fitting import fitted
from dfc.runtime.calibrate.inplace import Clocked, clocked, quiet_seconds
from dfc.runtime.calibrate.probes import chains_of, sizes_for
from dfc.runtime.calibrate.sampling import Reading, sample_all


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
    kind = device.split(":")[0]
    sizes = sizes_for(kind, quick)
    chains = chains_of(sizes, kind)
    runs, lacks = _runners(chains, device, sizes.other)
    mixed = blocks()
    rows: dict[str, list[Clocked]] = {name: [] for name in mixed}
    for block_name, block in mixed.items():
        runs[block_name] = _collecting(block, device, rows[block_name])
    took = sample_all(
        runs, rounds=7 if quick else 41, seconds=seconds / 4 if quick else seconds,
        say=lambda what: say(f"{name}: {what}"), wait=_waiting(device),
    )  # fmt: skip
    known = _known(device)
    readings = readings_of(took, sizes, known.pop("cache"), kind)
    alone = device_of(name, kind, {**known, **{f: r.value for f, r in readings.items()}})
    few, many = (
        [node for b, block in mixed.items() if b.startswith("many") == wide
         for node in zip(block.works, quiet_seconds(rows[b]), strict=True)]
        for wide in (False, True)
    )  # fmt: skip
    found = facts_of(fitted(alone, few, many))
    if alone.ahead:  # blocks show what starts take, and nothing of the work behind them
        found = {fact: v for fact, v in found.items() if fact in ("launch", *LAUNCHES)}
    return Measured(name, kind, known, _with(readings, found, took), tuple(lacks))


def _waiting(device: str) -> Callable[[], None] | None:
    """Waits for what was left to a GPU."""
    import torch

    return partial(torch.cuda.synchronize, device) if device.startswith("cuda") else None


def _collecting(block: Block, device: str, rows: list[Clocked]) -> Callable[[], None]:
    run = clocked(block.graph, block.inputs, device)
    return lambda: rows.append(run())


def _with(
    readings: Mapping[str, Reading], facts: Mapping[str, float], took: Mapping[str, Reading]
) -> dict[str, Reading]:
    """Readings with the values that blocks show; what only they show is as sure as they are."""
    block = took["lookups"]
    return {**readings, **{f: readings.get(f, block).at(v) for f, v in facts.items()}}


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

    return run


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
