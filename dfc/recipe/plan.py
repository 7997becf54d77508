"""A resolved recipe: every step a pass with its options, every goal a quantity; no text.

`str(plan)` is the recipe as one text without imports, which reads back to an equal plan.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dfc.errors import Span
from dfc.lang.units import Amount, amount_text
from dfc.lang.wording import value_text
from dfc.rewrite.pass_ import Pass, find_pass

if TYPE_CHECKING:
    from dfc.planning.machine import Machine

BASELINE, BEFORE = "baseline", "before"
# What is measured, and in which dimension.
QUANTITIES: Mapping[str, str] = {
    "latency": "time", "throughput": "rate", "size": "bytes", "peak_memory": "bytes",
    "error": "number",
}  # fmt: skip
VERIFY_MODES = ("each", "end", "none")
PERCENTILES = ("p50", "p95", "p99")
LOWER_IS_BETTER = frozenset({"latency", "size", "peak_memory", "error"})


@dataclass(frozen=True)
class Hole:
    """An option that is searched: the first choice is the default."""

    name: str
    choices: tuple[Any, ...]

    def __str__(self) -> str:
        return f"tune({', '.join(map(value_text, self.choices))})"


@dataclass(frozen=True)
class Quantity:
    """Something measured: `latency(p95)` of the version after a label, or of the final one.

    `version` is "" for the final graph, "baseline", "before", or a label.
    """

    name: str
    detail: str = ""
    version: str = ""

    def __str__(self) -> str:
        if self.version in (BASELINE, BEFORE):
            return self.version
        inside = ", ".join(filter(None, (self.version, self.detail)))
        return f"{self.name}({inside})" if inside else self.name


Lookup = Callable[[Quantity], float]


@dataclass(frozen=True)
class Test:
    """A comparison of quantities and amounts. `dimension` is that of both sides."""

    op: str
    left: Term
    right: Term
    dimension: str = "number"

    __test__ = False  # no test of pytest's

    def evaluate(self, lookup: Lookup) -> bool:
        return bool(_COMPARE[self.op](value_of(self.left, lookup), value_of(self.right, lookup)))

    def gap(self, lookup: Lookup) -> float:
        """How far the sides lie apart, as a part of the right one."""
        left, right = value_of(self.left, lookup), value_of(self.right, lookup)
        found = abs(left - right) / (abs(right) or 1.0)
        return math.inf if math.isnan(found) else found

    def explain(self, lookup: Lookup) -> str:
        """What the sides come to; an amount that stands there by itself is told by the test."""
        both = (self.left, self.right)
        sides = [t for t in both if not isinstance(t, Amount)] or both
        decimal = "iB" not in str(self)  # told as it was asked
        found = [
            (term_text(t), amount_text(value_of(t, lookup), self.dimension, decimal)) for t in sides
        ]
        return ", ".join(f"{text} is {number}" for text, number in found)

    def quantities(self) -> Iterator[Quantity]:
        yield from quantities_of(self.left)
        yield from quantities_of(self.right)

    def __str__(self) -> str:
        return f"{term_text(self.left)} {self.op} {term_text(self.right)}"


@dataclass(frozen=True)
class Arithmetic:
    op: str
    left: Term
    right: Term


Term = Quantity | Amount | Arithmetic
_COMPARE: Mapping[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
    "==": operator.eq, "!=": operator.ne,
}  # fmt: skip


def _divide(a: float, b: float) -> float:
    """a / b; what is divided by nothing is beyond all bounds."""
    return a / b if b else math.copysign(math.inf, a) if a else math.nan


_COMPUTE: Mapping[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": _divide,
}  # fmt: skip


COMPARISONS = frozenset(_COMPARE)
ARITHMETIC = frozenset(_COMPUTE)


def value_of(term: Term, lookup: Lookup) -> float:
    if isinstance(term, Quantity):
        return lookup(term)
    if isinstance(term, Amount):
        return term.value
    return float(_COMPUTE[term.op](value_of(term.left, lookup), value_of(term.right, lookup)))


def quantities_of(term: Term) -> Iterator[Quantity]:
    if isinstance(term, Quantity):
        yield term
    elif isinstance(term, Arithmetic):
        yield from quantities_of(term.left)
        yield from quantities_of(term.right)


def term_text(term: Term, level: int = 0) -> str:
    if isinstance(term, Quantity):
        return str(term)
    if isinstance(term, Amount):
        return str(term)
    own = 1 if term.op in "+-" else 2
    text = f"{term_text(term.left, own)} {term.op} {term_text(term.right, own + 1)}"
    return f"({text})" if own < level else text


@dataclass(frozen=True)
class Keep:
    """A condition for keeping a step: "faster", "smaller", or a comparison with `before`."""

    test: str | Test
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"keep if {self.test}"


@dataclass(frozen=True)
class PassStep:
    """One pass with its options; an option may be a hole."""

    label: str
    name: str
    options: Mapping[str, Any]
    keep: Keep | None = None
    span: Span | None = field(default=None, compare=False)

    @property
    def holes(self) -> tuple[Hole, ...]:
        return tuple(v for v in self.options.values() if isinstance(v, Hole))

    def build(self, chosen: Mapping[str, Any]) -> Pass:
        """The pass with its holes filled: by name, or with their first choice."""
        options = {
            k: chosen.get(v.name, v.choices[0]) if isinstance(v, Hole) else v
            for k, v in self.options.items()
        }
        return find_pass(self.name, options)

    def __str__(self) -> str:
        words = [f"{self.label}: " * (self.label != self.name) + self.name]
        if self.keep:
            words.append(str(self.keep))
        given = [f"{k}={value_text(v)}" for k, v in self.options.items()]
        if given:
            words.append("with " + ", ".join(given))
        return " ".join(words)


@dataclass(frozen=True)
class VerifyStep:
    """How the steps that follow are proved: each, end or none."""

    mode: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        given = ", ".join(f"{k}={value_text(v)}" for k, v in self.options.items())
        return f"verify {self.mode}" + (f" with {given}" if given else "")


@dataclass(frozen=True)
class EmitStep:
    """What is written beside the package."""

    format: str
    options: Mapping[str, Any] = field(default_factory=dict)
    span: Span | None = field(default=None, compare=False)

    def __str__(self) -> str:
        given = ", ".join(f"{k}={value_text(v)}" for k, v in self.options.items())
        return f"emit {self.format}" + (f" with {given}" if given else "")


@dataclass(frozen=True)
class RevertStep:
    """Go back to the graph as it was before a label."""

    label: str

    def __str__(self) -> str:
        return f"revert {self.label}"


@dataclass(frozen=True)
class KeepStep:
    """Keep what a label did only if a condition holds."""

    label: str
    keep: Keep

    def __str__(self) -> str:
        return f"keep {self.label} if {self.keep.test}"


@dataclass(frozen=True)
class WhenStep:
    """Steps that are taken if a comparison holds at that point, and others if not."""

    test: Test
    then: tuple[PlanStep, ...]
    otherwise: tuple[PlanStep, ...] = ()

    def __str__(self) -> str:
        text = f"when {self.test} {_block(self.then)}"
        return text + (f" else {_block(self.otherwise)}" if self.otherwise else "")


PlanStep = PassStep | VerifyStep | EmitStep | RevertStep | KeepStep | WhenStep


@dataclass(frozen=True)
class Goal:
    """minimize or maximize a quantity; several goals count in their order."""

    direction: str
    quantity: Quantity

    def __str__(self) -> str:
        return f"{self.direction} {self.quantity}"


@dataclass(frozen=True)
class Metric:
    """A user's metric: called with a way to run the model, and with data where it names some."""

    name: str
    data: str | None
    higher_is_better: bool

    def __str__(self) -> str:
        on = f" on {self.data}" if self.data else ""
        return f"metric {self.name}{on}, {'higher' if self.higher_is_better else 'lower'} is better"


