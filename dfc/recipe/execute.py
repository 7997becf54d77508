"""Carrying out a plan over a captured graph: passes, what they are kept for, undoing, branches.

Versions of the graph are references: copies share the parameters' data, and only versions that a
later step speaks of are held on to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.recipe.plan import (
    BASELINE,
    BEFORE,
    EmitStep,
    Keep,
    KeepStep,
    PassStep,
    Plan,
    PlanStep,
    RevertStep,
    Test,
    VerifyStep,
    WhenStep,
)
from dfc.recipe.quantities import Meter, runs, weight_bytes
from dfc.recipe.worst import asks_for_worst, settle
from dfc.report import Decision
from dfc.rewrite.driver import Outcome as PassOutcome
from dfc.rewrite.driver import PassReport, run_passes
from dfc.rewrite.journal import user_journal
from dfc.rewrite.pass_ import EXACT, Context, Numerics, Pass

Show = Callable[[str, Graph], None]
Left = tuple[Any, ...]  # products of steps: those of `_CARRIED`
_REMEMBERED = 16  # outcomes of steps: each may have weights of its own


@dataclass
class Outcome:
    """What became of the graph, and the story of how."""

    graph: Graph
    numerics: Numerics
    reports: list[PassReport]
    decisions: list[Decision]
    emits: list[EmitStep]
    products: dict[str, Any]
    versions: dict[str, Graph] = field(default_factory=dict)  # after the labels that goals name
    passes: tuple[Pass, ...] = ()  # as they were applied, reverted ones left out

    @property
    def changed(self) -> bool:
        return any(r.changes and r.verdict != "reverted" for r in self.reports)


@dataclass(frozen=True)
class _Version:
    """The graph around a labelled step."""

    before: Graph
    after: Graph
    promised: Numerics  # before it
    at: int  # how many reports there were before it
    left: Left  # what steps before it had left


@dataclass
class Executor:
    """Runs plans over one captured graph.

    Needs:  `meter` measures; `probes` prove, or are None; a `mode` takes the place of the plan's
            own `verify` lines.
    """

    graph: Graph
    meter: Meter
    probes: Any = None
    mode: str | None = None
    strict: bool = False
    show: Show | None = None
    on_fault: Callable[[Any], str] | None = None
    target: Any = None
    data: Mapping[str, Any] = field(default_factory=dict)
    functions: Mapping[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = lambda what: None
    # Steps that were run, by the graph that they ran on and what else decides their result: a
    # search runs the same first steps again and again.
    _memo: list[tuple[Graph, tuple[object, ...], PassOutcome, Left]] = field(default_factory=list)

    def run(self, plan: Plan, chosen: Mapping[str, Any] | None = None) -> Outcome:
        """Carry out a plan with its holes filled.

        Raises:  DfcError V030 under `strict` when a step changes results beyond its claim.
        """
        first = _Run(self, plan, chosen or {}, self.mode)
        outcome = first.run()
        if not first.owes_proof or self._holds(outcome, first.allowed):
            return outcome
        self.say("the result is wrong: proving each step")
        return _Run(self, plan, chosen or {}, "each").run()

    def _holds(self, outcome: Outcome, allowed: Mapping[str, Any]) -> bool:
        """One proof for all steps; they are marked as proved by it."""
        if self.probes is None or outcome.numerics.kind == "changes":
            return True
        self.say("proving the result")
        error = self.probes.failure(outcome.graph, outcome.numerics, **allowed)
        if not isinstance(error, float):
            return False
        for i, r in enumerate(outcome.reports):
            if r.changes and r.verdict == "unproved":
                outcome.reports[i] = replace(r, verdict="proved", error=error)
        return True

    def step(
        self,
        graph: Graph,
        p: Pass,
        mode: str,
        numerics: Numerics,
        context: Context,
        allowed: Mapping[str, Any],
    ) -> PassOutcome:
        """One pass, or what it did when it ran on the same graph before."""
        key = (str(p), mode, numerics, *allowed.items(), *carried(context)[:2])
        for i, (known, its_key, outcome, left) in enumerate(self._memo):
            if known is graph and its_key == key:
                self._memo.append(self._memo.pop(i))
                carry(context, left)
                return outcome
        found = run_passes(
            graph, [p], probes=self.probes, mode=mode, strict=self.strict,
            print_after=self.show, ctx=context, numerics=numerics, on_fault=self.on_fault,
            say=self.say, **allowed,
        )  # fmt: skip
        self._memo = [*self._memo[-_REMEMBERED:], (graph, key, found, carried(context))]
        return found


def _placed(e: DfcError, step: PassStep) -> DfcError:
    """An error of a step that names no place: it stands where the step does."""
    if step.span is None or all(d.span for d in e.diagnostics):
        return e
    found = [replace(d, span=d.span or step.span) for d in e.diagnostics]
    return DfcError.of(found, status=e.status)


_CARRIED = ("pins", "together", "plan")  # what steps leave besides the graph for those behind them


def carried(context: Context) -> Left:
    return tuple(context.products.get(name) for name in _CARRIED)


def carry(context: Context, left: Left) -> None:
    """Let the products be as they were."""
    for name, value in zip(_CARRIED, left, strict=True):
        context.products.pop(name, None)
        if value is not None:
            context.products[name] = value


class _Run:
    """One run of a plan."""

    def __init__(
        self, executor: Executor, plan: Plan, chosen: Mapping[str, Any], mode: str | None
    ) -> None:
        self.x = executor
        self.plan = plan
        self.chosen = chosen
        self.fixed = mode is not None
        first = next((s for s in plan.steps if isinstance(s, VerifyStep)), VerifyStep("each"))
        self.mode = mode or first.mode
        self.allowed = first.options  # atol, rtol and samples
        self.graph = executor.graph
        self.numerics = EXACT
        self.versions: dict[str, _Version] = {}
        self.wanted = _labels(plan.steps) | {
            q.version
            for quantities in (
                (g.quantity for g in plan.goals), *(r.quantities() for r in plan.requirements)
            )
            for q in quantities
        }  # fmt: skip
        self.reports: list[PassReport] = []
        self.passes: list[tuple[int, Pass]] = []  # what was applied, with how many reports before
        self.decisions: list[Decision] = []
        self.emits: list[EmitStep] = []
        self.owes_proof = False
        self.context = Context(
            target=executor.target, data=executor.data, progress=self._progress, say=executor.say,
            functions=executor.functions,
            journal=user_journal() if executor.data else None,
        )  # fmt: skip
        self.running = ""

    def run(self) -> Outcome:
        self.steps(self.plan.steps)
        return Outcome(
            self.graph, self.numerics, self.reports, self.decisions, self.emits,
            self.context.products, {k: v.after for k, v in self.versions.items()},
            tuple(p for _, p in self.passes),
        )  # fmt: skip

    def _progress(self, done: int, total: int) -> None:
        self.x.say(f"{self.running}: {done} of {total}" if total else f"{self.running}: {done}")

    def steps(self, steps: Sequence[PlanStep]) -> None:
        for step in steps:
            if isinstance(step, PassStep):
                self._pass(step)
            elif isinstance(step, VerifyStep):
                self.mode = self.mode if self.fixed else step.mode
                self.allowed = step.options
            elif isinstance(step, EmitStep):
                self.emits.append(step)
            elif isinstance(step, RevertStep):
                self._revert(step.label, "the recipe says so", str(step))
            elif isinstance(step, KeepStep):
                self._keep_step(step)
            else:
                self._when(step)

    # Passes

    def _pass(self, step: PassStep) -> None:
        self.running = step.label
        self.x.say(f"step {step.label}")
        before, promised, at = self.graph, self.numerics, len(self.reports)
        left = carried(self.context)
        mode = "none" if self.mode == "end" else self.mode
        try:
            p = self._settled(step.label, step.build(self.chosen))
            done = self.x.step(before, p, mode, promised, self.context, self.allowed)
        except DfcError as e:
            raise _placed(e, step) from e
        self.reports += done.reports
        self.passes += [(at, applied) for applied in done.passes]
        self.graph, self.numerics = done.graph, done.numerics
        self.x.meter.bench.promise(done.graph, done.numerics)
        changes = sum(r.changes for r in done.reports if r.verdict != "reverted")
        self.owes_proof |= bool(changes) and self.mode == "end"
        version = _Version(before, self.graph, promised, at, left)
        if step.keep and changes:
            self._keep(step.label, step.keep, version)
            version = replace(version, after=self.graph)
        if step.label in self.wanted:
            self.versions[step.label] = version

    def _settled(self, label: str, p: Pass) -> Pass:
        """A step whose `worst(...)` is replaced by layers, measured on the graph at hand."""
        if not asks_for_worst(p):
            return p
        ctx = self.context
        if self.x.probes is not None and not ctx.examples:
            ctx = replace(ctx, examples=tuple(x.inputs for x in self.x.probes.probes))
        meter = self.x.meter
        metric = next(iter(meter.metrics.values()), None)
        on = meter.bench.lead() if metric else ""
        found = settle(p, self.graph, ctx, self.x.say, metric, meter.unjudged, on)
        self.context.products.setdefault("sensitivity", []).append(found.sensitivity)
        self.decisions.append(Decision(f"{label}: worst", "chosen", str(found)))
        return found.step

    def _undo(self, version: _Version, reason: str) -> None:
        self.graph, self.numerics = version.before, version.promised
        carry(self.context, version.left)
        self.passes = [(at, p) for at, p in self.passes if at < version.at]
        for i in range(version.at, len(self.reports)):
            r = self.reports[i]
            if r.changes and r.verdict != "reverted":
                self.reports[i] = replace(r, verdict="reverted", reason=reason)

    # Decisions

    def _keep(self, label: str, keep: Keep, version: _Version) -> None:
        self.x.say(f"measuring {label}")
        decision = self._judge(keep, version)
        self.decisions.append(replace(decision, step=f"{label}: {keep}"))
        if decision.verdict == "reverted":
            self._undo(version, decision.reason)

    def _judge(self, keep: Keep, version: _Version) -> Decision:
        """Whether what lies between a version and the graph at hand is kept."""
        if keep.test == "smaller":
            before, after = weight_bytes(version.before), weight_bytes(self.graph)
            words = f"{before} bytes before, {after} after"
            return Decision("", "kept" if after < before else "reverted", words)
        why = self.x.meter.bench.why_not()
        if why and (isinstance(keep.test, str) or self.x.meter.why_not(keep.test.quantities())):
            return Decision("", "reverted", f"not measured: {why}")
        try:
            if isinstance(keep.test, Test):
                return self._judge_test(keep.test, version, ("kept", "reverted"))
            return self._judge_speed(version)
        except DfcError as e:
            if e.code[0] not in "KXV" or e.code == "K040":
                raise
            return Decision("", "reverted", f"it cannot be measured: {e.message}")

    def _judge_speed(self, version: _Version) -> Decision:
        before, after = ((g, self.x.meter.on(g)) for g in (version.before, self.graph))
        c = self.x.meter.bench.compare_versions(before, after, "faster")
        verdict = "kept" if c.verdict == "faster" else "reverted"
        words = str(c) if verdict == "kept" else f"not faster: {c}"
        engine = after[1]
        if engine != before[1]:
            words += f", on `{engine}` as before it on `{before[1]}`"
        return Decision("", verdict, words, engine, c.ratio, c.low, c.high, c.runs)

    def _judge_test(self, test: Test, version: _Version | None, words: tuple[str, str]) -> Decision:
        def versions(name: str) -> Graph:
            if name == BASELINE:
                return self.x.graph
            if name == BEFORE:
                return version.before if version else self.x.graph
            return self.versions[name].after if name else self.graph

        answer = self.x.meter.answer(test, versions)
        c = answer.comparison
        measured = (c.ratio, c.low, c.high, c.runs) if c else (None, None, None, 0)
        on = self.x.meter.on(self.graph) if any(map(runs, test.quantities())) else ""
        return Decision("", words[not answer.holds], answer.text, on, *measured)

    def _keep_step(self, step: KeepStep) -> None:
        version = self.versions.get(step.label)
        if version is None or not any(
            r.changes and r.verdict != "reverted" for r in self.reports[version.at :]
        ):
            return
        self._keep(step.label, step.keep, version)

    def _revert(self, label: str, reason: str, text: str) -> None:
        version = self.versions.get(label)
        if version is None:  # it stands in a branch that was not taken
            self.decisions.append(Decision(text, "not taken", f"`{label}` was not run"))
            return
        self._undo(version, reason)
        self.decisions.append(Decision(text, "reverted", reason))

    def _when(self, step: WhenStep) -> None:
        self.x.say(f"measuring for `when {step.test}`")
        names = {q.version for q in step.test.quantities()} - {"", BASELINE, BEFORE}
        absent = sorted(names - set(self.versions))
        if absent:  # what is compared stands in a branch that was not taken
            decision = Decision("", "not taken", f"`{absent[0]}` was not run")
        else:
            decision = self._judge_test(step.test, None, ("taken", "not taken"))
        self.decisions.append(replace(decision, step=f"when {step.test}"))
        self.steps(step.then if decision.verdict == "taken" else step.otherwise)


def _labels(steps: Sequence[PlanStep]) -> set[str]:
    """The labels that a step speaks of."""
    found: set[str] = set()
    for step in steps:
        if isinstance(step, (RevertStep, KeepStep)):
            found.add(step.label)
        keep = getattr(step, "keep", None)
        tests = [keep.test] if keep is not None else []
        if isinstance(step, WhenStep):
            tests.append(step.test)
            found |= _labels(step.then) | _labels(step.otherwise)
        found |= {q.version for t in tests if isinstance(t, Test) for q in t.quantities()}
    return found
