"""What a recipe can ask for, as numbers: time, bytes, errors and the user's own metrics.

latency(p50|p95|p99)  seconds for one call on the example, on the engine in question
throughput            items of the example (its leading dimension) through, per second
size                  bytes of the parameters, tied ones counted once
peak_memory           bytes of the parameters, and at the worst moment of the inputs and of all
                      values that are still needed, when the graph runs in its order on the example.
                      It is what the graph needs; what an engine takes besides is not in it
error                 the largest distance of any result from the float64 witness, as a share of
                      that output's largest value; of outputs that are no floats the share of wrong
                      elements. Over all probes, on the engine in question
a metric's name       what the user's function returns
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dfc.compiled import Compiled, with_state_inputs
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.types import TensorType
from dfc.recipe.bench import Bench, find_engine, on_device, state_of
from dfc.recipe.certain import judge, pair_of
from dfc.recipe.metrics import Measured, UserMetric
from dfc.recipe.plan import Quantity, Test
from dfc.report import Report

if TYPE_CHECKING:
    from dfc.runtime.measure import Comparison, Timing

TIMED = ("latency", "throughput")
_OF_THE_GRAPH = ("size", "peak_memory")
Versions = Callable[[str], Graph]  # "", "baseline", "before" or a label to the graph it stands for


@dataclass(frozen=True)
class Answer:
    """What became of a comparison of quantities: both sides with their numbers, in words.

    `undecided` says that there are too few items to know; then it does not hold.
    """

    holds: bool
    text: str
    comparison: Comparison | None = None
    undecided: bool = False
    gap: float = 0.0  # how far the sides are apart, as a part of the right one, where it is known


@dataclass
class Meter:
    """Measures quantities of versions of one model, on one engine or on that of each."""

    bench: Bench
    metrics: Mapping[str, UserMetric] = field(default_factory=dict)
    engine: str | None = None  # the engine in question; None: the bench's lead for each version
    _known: dict[tuple[int, str, str], tuple[Graph, float]] = field(default_factory=dict)
    _first: dict[str, Timing] = field(default_factory=dict)
    _scores: dict[tuple[int, str, str], tuple[Graph, Measured]] = field(default_factory=dict)

    def on(self, graph: Graph) -> str:
        """The engine that a version is measured on; the one in question may refuse the original."""
        original = self.bench.original
        if self.engine is None or (graph is original and not self.bench.runs(graph, self.engine)):
            return self.bench.lead(graph)
        return self.engine

    def why_not(self, quantities: Iterable[Quantity]) -> str | None:
        """Why quantities cannot be measured, None when they can."""
        return self.bench.why_not() if any(q.name != "size" for q in quantities) else None

    def value(self, q: Quantity, graph: Graph) -> float:
        """One quantity of a version, in base units; timings are set right for drift."""
        if q.name in TIMED:
            return self._timed(q, graph)
        key = (id(graph), q.name, self.on(graph) if runs(q) else "")
        if key not in self._known:
            self._known[key] = graph, self._measured(q.name, graph)
        return self._known[key][1]

    def forget(self) -> None:
        """Let go of the versions that were measured, but for the original."""
        original = self.bench.original
        self._known = {k: v for k, v in self._known.items() if v[0] is original}
        self._scores = {k: v for k, v in self._scores.items() if v[0] is original}

    def _measured(self, name: str, graph: Graph) -> float:
        if name == "size":
            return float(weight_bytes(graph))
        if name == "peak_memory":
            return float(peak_bytes(graph, self.bench.probes.probes[0].inputs))
        if name == "error":
            return relative_error(self.bench, graph, self.on(graph))
        return self.scores(name, graph).value

    def scores(self, name: str, graph: Graph) -> Measured:
        """What a metric says of a version: its number, and the scores of items if it gives any."""
        engine = self.on(graph)
        key = (id(graph), name, engine)
        if key not in self._scores:
            self.bench.say(f"calling metric {name}")
            run = self.bench.callable(graph, engine)
            self._scores[key] = (
                graph,
                self.metrics[name].measured(run, graph is self.bench.original),
            )
        return self._scores[key][1]

    def unjudged(self, graph: Graph) -> Compiled:
        """A version that is called like the model, for metrics alone: nobody compares its results
        with the original's.
        """
        engine, device = find_engine(self.bench.lead()), self.bench.device
        return Compiled(
            graph, engine, engine.build(with_state_inputs(graph), device), Report(), device=device
        )

    # Timing

    def _timed(self, q: Quantity, graph: Graph) -> float:
        """Measured beside the original, and scaled by how the original did at first.

        Why:  a machine that grew slower while a search went on must not choose the winner.
        """
        original = self.bench.original
        versions = [original] if graph is original else [original, graph]
        timings = self.bench.times([(g, self.on(g)) for g in versions])
        first = self._first.setdefault(self.on(original), timings[0])
        drift = first.p50_ms / timings[0].p50_ms
        return self.from_timing(q, timings[-1], drift)

    def from_timing(self, q: Quantity, t: Timing, drift: float = 1.0) -> float:
        if q.name == "throughput":
            return items(self.bench.original, self.bench.inputs()) / (t.mean_ms / 1e3 * drift)
        ms = {"p95": t.p95_ms, "p99": t.p99_ms}.get(q.detail, t.p50_ms)
        return ms / 1e3 * drift

    # Comparisons

    def answer(self, test: Test, versions: Versions) -> Answer:
        """Whether a comparison holds. Two timings are told apart beyond noise, or count as equal.

        Raises:  DfcError Q053 when something in it cannot be measured.
        """
        quantities = list(dict.fromkeys(test.quantities()))
        reason = self.why_not(quantities)
        if reason:
            raise DfcError("Q053", f"`{test}` cannot be decided: {reason}", status=2)
        timed = [q for q in quantities if q.name in TIMED]
        values = {q: self.value(q, versions(q.version)) for q in quantities if q not in timed}
        if len(timed) == 2 and all(q.detail in ("", "p50") for q in timed):
            graphs = [versions(q.version) for q in timed]
            if graphs[0] is not graphs[1]:
                return self._beyond_noise(test, timed, graphs, values)
        if timed:
            graphs = [versions(q.version) for q in timed]
            timings = self.bench.times([(g, self.on(g)) for g in graphs])
            values |= {q: self.from_timing(q, t) for q, t in zip(timed, timings, strict=True)}
        known = values.__getitem__
        plain = Answer(test.evaluate(known), test.explain(known), gap=test.gap(known))
        return self._paired(test, versions, plain)

    def _paired(self, test: Test, versions: Versions, plain: Answer) -> Answer:
        """A comparison of one metric with the original's, item by item where it gives scores."""
        pair = pair_of(test)
        if pair is None or pair[0].name not in self.metrics:
            return plain
        after, before = (versions(q.version) for q in pair)
        if after is before:
            return plain
        name = pair[0].name
        scores = self.scores(name, after), self.scores(name, before)
        found = judge(test, self.metrics[name], pair, *scores)
        if found is None:
            return plain
        text, undecided = f"{plain.text}: {found.words}", found.verdict == "undecided"
        return Answer(found.verdict == "accept", text, undecided=undecided, gap=plain.gap)

    def _beyond_noise(
        self,
        test: Test,
        timed: Sequence[Quantity],
        graphs: Sequence[Graph],
        values: dict[Quantity, float],
    ) -> Answer:
        """Two timings in one comparison: it must come out alike over the whole interval.

        Where it does not, they cannot be told apart: `<=`, `>=` and `==` hold, the others do not.
        """
        before, after = ((g, self.on(g)) for g in graphs)
        c = self.bench.compare_versions(before, after, "either")
        values[timed[0]] = self._of_ms(timed[0], c.before_ms)
        outcomes = set()
        for ratio in (c.low, c.high, c.ratio):
            values[timed[1]] = self._of_ms(timed[1], c.before_ms * ratio)
            outcomes.add(test.evaluate(values.__getitem__))
        alike = len(outcomes) == 1
        holds = outcomes.pop() if alike else test.op in ("<=", ">=", "==")
        text = test.explain(values.__getitem__) + ("" if alike else ", within noise")
        return Answer(holds, text, c)

    def _of_ms(self, q: Quantity, ms: float) -> float:
        if q.name == "latency":
            return ms / 1e3
        count = items(self.bench.original, self.bench.inputs())
        return count / (ms / 1e3) if ms > 0 else math.inf


