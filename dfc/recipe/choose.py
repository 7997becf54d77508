"""The last choice: which engine runs the result, and whether the result is what runs.

A rewrite that dfc chose by itself must not make the model slower than it was on any engine: where
it does, the captured graph takes its place again. How images lie in memory is an engine's form
(`eager:channels_last`); another precision is a step of the recipe, never a choice made here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.planning.engine import Engine, Runner
from dfc.recipe.bench import Bench, Ready, find_engine, on_device, state_of
from dfc.recipe.short_products import short_products
from dfc.report import Decision, EngineReport

if TYPE_CHECKING:
    from dfc.runtime.measure import Timing

GUARD_MARGIN = 0.02  # two builds of one graph differ by this much, by where their memory lies
GUARD_SECONDS = 1.0
NEAR = 1.5  # times the fastest: engines on which the captured graph may still win
CAPTURED = "as captured"
KERNELS = (  # layers for which PyTorch has no quick ones
    "dfc.linear_w4", "dfc.linear_w8", "dfc.grouped_linear_w4", "dfc.grouped_linear_w8",
)  # fmt: skip


@dataclass
class Choice:
    """What runs, and every engine that was considered."""

    graph: Graph
    engine: Engine
    runner: Runner | None
    engines: list[EngineReport] = field(default_factory=list)
    before_ms: float | None = None  # the original on the reference engine, in turns with what runs
    after_ms: float | None = None
    guard: Decision | None = None
    notes: list[str] = field(default_factory=list)


def choose(
    bench: Bench, graph: Graph, *, changed: bool, guarded: bool, lossy: bool = False
) -> Choice:
    """The engine by name, or the fastest right one, for a graph that was rewritten if `changed`,
    into other arithmetic if `lossy`.

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
    return _fastest(bench, candidates, engines, original, lossy)


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
        for name in bench.finalists(version):
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
        raise _none(bench.finalists(graph), refusals)
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
    bench: Bench, candidates: dict[str, Ready], engines: list[EngineReport],
    original: Graph | None, lossy: bool,
) -> Choice:  # fmt: skip
    bench.say("measuring")
    versions = [(bench.original, "eager")]
    versions += [(r.graph, n) for n, r in candidates.items()]
    before, *after = bench.times(versions, seconds=0.3)
    timings = dict(zip(candidates, after, strict=True))
    name = min(timings, key=lambda n: timings[n].p50_ms)
    for n, t in timings.items():
        engines.append(_measured(candidates[n], n, t, n == name))
    ready, after_ms, guard = candidates[name], timings[name].p50_ms, None
    if original is not None:
        guard = _guard(bench, ready, original)
        if guard.verdict == "reverted":
            ready = bench.ready(original, name)
            before, t = bench.times([(original, "eager"), (original, name)], seconds=0.3)
            after_ms = t.p50_ms
            engines[:] = _outrun(engines)
            engines.append(_measured(ready, name, t, True, CAPTURED))
        near = {n for n, t in timings.items() if t.p50_ms < NEAR * after_ms}
        if lossy or guard.verdict == "reverted":  # then its times say nothing of the original's
            near.update(bench.finalists(original))
        rivals = [n for n in bench.finalists(original) if n in near and n != name]
        other = _captured(bench, ready, original, rivals, engines)
        if other is not None:
            ready, guard, before = other
            after_ms = next(e.p50_ms for e in engines if e.verdict == "chosen") or after_ms
    return Choice(
        ready.graph, ready.engine, ready.runner, engines, before.p50_ms, after_ms, guard,
        [
            *placement_notes(bench, ready), *precision_notes(bench, ready),
            *kernel_notes(bench, ready), *finite_notes(bench, ready),
        ],
    )  # fmt: skip


def _outrun(engines: list[EngineReport]) -> list[EngineReport]:
    return [replace(e, verdict="slower") if e.verdict == "chosen" else e for e in engines]


def _measured(ready: Ready, name: str, t: Any, chosen: bool, form: str = "") -> EngineReport:
    worst = ready.verdict.worst if ready.verdict is not None else None
    verdict = "chosen" if chosen else "slower"
    note = getattr(ready.runner, "note", "")
    return EngineReport(name, verdict, note, t.p50_ms, t.spread_ms, worst, form)


