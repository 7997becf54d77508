"""`dfc bench`: engines side by side on the same inputs, alternating, beside the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from dfc.cli.options import (
    Device,
    Files,
    Json,
    Model,
    Random,
    Seconds,
    Seed,
    Sizes,
    Threads,
    Use,
    load_used,
)  # fmt: skip
from dfc.errors import DfcError

_DEFAULT = "eager,onnxruntime"


def bench(
    model: Model,
    inputs: Files = None,
    engine: Annotated[
        str,
        typer.Option("--engine", metavar="NAMES", help="Engines, separated by commas, or all."),
    ] = _DEFAULT,
    random: Random = False,
    size: Sizes = None,
    seed: Seed = 0,
    seconds: Seconds = 2.0,
    threads: Threads = None,
    device: Device = "cpu",
    use: Use = None,
    as_json: Json = False,
) -> None:
    """Measure engines side by side: median, spread and ratio.

    \b
    A model (not a package) is measured too, as PyTorch runs it: the first row.

    \b
    Examples:
      dfc bench encoder.dfcpkg --random --size B=8,S=64
      dfc bench encoder.py:build --engine eager,inductor,onnxruntime
      dfc bench encoder.dfcpkg inputs.npz --json
    """
    from dfc.cli.progress import Progress

    load_used(use)
    with Progress() as say:
        rows, origin, spent = _bench(
            model, inputs, engine, random, size, seed, seconds, threads, device, say
        )
    if as_json:
        from dfc.cli.tables import print_json

        print_json({"model": model, "inputs": origin, "threads": spent, "engines": rows})
    else:
        _print(model, origin, spent, rows)
    if all(r["p50_ms"] is None for r in rows):
        raise DfcError("K005", "no engine runs the model; the table says why")


def _bench(
    model: str, files: Sequence[str] | None, engines: str, random: bool, size: str | None,
    seed: int, seconds: float, threads: int | None, device: str, say: Any,
) -> tuple[list[dict[str, Any]], str, int]:  # fmt: skip
    say("loading PyTorch")
    import torch

    from dfc.cli.engines import chosen_engines
    from dfc.cli.inputs import choose_inputs, on_device, output_names
    from dfc.cli.prove import differences
    from dfc.planning.torch_device import check_device
    from dfc.rewrite.probe import clone
    from dfc.runtime.measure import measure

    names = chosen_engines(engines)
    check_device(device)
    if threads:
        torch.set_num_threads(threads)
    graph, example, original = _open(model, device, say)
    leaves, origin = choose_inputs(graph, files, size, random, seed, example)
    leaves = on_device(leaves, device)
    runners, rows = _build(graph, names, device, threads, say)
    if original is not None:
        runners = {"pytorch": original, **runners}
    first: list[Any] | None = None
    errors: dict[str, float | None] = {}
    for name, run in list(runners.items()):
        say(f"warming up {name}")
        try:
            results = run(clone(leaves))
        except (RuntimeError, DfcError) as e:
            runners.pop(name)
            rows[name] = _row(name, f"fails: {str(e).splitlines()[0]}")
            continue
        if first is None:
            first = results
            continue
        if len(first) >= len(graph.outputs):  # else the model returns what is no value of the graph
            found = differences(output_names(graph), results, first, "")
            errors[name] = max((d.error for d in found), default=0.0)
    say(f"measuring {', '.join(runners)} for about {seconds * len(runners):.0f} s")
    _tell_placement(rows, runners, graph, leaves, device)
    timings = measure(runners, leaves, seconds=seconds, most=100_000) if runners else {}
    base = next(iter(timings.values())).p50_ms if timings else None
    measured = []
    for name, t in timings.items():
        row = _row(name, "")
        row.update(p50_ms=t.p50_ms, spread_ms=t.spread_ms, runs=t.runs, error=errors.get(name))
        row["ratio"] = base / t.p50_ms if base else None
        measured.append(row)
    return measured + list(rows.values()), origin, torch.get_num_threads()


def _open(model: str, device: str, say: Any) -> tuple[Any, list[Any] | None, Any]:
    """The compiled graph, its example, and the model itself as a runner where it is at hand."""
    import dfc
    from dfc.cli.sources import is_package, open_source
    from dfc.package import read_package

    say(f"loading {model}")
    if is_package(model):
        from pathlib import Path

        package = read_package(Path(model))
        return package.graph, package.probes[0].inputs if package.probes else None, None
    source = open_source(model)
    compiled = dfc.compile(
        source.model, source.args, source.kwargs, source.dynamic_shapes,
        engine="eager", device="cpu", progress=say,
    )  # fmt: skip
    example = compiled.probes[0].inputs if compiled.probes else None
    original = None
    if source.kind in ("factory", "pt2") and not compiled.graph.mutations:
        original = _original(source, compiled.graph, device)
    return compiled.graph, example, original


def _original(source: Any, graph: Any, device: str) -> Callable[[Sequence[Any]], list[Any]]:
    """PyTorch's own run of the model, on flat inputs."""
    import torch
    import torch.utils._pytree as pytree

    from dfc.cli.sources import call_of

    model = source.model.to(device) if isinstance(source.model, torch.nn.Module) else source.model
    positional = len(source.args)

    def run(inputs: Sequence[Any]) -> list[Any]:
        args, kwargs = call_of(graph, inputs)
        named = [a.name for a in graph.arguments if not a.keyword_only]
        late = dict(zip(named[positional:], args[positional:], strict=True))
        with torch.no_grad():
            result = model(*args[:positional], **late, **kwargs)
        return [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]

    return run


