"""`dfc plan`: how a model would be spread over the devices of a target, before anything runs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfc.cli.options import Json, Model, Use, load_used
from dfc.counting import counted
from dfc.errors import DfcError

if TYPE_CHECKING:
    from dfc.ir.graph import Node
    from dfc.planning.cost import Sizes
    from dfc.planning.pipeline import Plan


_MEASURE = {
    "throughput": "as long for each microbatch", "latency": "as long for one microbatch",
    "memory": "as much on the fullest device", "cost": "as much for each microbatch",
}  # fmt: skip

_NOMINAL = (
    "figures of this host are nominal, not measured: `dfc calibrate -o host.dfc`, then "
    "`-t host.dfc`"
)  # fmt: skip


def plan(
    model: Model,
    target: Annotated[
        Path | None,
        typer.Option(
            "-t", "--target", metavar="FILE", help="The devices and links; default: this host's."
        ),
    ] = None,
    on: Annotated[
        str,
        typer.Option("--on", metavar="DEVICE,...", help="Only these; twice is two halves of it."),
    ] = "",
    by: Annotated[
        str, typer.Option("--by", help="Make small: time, latency, memory or cost (prices).")
    ] = "time",
    max_stages: Annotated[
        int | None, typer.Option("--max-stages", min=1, help="At most so many stages.")
    ] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option("--pin", metavar="SELECTOR=DEVICE", help="Part of the model on one device."),
    ] = None,
    together: Annotated[
        list[str] | None,
        typer.Option("--together", metavar="SELECTOR", help="Part of the model in one stage."),
    ] = None,
    size: Annotated[
        str, typer.Option("--size", metavar="NAME=N,...", help="Sizes of dynamic dimensions.")
    ] = "",
    microbatches: Annotated[
        int, typer.Option("-m", "--microbatches", min=1, help="Microbatches of one step.")
    ] = 8,
    train: Annotated[
        bool, typer.Option("--train", help="Plan training: backward passes and optimizer state.")
    ] = False,
    recompute: Annotated[
        str,
        typer.Option(
            "--recompute",
            help="Run forwards again for less memory: never, auto, selective, always.",
        ),
    ] = "never",
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Stream weights to devices that do not hold their stage."),
    ] = False,
    schedule: Annotated[
        str,
        typer.Option("--schedule", help="auto, or 1f1b, gpipe, zb1p, interleaved, zb_v and so on."),
    ] = "auto",
    stages_per_device: Annotated[
        int | None,
        typer.Option("--stages-per-device", min=1, help="Of each device; default: what is best."),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option("--measured", metavar="FILE", help="Seconds of nodes, as JSON."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time every node on this processor first.")
    ] = False,
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
    (`device gpu0 : h100`); `dfc calibrate` measures this machine. Measured times of nodes take the
    place of the model's, on devices that are processors.

    \b
    Examples:
      dfc plan llama.py:build -t two_gpus.dfc --stream
      dfc plan llama.py:build -t cluster.dfc --size B=4,S=2048 --by latency --svg timeline.svg
      dfc plan encoder.py:build -t host.dfc --on cpu0,cpu0 --measure
      dfc plan llama.py:build -t cluster.dfc --train --recompute auto --trace step.json
    """
    from dfc.api import plan as make
    from dfc.cli.inputs import parse_sizes
    from dfc.cli.measured import measure_times, measured_data, measured_text, read_times
    from dfc.cli.outputs import (
        require_apart,
        require_sources_kept,
        require_suffix,
        require_writable,
    )  # fmt: skip
    from dfc.cli.progress import Progress
    from dfc.cli.sources import open_source, read_text
    from dfc.planning.cost import default_sizes
    from dfc.planning.devices import wanted as objective
    from dfc.planning.fewer import fewer_devices, fewer_text
    from dfc.planning.layouts import layouts
    from dfc.recipe.machines import read_machine

    load_used(use)
    objective(by)
    names = on.split(",") if on else []
    if not all(names):
        raise DfcError("N046", f"`--on {on}` has an empty name", help="write --on gpu0,gpu1")
    wanted = _wanted(pin, together)
    require_apart(("--svg", svg), ("--trace", trace))
    require_sources_kept([model, str(target)], ("--svg", svg), ("--trace", trace))
    require_suffix("--svg", svg, ".svg")
    require_suffix("--trace", trace, ".json")
    require_writable(svg, force)
    require_writable(trace, force)
    if target is not None:
        read_text(target)
        read_machine(target)  # what is wrong in it, before the model is loaded
    with Progress() as say:
        say(f"reading {model}")
        source = open_source(model)
        graph = source.graph()
        wished = parse_sizes(graph, size)
        usual = source.sizes(graph)
        sizes = default_sizes(graph, usual | wished)
        inputs = {name: sizes[name] for name in graph.ranges}
        given = read_times(measured, graph) if measured else {}

        def timed(devices: list[str]) -> dict[Node, float]:
            if not measure:
                return given
            say("timing every node on this processor")
            return {**measure_times(source, graph, inputs, _threads(devices)), **given}

        def planned(devices: list[str], most: int | None, times: dict[Node, float]) -> Plan:
            for_some = f" on {counted(len(devices), 'device')}" if devices else ""
            at_most = f", at most {counted(most, 'stage')}" if most else ""
            say(f"planning {counted(len(graph), 'node')}{for_some}{at_most}")
            return make(
                graph, target, objective=by, devices=devices, max_stages=most,
                microbatches=microbatches, train=train, schedule=schedule,
                stages_per_device=stages_per_device, sizes=sizes, measured=times.get,
                measured_on="cpu", stream=stream, recompute=recompute, **wanted,
            )  # fmt: skip

        times = timed(names)
        found = planned(names, max_stages, times)
        each = min(x.chunks for x in layouts(schedule, stages_per_device, train))
        other = fewer_devices(found, names, lambda some, most: planned(
            some, most * each, times if len(some) == len(names) else timed(some)))  # fmt: skip
    _write(found, model, svg, trace, force)
    if as_json:
        from dfc.cli.tables import print_json

        data = data_of(found) | (measured_data(found, times) if times else {})
        data["fewer_devices"] = other and {
            "devices": list(other.device_stages),
            "step_seconds": other.step_seconds,
        }
        print_json(data)
        return
    show_plan(found)
    if target is None:
        print(_NOMINAL)
    if whence := sizes_text(graph.ranges, wished, usual):
        print(whence)
    if other is not None:
        print(fewer_text(found, other))
    if times:
        print(measured_text(found, measured_data(found, times)))


