"""What a step costs layer by layer: each layer alone gets it, all others stay as they were.

A layer is a module in which the step changes something. Results are compared on batches of the
step's data, or on the examples; values before the layer are computed once for all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from typing import Any

from dfc.compress.calibrate import batches_of
from dfc.compress.distance import Distance, logits_of
from dfc.compress.replay import Replay, differences
from dfc.counting import counted
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.slice import slice_graph
from dfc.lang.selectors import parse_selector
from dfc.recipe.metrics import Measured, UserMetric
from dfc.recipe.options import fields_of, part_field
from dfc.recipe.quantities import read_bytes
from dfc.rewrite.code_digest import own_code, this_process, versions
from dfc.rewrite.pass_ import Context, Data, Pass, named

BATCHES = 4  # of data that are compared on, at most
_MEMORY = 1 << 30  # bytes of values that are kept to begin from
_TIME_S = 0.1  # for a layer, which is timed once for each shape

Say = Callable[[str], None]
Run = Callable[[Graph], Callable[..., Any]]  # a graph as what a metric calls


@dataclass(frozen=True)
class Effect:
    """What a step does to one layer, or, as `layer` "" with `whole`, to all at once.

    Units:  bytes and ms are those of the layer; `drop` is worse where it is positive, `bound` its
            one-sided 95 % bound where the metric gives scores of items.
    """

    layer: str
    nodes: tuple[str, ...]  # the ops that the step changed there
    bytes: int  # after less before
    relative: float
    cosine: float | None = None
    kl: float | None = None
    before_ms: float | None = None
    after_ms: float | None = None
    metric: float | None = None
    drop: float | None = None
    bound: float | None = None
    agreement: float | None = None
    whole: bool = False
    changed: tuple[str, ...] = ()  # the values that the step changed

    @property
    def score(self) -> float:
        """How bad it is: the metric's drop, else the divergence of logits, else the distance."""
        return self.order[0]

    @property
    def order(self) -> tuple[float, ...]:
        """The score, then what decides between layers of one score."""
        return tuple(x for x in (self.drop, self.kl, self.relative) if x is not None)


@dataclass
class Sensitivity:
    """One step of a recipe, layer by layer, the worst first."""

    step: str
    by: str  # what the order goes by
    layers: list[Effect]
    whole: Effect
    where: str  # what it was measured on
    baseline: float | None = None  # the metric of the graph without the step
    label: str = ""
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        for told, effect in zip(data["layers"], self.layers, strict=True):
            told["score"] = effect.score
            del told["whole"], told["changed"]
        return data


def data_field(cls: type[Pass]) -> str | None:
    """The option that names data."""
    hints = fields_of(cls)
    return next((n for n, h in hints.items() if h is Data or "Data" in str(h)), None)


def why_not(p: Pass) -> str | None:
    """Why a step cannot be measured layer by layer, None when it can."""
    if not p.numerics.is_lossy:
        return "it changes results by rounding at most"
    if part_field(type(p)) is None:
        return "it has no option that says on which part of the model it works"
    return None