@dataclass(frozen=True)
class Device:
    name: str
    kind: str
    facts: Mapping[str, Any]
    span: Span | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"device {self.name} : {_made(self.kind, self.facts)}"


@dataclass(frozen=True)
class Link:
    source: str
    sink: str
    both: bool
    kind: str
    facts: Mapping[str, Any]
    span: Span | None = field(default=None, compare=False)

    def __str__(self) -> str:
        arrow = "<->" if self.both else "->"
        return f"link {self.source} {arrow} {self.sink} : {_made(self.kind, self.facts)}"


@dataclass(frozen=True)
class Target:
    """The devices that a model is compiled for, and the links between them."""

    name: str
    devices: tuple[Device, ...]
    links: tuple[Link, ...] = ()

    def machine(self) -> Machine:
        """The target as the planner sees it.

        Raises:  DfcError N045 for a device that lacks what a plan needs.
        """
        from dfc.recipe.machines import machine_of

        return machine_of(self)

    def __str__(self) -> str:
        return f"target {self.name} {_block((*self.devices, *self.links))}"


@dataclass(frozen=True)
class Plan:
    """A whole recipe, resolved: nothing is left to look up but data and metrics."""

    name: str
    steps: tuple[PlanStep, ...]
    goals: tuple[Goal, ...] = ()
    requirements: tuple[Test, ...] = ()
    target: Target | None = None
    data: tuple[str, ...] = ()
    metrics: tuple[Metric, ...] = ()
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @property
    def holes(self) -> tuple[Hole, ...]:
        return tuple(h for p in self.passes() for h in p.holes)

    def passes(self) -> Iterator[PassStep]:
        """Every pass step, those inside `when` included."""
        yield from passes_of(self.steps)

    def metric(self, name: str) -> Metric | None:
        return next((m for m in self.metrics if m.name == name), None)

    def __str__(self) -> str:
        parts = ["dfc 1"]
        if self.data:
            parts.append(f"data {', '.join(self.data)}")
        parts += map(str, self.metrics)
        if self.target:
            parts += ["", str(self.target)]
        head = f"recipe {self.name}" + (f" for {self.target.name}" if self.target else "")
        body = [*self.goals, *(f"require {r}" for r in self.requirements), *self.steps]
        return "\n".join([*parts, "", f"{head} {_block(body)}"]) + "\n"


def passes_of(steps: Sequence[PlanStep]) -> Iterator[PassStep]:
    """Every pass step of some steps, those inside `when` included."""
    for step in steps:
        if isinstance(step, PassStep):
            yield step
        elif isinstance(step, WhenStep):
            yield from passes_of(step.then)
            yield from passes_of(step.otherwise)


def _block(items: Sequence[object]) -> str:
    lines = [f"  {line}" for item in items for line in str(item).splitlines()]
    return "{\n" + "".join(f"{line}\n" for line in lines) + "}"


def _made(kind: str, facts: Mapping[str, Any]) -> str:
    return f"{kind}({', '.join(f'{k}={value_text(v)}' for k, v in facts.items())})"
