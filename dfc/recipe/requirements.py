"""What a recipe asked for, measured in the end: its goals before and after, its requirements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dfc.errors import DfcError, Diagnostic
from dfc.ir.graph import Graph
from dfc.recipe.plan import QUANTITIES, Plan, Test, quantities_of
from dfc.recipe.quantities import Meter, Versions
from dfc.report import GoalReport, RequirementReport


class RequirementMissed(DfcError):
    """A `require` of the recipe does not hold; `compiled` is what was made all the same.

    Its `report` has every requirement with its numbers, and the combinations that were tried.
    """

    def __init__(self, missed: Sequence[RequirementReport], compiled: Any = None) -> None:
        first = missed[0]
        super().__init__("Q050", _message(first), status=5)
        self.diagnostics = tuple(Diagnostic("Q050", _message(r)) for r in missed)
        self.args = (self.render(),)
        self.compiled = compiled

    @property
    def report(self) -> Any:
        return self.compiled.report


def _message(r: RequirementReport) -> str:
    return f"the requirement `{r.text}` is not met: {r.numbers}"


def check_measurable(plan: Plan, meter: Meter) -> None:
    """Refuse a recipe whose goals or conditions cannot be measured, before any work is done.

    Raises:  DfcError Q053.
    """
    quantities = [*(g.quantity for g in plan.goals)]
    for r in plan.requirements:
        quantities += quantities_of(r.left)
        quantities += quantities_of(r.right)
    reason = meter.why_not(quantities)
    if reason:
        shown = next(q for q in quantities if q.name != "size")
        raise DfcError("Q053", f"`{shown.name}` cannot be measured: {reason}", status=2)


def goal_reports(plan: Plan, meter: Meter, versions: Versions) -> list[GoalReport]:
    """The goals' values for the original and for the result, each once."""
    found: list[GoalReport] = []
    original = meter.bench.original
    for goal in dict.fromkeys(plan.goals):
        q = goal.quantity
        dimension = QUANTITIES.get(q.name, "number")
        before = meter.value(q, original)
        graph: Graph = versions(q.version)
        after = before if graph is original else meter.value(q, graph)
        found.append(GoalReport(str(goal), before, after, dimension))
    return found


def requirement_reports(plan: Plan, meter: Meter, versions: Versions) -> list[RequirementReport]:
    """Every requirement, whether it is met, and both sides in numbers."""

    def one(test: Test) -> RequirementReport:
        answer = meter.answer(test, versions)
        return RequirementReport(str(test), answer.holds, answer.text)

    return [one(r) for r in plan.requirements]