def _build(
    graph: Any, names: Sequence[str], device: str, threads: int | None, say: Any
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Runners by engine, and a row for each engine that refuses."""
    from dfc.compiled import with_state_inputs
    from dfc.ir.graph import Parameter
    from dfc.runtime.engines import find_engine

    missing = [p.name for p in graph.parameters.values() if p.data is None]
    if missing:
        raise DfcError("K021", f"the model has no weights (`{missing[0]}`)", status=2)
    lifted = with_state_inputs(graph)
    state = [
        m.target.data.tensor().clone()
        for m in graph.mutations
        if isinstance(m.target, Parameter) and m.target.data is not None
    ]
    runners: dict[str, Any] = {}
    refused: dict[str, dict[str, Any]] = {}

    def with_state(run: Any) -> Any:
        return lambda inputs: run([*inputs, *state])

    for name in names:
        say(f"building for {name}")
        try:
            run = find_engine(name).build(lifted, device, threads)
            runners[name] = with_state(run) if state else run
        except DfcError as e:
            refused[name] = _row(name, f"refuses: {e.message}")
    return runners, refused


def _tell_placement(
    rows: dict[str, dict[str, Any]], runners: Any, graph: Any, leaves: Sequence[Any], device: str
) -> None:
    """What ONNX Runtime did not run on the device, as a line below the engines."""
    if "onnxruntime" not in runners or device == "cpu":
        return
    from dfc.cli.inputs import on_device
    from dfc.compiled import with_state_inputs
    from dfc.recipe.bench import state_of
    from dfc.runtime.placement import placement

    state = on_device(state_of(graph), device)
    found = placement(with_state_inputs(graph), [*leaves, *state], device)
    rows["placement"] = _row("onnxruntime", str(found))


def _row(name: str, reason: str) -> dict[str, Any]:
    return {"engine": name, "p50_ms": None, "spread_ms": None, "runs": 0, "ratio": None,
            "error": None, "reason": reason}  # fmt: skip


def _print(model: str, origin: str, threads: int, rows: Sequence[dict[str, Any]]) -> None:
    from dfc.cli.tables import ms_text, print_table, print_text

    print_text(f"{model}, inputs: {origin}, threads: {threads}, runs alternate")
    shown = [
        [
            r["engine"],
            ms_text(r["p50_ms"]),
            ms_text(r["spread_ms"]),
            f"{r['ratio']:.2f}x" if r["ratio"] else "-",
            str(r["runs"] or "-"),
            r["reason"] or (f"differs by {r['error']:.2g}" if r["error"] is not None else ""),
        ]
        for r in rows
    ]
    print_table(["engine", "p50", "spread", "speed", "runs", ""], shown, right=(1, 2, 3, 4))
