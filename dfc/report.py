"""What was done, kept and undone, and why: the story of one compilation as data and as text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from dfc.counting import counted
from dfc.planning.host import machine_text
from dfc.rewrite.driver import PassReport


@dataclass(frozen=True)
class EngineReport:
    """One engine that was considered.

    Units:  p50_ms is the median of alternating runs on the example; None when not measured.
    """

    name: str
    verdict: str  # "chosen", "slower", "not faster", "refused", "wrong", "not tried"
    reason: str = ""
    p50_ms: float | None = None
    spread_ms: float | None = None
    error: float | None = None
    form: str = ""  # of the graph: as it was rewritten, or "as captured"

    @property
    def label(self) -> str:
        """The engine, and the graph's form where it is another than the rewritten one."""
        return f"{self.name}, {self.form}" if self.form else self.name


@dataclass(frozen=True)
class Decision:
    """What was measured before something was kept, undone or taken.

    Units:  ratio is time after over time before, between low and high; None when nothing was timed,
            the bounds also when there were too few runs for any.
    """

    step: str
    verdict: str  # "kept", "reverted", "taken", "not taken"
    reason: str = ""
    engine: str = ""
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    runs: int = 0

    def __post_init__(self) -> None:
        if self.high == float("inf"):  # JSON has no such number
            object.__setattr__(self, "low", None)
            object.__setattr__(self, "high", None)


@dataclass(frozen=True)
class RequirementReport:
    """One `require` of the recipe, with both sides in numbers.

    `undecided` says that it is not met because there are too few items to show it.
    """

    text: str
    met: bool
    numbers: str
    undecided: bool = False

    @property
    def verdict(self) -> str:
        return "met" if self.met else "NOT SHOWN" if self.undecided else "NOT MET"


@dataclass(frozen=True)
class GoalReport:
    """One goal: the original's value and the result's, in base units; `how` says where of times."""

    text: str
    before: float
    after: float
    dimension: str
    how: str = ""


@dataclass(frozen=True)
class TriedReport:
    """One combination of a recipe's holes.

    `values` are the goals' in base units; `missed` the requirements that it does not meet; `best`
    says that no other combination is better in one goal and as good in the others.
    """

    choices: dict[str, str]
    values: dict[str, float]
    missed: list[str] = field(default_factory=list)
    best: bool = False
    chosen: bool = False
    failed: str = ""


@dataclass(repr=False)
class Report:
    """The facts of one compilation.

    Units:  bytes of weights; seconds; errors are absolute, against the float64 witness.
    """

    model: str = ""
    nodes_before: int = 0
    nodes_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    capture_s: float = 0.0
    passes_s: float = 0.0
    proved: bool = False
    proof: str = ""
    lossy: bool = False  # it changes results on purpose: its own are the standard for engines
    rtol: float = 0.0  # what its passes promise, or the recipe allows: engines are held to it
    error: float | None = None
    original_error: float | None = None
    passes: list[PassReport] = field(default_factory=list)
    engines: list[EngineReport] = field(default_factory=list)
    before_ms: float | None = None
    after_ms: float | None = None
    notes: list[str] = field(default_factory=list)
    recipe: str = ""
    decisions: list[Decision] = field(default_factory=list)
    goals: list[GoalReport] = field(default_factory=list)
    requirements: list[RequirementReport] = field(default_factory=list)
    tried: list[TriedReport] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)  # what the times are of

    @property
    def missed(self) -> list[RequirementReport]:
        return [r for r in self.requirements if not r.met]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str) -> Report:
        data: dict[str, Any] = json.loads(text)
        for name, kind in _PARTS.items():
            data[name] = [kind(**x) for x in data.get(name, [])]
        return Report(**data)

    def __str__(self) -> str:
        nodes = f"{self.nodes_before} -> {counted(self.nodes_after, 'node')}"
        lines = [f"{self.model}: {nodes}, {self.proof}"]
        for p in self.passes:
            tail = f": {p.reason}" if p.reason else ""
            lines.append(
                f"  {p.step:<20} {p.changes:>5} changes {p.ms:>9.1f} ms  {p.verdict}{tail}"
            )
        for d in self.decisions:
            lines.append(f"  {d.step}: {d.verdict}" + (f": {d.reason}" if d.reason else ""))
        if self.machine:
            lines.append(f"  measured on {machine_text(self.machine)}")
        for e in self.engines:
            time = f"{e.p50_ms:.3f} ms" if e.p50_ms is not None else "not measured"
            tail = f": {e.reason}" if e.reason else ""
            lines.append(f"  engine {e.label:<13} {time}  {e.verdict}{tail}")
        lines += [f"  tried {tried_text(t)}" for t in self.tried]
        lines += [f"  {goal_text(g)}" for g in self.goals]
        lines += [f"  {requirement_text(r)}" for r in self.requirements]
        lines += [f"  note: {n}" for n in self.notes]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<dfc report of {self.model}: {self.proof}>"

    def _repr_html_(self) -> str:
        """For notebooks: the page in a frame, so that its style is its own."""
        text = escape(self.to_html())
        return f'<iframe srcdoc="{text}" style="width:100%;height:32em;border:0"></iframe>'

    def to_html(self) -> str:
        """One self-contained page."""
        from dfc.report_page import page

        return page(self)


_PARTS: Mapping[str, Callable[..., Any]] = {
    "passes": PassReport, "engines": EngineReport, "decisions": Decision, "goals": GoalReport,
    "requirements": RequirementReport, "tried": TriedReport,
}  # fmt: skip


def goal_text(g: GoalReport) -> str:
    from dfc.lang.units import amount_text

    values = f"{amount_text(g.before, g.dimension)} -> {amount_text(g.after, g.dimension)}"
    return f"{g.text}: {values}" + (f" ({g.how})" if g.how else "")


def requirement_text(r: RequirementReport) -> str:
    return f"require {r.text}: {r.verdict}: {r.numbers}"


def tried_text(t: TriedReport) -> str:
    """A combination in one line: its choices, then its goals, then what became of it."""
    choices = ", ".join(f"{k}={v}" for k, v in t.choices.items())
    values = ", ".join(f"{k} {v:.4g}" for k, v in t.values.items())
    marks = ["chosen"] * t.chosen + ["pareto"] * t.best + [f"misses {m}" for m in t.missed]
    return "; ".join(filter(None, [choices, values, t.failed, ", ".join(marks)]))
