"""A target as the planner's machine: the facts of its devices, and of the catalogue's."""

from __future__ import annotations

from dataclasses import replace

from dfc.errors import DfcError
from dfc.planning.catalogue import CATALOGUE
from dfc.planning.machine import EFFICIENCY, Device, Machine, Wire
from dfc.recipe import plan as p

PEAKS = {"peak": "f32", "peak_f16": "f16", "peak_bf16": "bf16", "peak_i8": "i8", "peak_f64": "f64"}


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
        wire = Wire(facts.get("bw", float("inf")), facts.get("latency", 0.0))
        wires[at[link.source], at[link.sink]] = wire
        if link.both:
            wires[at[link.sink], at[link.source]] = wire
    return Machine(target.name, devices, wires)


def _device(d: p.Device) -> Device:
    facts = {k: v.value for k, v in d.facts.items() if k != "dtypes"}
    peaks = {dtype: float(facts[k]) for k, dtype in PEAKS.items() if k in facts}
    known = CATALOGUE.get(d.kind)
    if known is not None:
        rates = {k: v * EFFICIENCY for k, v in known.peaks.items()} | peaks
        return replace(
            known, name=d.name, peaks=rates,
            memory=float(facts.get("mem", known.memory)),
            bandwidth=float(facts.get("bw", known.bandwidth * EFFICIENCY)),
            launch=float(facts.get("launch", known.launch)),
        )  # fmt: skip
    for fact in ("mem", "peak", "bw"):
        if fact not in facts:
            help = f"write {fact}=..., measure it with `dfc calibrate`, or name a known device: "
            raise DfcError("N045", f"device `{d.name}` has no `{fact}`, which a plan needs",
                           help=help + ", ".join(CATALOGUE))  # fmt: skip
        if not facts[fact] > 0:
            raise DfcError("N045", f"device `{d.name}` has an impossible `{fact}`")
    return Device(
        d.name, d.kind, float(facts["mem"]), float(facts["bw"]), peaks,
        float(facts.get("launch", 0.0)), "the target",
    )  # fmt: skip
