"""The last choice: which engine runs the result, and whether the result is what runs.

A rewrite that dfc chose by itself must not make the model slower than it was on the same engine:
there the captured graph takes its place again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.planning.engine import Engine, Runner
from dfc.recipe.bench import Bench, Ready, find_engine, on_device, state_of
from dfc.report import Decision, EngineReport

GUARD_MARGIN = 0.02  # two builds of one graph differ by this much, by where their memory lies
GUARD_SECONDS = 1.0


@dataclass
class Choice:
    """What runs, and every engine that was considered."""

    graph: Graph
    engine: Engine
    runner: Runner | None
    engines: list[EngineReport] = field(default_factory=list)
    before_ms: float | None = None  # the original on the reference engine
    after_ms: float | None = None
    guard: Decision | None = None
    notes: list[str] = field(default_factory=list)


def choose(bench: Bench, graph: Graph, *, changed: bool, guarded: bool) -> Choice:
    """The engine by name, or the fastest right one, for a graph that was rewritten if `changed`.

    With `guarded` the original stands in for a rewritten graph that is slower, beyond noise, or
    that the engine cannot run right.
    Raises:  DfcError V033 when the engine that was asked for gives other results, and whatever it
             refuses the graph with.
    """
    if any(p.data is None for p in graph.parameters.values()):
        names = bench.candidates()
        name = names[0] if len(names) == 1 else "eager"
        return Choice(graph, find_engine(name), None)
    original = bench.original if changed and guarded else None
    candidates, engines = _candidates(bench, graph, original)
    if bench.probes is None:
        ready = next(iter(candidates.values()))
        report = EngineReport(ready.engine.name, "chosen", "not measured: no example")
        return Choice(ready.graph, ready.engine, ready.runner, [*engines, report])
    return _fastest(bench, candidates, engines, original)


def _candidates(
    bench: Bench, graph: Graph, original: Graph | None
) -> tuple[dict[str, Ready], list[EngineReport]]:
    """The engines that give right results, and reports of the others.

    Where none runs the rewritten graph, those that run the original, if that may stand in.
    """
    found: dict[str, Ready] = {}
    refusals: dict[str, DfcError] = {}
    for version in (graph, original):
        if version is None or found:
            continue
        for name in bench.candidates():
            bench.say(f"building for {name}")
            try:
                ready = bench.ready(version, name)
            except DfcError as e:
                refusals.setdefault(name, e)
                continue
            if ready.wrong is None:
                found[name] = ready
            else:
                message = f"engine `{name}` gives other results: {ready.wrong}"
                refusals.setdefault(name, DfcError("V033", message))
    if not found:
        raise _none(bench.candidates(), refusals)
    verdicts = {n: "wrong" if e.code == "V033" else "refused" for n, e in refusals.items()}
    return found, [
        EngineReport(n, verdicts[n], e.message) for n, e in refusals.items() if n not in found
    ]


def _none(wanted: list[str], refusals: dict[str, DfcError]) -> DfcError:
    if len(wanted) == 1:
        return refusals[wanted[0]]
    reasons = "; ".join(f"{n}: {e.message}" for n, e in refusals.items())
    return DfcError("K005", f"no engine runs the result: {reasons}")


def _fastest(
    bench: Bench, candidates: dict[str, Ready], engines: list[EngineReport], original: Graph | None
) -> Choice:
    bench.say("measuring")
    versions = [(bench.original, "eager")]
    versions += [(r.graph, n) for n, r in candidates.items()]
    before, *after = bench.times(versions, seconds=0.3)
    timings = dict(zip(candidates, after, strict=True))
    name = min(timings, key=lambda n: timings[n].p50_ms)
    ready = candidates[name]
    guard = None
    if original is not None:
        guard = _guard(bench, ready, original)
        if guard.verdict == "reverted":
            ready = bench.ready(original, name)
    for n, t in timings.items():
        verdict, worst = candidates[n].verdict, None
        if verdict is not None:
            worst = verdict.worst
        engines.append(
            EngineReport(n, "chosen" if n == name else "slower", "", t.p50_ms, t.spread_ms, worst)
        )
    after_ms = timings[name].p50_ms
    if guard is not None and guard.verdict == "reverted" and guard.ratio:
        after_ms /= guard.ratio
    return Choice(
        ready.graph, ready.engine, ready.runner, engines, before.p50_ms, after_ms, guard,
        placement_notes(bench, ready),
    )  # fmt: skip


def placement_notes(bench: Bench, ready: Ready) -> list[str]:
    """What ONNX Runtime left to the CPU though another device was asked for."""
    if ready.engine.name != "onnxruntime" or bench.device == "cpu":
        return []
    from dfc.compiled import with_state_inputs
    from dfc.runtime.placement import placement

    state = on_device(state_of(ready.graph), bench.device)
    found = placement(with_state_inputs(ready.graph), [*bench.inputs(), *state], bench.device)
    return [] if found.is_whole else [f"onnxruntime: {found}"]


def _guard(bench: Bench, ready: Ready, original: Graph) -> Decision:
    """The rewritten graph against the original on the engine that was chosen."""
    name, step = ready.engine.name, "the result against the original"
    if ready.graph is original:
        reason = "the engine runs the rewritten graph not at all, or wrong"
        return Decision(step, "reverted", reason, name)
    bench.say("comparing with the original")
    try:
        c = bench.compare(
            original, ready.graph, "slower", name, margin=GUARD_MARGIN, seconds=GUARD_SECONDS
        )
    except DfcError as e:  # the engine takes the rewritten graph alone
        return Decision(step, "kept", f"the original cannot run there: {e.message}", name)
    slower = c.verdict == "slower"
    words = f"slower: {c}" if slower else str(c)
    verdict = "reverted" if slower else "kept"
    return Decision(step, verdict, words, name, c.ratio, c.low, c.high, c.runs)


def own_error(probes: Any) -> float:
    """How far the original itself is from the witness."""
    from dfc.rewrite.agree import judge

    worst = 0.0
    for probe in probes.ready():
        worst = max(worst, judge(probe.original, probe.original, probe.witness).worst)
    return worst
