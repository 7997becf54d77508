"""The story in one screen: trace, rewrite and prove, choose an engine, return a callable."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dfc.ops  # noqa: F401 - makes the ops known
from dfc.compiled import Compiled, with_state_inputs
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.ir.types import TensorType
from dfc.ir.verify import verify as verify_graph
from dfc.report import EngineReport, Report
from dfc.rewrite.driver import run_passes
from dfc.rewrite.pass_ import DEFAULT, Pass, as_pass

if TYPE_CHECKING:
    from dfc.planning.engine import Engine, Runner

ENGINE_RTOL = (
    3e-5  # how far an engine's own kernels may be from the witness, of the largest element
)
Progress = Callable[[str], None]


def trace(
    model: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Graph:
    """Capture a model as a graph, with torch.export's own argument names.

    Raises:  DfcError T family when the model cannot be captured.
    """
    from dfc.capture.torch_export import trace as capture

    return capture(model, args, kwargs, dynamic_shapes)


def parse(text: str, file: str = "<string>") -> Graph:
    """Read graph text.

    Raises:  DfcError P family with `file:line:col`.
    """
    from dfc.lang.graph_parser import parse_graph

    return parse_graph(text, file)


def compile(
    model: Any,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    *,
    passes: Sequence[str | Pass] | None = None,
    engine: str = "auto",
    verify: str = "each",
    strict: bool = False,
    device: str = "cpu",
    weights: str | os.PathLike[str] | None = None,
    reproducers: str | os.PathLike[str] | None = None,
    print_after: Callable[[str, Graph], None] | None = None,
    progress: Progress | None = None,
) -> Compiled:
    """Trace (unless given a graph), simplify, prove, and build for an engine.

    Args follow the model's forward. `passes` are names or `Pass` objects (default: the shipped
    set); `engine` is a name, or "auto" for the fastest that is right on the example; `verify` is
    "each", "end" or "none"; `weights` is a safetensors file for what the model has on the meta
    device, read as it is needed. A rewrite that is found to be wrong is left out, told in
    the report, and written below `reproducers` for `dfc run` to show again (default:
    $DFC_REPRODUCERS, else the user's cache; "none" writes nothing).
    Raises:  DfcError.
    """
    say = progress or (lambda what: None)
    report = Report(model=_model_name(model))
    start = time.perf_counter()
    say("tracing")
    graph = model if isinstance(model, Graph) else trace(model, args or (), kwargs, dynamic_shapes)
    report.capture_s = time.perf_counter() - start
    report.notes += graph.notes
    if weights is not None:
        from dfc.package import attach_weights

        attach_weights(graph, Path(weights))
    verify_graph(graph, types=isinstance(model, Graph))
    chosen = [as_pass(p) for p in (DEFAULT if passes is None else passes)]
    probes = _probes(model, graph, args, kwargs, verify, report, say)
    start = time.perf_counter()
    say("rewriting")
    from dfc.reproducer import writer

    outcome = run_passes(
        graph, chosen, probes=probes, mode=verify if probes else "none", strict=strict,
        print_after=print_after, on_fault=writer(reproducers), say=say,
    )  # fmt: skip
    report.notes += outcome.notes()
    report.passes_s = time.perf_counter() - start
    report.passes = outcome.reports
    report.nodes_before, report.nodes_after = len(graph), len(outcome.graph)
    report.bytes_before, report.bytes_after = weight_bytes(graph), weight_bytes(outcome.graph)
    if probes is not None:
        report.notes += probes.notes
    built, runner = _build(outcome.graph, engine, probes, device, report, say, original=graph)
    _proof(report, probes, verify)
    steps = [str(p) for p in chosen]
    return Compiled(
        outcome.graph, built, runner, report, list(probes.ready()) if probes else [], steps, device
    )


def load(
    path: str | os.PathLike[str], *, engine: str | None = None, device: str = "cpu"
) -> Compiled:
    """Read a package and build it for an engine (default: the one that it was compiled for).

    Raises:  DfcError D family for a damaged package.
    """
    from dfc.package import read_package

    package = read_package(Path(path))
    report = package.report
    name = engine or package.engine
    has_data = all(p.data is not None for p in package.graph.parameters.values())
    found = _find_engine("eager" if name == "auto" else name)
    runner = found.build(with_state_inputs(package.graph), device) if has_data else None
    return Compiled(package.graph, found, runner, report, package.probes, package.steps, device)


def _model_name(model: Any) -> str:
    return (
        model.name if isinstance(model, Graph) else getattr(model, "__name__", type(model).__name__)
    )


def weight_bytes(graph: Graph) -> int:
    """Bytes of all parameters."""
    total = 0
    for p in graph.parameters.values():
        assert isinstance(p.type, TensorType)
        total += int(p.type.numel) * p.type.dtype.itemsize  # type: ignore[arg-type]
    return total


def _probes(
    model: Any, graph: Graph, args: Any, kwargs: Any, verify: str, report: Report, say: Progress
) -> Any:
    """Probes with the original's results, or None with the reason in the report."""
    if any(p.data is None for p in graph.parameters.values()):
        report.notes.append("unproved: the model has no weights, so nothing can be run")
        return None
    if args is None and kwargs is None:
        report.notes.append("unproved: there are no example inputs")
        return None
    import torch

    from dfc.calling import flat_inputs
    from dfc.rewrite.probe import make_probes

    inputs = flat_inputs(graph, args or (), kwargs or {})
    if any(isinstance(x, torch.Tensor) and x.is_meta for x in inputs):
        report.notes.append("unproved: the example inputs are on the meta device")
        return None
    if verify == "none":
        return make_probes(graph, inputs, count=1)
    say("running the original on probe inputs")
    run_original = None
    if not isinstance(model, Graph) and not _on_meta(model):
        from dfc.capture.original import original_runner

        run_original = original_runner(model, graph, args or (), kwargs or {})
    probes = make_probes(graph, inputs, run_original=run_original)
    _settle_size_one(graph, probes, report)
    return probes


def _on_meta(model: Any) -> bool:
    """Whether the model itself cannot run: its weights came from a file."""
    return any(p.is_meta for p in getattr(model, "parameters", tuple)())


def _settle_size_one(graph: Graph, probes: Any, report: Report) -> None:
    """Run every probe; where size 1 alone goes wrong, the graph is for sizes from 2 on."""
    try:
        for _ in probes.ready():
            pass
    except DfcError as e:
        wrong = [p for p in probes.probes if p.original is None]
        ones = {s for s, (low, _) in graph.ranges.items() if low == 1}
        if e.code != "T010" or not wrong or not wrong[0].ones or not ones:
            raise
        for s in sorted(ones):
            graph.ranges[s] = (2, graph.ranges[s][1])
        report.notes.append(
            f"{', '.join(f'`{s}`' for s in sorted(ones))} must be at least 2: "
            "torch.export took another path for size 1"
        )
        probes.probes = [p for p in probes.probes if not p.ones]
        _settle_size_one(graph, probes, report)


def _find_engine(name: str) -> Engine:
    from dfc.runtime.engines import find_engine

    return find_engine(name)


def _build(
    graph: Graph,
    name: str,
    probes: Any,
    device: str,
    report: Report,
    say: Progress,
    original: Graph,
) -> tuple[Engine, Runner | None]:
    """The engine by name, or the fastest right one; everything considered is in the report."""
    if any(p.data is None for p in graph.parameters.values()):
        return _find_engine("eager" if name == "auto" else name), None
    lifted = with_state_inputs(graph)
    if name != "auto":
        say(f"building for {name}")
        engine = _find_engine(name)
        runner = engine.build(lifted, device)
        verdict = _judge(runner, graph, probes, device)
        if verdict is not None and not verdict.agrees:
            raise DfcError("V033", f"engine `{name}` gives other results: {verdict.difference}")
        _time(report, {name: runner}, {name: verdict}, probes, graph, original, device)
        return engine, runner
    runners: dict[str, Runner] = {}
    verdicts: dict[str, Any] = {}
    for candidate in ("eager", "onnxruntime"):
        say(f"building for {candidate}")
        try:
            runner = _find_engine(candidate).build(lifted, device)
            verdict = _judge(runner, graph, probes, device)
        except DfcError as e:
            report.engines.append(EngineReport(candidate, "refused", e.message))
            continue
        if verdict is not None and not verdict.agrees:
            report.engines.append(EngineReport(candidate, "wrong", str(verdict.difference)))
            continue
        runners[candidate], verdicts[candidate] = runner, verdict
    say("measuring")
    fastest = _time(report, runners, verdicts, probes, graph, original, device)
    return _find_engine(fastest), runners[fastest]


def _judge(runner: Runner, graph: Graph, probes: Any, device: str) -> Any:
    if probes is None:
        return None
    state = list(_state(graph))

    def run(inputs: Sequence[Any]) -> list[Any]:
        return on_device(runner(on_device([*inputs, *state], device)), "cpu")

    return probes.judge(run, rtol=ENGINE_RTOL)


def on_device(values: Sequence[Any], device: str) -> list[Any]:
    """The tensors among the values on a device; numbers as they are."""
    import torch

    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in values]