def _captured(
    bench: Bench, ready: Ready, original: Graph, rivals: list[str], engines: list[EngineReport]
) -> tuple[Ready, Decision, Timing] | None:
    """The captured graph on another engine, if it is faster there than what was chosen; and what
    it takes meanwhile on the reference engine.

    Why:  what is fused for one engine may stand in the way of another's own fusions.
    """
    built: dict[str, Ready] = {}
    for name in rivals:
        bench.say(f"building the original for {name}")
        try:
            found = bench.ready(original, name)
        except DfcError:
            continue  # it runs the rewritten graph alone
        if found.wrong is None:
            built[name] = found
    if not built:
        return None
    held = next(e for e in engines if e.verdict == "chosen").name
    versions = [(original, "eager"), (ready.graph, held), *((original, n) for n in built)]
    before, now, *theirs = bench.times(versions, seconds=0.3)
    best = min(range(len(theirs)), key=lambda i: theirs[i].p50_ms)
    names, chosen, undecided = list(built), None, ""
    if theirs[best].p50_ms < now.p50_ms:
        chosen, undecided = _challenge(bench, (ready.graph, held), (original, names[best]))
    if chosen is not None:
        engines[:] = _outrun(engines)
    for i, n in enumerate(names):
        report = _measured(built[n], n, theirs[i], chosen is not None and i == best, CAPTURED)
        if undecided and i == best:
            report = replace(report, verdict="not faster", reason=undecided)
        engines.append(report)
    return None if chosen is None else (built[names[best]], chosen, before)


def _challenge(
    bench: Bench, now: tuple[Graph, str], other: tuple[Graph, str]
) -> tuple[Decision | None, str]:
    """The decision for the other version if it is faster beyond noise; else what was measured."""
    bench.say(f"comparing with the original on {other[1]}")
    c = bench.compare_versions(now, other, "faster", margin=GUARD_MARGIN, seconds=GUARD_SECONDS)
    if c.verdict != "faster":
        return None, f"in turns with `{now[1]}` {c}"
    words = f"against the result on `{now[1]}` the captured graph on `{other[1]}` is {c}"
    decision = Decision(
        "the result against the original", "reverted", words, other[1], c.ratio, c.low, c.high,
        c.runs,
    )  # fmt: skip
    return decision, ""


def placement_notes(bench: Bench, ready: Ready) -> list[str]:
    """What ONNX Runtime left to the CPU though another device was asked for."""
    if ready.engine.name != "onnxruntime" or bench.device == "cpu":
        return []
    from dfc.compiled import with_state_inputs
    from dfc.runtime.placement import placement

    state = on_device(state_of(ready.graph), bench.device)
    found = placement(with_state_inputs(ready.graph), [*bench.inputs(), *state], bench.device)
    return [] if found.is_whole else [f"onnxruntime: {found}"]


def precision_notes(bench: Bench, ready: Ready) -> list[str]:
    """What the device computes with fewer bits than float32 has, as PyTorch's settings say."""
    short = short_products(ready.graph, bench.device)
    return [f"float32 {what} have 10 bits of mantissa on {bench.device} (TF32)" for what in short]


def kernel_notes(bench: Bench, ready: Ready) -> list[str]:
    """What made PyTorch's engines slower: kernels of dfc's own that are not there."""
    if bench.device != "cpu" or not any(n.op in KERNELS for n in ready.graph.walk()):
        return []
    from dfc.runtime.kernels.library import state

    found = state()
    if found.built:
        return []
    words = f"kernels for int4 and int8 linear layers: {found.reason}"
    return [f"{words}; {found.advice}" if found.advice else words]


def finite_notes(bench: Bench, ready: Ready) -> list[str]:
    """Where steps that change results on purpose left no numbers: no distance counts those."""
    bad, whole = bench.not_finite(ready.graph)
    if not bad:
        return []
    what = "are NaN or infinite where the original's are numbers"
    return [f"{bad} of {whole} results on probe inputs {what}: `dfc bisect` finds the step"]


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
