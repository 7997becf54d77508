"""`dfc run --memory`: a model in less memory than its weights take, and what that cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError

if TYPE_CHECKING:
    from dfc.compiled import Compiled
    from dfc.runtime.tiers.streamed import Streamed

Say = Callable[[str], None]


def open_unbuilt(model: str, engine: str | None, device: str, say: Say) -> Compiled:
    """A package whose weights are not read yet, or a model compiled.

    Raises:  DfcError K073 for an engine that cannot stream.
    """
    from dfc.api import opened
    from dfc.cli.run import open_compiled
    from dfc.cli.sources import is_package
    from dfc.planning.torch_device import check_device

    if engine not in (None, "eager"):
        message = f"the `{engine}` engine cannot stream weights: `eager` can"
        raise DfcError("K073", message, help="leave out --engine, or --memory", status=2)
    check_device(device)
    if not is_package(model):
        return open_compiled(model, "eager", "cpu", say)
    say(f"loading {model}")
    return opened(model, engine="eager", device=device, build=False)


def run_streamed(
    compiled: Compiled, memory: str, device: str, inputs: Sequence[Any], seed: int,
    trace: str | None, force: bool, say: Say,
) -> tuple[list[Any], dict[str, Any]]:  # fmt: skip
    """The output leaves, and what a pass took beside what was planned.

    Raises:  what `Compiled.within` raises; D010.. for the trace.
    """
    import torch

    from dfc.cli.inputs import on_device
    from dfc.rewrite.probe import clone
    from dfc.runtime.tiers.report import measured
    from dfc.runtime.tiers.streamed import Streamed

    say("planning what stays")
    device, memory, host = budgets(memory, device)
    found = compiled.within(memory, device=device, inputs=inputs, host=host, say=say)
    try:
        runner = found.runner
        assert isinstance(runner, Streamed)
        given = on_device(inputs, device)
        torch.manual_seed(seed)
        results = [own(x) for x in found.run_flat(clone(given))]
        say("timing passes")
        data = measured(runner, [*given, *found.state.values()])
        if trace:
            _draw(runner, Path(trace), force, compiled.graph.name)
    finally:
        found.close()
    return results[: len(compiled.graph.outputs)], data


def budgets(text: str, device: str) -> tuple[str, str, str | None]:
    """`--memory` as a device, its memory, and the host's: `8GiB`, or `cuda=8GiB,cpu=16GiB`.

    Raises:  DfcError Q006 for budgets that are not of one device and its host.
    """
    if "=" not in text:
        return device, text, None
    found = dict(part.strip().split("=", 1) for part in text.split(",") if "=" in part)
    devices = [d for d in found if d != "cpu"]
    if len(found) != len(text.split(",")) or len(devices) > 1:
        help = "write --memory cuda=8GiB,cpu=16GiB"
        raise DfcError("Q006", f"--memory {text} is not of one device and its host", help=help)
    if not devices:
        return "cpu", found["cpu"], None
    return devices[0], found[devices[0]], found.get("cpu")


def own(x: Any) -> Any:
    """A result that stays when the runner is over."""
    import torch

    return x.clone() if isinstance(x, torch.Tensor) else x


def _draw(runner: Streamed, path: Path, force: bool, name: str) -> None:
    from dfc.planning.stream_picture import chrome_trace, svg_timeline
    from dfc.publish import publish_file

    found = runner.plan.simulation
    with publish_file(path, force=force) as temp:
        if path.suffix == ".svg":
            temp.write_text(svg_timeline(found, f"{name}: passes as planned"), encoding="utf-8")
        else:
            temp.write_text(json.dumps(chrome_trace(found)), encoding="utf-8")


def show(data: dict[str, Any]) -> None:
    """The report as text."""
    from dfc.cli.tables import print_table, print_text
    from dfc.lang.units import amount_text

    def size(x: float) -> str:
        return amount_text(x, "bytes")

    def seconds(x: float) -> str:
        return amount_text(x, "time")

    if not data["streamed"]:
        took = seconds(data["pass_seconds"])
        print_text(f"all weights fit in {size(data['memory'])}; a pass took {took}")
        return
    took, predicted, bound = (
        data[k] for k in ("pass_seconds", "predicted_seconds", "bound_seconds")
    )
    print_table(
        ["memory", "stay", "slots", "a pass brings", "at", "took", "planned", "bound"],
        [[size(data["memory"]), size(data["resident_bytes"]),
          f"{data['slots']} x {size(data['slot_bytes'])}", size(data["bytes_per_pass"]),
          amount_text(data["bandwidth"], "bytes/s"), seconds(took), seconds(predicted),
          seconds(bound)]],
        right=range(8),
    )  # fmt: skip
    names = data["streamed"]
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    print_text(f"streamed from {data['from']}: {shown}; limited by {data['limit']}")
    below = data.get("below")
    if below:
        print_text(
            f"the host holds {size(below['held_bytes'])} of {size(below['memory'])}, "
            f"{below['slots']} x {size(below['slot_bytes'])} of it slots: a pass reads "
            f"{size(below['bytes_per_pass'])} from {below['from']} at "
            f"{amount_text(below['bandwidth'], 'bytes/s')}"
        )
    for what, gain in data["advice"][:3]:
        print_text(f"{what}: {gain:.2f} times as fast")
