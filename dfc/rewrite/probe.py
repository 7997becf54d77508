"""Probes: inputs made from the user's example, with the original's outputs and the witness's.

The example itself, the same sizes with other values, and other sizes, size 1 among them; of a large
example, smaller ones. Values are drawn from the example's own dtype and range: a token id stays a
valid token id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dfc.calling import allowed
from dfc.errors import DfcError
from dfc.ir.expr import evaluate
from dfc.ir.graph import Graph
from dfc.ir.interpret import bind_inputs, interpret
from dfc.ir.types import TensorType
from dfc.ops.nudged import farthest
from dfc.rewrite.agree import Element, Verdict, judge, worst_elements
from dfc.rewrite.pass_ import Numerics

# The model's own kernels against the captured graph's: the same ones, in another layout at most.
CAPTURE_RTOL = 1e-5
# Of all values together: the double of each is computed, which takes seconds by then.
_MOST_ELEMENTS = 2**28


@dataclass
class Probe:
    """One set of flat inputs; the outputs are computed when they are first needed."""

    label: str
    inputs: list[Any]
    original: list[Any] | None = None
    witness: list[Any] | None = None
    ones: bool = False  # every dynamic size is at its smallest


# Flat inputs to output leaves, then mutations: the user's own model, where there is one.
Original = Callable[[Sequence[Any]], list[Any]]


@dataclass(frozen=True)
class Failure:
    """A probe on which a graph is wrong: what it gave, or why it gave nothing."""

    probe: Probe
    reason: str
    verdict: Verdict | None = None
    results: tuple[Any, ...] = ()

    @property
    def elements(self) -> tuple[Element, ...]:
        """The worst elements of the output that differs."""
        difference = self.verdict.difference if self.verdict else None
        if difference is None:
            return ()
        assert self.probe.original is not None and self.probe.witness is not None
        i = difference.output
        original, witness = self.probe.original[i], self.probe.witness[i]
        return worst_elements(self.results[i], original, witness, difference.allowed)


@dataclass
class Probes:
    """The probes of one model.

    Needs:  `graph` is the captured graph, with data, and nobody changes it. `run_original` is the
            model itself, so that a wrong capture is found too; without it, the graph is believed.
    """

    graph: Graph
    probes: list[Probe]
    seed: int = 0
    notes: list[str] = field(default_factory=list)
    run_original: Original | None = None
    made: int = 0  # how many there would be had none been dropped

    def __post_init__(self) -> None:
        self.made = self.made or len(self.probes)

    def check(self, graph: Graph, numerics: Numerics) -> Verdict:
        """Run a rewritten graph on every probe and judge it.

        Raises:  DfcError K020 when the graph fails.
        """
        worst = 0.0
        for probe in self.ready():
            verdict, _ = self.run(probe, graph, numerics)
            if not verdict.agrees:
                return verdict
            worst = max(worst, verdict.worst)
        return Verdict(worst)

    def run(
        self,
        probe: Probe,
        graph: Graph,
        numerics: Numerics,
        *,
        atol: float = 0.0,
        rtol: float = 0.0,
    ) -> tuple[Verdict, list[Any]]:
        """Run a graph on one probe, and judge it by what is promised and what the user allows.

        Raises:  DfcError K020 when the graph fails.
        """
        torch.manual_seed(self.seed)
        results = interpret(graph, clone(probe.inputs))
        assert probe.original is not None and probe.witness is not None
        exact = numerics.kind == "exact" and not atol and not rtol
        rtol = max(numerics.rtol, rtol)
        original, witness = probe.original, probe.witness
        verdict = judge(results, original, witness, exact=exact, rtol=rtol, atol=atol)
        return verdict, results

    def failure(
        self,
        graph: Graph,
        numerics: Numerics,
        *,
        atol: float = 0.0,
        rtol: float = 0.0,
        samples: int | None = None,
        only: Probe | None = None,
    ) -> Failure | float:
        """The first of the probes (so many of them, or one alone) that a graph is wrong on; the
        largest error when there is none."""
        worst = 0.0
        for probe in [only] if only else self.ready(samples):
            try:
                verdict, results = self.run(probe, graph, numerics, atol=atol, rtol=rtol)
            except DfcError as e:
                return Failure(probe, f"the rewritten graph fails: {e.message}")
            if not verdict.agrees:
                return Failure(probe, str(verdict.difference), verdict, tuple(results))
            worst = max(worst, verdict.worst)
        return worst

    def judge(self, run: Any, rtol: float = 0.0, rounded: bool = False) -> Verdict:
        """The same for anything that takes flat inputs: an engine's runner. It may be as far off as
        the graph goes by itself where its numbers move (`dfc.ops.nudged`)."""
        worst = 0.0
        for probe in self.ready():
            torch.manual_seed(self.seed)
            assert probe.original is not None and probe.witness is not None
            results, original, witness = run(clone(probe.inputs)), probe.original, probe.witness
            verdict = judge(results, original, witness, rtol=rtol, rounded=rounded)
            if not verdict.agrees:
                original = farthest(
                    self.graph, probe.inputs, original, witness, self.seed, rounded=rounded
                )
                verdict = judge(results, original, witness, rtol=rtol, rounded=rounded)
            if not verdict.agrees:
                return verdict
            worst = max(worst, verdict.worst)
        return Verdict(worst)

    def as_run_by(self, run: Any, rtol: float) -> Probes:
        """The same, with what another run gives as the originals': results are held to twice its
        error then. A run that is itself farther than `rtol` from the witness is no standard."""
        found = []
        for probe in self.ready():
            torch.manual_seed(self.seed)
            assert probe.original is not None and probe.witness is not None
            results = run(clone(probe.inputs))
            if not judge(results, probe.original, probe.witness, rtol=rtol).agrees:
                return self
            found.append(replace(probe, original=results))
        return Probes(self.graph, found, self.seed)

    def ready(self, count: int | None = None) -> Iterator[Probe]:
        """The probes that the original can run; the others are dropped with a note.

        With a count, the first so many; those that are not there yet are made.
        """
        while count is not None and len(self.probes) < count and self.made < 2 * count:
            self.probes.append(_further(self.graph, self.probes[0].inputs, self.made, self.seed))
            self.made += 1
        for probe in self.probes[:count]:
            if probe.original is None:
                try:
                    self._compute(probe)
                except DfcError as e:
                    if probe is self.probes[0] or e.code == "T010":
                        raise
                    self.probes.remove(probe)
                    self.notes.append(f"the probe with {probe.label} was dropped: {e.message}")
                    continue
            yield probe

    def look_aside(self, names: Sequence[str], inputs: Sequence[Any]) -> None:
        """Note it when the model gives other results than its graph for other values of these
        inputs: it then looks at them in Python, and takes another way than it took while traced.

        Why:  the graph is right for data like the example, so it is not refused.
        Cost:  one run of each; the witness is asked only where they differ.
        """
        assert self.run_original is not None
        try:
            torch.manual_seed(self.seed)
            captured = interpret(self.graph, clone(inputs))
            torch.manual_seed(self.seed)
            original = self.run_original(clone(inputs))
            if judge(original, captured, captured, rtol=CAPTURE_RTOL).agrees:
                return
            self._compute(Probe("", clone(inputs)))
        except DfcError as e:
            if e.code == "T010":
                shown = ", ".join(f"`{n}`" for n in names)
                found = e.message.partition(": ")[2]
                self.notes.append(
                    f"the captured graph is for values of {shown} like the example's: for others "
                    f"the model takes another way than it takes while traced ({found})"
                )

    def _compute(self, probe: Probe) -> None:
        """The captured graph's results, the witness's, and the model's own when it is at hand."""
        torch.manual_seed(self.seed)
        captured = interpret(self.graph, clone(probe.inputs))
        torch.manual_seed(self.seed)
        witness = interpret(self.graph, clone(probe.inputs), double=True)
        if self.run_original is not None:
            torch.manual_seed(self.seed)
            original = self.run_original(clone(probe.inputs))
            # The witness comes from the captured graph: the model is what must agree with it.
            verdict = judge(original, captured, witness, rtol=CAPTURE_RTOL)
            if not verdict.agrees:
                raise DfcError(
                    "T010",
                    f"the captured graph gives other results than the model with {probe.label}: "
                    f"{verdict.difference}",
                    help="its code may take another way while it is traced, as for a mask of ones; "
                    "else please report the model: `engine` and `passes` play no part in this",
                    status=3,
                )
        probe.original, probe.witness = captured, witness


