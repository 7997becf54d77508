"""Which step, and which change within it, breaks a check that anybody wrote.

Like `git bisect`: a check says good, bad, or that it cannot tell; halving finds where it turns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dfc.counting import counted
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.rewrite.blame import describe_change, fields_of, firings_of, number_of
from dfc.rewrite.pass_ import EXACT, Context, Numerics, Pass
from dfc.rewrite.promises import FAULTS, run_checked, weaker
from dfc.rewrite.search import Border, find_border
from dfc.rewrite.verdicts import LeftOut

GOOD, BAD, UNKNOWN = True, False, None


@dataclass(frozen=True)
class Candidate:
    """A graph to check: after so many steps and, of the last one, at most so many changes."""

    graph: Graph
    steps: tuple[Pass, ...]
    promised: Numerics = EXACT

    def __str__(self) -> str:
        return ",".join(map(str, self.steps)) or "no step"


Check = Callable[[Candidate], bool | None]


@dataclass
class Conclusion:
    """What was found: the step (counted from 1) and the change of it that breaks the check.

    `step` is 0 when nothing does. `doubtful` counts the steps or changes before the one named that
    the check could not tell apart from it. `change` is None where the step cannot be cut further.
    """

    steps: tuple[str, ...]
    step: int = 0
    change: LeftOut | None = None
    at: int = 0  # which of the step's changes it is, counted from 1
    changes: int = 0  # how many changes the step makes
    tries: int = 0
    doubtful: int = 0
    skips: bool = False  # whether the step can go on without that change
    broken: str = ""  # the step does not even run
    notes: list[str] = field(default_factory=list)

    @property
    def culprit(self) -> str:
        return self.steps[self.step - 1] if self.step else ""


def bisect(
    graph: Graph,
    passes: Sequence[Pass],
    check: Check,
    *,
    ctx: Context | None = None,
    say: Callable[[str], None] = lambda what: None,
) -> Conclusion:
    """Find the first step that breaks a check, and the first change within that step.

    Needs:   a check that says the same of equal graphs. Where it turns more than once, one of the
             turns from good to bad is found.
    Raises:  DfcError Q020 when the check fails on the graph as it is.
    Cost:    each pass once; log2(steps) + log2(changes) checks, and two for the ends.
    """
    run = _Bisection(graph, list(passes), check, ctx or Context(), say)
    return run.conclusion()


class _Bisection:
    def __init__(
        self,
        graph: Graph,
        passes: list[Pass],
        check: Check,
        ctx: Context,
        say: Callable[[str], None],
    ) -> None:
        self.passes, self.check, self.ctx, self.say = passes, check, ctx, say
        self.found = Conclusion(tuple(map(str, passes)))
        self.versions = [Candidate(graph.copy(), ())]
        self.changes = [0]

    def conclusion(self) -> Conclusion:
        self._run_all()
        if self.tell(self.versions[0], "the graph as it is") is not GOOD:
            raise DfcError(
                "Q020",
                "the check does not pass on the graph as it is: no step is at fault",
                help="a check exits with 0 for good, with 1 for bad, with 125 for cannot tell",
            )
        last = len(self.versions) - 1
        if not self.found.broken and self.tell(self.versions[last], "all steps") is not BAD:
            return self.found
        if self.found.broken:
            if self.tell(self.versions[last], "the steps before it") is not BAD:
                self.found.step = last + 1
                return self.found
            self.found.broken = ""
        border = find_border(0, last, self._step_is_bad)
        self.found.step, self.found.doubtful = border.bad, border.between
        if not border.between:
            self._within(border.bad)
        return self.found

    def tell(self, candidate: Candidate, what: str) -> bool | None:
        self.found.tries += 1
        self.say(f"check {self.found.tries}: {what}")
        return self.check(candidate)

    def _run_all(self) -> None:
        """Every version once; passes change a copy, so each stays as it is."""
        for i, p in enumerate(self.passes):
            self.say(f"step {i + 1} of {len(self.passes)}: {p}")
            before = self.versions[-1]
            graph = before.graph.copy()
            try:
                report = run_checked(p, graph, self.ctx)
            except DfcError as e:
                if e.code not in FAULTS:
                    raise
                self.found.broken = e.render()
                return
            promised = weaker(before.promised, p.numerics) if report.changes else before.promised
            self.versions.append(Candidate(graph, (*before.steps, p), promised))
            self.changes.append(report.changes)

    def _step_is_bad(self, number: int) -> bool | None:
        what = f"after step {number}, {self.passes[number - 1]}"
        verdict = self.tell(self.versions[number], what)
        return None if verdict is UNKNOWN else verdict is BAD

    def _within(self, number: int) -> None:
        """The change of a step that breaks the check: the step again, with fewer changes."""
        step, self.found.changes = self.passes[number - 1], self.changes[number]
        if "limit" not in fields_of(step) or self.found.changes == 0:
            return
        if self.found.changes == 1:
            border = Border(0, 1, 0)
        else:
            border = find_border(0, self.found.changes, lambda n: self._change_is_bad(number, n))
        self.found.at, self.found.doubtful = border.bad, border.between
        self.found.skips = "skip" in fields_of(step)
        without, _ = self._cut(number, border.bad - 1)
        with_it, products = self._cut(number, border.bad)
        firings = firings_of(products, step)
        firing = firings[-1] if len(firings) == border.bad else None
        out = LeftOut(step.name, number_of(step, border.bad), "the check fails with it")
        self.found.change, _ = describe_change(without.graph, with_it.graph, firing, out)

    def _change_is_bad(self, number: int, changes: int) -> bool | None:
        candidate, _ = self._cut(number, changes)
        total = self.found.changes
        step = f"step {number}, {self.passes[number - 1].name}"
        what = f"{changes} of the {counted(total, 'change')} of {step}"
        verdict = self.tell(candidate, what)
        return None if verdict is UNKNOWN else verdict is BAD

    def _cut(self, number: int, changes: int) -> tuple[Candidate, dict[str, Any]]:
        """The version after a step of which at most so many changes are made."""
        before = self.versions[number - 1]
        step = dataclasses.replace(self.passes[number - 1], limit=changes)  # type: ignore[type-var]
        graph = before.graph.copy()
        ctx = dataclasses.replace(self.ctx, products={})
        run_checked(step, graph, ctx)
        promised = weaker(before.promised, step.numerics)
        return Candidate(graph, (*before.steps, step), promised), ctx.products


__all__ = ["Border", "Candidate", "Check", "Conclusion", "bisect"]