@dataclass
class Measuring:
    """Measures one step on one graph.

    Needs:  `graph` is as the step finds it; `metric` and `run` together, or neither; `build` makes
            runners of graphs for the times, or is None. `keep` finished measurements in a journal
            (`ctx.journal`), so that what was interrupted goes on.
    """

    graph: Graph
    step: Pass
    ctx: Context
    say: Say = lambda what: None
    metric: UserMetric | None = None
    run: Run | None = None
    build: Callable[[Graph], Any] | None = None
    engine: str = ""
    _times: dict[object, tuple[float, float]] = field(default_factory=dict)

    def measured(self) -> Sensitivity:
        """Every layer, the worst first, and the whole step.

        Raises:  DfcError D085 when there is nothing to run; Q052 when the step changes no layer;
                 whatever the step raises.
        """
        layers = changed_layers(self.graph, self.step, self.ctx)
        if not layers:
            message = f"`{self.step}` changes nothing in this model"
            raise DfcError("Q052", message, help=f"try `dfc explain MODEL --pass {self.step.name}`")
        self.say("running the model without the step")
        replays, where = self._replays()
        baseline = self._baseline()
        done = self._finished(replays, baseline)
        logits = logits_of(self.graph)
        effects: list[Effect] = []
        for number, layer in enumerate([*layers, None], 1):
            self.ctx.progress(number, len(layers) + 1)
            self.say(f"{self.step.name}: layer {number} of {len(layers) + 1}: {layer or 'all'}")
            effect = done.get(layer)
            if effect is None:
                effect = self._effect(layer, replays, logits, baseline)
                done.keep(layer, effect)
            effects.append(effect)
        whole = effects.pop()
        # What follows its surroundings changes nothing; what shares a weight is one layer.
        effects = list({e.changed: e for e in reversed(effects) if e.changed}.values())
        effects.sort(key=lambda e: e.order, reverse=True)
        by = self._by(effects)
        return Sensitivity(
            str(self.step), by, effects, whole, where, baseline.value if baseline else None
        )

    def _by(self, effects: Sequence[Effect]) -> str:
        if self.metric is not None:
            return f"the drop of {self.metric.declared.name}"
        return "relative error" if effects[0].kl is None else "KL divergence of the outputs"

    # What it is measured on

    def _replays(self) -> tuple[list[Replay], str]:
        """The model's values on a few batches: as many as _MEMORY holds, one at least."""
        name = getattr(self.step, data_field(type(self.step)) or "", None)
        if name is None and not self.ctx.examples:
            message = f"there is nothing to run `{self.step.name}` on: no data and no example"
            raise DfcError("D085", message, help="name data in the step: `using calib`")
        given: Iterable[Any] = (
            batches_of(self.ctx, name, self.graph) if name else self.ctx.examples[:1]
        )
        found: list[Replay] = []
        for batch in islice(given, BATCHES):
            found.append(Replay(self.graph, batch))
            if sum(r.bytes for r in found) * (len(found) + 1) > len(found) * _MEMORY:
                break
        several = f"{counted(len(found), 'batch')} of {name}"
        return found, several if name else "the example"

    def _baseline(self) -> Measured | None:
        if self.metric is None or self.run is None:
            return None
        self.say(f"calling metric {self.metric.declared.name}")
        return self.metric.measured(self.run(self.graph), original=True)

    def _finished(self, replays: Sequence[Replay], baseline: Measured | None) -> Finished:
        import torch

        from dfc.ir.weights import tensor_sha256

        if self.ctx.journal is None:
            return Finished(None, "")
        words = [self.graph.fingerprint(), str(self.step), self.engine]
        words += [*versions(), own_code() or this_process()]  # of the step, the ops, the metric
        words += [f.name for f in fields(Effect)]  # what a record has
        words += [self.metric.declared.name if self.metric else ""]
        if baseline is not None:  # another metric of the name, or other data, says another number
            items = baseline.items.tobytes() if baseline.items is not None else b""
            words += [repr(baseline.value), hashlib.sha256(items).hexdigest()]
        for r in replays:
            words += [tensor_sha256(x) for x in r.inputs if isinstance(x, torch.Tensor)]
        key = hashlib.sha256("\n".join(words).encode()).hexdigest()
        return Finished(self.ctx.journal, f"sensitivity-{key[:40]}")

    # One layer

    def _effect(
        self, layer: str | None, replays: Sequence[Replay], logits: Sequence[bool],
        baseline: Measured | None,
    ) -> Effect:  # fmt: skip
        decisions: list[Any] = []
        variant = self.graph.copy()
        ctx = _quiet(self.ctx, decisions)
        alone(self.step, layer).run(variant, ctx)
        distance = Distance(logits)
        for r in replays:
            distance.add(r.run(variant), r.outputs)
        done = [d for d in decisions if d.changed]
        nodes = tuple(dict.fromkeys(d.op for d in done))
        before_ms, after_ms = self._timed(variant, replays[0]) if layer is not None else (None,) * 2
        found = Effect(
            layer or "", nodes, read_bytes(variant) - read_bytes(self.graph),
            distance.relative, distance.cosine, distance.kl, before_ms, after_ms,
            whole=layer is None, changed=tuple(dict.fromkeys(d.value for d in done)),
        )  # fmt: skip
        return self._with_metric(found, variant, baseline)

    def _with_metric(self, e: Effect, variant: Graph, baseline: Measured | None) -> Effect:
        if self.metric is None or self.run is None or baseline is None:
            return e
        after = self.metric.measured(self.run(variant))
        sign = 1 if self.metric.declared.higher_is_better else -1
        drop = sign * (baseline.value - after.value)
        compared = self.metric.compared(baseline, after)
        bound = compared.upper if compared else None
        agreement = compared.agreement if compared else None
        return replace(e, metric=after.value, drop=drop, bound=bound, agreement=agreement)

    def _timed(self, variant: Graph, replay: Replay) -> tuple[float | None, float | None]:
        """How long the nodes that differ take, before and after: once for each shape."""
        if self.build is None:
            return None, None
        parts = []
        for graph, nodes in zip((self.graph, variant), _changed(self.graph, variant), strict=True):
            if not nodes:
                return None, None
            part, outer = slice_graph(graph, nodes)
            inputs = [replay.named(v) for v in outer]
            if any(x is None for x in inputs):
                return None, None
            parts.append((part, inputs))
        key = tuple(_shape(part) for part, _ in parts)
        if key not in self._times:
            self._times[key] = self._side_by_side(parts)
        return self._times[key]

    def _side_by_side(self, parts: Sequence[tuple[Graph, list[Any]]]) -> tuple[float, float]:
        from dfc.runtime.measure import measure

        assert self.build is not None
        runners = {}
        for name, (part, inputs) in zip(("before", "after"), parts, strict=True):
            run = self.build(part)
            runners[name] = lambda _, run=run, inputs=inputs: run(inputs)
        found = measure(runners, [], seconds=_TIME_S, most=2000)
        return found["before"].p50_ms, found["after"].p50_ms


