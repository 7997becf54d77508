"""`dfc calibrate`: measure this machine, and write what a plan needs to know of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfc.cli.options import MAX_THREADS, Force, Json
from dfc.counting import counted

if TYPE_CHECKING:
    from dfc.runtime.calibrate.device import Measured
    from dfc.runtime.calibrate.links import MeasuredLink


def calibrate(
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="Where the target is written.")
    ] = Path("host.dfc"),
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", min=1, max=MAX_THREADS, help="Threads of the processor; default all."
        ),
    ] = None,
    name: Annotated[str, typer.Option("--name", help="The target's name.")] = "host",
    quick: Annotated[
        bool, typer.Option("--quick", help="A quarter of the time, smaller sizes, less exact.")
    ] = False,
    gpus: Annotated[
        bool, typer.Option("--gpus/--no-gpus", help="Measure the GPUs, where there are any.")
    ] = True,
    links: Annotated[
        bool, typer.Option("--links/--no-links", help="Measure copies and messages.")
    ] = True,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure this machine as a target that plans read.

    \b
    Rates by dtype and class of operator, memory and cache bandwidth, the time to start an
    operator between others, copies to and between GPUs, messages between processes. Everything
    is sampled in turns; a value is what the quickest tenth of its samples took at most, and one
    whose quartiles lie apart says so. A minute for each device: let nothing else run meanwhile.

    \b
    Examples:
      dfc calibrate
      dfc calibrate -o lane.dfc --threads 1 --name lane
      dfc calibrate --quick --no-links --json
    """
    from dfc.cli.outputs import require_writable, write_text
    from dfc.cli.progress import Progress
    from dfc.recipe.calibrated import require_word, target_text

    require_writable(str(output), force)
    require_word(name)
    warning = busy_text(os.getloadavg()[0], os.cpu_count() or 1)
    with Progress() as say:
        if warning:
            say.log(f"dfc: {warning}")
        say("loading PyTorch")
        devices, found, notes = _measured(threads, quick, gpus, links, say)
    notes += [warning] if warning else []
    text = target_text(name, devices, *_one_each(found, notes))
    write_text(str(output), text, force)
    if as_json:
        from dfc.cli.tables import print_json

        print_json(_data(str(output), devices, found))
    else:
        _show(str(output), devices, found)


def _one_each(
    found: list[MeasuredLink], notes: list[str]
) -> tuple[list[MeasuredLink], list[str]]:  # fmt: skip
    """The first link of each direction, which a pipeline takes by itself; others as notes."""
    from dfc.lang.units import amount_text

    kept: dict[tuple[str, str], MeasuredLink] = {}
    told = list(notes)
    for x in found:
        if kept.setdefault((x.source, x.sink), x) is not x:
            bandwidth = amount_text(x.bandwidth.value, "bytes/s")
            latency = amount_text(x.latency.value, "time")
            told.append(f"{x.source} -> {x.sink} by {x.kind}: {bandwidth}, {latency}")
    return list(kept.values()), told


def busy_text(load: float, cores: int) -> str:
    """What to know of figures that are measured beside other work; nothing on a quiet machine.

    Why:  threads that wait for a core that others hold are slow each time alike, so that no spread
          tells.
    """
    if load < 0.5 * cores:
        return ""
    tasks = f"{load:.1f} tasks on {counted(cores, 'core')}"
    return f"other work was running ({tasks}): figures may be far too low"


def _measured(
    threads: int | None, quick: bool, gpus: bool, links: bool, say: Callable[[str], None]
) -> tuple[list[Measured], list[MeasuredLink], list[str]]:
    import torch

    from dfc.planning.host import machine_text, this_machine
    from dfc.runtime.calibrate.device import measure_device

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        note = f"measured by `dfc calibrate` on {machine_text(this_machine())}"
        devices = [measure_device("cpu0", "cpu", quick=quick, say=say)]
    finally:
        torch.set_num_threads(before)
    count = torch.cuda.device_count() if gpus and torch.cuda.is_available() else 0
    notes = [note]
    for i in range(count):
        notes.append(f"gpu{i} is {torch.cuda.get_device_name(i)}")
        devices.append(measure_device(f"gpu{i}", f"cuda:{i}", quick=quick, say=say))
    return devices, _links(count, quick, say) if links else [], notes


def _links(gpus: int, quick: bool, say: Callable[[str], None]) -> list[MeasuredLink]:
    """Every direction between the host and GPUs, and between processes, over sockets and gloo."""
    import socket

    from dfc.runtime.calibrate.links import copies, messages

    found = []
    for kind in ("local", "gloo") if hasattr(socket, "AF_UNIX") else ("gloo",):
        say(f"messages between two processes, {kind}")
        found.append(messages("cpu0", kind, quick=quick))
    ends = [("cpu0", "cpu"), *((f"gpu{i}", f"cuda:{i}") for i in range(gpus))]
    for source, a in ends:
        for sink, b in ends:
            if source != sink:
                say(f"copies from {source} to {sink}")
                kind = "pcie" if "cpu" in (a, b) else "peer"
                found.append(copies(source, sink, a, b, kind, quick=quick))
    return found


def _data(path: str, devices: list[Measured], links: list[MeasuredLink]) -> dict[str, Any]:
    return {
        "target": path,
        "devices": [
            {"name": d.name, "kind": d.kind, **d.facts, "lacks": d.lacks,
             "measured": {k: vars(r) for k, r in d.readings.items()}}
            for d in devices
        ],
        "links": [
            {"from": x.source, "to": x.sink, "kind": x.kind, "latency": vars(x.latency),
             "bandwidth": vars(x.bandwidth)}
            for x in links
        ],
    }  # fmt: skip


def _show(path: str, devices: list[Measured], links: list[MeasuredLink]) -> None:
    from dfc.cli.tables import print_table
    from dfc.lang.units import amount_text
    from dfc.recipe.calibrated import is_unsteady
    from dfc.recipe.targets import DEVICES, LINK

    found = [
        (d.name, fact, d.readings[fact], dimension)
        for d in devices for fact, dimension in DEVICES[d.kind].items() if fact in d.readings
    ]  # fmt: skip
    for x in links:
        way = f"{x.source} to {x.sink}, {x.kind}"
        for fact, r in (("bw", x.bandwidth), ("latency", x.latency)):
            found.append((way, fact, r, LINK[fact]))
    rows = []
    for of, fact, r, dimension in found:
        value = amount_text(r.value, dimension)
        below = f"below {amount_text(r.least, dimension)}"
        spread = "unsteady" if is_unsteady(r) else f"{r.spread:.0%}"
        rows.append([of, fact, value, spread] if r.is_seen else [of, fact, below, ""])
    print_table(["of", "fact", "measured", "spread"], rows, right=(2, 3))
    if any(is_unsteady(r) for _, _, r, _ in found):
        print("unsteady: samples differ by more than the value; measure again on a quiet machine")
    for d in devices:
        if d.lacks:
            print(f"{d.name} has no kernels for {', '.join(d.lacks)}")
    print(f"\nwrote {path}: plan with `dfc plan MODEL -t {path}`")