def runs(q: Quantity) -> bool:
    """Whether a quantity takes an engine."""
    return q.name not in _OF_THE_GRAPH


def items(graph: Graph, inputs: Sequence[Any]) -> int:
    """What one call of the example carries: the leading dimension of its first tensor."""
    for v, x in zip(graph.inputs, inputs, strict=True):
        if isinstance(v.type, TensorType) and x.dim():
            return max(int(x.shape[0]), 1)
    return 1


def weight_bytes(graph: Graph) -> int:
    """Bytes of all parameters."""
    return sum(map(_bytes, graph.parameters.values()))


def read_bytes(graph: Graph) -> int:
    """Bytes of the parameters that something reads or writes: what `dce` would leave."""
    written = {m.target for m in graph.mutations}
    return sum(_bytes(p) for p in graph.parameters.values() if p.use_count or p in written)


def _bytes(p: Parameter) -> int:
    assert isinstance(p.type, TensorType)
    return int(p.type.numel) * p.type.dtype.itemsize  # type: ignore[arg-type]


def peak_bytes(graph: Graph, inputs: Sequence[Any]) -> int:
    """Parameters, and the most that is alive at once while the graph runs in its order.

    Views share their memory and count once. What ops take for themselves is not seen.
    """
    import torch

    from dfc.ir.interpret import interpret

    weights = {
        p.data.tensor().untyped_storage().data_ptr()
        for p in graph.parameters.values()
        if p.data is not None
    }
    live: dict[Value, tuple[int, int]] = {}
    remaining = {v: v.use_count for n in graph.nodes for v in n.operands}
    kept = set(graph.result.operands)
    peak = 0

    def hold(values: Sequence[Value], results: Sequence[Any]) -> None:
        for v, x in zip(values, results, strict=True):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage.data_ptr() not in weights:
                    live[v] = storage.data_ptr(), storage.nbytes()

    def observe(node: Node, results: Sequence[Any]) -> None:
        nonlocal peak
        if node.graph is not graph:
            return
        hold(node.results, results)
        peak = max(peak, sum(dict(live.values()).values()))
        for v in node.operands:
            remaining[v] -= 1
            if not remaining[v] and v not in kept and v not in graph.inputs:
                live.pop(v, None)

    hold(graph.inputs, inputs)
    interpret(graph, inputs, observe=observe)
    return weight_bytes(graph) + peak


