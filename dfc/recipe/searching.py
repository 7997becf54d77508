"""Filling the holes of a plan: combinations are tried within a budget, the best one is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from dfc.errors import DfcError
from dfc.lang import syntax as s
from dfc.lang.source import Source
from dfc.lang.units import Amount, amount, amount_text
from dfc.recipe.execute import Executor, Outcome
from dfc.recipe.holes import Chosen, chosen_text, combinations, count
from dfc.recipe.plan import QUANTITIES, Goal, Plan
from dfc.recipe.quantities import TIMED
from dfc.report import TriedReport

MOST = 64  # combinations, unless a budget says otherwise
_CLOSE = 0.02  # two timings nearer than this are equal, and the next goal decides


@dataclass(frozen=True)
class Budget:
    """How long a search may take: seconds, a number of combinations, or both."""

    seconds: float = math.inf
    count: int = MOST

    @staticmethod
    def of(given: str | int | float | Budget | None) -> Budget:
        """`60s` or `5min` is time, `20` is a number of combinations; a float is seconds.

        Raises:  DfcError Q052.
        """
        if given is None or isinstance(given, Budget):
            return given or Budget()
        if isinstance(given, float) and given > 0:
            return Budget(seconds=given, count=10**9)
        if isinstance(given, int) and given > 0:
            return Budget(count=given)
        found = _amount(str(given))
        if found is not None and found.value > 0:
            if found.dimension == "time":
                return Budget(seconds=found.value, count=10**9)
            if found.dimension == "number" and float(found.value).is_integer():
                return Budget(count=int(found.value))
        raise DfcError(
            "Q052", f"`{given}` is no budget", help="write a time, as 60s, or a number of tries"
        )


def _amount(text: str) -> Amount | None:
    from dfc.lang.reader import parse_expression

    source = Source(text, "--budget")
    try:
        x = parse_expression(source)
    except DfcError:
        return None
    found = amount(x, source) if isinstance(x, s.Number) else None
    return found if isinstance(found, Amount) else None


@dataclass
class Trial:
    """One combination that was carried out."""

    chosen: Chosen
    values: dict[str, float] = field(default_factory=dict)  # by the goal's text
    missed: tuple[str, ...] = ()
    gap: float = 0.0  # by how much it misses them
    failed: str = ""

    @property
    def usable(self) -> bool:
        return not self.failed


@dataclass
class Search:
    """The best outcome, what it was chosen from, and what was left out."""

    outcome: Outcome
    chosen: Chosen
    reports: list[TriedReport]
    notes: list[str]


def search(executor: Executor, plan: Plan, budget: Budget) -> Search:
    """Carry out the plan; where it has holes and goals, with the best of their choices.

    A combination that meets every `require` beats those that do not, and where none does the
    nearest is best; then the goals count in their order, and of equals the earlier one stays.
    Raises:  DfcError when no combination can be carried out.
    """
    if not plan.holes:
        return Search(executor.run(plan), {}, [], [])
    if not plan.goals:
        first = next(combinations(plan))
        shown = ", ".join(f"{k}={v}" for k, v in chosen_text(first).items())
        note = f"the recipe has no goal to choose by: {shown}, the first choices, were taken"
        return Search(executor.run(plan, first), first, [], [note])
    return _Searching(executor, plan, budget).run()


class _Searching:
    def __init__(self, executor: Executor, plan: Plan, budget: Budget) -> None:
        self.x, self.plan, self.budget = executor, plan, budget
        self.trials: list[Trial] = []
        self.best: tuple[Trial, Outcome] | None = None
        self.error: DfcError | None = None

    def run(self) -> Search:
        total = count(self.plan)
        most = min(total, self.budget.count)
        start = time.perf_counter()
        for chosen in islice(combinations(self.plan), most):
            if self.trials and time.perf_counter() - start > self.budget.seconds:
                break
            self._tell(len(self.trials) + 1, most, chosen)
            self._try(chosen)
        if self.best is None:
            assert self.error is not None
            raise self.error
        winner, outcome = self.best
        notes = []
        if len(self.trials) < total:
            spent = time.perf_counter() - start
            tried = f"{len(self.trials)} of {total} combinations"
            notes.append(
                f"{tried} {'was' if len(self.trials) == 1 else 'were'} tried in {spent:.0f} s; "
                "a larger budget tries the others"
            )
        return Search(outcome, winner.chosen, self._reports(winner), notes)

    def _tell(self, number: int, total: int, chosen: Chosen) -> None:
        shown = ", ".join(f"{k}={v}" for k, v in chosen_text(chosen).items())
        best = ""
        if self.best:
            values = self.best[0].values
            best = "; best so far " + ", ".join(
                goal_value_text(g, values[str(g.quantity)]) for g in self.plan.goals
            )
        self.x.say(f"trying {number} of {total}: {shown}{best}")

    def _try(self, chosen: Chosen) -> None:
        trial = Trial(chosen)
        self.trials.append(trial)
        try:
            outcome = self.x.run(self.plan, chosen)
            versions = version_lookup(self.x, outcome)
            for goal in self.plan.goals:
                q = goal.quantity
                trial.values[str(q)] = self.x.meter.value(q, versions(q.version))
            answers = {str(r): self.x.meter.answer(r, versions) for r in self.plan.requirements}
            trial.missed = tuple(r for r, a in answers.items() if not a.holds)
            trial.gap = sum(answers[r].gap for r in trial.missed)
        except DfcError as e:
            if e.code in ("K040", "K041") or e.code[0] not in "KXVR":
                raise  # the user's code or text is wrong, whatever the choices
            trial.failed, self.error = e.message, e
            return
        finally:
            self.x.meter.forget()
        if self.best is None or better(trial, self.best[0], self.plan.goals):
            self.best = trial, outcome

    def _reports(self, winner: Trial) -> list[TriedReport]:
        front = pareto([t for t in self.trials if t.usable and not t.missed], self.plan.goals)
        several = len(self.plan.goals) > 1
        return [
            TriedReport(
                chosen_text(t.chosen), t.values, list(t.missed), several and t in front,
                t is winner, t.failed,
            )
            for t in self.trials
        ]  # fmt: skip


def version_lookup(executor: Executor, outcome: Outcome) -> Callable[[str], Any]:
    """The graphs that goals and requirements speak of, when all steps are done."""

    def versions(name: str) -> Any:
        if not name:
            return outcome.graph
        return outcome.versions.get(name, executor.graph)

    return versions


def better(a: Trial, b: Trial, goals: Sequence[Goal]) -> bool:
    """Whether a trial is to be preferred: fewer requirements missed, or by less; then the goals."""
    if len(a.missed) != len(b.missed):
        return len(a.missed) < len(b.missed)
    if a.gap != b.gap:
        return a.gap < b.gap
    for goal in goals:
        x, y = (_cost(goal, t.values) for t in (a, b))
        if not _equal(goal, x, y):
            return x < y
    return False


def _cost(goal: Goal, values: Mapping[str, float]) -> float:
    value = values[str(goal.quantity)]
    if math.isnan(value):
        return math.inf
    return value if goal.direction == "minimize" else -value


def _equal(goal: Goal, x: float, y: float) -> bool:
    if goal.quantity.name in TIMED:
        return math.isclose(x, y, rel_tol=_CLOSE)
    return x == y


def pareto(trials: Iterable[Trial], goals: Sequence[Goal]) -> list[Trial]:
    """Those that no other beats in one goal without losing in another."""
    listed = list(trials)

    def beats(a: Trial, b: Trial) -> bool:
        pairs = [(_cost(g, a.values), _cost(g, b.values)) for g in goals]
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

    return [t for t in listed if not any(beats(o, t) for o in listed)]


def goal_value_text(goal: Goal, value: float) -> str:
    dimension = QUANTITIES.get(goal.quantity.name, "number")
    return f"{goal.quantity} {amount_text(value, dimension)}"
