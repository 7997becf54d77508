"""The facts of a target's device as the planner's device: which fact is which figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dfc.errors import DfcError
from dfc.planning.machine import Device

PEAKS = {"peak": "f32", "peak_f16": "f16", "peak_bf16": "bf16", "peak_i8": "i8", "peak_f64": "f64"}
RATES = {
    "rate_conv": ("conv",), "rate_attention": ("attention",), "rate_gather": ("gather",),
    "rate_math": ("math", "norm", "reduce"),
}  # fmt: skip
_LAUNCHED = ("view", "matmul", "conv", "unfold", "attention", "norm", "reduce", "gather")
LAUNCHES = {f"launch_{kind}": kind for kind in _LAUNCHED}


def device_of(name: str, kind: str, facts: Mapping[str, float]) -> Device:
    """A device of which all figures are given.

    Needs:   `mem`, `peak` and `bw`.
    Raises:  DfcError N045 for a cache of which only the size or only the speed is known.
    """
    peaks = {dtype: facts[k] for k, dtype in PEAKS.items() if k in facts}
    launch = facts.get("launch", 0.0)
    plain = Device(name, kind, facts["mem"], facts["bw"], peaks, launch, "the target")
    return with_details(plain, facts)


def with_details(device: Device, facts: Mapping[str, float]) -> Device:
    """What `dfc calibrate` measures beyond a data sheet.

    Raises:  DfcError N045 for a cache of which only the size or only the speed is known.
    """
    if ("cache" in facts) != ("bw_cache" in facts):
        message = f"device `{device.name}` has one of `cache` and `bw_cache`, not both"
        raise DfcError("N045", message, help="measure both with `dfc calibrate`")
    return replace(
        device,
        cores=facts.get("cores", 0.0),
        price=facts.get("price", 1.0),
        rates={k: facts[f] for f, kinds in RATES.items() if f in facts for k in kinds},
        launches={k: facts[f] for f, k in LAUNCHES.items() if f in facts},
        grain=facts.get("grain", 0.0),
        cache=facts.get("cache", 0.0),
        cache_bandwidth=facts.get("bw_cache", float("inf")),
        each_matrix=facts.get("launch_each", 0.0),
        each_product=facts.get("launch_product", facts.get("launch_each", 0.0)),
        fresh_bandwidth=facts.get("bw_fresh", float("inf")),
        layout_bandwidth=facts.get("bw_conv", 0.0),
    )


def facts_of(device: Device) -> dict[str, float]:
    """The facts that `with_details` made rates and times to start of."""
    found = {f: device.rates[kinds[0]] for f, kinds in RATES.items() if kinds[0] in device.rates}
    found |= {f: device.launches[kind] for f, kind in LAUNCHES.items() if kind in device.launches}
    return found | {
        "launch": device.launch,
        "grain": device.grain,
        "launch_each": device.each_matrix,
        "bw_cache": device.cache_bandwidth,
        "bw_conv": device.layout_bandwidth,
    }