def relative_error(bench: Bench, graph: Graph, engine: str) -> float:
    """How far the results on an engine are from the witness, over all probes."""
    import torch

    from dfc.rewrite.probe import clone

    run = bench.ready(graph, engine).runner
    state, worst = state_of(graph), 0.0
    for probe in bench.probes.ready():
        torch.manual_seed(bench.probes.seed)
        given = on_device([*clone(probe.inputs), *state], bench.device)
        results = on_device(run(given), "cpu")
        for x, o, w in zip(results, probe.original, probe.witness, strict=True):
            worst = max(worst, _distance(x, o, w))
    return worst


def _distance(x: Any, original: Any, witness: Any) -> float:
    import torch

    if not isinstance(original, torch.Tensor):
        return float(x != original)
    if not original.numel():
        return 0.0
    if not (original.is_floating_point() or original.is_complex()):
        return float((x != original).double().mean())
    if original.is_complex():
        x, original, witness = (
            torch.view_as_real(t.resolve_conj()) for t in (x, original, witness)
        )
    wide = witness.double()
    known = original.isfinite() & wide.isfinite()
    if not torch.equal(x.isfinite() & wide.isfinite(), known):
        return math.inf
    zero = torch.zeros((), dtype=torch.float64)
    error = float(torch.where(known, (x.double() - wide).abs(), zero).max())
    scale = float(torch.where(known, wide.abs(), zero).max())
    return error / scale if scale else error
