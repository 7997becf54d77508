"""From a pass that is wrong to the one rewrite at fault, and on without it.

A pass with a field `limit` is run again with fewer and fewer changes, until the first one that
breaks the probe is found. A pass that also has `skip` goes on without that one; a pass that names
its rewrites in `Context.products[name].firings` (as `fuse` does) is told by rule and node.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dfc.counting import counted
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.rewrite.agree import Element
from dfc.rewrite.divergence import Divergence, first_divergence
from dfc.rewrite.pass_ import Context, Numerics, Pass
from dfc.rewrite.probe import Failure, Probe, Probes
from dfc.rewrite.promises import FAULTS, run_checked, weaker
from dfc.rewrite.search import NotBroken, bad_bound, first_bad
from dfc.rewrite.verdicts import LeftOut, PassReport

PER_RULE = 4  # wrong rewrites of one rule after which the rule is left out as a whole
IN_ALL = 16  # wrong rewrites after which the pass is undone
ROUNDS = 2 * IN_ALL + PER_RULE

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wrong:
    """How a run of a pass is wrong: on a probe, or before anything could run."""

    reason: str
    probe: Probe | None = field(default=None, repr=False)
    elements: tuple[Element, ...] = ()
    error: float | None = None


@dataclass(frozen=True)
class Proof:
    """What results are judged by: the probes, and what the user allows beside the promises."""

    probes: Probes
    atol: float = 0.0
    rtol: float = 0.0
    samples: int | None = None

    def judge(self, graph: Graph, promised: Numerics, only: Probe | None = None) -> Wrong | float:
        """How the graph is wrong on all probes or on one; its largest error when it is not."""
        found = self.probes.failure(
            graph, promised, atol=self.atol, rtol=self.rtol, samples=self.samples, only=only
        )
        if isinstance(found, Failure):
            worst = found.verdict.worst if found.verdict else None
            return Wrong(found.reason, found.probe, found.elements, worst)
        return found


@dataclass(frozen=True)
class Trial:
    """A pass run on a copy of the graph: what it made of it, and how that is wrong."""

    step: Pass
    graph: Graph
    report: PassReport | None
    products: dict[str, Any]
    firings: tuple[Any, ...]
    wrong: Wrong | None
    error: float | None = None

    @property
    def changes(self) -> int:
        return self.report.changes if self.report else 0


@dataclass(frozen=True)
class Fault:
    """A wrong rewrite with all that is needed to see it again.

    `whole` is the graph before the pass and `step` the pass that makes it wrong; `before` is the
    graph with every rewrite but the wrong one. `rule` is the rule (dfc.rewrite.rule.Rule), `nodes`
    the names in `before` that the rewrite touches.
    """

    step: Pass
    whole: Graph
    before: Graph
    left_out: LeftOut
    proof: Proof
    promised: Numerics
    probe: Probe | None
    rule: Any = None
    nodes: tuple[str, ...] = ()


OnFault = Callable[[Fault], str]  # gives where the reproducer is, "" for nowhere


@dataclass
class Blame:
    """Finds what is wrong in one pass, again and again, until the rest is right.

    Needs:  `before` is the graph before the pass and `products` the context's at that time.
    """

    step: Pass
    before: Graph
    ctx: Context
    products: dict[str, Any]
    proof: Proof
    promised: Numerics  # before the pass
    say: Say
    on_fault: OnFault | None = None
    strict: bool = False
    left_out: list[LeftOut] = field(default_factory=list)

    def settle(self, wrong: Wrong) -> Trial | LeftOut:
        """The pass without its wrong rewrites, proved; or why all of it must go.

        Raises:  DfcError V030 (status 4) under `strict`, after the first one was found.
        """
        shaken = self._shaken(wrong)
        if shaken is not None:
            reason = (
                f"nothing can be said: the graph before it is no longer right ({shaken.reason})"
            )
            return self._whole(Wrong(reason, wrong.probe), None)
        trial = self.attempt(self.step, prove=wrong.probe or False)
        if trial.wrong is None:
            return self._whole(
                Wrong("it is not deterministic: a second run gave another graph", wrong.probe), None
            )
        if not self._bisectable(wrong):
            return self._whole(wrong, trial)
        step, good, probe = self.step, 0, trial.wrong.probe
        for _ in range(ROUNDS):
            if trial.wrong is None:
                return trial
            if trial.wrong.probe is not probe:  # what is good on one probe may be bad on another
                good, probe = 0, trial.wrong.probe
            try:
                found = self._culprit(step, good, trial)
            except NotBroken:
                return self._whole(
                    Wrong("it fails with all of its changes, but with no number of them"), None
                )
            rest, good = self._without(step, *found)
            if rest is None or len(self.left_out) >= IN_ALL:
                return self._whole(Wrong("too much of it is wrong"), None)
            step = rest
            trial = self.attempt(step, prove=True)
        return self._whole(Wrong("leaving out what is wrong comes to no end"), None)

    def attempt(self, step: Pass, *, limit: int | None = None, prove: Probe | bool = True) -> Trial:
        """Run the pass on a copy with at most so many changes, and prove it: on all probes, on
        one, or not at all."""
        graph = self.before.copy()
        products = {k: copy.copy(v) for k, v in self.products.items()}
        old = len(firings_of(products, step))
        limited = step if limit is None else dataclasses.replace(step, limit=limit)  # type: ignore[type-var]
        ctx = dataclasses.replace(self.ctx, products=products)
        report, wrong, error = None, None, None
        try:
            report = run_checked(limited, graph, ctx)
        except DfcError as e:
            if e.code not in FAULTS:
                raise
            wrong = Wrong(said(e))
        promised = weaker(self.promised, step.numerics)
        if report and report.changes and prove is not False and promised.kind != "changes":
            judged = self.proof.judge(graph, promised, None if prove is True else prove)
            wrong, error = (judged, None) if isinstance(judged, Wrong) else (None, judged)
        firings = firings_of(products, step)[old:]
        return Trial(limited, graph, report, products, firings, wrong, error)

    # Finding

    def _shaken(self, wrong: Wrong) -> Wrong | None:
        """How the graph before the pass fails its own proof by now: a model that gives other
        results from run to run, or weights that somebody wrote to."""
        if wrong.probe is None or self.promised.kind == "changes":
            return None
        found = self.proof.judge(self.before, self.promised, wrong.probe)
        return found if isinstance(found, Wrong) else None

    def _bisectable(self, wrong: Wrong) -> bool:
        """Whether the pass does nothing when it may do nothing."""
        if "limit" not in fields_of(self.step):
            return False
        none = self.attempt(self.step, limit=0, prove=wrong.probe or False)
        return none.wrong is None and none.changes == 0

    def _culprit(self, step: Pass, good: int, trial: Trial) -> tuple[int, Trial, Trial]:
        """Which change breaks the graph (counted from 1), and the pass without and with it."""
        assert trial.wrong is not None
        only = trial.wrong.probe or False
        tried: dict[int, Trial] = {}

        def is_bad(limit: int) -> bool:
            self.say(f"`{step.name}` is wrong: trying {limit} of its changes")
            tried[limit] = self.attempt(step, limit=limit, prove=only)
            return tried[limit].wrong is not None

        high = trial.changes
        if not high:  # it failed on the way: nobody knows how far it would have come
            good, high = bad_bound(good, is_bad)
        elif good >= high:
            raise NotBroken
        at = first_bad(good, high, is_bad)
        with_it = tried.get(at) or self.attempt(step, limit=at, prove=only)
        without = tried.get(at - 1) or self.attempt(step, limit=at - 1, prove=False)
        if with_it.wrong is None:
            raise NotBroken
        return at, without, with_it

    def _without(
        self, step: Pass, at: int, without: Trial, with_it: Trial
    ) -> tuple[Pass | None, int]:
        """The pass without its wrong change, and how many changes are known to be right then."""
        out, rule = self._describe(step, at, without, with_it)
        if not any(_same(out, x) for x in self.left_out):
            self._note(self._fault(step, out, rule, without, with_it))
        same = [x for x in self.left_out if x.rule == out.rule]
        remove = getattr(step, "without", None)
        if out.rule and remove and (len(same) >= PER_RULE or out.number < 0):
            if out.number >= 0:
                reason = f"it was wrong {counted(len(same), 'time')}"
                self.left_out.append(dataclasses.replace(out, number=-1, reason=reason))
            rest = remove(out.rule)
            if rest is not None and "skip" in fields_of(rest):  # the numbers are others now
                rest = dataclasses.replace(rest, skip=self.step.skip)  # type: ignore[attr-defined]
            return rest, 0
        if "skip" in fields_of(step) and out.number >= 0:
            # Leaving out one may change what comes after it, and so its number: it is found again.
            own = self.step.skip  # type: ignore[attr-defined]
            kept = [n for n in step.skip if n in own or n < out.number]  # type: ignore[attr-defined]
            skip = (*kept, out.number)
            return dataclasses.replace(step, skip=skip), at - 1  # type: ignore[type-var]
        if at == 1:
            return None, 0
        return dataclasses.replace(step, limit=at - 1), at - 1  # type: ignore[type-var]

    def _describe(self, step: Pass, at: int, without: Trial, with_it: Trial) -> tuple[LeftOut, Any]:
        wrong = with_it.wrong
        assert wrong is not None
        label = wrong.probe.label if wrong.probe else ""
        out = LeftOut(step.name, number_of(step, at), wrong.reason, probe=label)
        out = dataclasses.replace(out, elements=wrong.elements)
        firing = with_it.firings[-1] if len(with_it.firings) == at else None
        firing = firing or getattr(with_it.products.get(step.name), "trying", None)
        return describe_change(without.graph, with_it.graph, firing, out)

    def _fault(self, step: Pass, out: LeftOut, rule: Any, without: Trial, with_it: Trial) -> Fault:
        probe = with_it.wrong.probe if with_it.wrong else None
        nodes = [out.node] if out.node else []
        nodes += [n.results[0].name for n in touched(without.graph, with_it.graph) if n.results]
        known = tuple(dict.fromkeys(n for n in nodes if find_node(without.graph, n)))
        promised = weaker(self.promised, step.numerics)
        return Fault(
            with_it.step, self.before, without.graph, out, self.proof, promised, probe, rule, known
        )

    def _note(self, fault: Fault) -> None:
        """Write it down, for the report and as a reproducer; under `strict` that is the end."""
        out = fault.left_out
        if self.on_fault is not None:
            self.say("writing a reproducer")
            out = dataclasses.replace(out, reproducer=self.on_fault(fault))
        self.left_out.append(out)
        if self.strict:
            raise blame_error(out)

    def _whole(self, wrong: Wrong, trial: Trial | None) -> LeftOut:
        """The pass as the culprit, with the first value that differs."""
        label = wrong.probe.label if wrong.probe else ""
        reason, where = wrong.reason, None
        if trial is not None and trial.report and wrong.probe:
            exact = weaker(self.promised, self.step.numerics).kind == "exact"
            seed = self.proof.probes.seed
            where = first_divergence(self.before, trial.graph, wrong.probe, seed, exact)
            reason += f"; first at {where}" if where else ""
        out = LeftOut(self.step.name, -1, reason, probe=label, elements=wrong.elements)
        if isinstance(where, Divergence):
            out = dataclasses.replace(out, node=where.name, op=where.op, place=where.place)
        if trial is None:  # nothing to see again, or it was noted piece by piece
            self.left_out.append(out)
            if self.strict:
                raise blame_error(out)
            return out
        changed = [n.results[0].name for n in touched(self.before, trial.graph) if n.results]
        promised = weaker(self.promised, self.step.numerics)
        self._note(
            Fault(self.step, self.before, self.before, out, self.proof, promised, wrong.probe,
                  None, tuple(changed))
        )  # fmt: skip
        return self.left_out[-1]


def describe_change(
    without: Graph, with_it: Graph, firing: Any, out: LeftOut
) -> tuple[LeftOut, Any]:
    """A change by its node and line, and by its rule where it has one; and that rule."""
    if firing is not None:
        node, rule = find_node(without, firing.value), firing.rule
        out = dataclasses.replace(
            out, number=firing.number, rule=rule.full_name, node=firing.value,
            op=node.op if node else "", place=firing.place,
            origin=str(rule.source.span(*rule.at)),
        )  # fmt: skip
        return out, rule
    changed = next((n for n in touched(without, with_it) if n.results), None)
    if changed is None:
        return out, None
    name, place = changed.results[0].name, str(changed.loc or "")
    return dataclasses.replace(out, node=name, op=changed.op, place=place), None


def blame_error(out: LeftOut) -> DfcError:
    """Strict: the wrong rewrite as an error."""
    return DfcError(
        "V030",
        f"pass `{out.step}` changed the results: {out.reason}",
        notes=out.lines(),
        help="without --strict it is left out and compilation goes on",
        status=4,
    )


def _same(a: LeftOut, b: LeftOut) -> bool:
    """Whether two are the same rewrite, met twice."""
    if a.number < 0 or b.number < 0:
        return False
    return (a.rule, a.node) == (b.rule, b.node) if a.rule else a.number == b.number


def touched(before: Graph, after: Graph) -> list[Node]:
    """The nodes of `before` that are gone or look different in `after`, told by name; those that
    are gone first."""
    now = {n.results[0].name: _text(n) for n in after.walk() if n.results}
    gone, other = [], []
    for n in before.walk():
        if n.results and n.results[0].name not in now:
            gone.append(n)
        elif n.results and now[n.results[0].name] != _text(n):
            other.append(n)
    return [*gone, *other]


def _text(node: Node) -> tuple[object, ...]:
    inputs = tuple(
        tuple(v.name if v else None for v in x)
        if isinstance(x, tuple)
        else (x.name if x is not None else None)
        for x in node.inputs
    )
    return (node.op, node.attributes, inputs, tuple(r.type for r in node.results))


def find_node(graph: Graph, name: str) -> Node | None:
    return next((n for n in graph.walk() if any(r.name == name for r in n.results)), None)


def fields_of(step: Pass) -> set[str]:
    if not dataclasses.is_dataclass(step):
        return set()
    return {f.name for f in dataclasses.fields(step)}


def firings_of(products: dict[str, Any], step: Pass) -> tuple[Any, ...]:
    found: Sequence[Any] = getattr(products.get(step.name), "firings", ())
    return tuple(found)


def number_of(step: Pass, at: int) -> int:
    """The number of the `at`-th change that is made, when those in `skip` are left out."""
    skip = set(getattr(step, "skip", ()))
    number = -1
    for _ in range(at):
        number += 1
        while number in skip:
            number += 1
    return number


def said(e: DfcError) -> str:
    """An error in one line, with the first line of what explains it."""
    span = e.diagnostics[0].span
    notes = [n.splitlines()[0] for d in e.diagnostics for n in d.notes if n]
    told = [*([str(span)] if span else []), *notes]
    return e.message + (f" ({', '.join(told)})" if told else "")