@dataclass
class Finished:
    """Measurements that are done, on disk where there is a journal: a second run goes on."""

    journal: Any
    key: str

    def __post_init__(self) -> None:
        records = self.journal.records(self.key) if self.journal is not None else []
        self.known = {self._place(r): r for r in records}

    @staticmethod
    def _place(record: Mapping[str, Any]) -> str | None:
        return None if record["whole"] else str(record["layer"])

    def get(self, layer: str | None) -> Effect | None:
        record = self.known.get(layer)
        if record is None:
            return None
        lists = {k: tuple(record[k]) for k in ("nodes", "changed")}
        return Effect(**{**record, **lists})

    def keep(self, layer: str | None, effect: Effect) -> None:
        if self.journal is not None:
            self.journal.append(self.key, asdict(effect))


def changed_layers(graph: Graph, p: Pass, ctx: Context) -> list[str]:
    """The modules in which a step changes something, or what they read, in the graph's order.

    Of those that share a weight, the ones in the step's own part: elsewhere it finds nothing.
    """
    decisions: list[Any] = []
    p.run(graph.copy(), _quiet(ctx, decisions))
    changed = {d.value for d in decisions if d.changed}

    def touches(n: Node) -> bool:
        read = (v for v in n.operands if isinstance(v, Parameter))
        return not changed.isdisjoint(map(named, (*n.results, *read)))

    own = getattr(p, part_field(type(p)) or "", None)
    part = set(graph.nodes if own is None else own.nodes_left(graph))
    places = [n.loc.module for n in graph.nodes if n in part and n.loc and touches(n)]
    return list(dict.fromkeys(places))


def _quiet(ctx: Context, decisions: list[Any]) -> Context:
    """Where a step is only tried: what it tells is told when it is run."""
    return replace(
        ctx, decisions=decisions, progress=lambda done, total: None, say=lambda what: None,
        products={**ctx.products, "notes": []},
    )  # fmt: skip


def alone(p: Pass, layer: str | None) -> Pass:
    """A step for one layer, and for what it was restricted to already; None: as it is."""
    if layer is None:
        return p
    name = part_field(type(p))
    assert name is not None
    own = getattr(p, name)
    text = json.dumps(layer) if own is None else f"({own}) & {json.dumps(layer)}"
    return replace(p, **{name: parse_selector(text)})  # type: ignore[type-var]


def _changed(graph: Graph, variant: Graph) -> tuple[set[Node], set[Node]]:
    return differences(graph, variant)


def _shape(part: Graph) -> object:
    """What a part's time depends on: its ops and types, not its weights' numbers."""
    places: dict[Value, int] = {}
    for v in (*part.inputs, *part.parameters.values(), *(r for n in part.nodes for r in n.results)):
        places[v] = len(places)
    types = tuple(str(v.type) for v in places)
    nodes = tuple((n.op, n.attributes, tuple(places[v] for v in n.operands)) for n in part.nodes)
    return types, nodes
