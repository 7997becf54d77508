"""A fault made small: the few nodes, numbers and options with which a rewrite is still wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Value
from dfc.ir.interpret import interpret
from dfc.ir.slice import neighbours, slice_graph
from dfc.ir.verify import verify
from dfc.rewrite.blame import Fault, Wrong, fields_of
from dfc.rewrite.pass_ import EXACT, Context, Numerics, Pass
from dfc.rewrite.probe import Failure, Probe, Probes, clone
from dfc.rewrite.promises import FAULTS, run_checked

RADII = (0, 1, 2, 3, 4, 6, 8, 12, 16)
SMALL = 24  # nodes that are tried to be left out one by one


@dataclass(frozen=True)
class Case:
    """A pass that is wrong on a graph with one probe, by what it promises and the user allows."""

    graph: Graph
    step: Pass
    probe: Probe
    promised: Numerics = EXACT
    atol: float = 0.0
    rtol: float = 0.0
    seed: int = 0

    def wrong(self) -> Wrong | None:
        """How the pass is wrong, run again; None when it is right.

        Raises:  DfcError when the graph itself does not run.
        """
        probes = Probes(self.graph, [self.probe], self.seed)
        try:
            graph = self.graph.copy()
            report = run_checked(self.step, graph, Context())
        except DfcError as e:
            if e.code not in FAULTS:
                raise
            return Wrong(e.message, None)
        if not report.changes or self.promised.kind == "changes":
            return None
        found = probes.failure(
            graph, self.promised, atol=self.atol, rtol=self.rtol, only=self.probe
        )
        if isinstance(found, Failure):
            return Wrong(found.reason, self.probe, found.elements)
        return None


def reduce(fault: Fault) -> Case | None:
    """The smallest case that was found; None when the fault does not happen again.

    Cost:  one run of the graph for the values in between; small graphs after that.
    """
    probe = fault.probe or next(iter(fault.proof.probes.ready()))
    known: dict[str, Any] = {}
    seeds = _top_level(fault.before, fault.nodes)
    steps = _narrowed(fault)
    if seeds:
        for radius in RADII:
            part = neighbours(fault.before, seeds, radius)
            found = _first(_cases(fault, probe, known, part, steps))
            if found is not None:
                return _fewer(fault, probe, known, part, seeds, found)
            if len(part) == len(fault.before):
                break
    whole = Case(
        fault.whole, fault.step, _single(fault.whole, probe.inputs, probe.label,
                                         fault.proof.probes.seed),
        fault.promised, fault.proof.atol, fault.proof.rtol, fault.proof.probes.seed,
    )  # fmt: skip
    return whole if _happens(whole) else None


def _top_level(graph: Graph, names: Sequence[str]) -> list[Node]:
    """The graph's own nodes of these names, or around them."""
    wanted = set(names)
    found = []
    for node in graph.nodes:
        inside = (n for g in node.graphs for n in g.walk())
        if any(r.name in wanted for n in (node, *inside) for r in n.results):
            found.append(node)
    return found


def _narrowed(fault: Fault) -> list[Pass]:
    """The pass with the rule alone, then without limits, then as it was."""
    step, found = fault.step, []
    names = fields_of(step)
    free = {k: v for k, v in {"limit": None, "skip": ()}.items() if k in names}
    if fault.rule is not None and "rules" in names:
        others = {k: None for k in ("select", "exclude") if k in names}
        rules = (fault.rule.full_name,)
        found.append(dataclasses.replace(step, rules=rules, **free, **others))  # type: ignore[type-var]
    if free:
        found.append(dataclasses.replace(step, **free))  # type: ignore[type-var]
    return [*found, step]


def _cases(
    fault: Fault,
    probe: Probe,
    known: dict[str, Any],
    part: Sequence[Node],
    steps: Sequence[Pass],
) -> Iterator[Case]:
    """The part as a graph of its own with what it reads, for each form of the pass."""
    try:
        graph, outer = slice_graph(fault.before, part)
        verify(graph, types=False)
        inputs = _values(fault, outer, part, probe, known)
        single = _single(graph, inputs, probe.label, fault.proof.probes.seed)
    except DfcError:  # a size that nothing in this part fixes, or an op that needs more
        return
    for step in steps:
        yield Case(
            graph, step, single, fault.promised, fault.proof.atol, fault.proof.rtol,
            fault.proof.probes.seed,
        )  # fmt: skip


def _first(cases: Iterator[Case]) -> Case | None:
    return next((c for c in cases if _happens(c)), None)


def _happens(case: Case) -> bool:
    try:
        return case.wrong() is not None
    except DfcError:
        return False


def _fewer(
    fault: Fault,
    probe: Probe,
    known: dict[str, Any],
    part: Sequence[Node],
    seeds: Sequence[Node],
    case: Case,
) -> Case:
    """Leave out what need not be there, node by node."""
    kept = list(part)
    if len(kept) > SMALL:
        return case
    for node in [n for n in reversed(kept) if n not in seeds]:
        fewer = [n for n in kept if n is not node]
        found = _first(_cases(fault, probe, known, fewer, [case.step]))
        if found is not None:
            kept, case = fewer, found
    return case


def _values(
    fault: Fault, wanted: Sequence[Value], part: Sequence[Node], probe: Probe, known: dict[str, Any]
) -> list[Any]:
    """What values are on the probe; those of the part are kept, for when it gets smaller."""
    import torch

    graph = fault.before
    if not known:
        inputs = clone(probe.inputs)
        known.update((v.name, x) for v, x in zip(graph.inputs, inputs, strict=True))
    names = {v.name for v in wanted} - set(known)
    if names:
        names |= {r.name for n in part for r in n.results}

        def keep(node: Node, results: Sequence[Any]) -> None:
            for r, x in zip(node.results, results, strict=True):
                if r.name in names:
                    known[r.name] = x.clone() if isinstance(x, torch.Tensor) else x

        torch.manual_seed(fault.proof.probes.seed)
        interpret(graph, clone(probe.inputs), observe=keep)
    return [known[v.name] for v in wanted]


def recompute(graph: Graph, probe: Probe, seed: int) -> Probe:
    """A probe with what the graph itself gives here, and its witness."""
    return _single(graph, probe.inputs, probe.label, seed)


def _single(graph: Graph, inputs: Sequence[Any], label: str, seed: int) -> Probe:
    """A probe with what the graph itself gives, and its witness."""
    import torch

    made = Probe(label, list(inputs))
    torch.manual_seed(seed)
    made.original = interpret(graph, clone(inputs))
    torch.manual_seed(seed)
    made.witness = interpret(graph, clone(inputs), double=True)
    return made
