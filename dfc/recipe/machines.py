"""A target as the planner's machine: the facts of its devices, and of the catalogue's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

from dfc.errors import DfcError, Diagnostic
from dfc.lang import syntax as s
from dfc.lang.reader import read_document
from dfc.planning.catalogue import CATALOGUE
from dfc.planning.facts import PEAKS, device_of, with_details
from dfc.planning.machine import EFFICIENCY, Device, Machine, Wire
from dfc.recipe import plan as p
from dfc.recipe.sources import is_text, plan_of, source_of


def machine_of(target: p.Target) -> Machine:
    """The machine that a target describes.

    Raises:  DfcError N045 for a device or a link that lacks what a plan needs.
    """
    if not target.devices:
        raise DfcError("N045", f"target `{target.name}` has no devices")
    problems = [x for d in target.devices for x in _lacking(d)]
    problems += [x for link in target.links for x in _lacking_link(link)]
    if problems:
        raise DfcError.of(problems)
    devices = tuple(_device(d) for d in target.devices)
    at = {d.name: i for i, d in enumerate(target.devices)}
    wires: dict[tuple[int, int], Wire] = {}
    for link in target.links:
        facts = {k: float(v.value) for k, v in link.facts.items()}
        wire = Wire(facts.get("bw", float("inf")), facts.get("latency", 0.0))
        wires[at[link.source], at[link.sink]] = wire
        if link.both:
            wires[at[link.sink], at[link.source]] = wire
    return Machine(target.name, devices, wires)


def read_machine(target: str | os.PathLike[str]) -> Machine:
    """The machine of a target's text, or of its file.

    Raises:  DfcError N045 for a text without a target, or with several; its own errors.
    """
    found = plan_of("O0", target=target).target
    if found is None:
        document = read_document(source_of(target)).document
        names = [f"`{x.name.name}`" for x in document.entries if isinstance(x, s.Target)]
        message = f"there are {len(names)} targets: {', '.join(names)}"
        if not names:
            text = isinstance(target, str) and is_text(target)
            message = "there is no target" if text else f"`{target}` has no target"
        help = "write `target NAME { device gpu0 : h100 }`, one in the file"
        raise DfcError("N045", message, help=help, status=2)
    return machine_of(found)


def _device(d: p.Device) -> Device:
    return replace(_figures(d), dtypes=tuple(d.facts.get("dtypes", ())))


def _figures(d: p.Device) -> Device:
    facts = {k: float(v.value) for k, v in d.facts.items() if k != "dtypes"}
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
    return device_of(d.name, d.kind, facts)


def _lacking(d: p.Device) -> Iterator[Diagnostic]:
    """The figures that a plan needs, and that neither the device nor the catalogue has."""
    lacks = [f for f in ("mem", "peak", "bw") if f not in d.facts and d.kind not in CATALOGUE]
    if lacks:
        message = f"device `{d.name}` has no {' and no '.join(f'`{f}`' for f in lacks)}"
        help = (
            f"write {', '.join(f'{f}=...' for f in lacks)}, measure with `dfc calibrate`, "
            f"or name a known device: {', '.join(CATALOGUE)}"
        )
        yield Diagnostic("N045", f"{message}, which a plan needs", d.span, help)


def _lacking_link(link: p.Link) -> Iterator[Diagnostic]:
    """A link without a bandwidth would carry anything in no time."""
    if "bw" not in link.facts:
        message = f"the link from `{link.source}` to `{link.sink}` has no `bw`, which a plan needs"
        help = "write bw=25GB/s, or measure with `dfc calibrate`"
        yield Diagnostic("N045", message, link.span, help)
