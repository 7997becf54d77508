"""Runs passes and keeps their promises: validity, timing, proof, blame, undoing what is wrong."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.interpret import Observer, interpret
from dfc.ir.verify import verify
from dfc.rewrite.pass_ import CHANGES, EXACT, Context, Numerics, Pass, close

VERIFY = ("none", "end", "each")


@dataclass(frozen=True)
class PassReport:
    """What one pass did.

    Units:  ms of wall clock for the pass alone; error against the witness, absolute.
    """

    step: str
    changes: int
    nodes_before: int
    nodes_after: int
    ms: float
    verdict: str  # "proved", "unproved", "unchanged", "reverted"
    reason: str = ""
    error: float | None = None


@dataclass
class Outcome:
    """The rewritten graph and the story of how it came about."""

    graph: Graph
    reports: list[PassReport]
    probes: Any = None
    numerics: Numerics = EXACT  # what all passes together promise

    @property
    def reverted(self) -> list[PassReport]:
        return [r for r in self.reports if r.verdict == "reverted"]


def run_passes(
    graph: Graph,
    passes: Sequence[Pass],
    *,
    probes: Any = None,
    mode: str = "each",
    strict: bool = False,
    print_after: Callable[[str, Graph], None] | None = None,
    ctx: Context | None = None,
    numerics: Numerics = EXACT,
) -> Outcome:
    """Run passes on a copy of the graph. `numerics` is what was promised before them.

    Needs:   a valid graph; `probes` (dfc.rewrite.probe.Probes) unless the mode is "none". Without
             them, passes run unproved and say so.
    Raises:  DfcError V030 (status 4) under `strict` when a pass changes results beyond its claim.
    """
    if mode not in VERIFY:
        raise DfcError("Q004", f"verify is one of {', '.join(VERIFY)}, got `{mode}`")
    context = ctx or Context()
    current = graph.copy()
    reports: list[PassReport] = []
    unproved: list[tuple[int, Graph]] = []
    for p in passes:
        # Only a proof can ask for the old graph back.
        before = current.copy() if probes is not None and mode != "none" else current
        report = _one(p, current, context)
        promised = _weaker(numerics, p.numerics)
        if report.changes and mode == "each" and probes is not None:
            report, wrong = _prove(p, current, before, probes, promised, report)
            if wrong is not None:
                if strict:
                    raise _blame_error(p, wrong)
                current = before
        elif report.changes and mode == "end":
            unproved.append((len(reports), before))
        if report.verdict != "reverted":
            numerics = promised if report.changes else numerics
        reports.append(report)
        if print_after:
            print_after(str(p), current)
    if unproved and probes is not None:
        current = _prove_at_end(graph, passes, current, reports, probes, numerics, strict, context)
    return Outcome(current, reports, probes, numerics)


def _one(p: Pass, graph: Graph, ctx: Context) -> PassReport:
    """Run a pass and check what can be checked without running the graph."""
    count = len(graph)
    before = _snapshot(graph)
    start = time.perf_counter()
    changes = p.run(graph, ctx)
    ms = (time.perf_counter() - start) * 1e3
    changed = _changed(graph, before)
    try:
        verify(graph, types=[n for n in changed if n is not graph.result])
    except DfcError as e:
        raise DfcError(
            "V031", f"pass `{p.name}` left an invalid graph", notes=(e.render(),), status=1
        ) from e
    if not changes and (changed or [*graph.walk(), graph.result] != list(before)):
        raise DfcError("V032", f"pass `{p.name}` says 0 changes and changed the graph", status=1)
    verdict = "unproved" if changes else "unchanged"
    return PassReport(str(p), changes, count, len(graph), ms, verdict)


Snapshot = dict[Node, tuple[object, ...]]


def _snapshot(graph: Graph) -> Snapshot:
    """What each node looked like: cheap, because nodes that a pass leaves alone stay themselves."""
    found: Snapshot = {n: _look(n) for n in graph.walk()}
    found[graph.result] = (*_look(graph.result), *_weights(graph))
    return found


def _look(node: Node) -> tuple[object, ...]:
    types = (*(r.type for r in node.results), *(v.type for v in node.operands))
    return (node.op, node.attributes, node.inputs, node.stage, node.results, node.graphs, types)


def _weights(graph: Graph) -> list[tuple[Parameter, object]]:
    return [(p, p.data) for p in graph.parameters.values()]


def _changed(graph: Graph, before: Snapshot) -> list[Node]:
    """The nodes that are new or look different, and the result node when outputs did."""
    found = [n for n in graph.walk() if before.get(n) != _look(n)]
    if before[graph.result] != (*_look(graph.result), *_weights(graph)):
        found.append(graph.result)
    return found


def _weaker(a: Numerics, b: Numerics) -> Numerics:
    """The promise of two passes in a row."""
    if CHANGES in (a, b):
        return CHANGES
    if a.kind == b.kind == "close":
        return close(a.rtol + b.rtol)
    return a if a.kind == "close" else b


def _prove(
    p: Pass, graph: Graph, before: Graph, probes: Any, promised: Numerics, report: PassReport
) -> tuple[PassReport, str | None]:
    from dataclasses import replace

    if promised.kind == "changes":
        return replace(report, reason="judged by its metric, not by probes"), None
    try:
        verdict = probes.check(graph, promised)
    except DfcError as e:
        reason = f"the rewritten graph fails: {e.message}"
        return replace(report, verdict="reverted", reason=reason), reason
    if verdict.agrees:
        return replace(report, verdict="proved", error=verdict.worst), None
    where = first_divergence(before, graph, probes, exact=promised.kind == "exact")
    reason = f"{verdict.difference}" + (f"; first at {where}" if where else "")
    return replace(report, verdict="reverted", reason=reason, error=verdict.worst), reason


def _blame_error(p: Pass, reason: str) -> DfcError:
    return DfcError(
        "V030",
        f"pass `{p.name}` changed the results: {reason}",
        help="without --strict the pass is reverted and compilation goes on",
        status=4,
    )


def _prove_at_end(
    graph: Graph,
    passes: Sequence[Pass],
    current: Graph,
    reports: list[PassReport],
    probes: Any,
    numerics: Numerics,
    strict: bool,
    ctx: Context,
) -> Graph:
    """One proof for all passes; when it fails, run again with a proof after each."""
    from dataclasses import replace

    if numerics.kind == "changes":
        return current
    verdict = None
    with contextlib.suppress(DfcError):  # a graph that fails is found by the second run
        verdict = probes.check(current, numerics)
    if verdict is not None and verdict.agrees:
        for i, r in enumerate(reports):
            if r.changes:
                reports[i] = replace(r, verdict="proved", error=verdict.worst)
        return current
    again = run_passes(graph, passes, probes=probes, mode="each", strict=strict, ctx=ctx)
    reports[:] = again.reports
    return again.graph


def first_divergence(before: Graph, after: Graph, probes: Any, exact: bool = False) -> str | None:
    """The first node, by name, whose value differs: beyond rounding or, if `exact`, at all."""
    for probe in probes.ready():
        found = _divergence(before, after, probe.inputs, probes.seed, exact)
        if found:
            return found
    kept = {r.name for n in after.nodes for r in n.results}
    gone = next((r for n in before.nodes for r in n.results if r.name not in kept), None)
    return f"%{gone.name} = {gone.node.op}, which is gone" if gone and gone.node else None


def _divergence(
    before: Graph, after: Graph, inputs: Sequence[Any], seed: int, exact: bool
) -> str | None:
    import torch

    from dfc.rewrite.agree import judge

    def run(graph: Graph, observe: Observer, double: bool = False) -> None:
        torch.manual_seed(seed)
        interpret(graph, inputs, observe=observe, double=double)

    def keep(values: dict[str, Any]) -> Observer:
        def store(node: Node, results: Sequence[Any]) -> None:
            values.update(zip((r.name for r in node.results), results, strict=True))

        return store

    values: dict[str, Any] = {}
    wide: dict[str, Any] = {}
    run(before, keep(values))
    run(before, keep(wide), double=True)
    found: list[Value] = []

    def compare(node: Node, results: Sequence[Any]) -> None:
        for r, x in zip(node.results, results, strict=True):
            if not found and r.name in values:
                verdict = judge([x], [values[r.name]], [wide[r.name]], exact=exact)
                if not verdict.agrees:
                    found.append(r)

    try:
        run(after, compare)
    except DfcError as e:
        return e.message
    if not found or found[0].node is None:
        return None
    node = found[0].node
    place = f", traced from {node.loc}" if node.loc else ""
    return f"%{found[0].name} = {node.op}{place}"