def _state(graph: Graph) -> list[Any]:
    from dfc.ir.graph import Parameter

    return [
        m.target.data.tensor().clone()
        for m in graph.mutations
        if isinstance(m.target, Parameter) and m.target.data is not None
    ]


def _time(
    report: Report,
    runners: dict[str, Runner],
    verdicts: dict[str, Any],
    probes: Any,
    graph: Graph,
    original: Graph,
    device: str,
) -> str:
    """Measure the candidates beside the untransformed graph; the name of the fastest."""
    if probes is None:
        report.engines += [EngineReport(n, "chosen", "not measured: no example") for n in runners]
        return next(iter(runners))
    from dfc.runtime.measure import measure

    lifted = with_state_inputs(original)
    before = _find_engine("eager").build(lifted, device)
    timings = measure(
        {"": before, **runners},
        on_device([*probes.probes[0].inputs, *_state(graph)], device),
        seconds=0.3,
    )
    report.before_ms = timings.pop("").p50_ms
    fastest = min(timings, key=lambda n: timings[n].p50_ms)
    report.after_ms = timings[fastest].p50_ms
    for n, t in timings.items():
        report.engines.append(
            EngineReport(
                n,
                "chosen" if n == fastest else "slower",
                "",
                t.p50_ms,
                t.spread_ms,
                verdicts[n].worst if verdicts[n] else None,
            )
        )
    return fastest


def _proof(report: Report, probes: Any, verify: str) -> None:
    if probes is None or verify == "none":
        report.proof = "unproved"
        return
    count = len(probes.probes)
    errors = [e.error for e in report.engines if e.verdict == "chosen" and e.error is not None]
    report.error = max(errors, default=0.0)
    report.original_error = _own_error(probes)
    report.proved = True
    report.proof = (
        f"proved on {count} probes (largest error {report.error:.3g}, "
        f"the original's own {report.original_error:.3g})"
    )


def _own_error(probes: Any) -> float:
    from dfc.rewrite.agree import judge

    worst = 0.0
    for probe in probes.ready():
        worst = max(worst, judge(probe.original, probe.original, probe.witness).worst)
    return worst


__all__ = ["Compiled", "compile", "load", "parse", "trace", "weight_bytes"]
