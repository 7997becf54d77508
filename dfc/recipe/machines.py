"""A target as the planner's machine: the facts of its devices, and of the catalogue's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dfc.errors import DfcError
from dfc.planning.catalogue import CATALOGUE
from dfc.planning.machine import EFFICIENCY, Device, Machine, Wire
from dfc.recipe import plan as p

PEAKS = {"peak": "f32", "peak_f16": "f16", "peak_bf16": "bf16", "peak_i8": "i8", "peak_f64": "f64"}
RATES = {"rate_conv": ("conv",), "rate_attention": ("attention",), "rate_math": ("math", "norm")}
LAUNCHES = {f"launch_{kind}": kind for kind in ("view", "matmul", "conv", "attention", "norm")}


def machine_of(target: p.Target) -> Machine:
    """The machine that a target describes.

    Raises:  DfcError N045 for a device that lacks what a plan needs.
    """
    devices = tuple(_device(d) for d in target.devices)
    if not devices:
        raise DfcError("N045", f"target `{target.name}` has no devices")
    at = {d.name: i for i, d in enumerate(target.devices)}
    wires: dict[tuple[int, int], Wire] = {}
    for link in target.links:
        facts = {k: float(v.value) for k, v in link.facts.items()}
        _check_possible(f"the link from `{link.source}` to `{link.sink}`", facts)
        wire = Wire(facts.get("bw", float("inf")), facts.get("latency", 0.0))
        wires[at[link.source], at[link.sink]] = wire
        if link.both:
            wires[at[link.sink], at[link.source]] = wire
    return Machine(target.name, devices, wires)


def _device(d: p.Device) -> Device:
    facts: dict[str, Any] = {k: v.value for k, v in d.facts.items() if k != "dtypes"}
    _check_possible(f"device `{d.name}`", facts)
    facts["dtypes"] = d.facts.get("dtypes", ())
    peaks = {dtype: float(facts[k]) for k, dtype in PEAKS.items() if k in facts}
    known = CATALOGUE.get(d.kind)
    if known is not None:
        rates = {k: v * EFFICIENCY for k, v in known.peaks.items()} | peaks
        return _with_details(replace(
            known, name=d.name, peaks=rates,
            memory=float(facts.get("mem", known.memory)),
            bandwidth=float(facts.get("bw", known.bandwidth * EFFICIENCY)),
            launch=float(facts.get("launch", known.launch)),
        ), facts)  # fmt: skip
    for fact in ("mem", "peak", "bw"):
        if fact not in facts:
            help = f"write {fact}=..., measure it with `dfc calibrate`, or name a known device: "
            raise DfcError("N045", f"device `{d.name}` has no `{fact}`, which a plan needs",
                           help=help + ", ".join(CATALOGUE))  # fmt: skip
    return _with_details(Device(
        d.name, d.kind, float(facts["mem"]), float(facts["bw"]), peaks,
        float(facts.get("launch", 0.0)), "the target",
    ), facts)  # fmt: skip


def _check_possible(what: str, facts: Mapping[str, Any]) -> None:
    """Sizes and rates are more than nothing; times and counts may be nothing.

    Raises:  DfcError N045.
    """
    for fact, value in facts.items():
        may_be_zero = fact.startswith("launch") or fact in ("latency", "index", "grain")
        if not (value > 0 or (may_be_zero and value == 0)) or value == float("inf"):
            raise DfcError("N045", f"{what} has an impossible `{fact}`: {value:g}")


def _with_details(device: Device, facts: Mapping[str, Any]) -> Device:
    """What `dfc calibrate` measures beyond a data sheet.

    Raises:  DfcError N045 for a cache of which only the size or only the speed is known.
    """
    if ("cache" in facts) != ("bw_cache" in facts):
        message = f"device `{device.name}` has one of `cache` and `bw_cache`, not both"
        raise DfcError("N045", message, help="measure both with `dfc calibrate`")
    return replace(
        device,
        dtypes=tuple(facts.get("dtypes", ())),
        price=float(facts.get("price", 1.0)),
        rates={k: float(facts[f]) for f, kinds in RATES.items() if f in facts for k in kinds},
        launches={k: float(facts[f]) for f, k in LAUNCHES.items() if f in facts},
        grain=float(facts.get("grain", 0.0)),
        cache=float(facts.get("cache", 0.0)),
        cache_bandwidth=float(facts.get("bw_cache", float("inf"))),
    )
