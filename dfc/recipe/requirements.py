"""What a recipe asked for, measured in the end: its goals before and after, its requirements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dfc.counting import counted
from dfc.errors import DfcError, Diagnostic
from dfc.ir.graph import Graph
from dfc.recipe.certain import hopeless, pair_of
from dfc.recipe.plan import QUANTITIES, Plan, Test, quantities_of
from dfc.recipe.quantities import TIMED, Meter, Versions
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
        self.report = None if compiled is None else compiled.report

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process is told, and gets the report; what was compiled stays here."""
        make, (cls, args, facts) = super().__reduce__()
        return make, (cls, args, {**facts, "compiled": None})


def _message(r: RequirementReport) -> str:
    verb = "cannot be judged" if r.undecided else "is not met"
    return f"the requirement `{r.text}` {verb}: {r.numbers}"


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


def check_resolvable(plan: Plan, meter: Meter) -> None:
    """Refuse requirements on a metric that its items are too few to ever show, before any work.

    Only where a step changes results on purpose: else nothing is expected to change.
    Raises:  DfcError Q056.
    """
    if not any(s.build({}).numerics.is_lossy for s in plan.passes()):
        return
    problems = []
    for test in plan.requirements:
        pair = pair_of(test)
        if pair is None or pair[0].name not in meter.metrics or meter.why_not(pair):
            continue
        name, original = pair[0].name, meter.bench.original
        before = meter.scores(name, original)
        needed = hopeless(test, meter.metrics[name], before)
        if needed is not None:
            count = f"{needed:,}".replace(",", " ")
            items = counted(len(before.items), "item")
            message = (
                f"`require {test}` cannot be judged on {items}: even a result "
                "that is right and wrong on the same ones does not show it"
            )
            problems.append(Diagnostic("Q056", message, None, f"give `{name}` {count} items"))
    if problems:
        raise DfcError.of(problems)


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
        how = _where(meter, original, graph) if q.name in TIMED else ""
        found.append(GoalReport(str(goal), before, after, dimension, how))
    return found


def _where(meter: Meter, *versions: Graph) -> str:
    """The engines of timings, which are not those of the choice: it had the original on eager."""
    before, after = map(meter.on, versions)
    return f"both on {after}, timed anew" if before == after else f"{before} -> {after}, timed anew"


def requirement_reports(plan: Plan, meter: Meter, versions: Versions) -> list[RequirementReport]:
    """Every requirement, whether it is met, and both sides in numbers."""

    def one(test: Test) -> RequirementReport:
        answer = meter.answer(test, versions)
        return RequirementReport(str(test), answer.holds, answer.text, answer.undecided)

    return [one(r) for r in plan.requirements]