def own_probes(probes: Iterable[Probe], graph: Graph, seed: int = 0) -> Probes:
    """The same inputs with a version's own results: it differs from the original on purpose."""
    return Probes(graph, [Probe(p.label, p.inputs) for p in probes], seed)


def clone(inputs: Sequence[Any]) -> list[Any]:
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]


def make_probes(
    graph: Graph,
    inputs: Sequence[Any],
    *,
    count: int | None = None,
    seed: int = 0,
    run_original: Original | None = None,
) -> Probes:
    """Probes around the user's flat example: `count` of them, or three at most."""
    generator = torch.Generator().manual_seed(seed)
    probes = [Probe("the example", clone(inputs))]
    sizes = bind_inputs(graph, inputs)
    plans: list[tuple[str, dict[str, Any]]] = []
    ones: dict[str, Any] | None = None
    if graph.ranges:
        ones = {s: max(low, 1) for s, (low, _) in graph.ranges.items() if s in sizes}
        other = {s: _other(sizes[s], *graph.ranges[s]) for s in ones}
        other = _affordable(graph, sizes, other)
        for plan in (ones, other):
            if allowed(graph, {**sizes, **plan}):
                plans.append((_label(plan), plan))
    plans.append(("other values", {}))
    for label, changed in plans[: 2 if count is None else max(count - 1, 0)]:
        made = _drawn(graph, inputs, {**sizes, **changed}, generator)
        probes.append(Probe(label, made, ones=changed is ones))
    while count is not None and len(probes) < count:
        probes.append(_further(graph, inputs, len(probes), seed))
    return Probes(graph, probes, seed, run_original=run_original)


