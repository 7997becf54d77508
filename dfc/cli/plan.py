"""`dfc plan`: how a model would be spread over the devices of a target, before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfc.cli.options import Json, Model, Use, load_used
from dfc.errors import DfcError

if TYPE_CHECKING:
    from dfc.ir.graph import Graph
    from dfc.planning.machine import Machine
    from dfc.planning.pipeline import Plan


def plan(
    model: Model,
    target: Annotated[
        Path, typer.Option("-t", "--target", metavar="FILE", help="The devices and links.")
    ],
    size: Annotated[
        str, typer.Option("--size", metavar="NAME=N,...", help="Sizes of dynamic dimensions.")
    ] = "",
    microbatches: Annotated[
        int, typer.Option("-m", "--microbatches", min=1, help="Microbatches of one step.")
    ] = 8,
    train: Annotated[
        bool, typer.Option("--train", help="Plan training: backward passes and optimizer state.")
    ] = False,
    schedule: Annotated[
        str, typer.Option("--schedule", help="auto, or a schedule: 1f1b, gpipe, zb1p.")
    ] = "auto",
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Draw the timeline.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Write a trace for Perfetto or Chrome."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    use: Use = None,
    as_json: Json = False,
) -> None:
    """Show how a model would run as stages on several devices.

    Stages with their devices, times, memory, what each sends, and what limits it.

    Times come from the operators' arithmetic and bytes and from the target's figures. A model
    without weights (on the meta device) is enough. A device of the target has its figures
    (`device gpu0 : cuda(mem=80GB, peak=60TFLOPS, bw=2TB/s)`) or is a known one
    (`device gpu0 : h100`).

    \b
    Examples:
      dfc plan llama.py:build -t two_gpus.dfc
      dfc plan llama.py:build -t cluster.dfc --size B=4,S=2048 -m 32 --svg timeline.svg
      dfc plan llama.py:build -t cluster.dfc --train --schedule 1f1b --trace step.json --json
    """
    from dfc.cli.inputs import parse_sizes
    from dfc.cli.progress import Progress
    from dfc.cli.sources import open_source
    from dfc.planning.model import Wish
    from dfc.planning.pipeline import plan as make

    load_used(use)
    machine = _machine(target)
    with Progress() as say:
        say(f"reading {model}")
        graph = open_source(model).graph()
        sizes = parse_sizes(graph, size)
        say(f"planning {len(graph)} nodes on {len(machine.devices)} devices")
        wish = Wish(microbatches=microbatches, trains=train)
        found = make(graph, machine, sizes=sizes, wish=wish, schedule=schedule)
    _write(found, svg, trace, force)
    if as_json:
        from dfc.cli.tables import print_json

        print_json(data_of(found))
    else:
        _show(found, graph)


def _machine(path: Path) -> Machine:
    from dfc.recipe.machines import machine_of
    from dfc.recipe.sources import plan_of

    target = plan_of("O0", target=path).target
    if target is None:
        help = "write `target NAME { device gpu0 : h100 }`, one in the file"
        raise DfcError("N045", f"{path} has no target, or several", help=help)
    return machine_of(target)


def _write(found: Plan, svg: Path | None, trace: Path | None, force: bool) -> None:
    from dfc.planning.timeline import chrome_trace, svg_timeline
    from dfc.publish import publish_file

    names = [s.device for s in found.stages]
    if svg is not None:
        title = f"{found.name}: {found.schedule}, {found.wish.microbatches} microbatches"
        with publish_file(svg, force=force) as temp:
            temp.write_text(svg_timeline(found.simulation, names, title), encoding="utf-8")
    if trace is not None:
        with publish_file(trace, force=force) as temp:
            events = chrome_trace(found.simulation, names)
            temp.write_text(json.dumps(events), encoding="utf-8")


def data_of(found: Plan) -> dict[str, Any]:
    """A plan as data."""
    simulation = found.simulation
    return {
        "model": found.name,
        "sizes": dict(found.sizes),
        "schedule": found.schedule,
        "microbatches": found.wish.microbatches,
        "step_seconds": found.step_seconds,
        "bubble": simulation.bubble,
        "bottleneck_seconds": found.partition.bottleneck,
        "certified_gap": found.partition.gap,
        "method": found.partition.method,
        "stages": [vars(s) for s in found.stages],
        "links": [
            {"from": a, "to": b, "bytes": size, "busy": busy} for a, b, size, busy in found.links
        ],
        "other_splits": dict(found.splits),
        "advice": dict(found.advice),
        "program": str(simulation.program).splitlines(),
    }


def _show(found: Plan, graph: Graph) -> None:
    from dfc.cli.tables import bytes_text, print_table
    from dfc.lang.units import amount_text

    def time(seconds: float) -> str:
        return amount_text(seconds, "time")

    rows = [
        [str(s.index), s.device, str(s.nodes), time(s.seconds), s.limit, bytes_text(s.weights),
         f"{bytes_text(s.memory)} of {bytes_text(s.capacity)}", bytes_text(s.sent), s.starts]
        for s in found.stages
    ]  # fmt: skip
    head = [
        "stage",
        "device",
        "nodes",
        "time",
        "limit",
        "weights",
        "peak memory",
        "sends",
        "starts at",
    ]
    print_table(head, rows, right=[0, 2, 3])
    simulation = found.simulation
    sizes = ", ".join(f"{k}={v}" for k, v in found.sizes.items())
    print(
        f"\n{found.schedule}, {found.wish.microbatches} microbatches"
        f"{f' of {sizes}' if sizes else ''}: a step takes {time(found.step_seconds)}, "
        f"{simulation.bubble:.1%} of it waiting; one microbatch every "
        f"{time(found.partition.bottleneck)}"
    )
    gap = found.partition.gap
    print(f"no partition is more than {gap:.1%} better" if gap > 1e-6 else "no partition is better")
    for a, b, size, busy in found.links:
        print(f"{a} to {b}: {bytes_text(size)} a step, busy {busy:.0%} of it")
    for name, ratio in found.splits:
        print(f"{name}: {ratio:.2f} times as long for each microbatch")
    if found.advice:
        what, gain = found.advice[0]
        print(f"what helps most: {what}, {gain:.2f} times as fast")
