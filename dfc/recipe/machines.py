"""A target as the planner's machine: the facts of its devices, and of the catalogue's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dfc.errors import DfcError
from dfc.planning.catalogue import CATALOGUE
from dfc.planning.facts import PEAKS, device_of, with_details
from dfc.planning.machine import EFFICIENCY, Device, Machine, Wire
from dfc.recipe import plan as p


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
    return replace(_figures(d), dtypes=tuple(d.facts.get("dtypes", ())))


def _figures(d: p.Device) -> Device:
    facts = {k: float(v.value) for k, v in d.facts.items() if k != "dtypes"}
    _check_possible(f"device `{d.name}`", facts)
    known = CATALOGUE.get(d.kind)
    if known is not None:
        peaks = {dtype: facts[k] for k, dtype in PEAKS.items() if k in facts}
        rates = {k: v * EFFICIENCY for k, v in known.peaks.items()} | peaks
        return with_details(replace(
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
    return device_of(d.name, d.kind, facts)


def _check_possible(what: str, facts: Mapping[str, Any]) -> None:
    """Sizes and rates are more than nothing; times and counts may be nothing.

    Raises:  DfcError N045.
    """
    for fact, value in facts.items():
        may_be_zero = fact.startswith("launch") or fact in ("latency", "index", "grain")
        if not (value > 0 or (may_be_zero and value == 0)) or value == float("inf"):
            raise DfcError("N045", f"{what} has an impossible `{fact}`: {value:g}")
