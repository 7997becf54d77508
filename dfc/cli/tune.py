"""`dfc tune`: a package's engine chosen again, by measuring on this machine."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dfc.cli.options import (
    Device,
    Files,
    Force,
    Json,
    Random,
    Seconds,
    Seed,
    Sizes,
    Threads,
    Use,
    load_used,
)  # fmt: skip


def tune(
    package: Annotated[
        str, typer.Argument(metavar="PACKAGE", help="A package folder.", show_default=False)
    ],
    inputs: Files = None,
    engines: Annotated[
        str,
        typer.Option("--engines", metavar="NAMES", help="Engines, separated by commas, or all."),
    ] = "all",
    budget: Annotated[
        str,
        typer.Option("--budget", metavar="TIME", help="For building: what is not begun is left."),
    ] = "5min",
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="PATH", help="Default: the package itself."),
    ] = None,
    random: Random = False,
    size: Sizes = None,
    seed: Seed = 0,
    seconds: Seconds = 1.0,
    threads: Threads = None,
    device: Device = "cpu",
    force: Force = False,
    use: Use = None,
    as_json: Json = False,
) -> None:
    """Measure a package here and keep its fastest engine.

    The package's own engine stays unless another is faster beyond noise. The choice, all times and
    what machine they are of are written into the package, all or nothing.

    \b
    Examples:
      dfc tune encoder.dfcpkg
      dfc tune encoder.dfcpkg --engines onnxruntime,openvino --size B=8,S=128
      dfc tune encoder.dfcpkg --budget 30s -o here.dfcpkg --json
    """
    from dfc.cli.outputs import require_writable
    from dfc.cli.progress import Progress

    load_used(use)
    require_writable(output, force, folder=True)
    with Progress() as say:
        budget_s = _seconds(budget)
        say("loading PyTorch")
        tuned, origin = _tune(
            package, inputs, engines, budget_s, random, size, seed, seconds, threads, device, say
        )
        target = output or package
        say(f"writing {target}")
        tuned.compiled.save(target, force=force or output is None)
    data = _facts(package, target, origin, tuned)
    if as_json:
        from dfc.cli.tables import print_json

        print_json(data)
    else:
        _print(data, tuned)


def _seconds(text: str) -> float:
    """`30s` or `5min` in seconds.

    Raises:  DfcError Q052.
    """
    from dfc.errors import DfcError
    from dfc.recipe.searching import Budget

    try:
        found = Budget.of(text).seconds
    except DfcError:  # its help names tries as well, which searches of recipes have
        found = math.inf
    if not math.isfinite(found):
        raise DfcError("Q052", f"`{text}` is no time", help="write a time, as 30s or 5min")
    return found


def _tune(
    package: str, files: list[str] | None, engines: str, budget_s: float, random: bool,
    size: str | None, seed: int, seconds: float, threads: int | None, device: str, say: Any,
) -> tuple[Any, str]:  # fmt: skip
    import torch

    from dfc.cli.engines import chosen_engines
    from dfc.package import read_package
    from dfc.planning.torch_device import check_device
    from dfc.recipe.tuning import tune as measure

    names = None if engines == "all" else chosen_engines(engines)
    check_device(device)
    if threads:
        torch.set_num_threads(threads)
    leaves, origin = None, "the example it was compiled with"
    if files or random or size is not None:
        from dfc.cli.inputs import choose_inputs

        held = read_package(Path(package))
        example = held.probes[0].inputs if held.probes else None
        leaves, origin = choose_inputs(held.graph, files, size, random, seed, example)
    tuned = measure(
        Path(package), names, budget_s=budget_s, seconds=seconds, device=device, inputs=leaves,
        say=say,
    )  # fmt: skip
    return tuned, origin


def _facts(package: str, target: str, origin: str, tuned: Any) -> dict[str, Any]:
    return {
        "package": package,
        "written": target,
        "inputs": origin,
        "engine": {"before": tuned.before, "after": tuned.after},
        "decision": asdict(tuned.decision),
        "engines": [asdict(e) for e in tuned.engines],
        "machine": tuned.compiled.report.machine,
    }


def _print(data: dict[str, Any], tuned: Any) -> None:
    from dfc.cli.compile_tables import print_engines
    from dfc.cli.tables import print_text
    from dfc.planning.host import machine_text

    print_text(f"{data['package']}, inputs: {data['inputs']}, runs alternate")
    print_text(f"measured on {machine_text(data['machine'])}\n")
    print_engines(tuned.compiled.report)
    before, after = data["engine"]["before"], data["engine"]["after"]
    words = f"{before} -> {after}" if before != after else f"{after} stays"
    print_text(f"\n{words}: {tuned.decision.reason}")
    print_text(f"wrote {data['written']}")
    print_text(f"next: dfc bench {data['written']}")