def other_masks(graph: Graph, inputs: Sequence[Any]) -> tuple[list[str], list[Any]]:
    """The example with masks of ones where it leaves something out, and the other way about; and
    the names of these inputs, which are none without masks.

    Why:  models look in Python whether a mask leaves anything out, and probes draw their values
          from the example's: all ones stay all ones, and some zeros stay some.
    """
    names, made = [], clone(inputs)
    for i, (v, x) in enumerate(zip(graph.inputs, inputs, strict=True)):
        if not isinstance(x, torch.Tensor) or x.dim() < 2 or not x.numel() or x.is_complex():
            continue
        ones = x == 1
        if not bool((ones | (x == 0)).all()) or not bool(ones.any()):
            continue
        made[i] = torch.ones_like(x)
        if bool(ones.all()):
            made[i].reshape(-1)[-1] = 0
        names.append(v.name)
    return names, made


def _affordable(graph: Graph, sizes: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Sizes other than the example's, or halves of them while they are too much work."""
    while _elements(graph, {**sizes, **other}) > _MOST_ELEMENTS:
        # Odd ones: what a kernel or a rewrite takes for granted is even.
        least = {s: max(graph.ranges[s][0], 1) + 1 for s in other}
        smaller = {s: max(v // 2 | 1, min(least[s], v)) for s, v in other.items()}
        if smaller == other or not allowed(graph, {**sizes, **smaller}):
            break
        other = smaller
    return other


def _elements(graph: Graph, sizes: dict[str, Any]) -> int:
    """How many numbers the nodes compute at these sizes; what depends on data is left out."""
    found = (
        evaluate(r.type.numel, sizes)
        for n in graph.walk() for r in n.results if isinstance(r.type, TensorType)
    )  # fmt: skip
    return sum(x for x in found if isinstance(x, int))


def _drawn(
    graph: Graph, inputs: Sequence[Any], bindings: dict[str, Any], generator: torch.Generator
) -> list[Any]:
    """Inputs of these sizes, with values drawn from the example's."""
    made = [
        _like(x, v.type, bindings, generator) if isinstance(x, torch.Tensor) else x
        for x, v in zip(inputs, graph.inputs, strict=True)
    ]
    return [bindings.get(v.name, x) if not isinstance(x, torch.Tensor) else x
            for x, v in zip(made, graph.inputs, strict=True)]  # fmt: skip


def _further(graph: Graph, inputs: Sequence[Any], number: int, seed: int) -> Probe:
    """One more probe than anybody asked for by name: sizes and values by its number."""
    generator = torch.Generator().manual_seed(seed + number)
    sizes = bind_inputs(graph, inputs)
    for _ in range(8):
        plan = {}
        for s, (low, high) in graph.ranges.items():
            if s in sizes:
                least, most = max(low, 1), 2 * sizes[s] + 2
                most = most if high is None else min(most, high)
                at = torch.randint(max(most - least, 0) + 1, (1,), generator=generator)
                plan[s] = least + int(at)
        if allowed(graph, {**sizes, **plan}):
            plan = _affordable(graph, sizes, plan)
            break
        plan = {}
    label = f"{_label(plan)}, other values" if plan else "other values"
    label += f", number {number + 1}"
    return Probe(label, _drawn(graph, inputs, {**sizes, **plan}, generator))


def _label(sizes: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in sizes.items())


def _other(size: int, low: int, high: int | None) -> int:
    """Another size in range, not too far from the example's."""
    for candidate in (size + 1, size - 1, size):
        if candidate >= max(low, 1) and (high is None or candidate <= high):
            return candidate
    return size


def _like(
    x: torch.Tensor, type: Any, bindings: dict[str, Any], generator: torch.Generator
) -> torch.Tensor:
    """A tensor of the declared shape with values drawn from the example's."""
    assert isinstance(type, TensorType)
    sizes: list[Any] = [evaluate(s, bindings) for s in type.shape]
    shape = [int(s) for s in sizes]
    count = 1
    for s in shape:
        count *= s
    if not x.numel() or not count:
        return torch.zeros(shape, dtype=x.dtype)
    flat = x.detach().reshape(-1)
    at = torch.randint(flat.numel(), (count,), generator=generator)
    drawn = flat[at].reshape(shape).clone()
    if x.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        low, high = flat.min(), flat.max()
        noise = torch.randn(shape, generator=generator) * 0.05
        finite = bool(low.isfinite() and high.isfinite())
        if finite and bool(low == high):
            # A constant example says nothing of what the model does with its values.
            drawn = (drawn.double() * (1 + noise)).to(x.dtype)
        elif finite and bool((flat != flat.round()).any()):
            drawn = (drawn.double() * (1 + noise)).clamp(low.double(), high.double()).to(x.dtype)
    return drawn


__all__ = ["Failure", "Probe", "Probes", "clone", "make_probes"]