def sizes_text(names: Iterable[str], wished: Sizes, usual: Sizes) -> str:
    """Where sizes come from that were not asked for, and how to ask for others."""
    left = [name for name in names if name not in wished]
    parts = [
        f"{' and '.join(some)} {'is' if len(some) == 1 else 'are'} {what}"
        for some, what in (
            ([n for n in left if n in usual], "as in the example"),
            ([n for n in left if n not in usual], "the least that the model takes"),
        )
        if some
    ]  # fmt: skip
    if not parts:
        return ""
    return f"{', '.join(parts)}: `--size {','.join(f'{n}=N' for n in left)}` plans for others"


def _threads(devices: list[str]) -> int:
    """The threads of the smallest part of this processor: a device that is named twice is halves.

    Where GPUs alone are named, nothing that was measured is used.
    """
    import torch

    parts = max((devices.count(d) for d in devices), default=1)
    return max(1, torch.get_num_threads() // parts)


def _wanted(pin: list[str] | None, together: list[str] | None) -> dict[str, Any]:
    pins: dict[str, str] = {}
    for text in pin or ():
        part, equals, device = text.rpartition("=")
        if not equals or not part or not device:
            help = "write --pin 'layers.0.**=gpu0'"
            raise DfcError("N046", f"--pin {text} names no device", help=help)
        if pins.setdefault(part, device) != device:
            raise DfcError("N048", f"`{part}` is pinned to `{pins[part]}` and to `{device}`")
    return {"pins": pins, "together": together or ()}


def _write(found: Plan, model: str, svg: Path | None, trace: Path | None, force: bool) -> None:
    from dfc.planning.timeline import chrome_trace, svg_timeline
    from dfc.publish import publish_file

    names = rows_of(found)
    if svg is not None:
        told = [_step_text(found), *_advice_text(found)]
        with publish_file(svg, force=force) as temp:
            drawn = svg_timeline(found.simulation, names, model, _notes(found), told)
            temp.write_text(drawn, encoding="utf-8")
    if trace is not None:
        with publish_file(trace, force=force) as temp:
            events = chrome_trace(found.simulation, names)
            temp.write_text(json.dumps(events), encoding="utf-8")


def _notes(found: Plan) -> dict[str, str]:
    """What stands behind the rows of a picture: a device's time and memory, a link's bytes."""
    from dfc.cli.tables import bytes_text
    from dfc.lang.units import amount_text

    notes = {
        f"{a} → {b}": f"{bytes_text(size)}, busy {busy:.0%}" for a, b, size, busy in found.links
    }
    for row, mine in zip(rows_of(found), found.device_stages.values(), strict=True):
        stages = [found.stages[i] for i in mine]
        time = amount_text(sum(s.seconds for s in stages), "time")
        limits = " and ".join(dict.fromkeys(s.limit for s in stages))
        memory = f"{bytes_text(stages[0].memory)} of {bytes_text(stages[0].capacity)}"
        notes[row] = f"{time} a microbatch ({limits}), {memory}"
    return notes


def rows_of(found: Plan) -> list[str]:
    """What the rows of a picture are called: devices, with their stages where they have several."""
    if len(found.machine.devices) == len(found.stages):
        return [d.name for d in found.machine.devices]
    return [f"{name} ({', '.join(map(str, s))})" for name, s in found.device_stages.items()]


def _microbatches(found: Plan) -> str:
    return counted(found.wish.microbatches, "microbatch")


def data_of(found: Plan) -> dict[str, Any]:
    """A plan as data."""
    from dfc.planning.recompute_choice import replays
    from dfc.planning.tier_advice import tiers_data

    simulation = found.simulation
    tiers = {s: {"tiers": tiers_data(t)} for s, t in found.tiers.items()}
    return {
        "model": found.name,
        "sizes": dict(found.sizes),
        "schedule": found.schedule,
        "microbatches": found.wish.microbatches,
        "step_seconds": found.step_seconds,
        "bubble": simulation.bubble,
        "objective": found.objective,
        "bottleneck_seconds": found.bottleneck,
        "latency_seconds": found.latency,
        "peak_bytes": found.peak,
        "cost": found.cost,
        "certified_gap": found.partition.gap,
        "method": found.partition.method,
        "stages": [vars(s) | tiers.get(s.index, {}) for s in found.stages],
        "devices": found.device_stages,
        "links": [
            {"from": a, "to": b, "bytes": size, "busy": busy} for a, b, size, busy in found.links
        ],
        "other_splits": dict(found.splits),
        "advice": dict(found.advice),
        "idle": list(found.idle),
        "no_pipeline": found.no_pipeline or None,
        "recomputes": [vars(r) for r in replays(found.program, found.costs)],
        "program": str(simulation.program).splitlines(),
    }


def show_plan(found: Plan) -> None:
    """A plan as tables and sentences."""
    from dfc.cli.tables import bytes_text, print_table
    from dfc.lang.units import amount_text
    from dfc.planning.actions import SELECTIVE
    from dfc.planning.recompute_choice import replays
    from dfc.planning.streamed_stages import streamed_text
    from dfc.planning.wording import certificate, layout_text

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
    print(f"\n{_step_text(found)}")
    print(f"by {found.objective}: {certificate(found)}")
    for told in streamed_text(found.tiers, [s.device for s in found.stages]):
        print(told)
    for again in replays(found.program, found.costs):
        longer = f"costs {time(again.costs)} a step" if again.costs > 0 else "costs no time"
        how = "recomputes selectively" if again.way == SELECTIVE else "recomputes"
        saves = f"{'saves' if again.saves >= 0 else 'takes'} {bytes_text(abs(again.saves))}"
        more = "" if again.saves >= 0 else " more"
        print(f"stage {again.stage} {how}: {saves}{more}, {longer}")
    if found.idle:
        print(f"not used, as it would be no better with them: {', '.join(found.idle)}")
    if len(found.device_stages) < len(found.stages):
        print(f"{layout_text(found)}: a device's time and memory are those of all its stages")
    for a, b, size, busy in found.links:
        print(f"{a} to {b}: {bytes_text(size)} a step, busy {busy:.0%} of it")
    alike: dict[str, list[str]] = {}
    for name, ratio in found.splits:
        alike.setdefault(f"{ratio:.2f}", []).append(name)
    for times, names in alike.items():
        print(f"{', '.join(names)}: {times} times {_MEASURE[found.objective]}")
    for line in _advice_text(found):
        print(line)
    if found.no_pipeline:
        print(f"note: these stages cannot be run as a pipeline: {found.no_pipeline}")


def _step_text(found: Plan) -> str:
    from dfc.lang.units import amount_text

    sizes = ", ".join(f"{k}={v}" for k, v in found.sizes.items())
    step, each, whole = (
        amount_text(x, "time") for x in (found.step_seconds, found.bottleneck, found.latency)
    )
    return (
        f"{found.schedule}, {_microbatches(found)}{f' of {sizes}' if sizes else ''}: a step takes "
        f"{step}, {found.simulation.bubble:.1%} of it waiting; one microbatch every {each}, which "
        f"takes {whole} through all stages"
    )


def _advice_text(found: Plan) -> list[str]:
    return [f"what helps most: {w}, {gain:.2f} times as fast" for w, gain in found.advice[:1]]
