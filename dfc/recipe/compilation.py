"""One compilation, from a model and a plan to what runs: every stage in order, each told."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfc.compiled import Compiled
from dfc.counting import counted
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.ir.verify import verify as verify_graph
from dfc.planning.host import this_machine
from dfc.recipe import probing
from dfc.recipe.bench import Bench
from dfc.recipe.choose import Choice, choose, own_error
from dfc.recipe.execute import Executor, Outcome
from dfc.recipe.holes import fill
from dfc.recipe.metrics import bind, used_metrics
from dfc.recipe.plan import BASELINE, Plan, VerifyStep
from dfc.recipe.quantities import Meter, weight_bytes
from dfc.recipe.requirements import (
    RequirementMissed,
    check_measurable,
    check_resolvable,
    goal_reports,
    requirement_reports,
)
from dfc.recipe.resolve import check_on
from dfc.recipe.searching import Budget, Search, search
from dfc.report import Report
from dfc.rewrite.driver import VERIFY


@dataclass
class Compilation:
    """What is asked of one compilation; `run` does it.

    `guarded` says that dfc itself chose the steps, for speed: the original may take the result's
    place.
    """

    plan: Plan
    guarded: bool
    data: Mapping[str, Any]
    metrics: Mapping[str, Any]
    budget: str | int | float | Budget | None
    engine: str
    verify: str | None
    strict: bool
    device: str
    print_after: Callable[[str, Graph], None] | None
    say: Callable[[str], None]
    on_fault: Callable[[Any], str] | None = None
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    report: Report = field(default_factory=Report)

    def run(
        self, model: Any, args: Any, kwargs: Any, dynamic_shapes: Any, weights: Any
    ) -> Compiled:
        """Trace, carry out the plan, choose an engine, check what was required.

        Raises:  RequirementMissed; DfcError.
        """
        budget = Budget.of(self.budget)
        metrics = bind(self.plan, self.metrics, self.data)
        mode = self._mode()
        graph = self._graph(model, args, kwargs, dynamic_shapes, weights)
        probes = probing.make(model, graph, args, kwargs, mode, self.report, self.say)
        bench = Bench(graph, probes, self.engine, self.device, self.say, self._allowed())
        meter = Meter(bench, metrics)
        check_measurable(self.plan, meter)
        check_resolvable(self.plan, meter)
        found = self._search(graph, meter, probes, budget)
        outcome = found.outcome
        choice = choose(
            bench, outcome.graph, changed=outcome.changed, guarded=self.guarded,
            lossy=outcome.numerics.kind == "changes",
        )  # fmt: skip
        self._tell(graph, choice, found, probes, mode)
        plan = fill(self.plan, found.chosen)
        compiled = Compiled(
            choice.graph, choice.engine, choice.runner, self.report,
            list(probes.ready()) if probes else [], self.device, str(plan),
            [(e.format, e.options) for e in outcome.emits],
            outcome.passes if choice.graph is outcome.graph else (),
            _plan_of(outcome, choice),
        )  # fmt: skip
        self._settle(compiled, meter, choice, outcome.versions)
        return compiled

    def _mode(self) -> str:
        if self.verify is not None and self.verify not in VERIFY:
            message = f"verify is one of {', '.join(VERIFY)}, got `{self.verify}`"
            raise DfcError("Q004", message)
        own = next((s.mode for s in self.plan.steps if isinstance(s, VerifyStep)), "each")
        return self.verify or own

    def _allowed(self) -> float:
        """The largest relative error that the plan allows engines."""
        steps = [s for s in self.plan.steps if isinstance(s, VerifyStep)]
        return max((float(s.options.get("rtol", 0.0)) for s in steps), default=0.0)

    def _graph(
        self, model: Any, args: Any, kwargs: Any, dynamic_shapes: Any, weights: Any
    ) -> Graph:
        report = self.report
        report.model = _name(model)
        start = time.perf_counter()
        self.say("tracing")
        if isinstance(model, Graph):
            graph = model
        else:
            from dfc.capture.torch_export import trace

            graph = trace(model, () if args is None else args, kwargs, dynamic_shapes)
            graph.original = None  # probes compare them; weights that passes replace can go
        report.capture_s = time.perf_counter() - start
        report.notes += [*graph.notes, *self.plan.warnings]
        if weights is not None:
            from dfc.package import attach_weights

            attach_weights(graph, Path(weights))
        verify_graph(graph, types=isinstance(model, Graph))
        problems = check_on(self.plan, graph)
        if problems:
            raise DfcError.of(problems)
        return graph

    def _search(self, graph: Graph, meter: Meter, probes: Any, budget: Budget) -> Search:
        start = time.perf_counter()
        self.say("rewriting")
        executor = Executor(
            graph, meter, probes, "none" if probes is None else self.verify, self.strict,
            self.print_after, self.on_fault, self.plan.target, self.data, self.functions, self.say,
        )  # fmt: skip
        found = search(executor, self.plan, budget)
        self.report.passes_s = time.perf_counter() - start
        return found

    def _tell(self, graph: Graph, choice: Choice, found: Search, probes: Any, mode: str) -> None:
        """What was done, in the report."""
        report, outcome = self.report, found.outcome
        report.recipe = str(fill(self.plan, found.chosen))
        report.passes, report.decisions = outcome.reports, outcome.decisions
        report.tried = found.reports
        report.nodes_before, report.nodes_after = len(graph), len(choice.graph)
        report.bytes_before, report.bytes_after = weight_bytes(graph), weight_bytes(choice.graph)
        report.engines = choice.engines
        if any(e.p50_ms is not None for e in choice.engines):
            report.machine = this_machine(self.device)
        report.before_ms, report.after_ms = choice.before_ms, choice.after_ms
        if choice.guard is not None:
            report.decisions = [*outcome.decisions, choice.guard]
        extra = [*outcome.products.get("notes", ()), *choice.notes]
        report.notes += [*found.notes, *extra]
        report.notes += ["\n".join(x.lines()) for r in outcome.reports for x in r.left_out]
        if probes is not None:
            report.notes += probes.notes
        promised = outcome.numerics.rtol if choice.graph is outcome.graph else 0.0
        report.rtol = max(promised, self._allowed())
        changes = outcome.numerics.kind == "changes" and choice.graph is outcome.graph
        judges = tuple(m.name for m in used_metrics(self.plan)) if changes else ()
        idle = [m.name for m in self.plan.metrics if m.name in self.metrics] if changes else []
        for name in (x for x in idle if x not in judges):
            ask = f"write `require {name} ...` with a bound, or make it a goal"
            report.notes.append(f"metric `{name}` was given, and nothing asks for it: {ask}")
        _proof(report, probes, mode, changes, judges)

    def _settle(
        self, compiled: Compiled, meter: Meter, choice: Choice, labelled: Mapping[str, Graph]
    ) -> None:
        """Goals and requirements, measured on the engine that was chosen.

        Raises:  RequirementMissed.
        """
        meter.engine = choice.engine.name

        def versions(name: str) -> Graph:
            if name == BASELINE:
                return meter.bench.original
            return labelled.get(name, choice.graph) if name else choice.graph

        self.say("measuring what was asked for")
        report = self.report
        report.goals = goal_reports(self.plan, meter, versions)
        report.requirements = requirement_reports(self.plan, meter, versions)
        if report.missed:
            raise RequirementMissed(report.missed, compiled)


def _plan_of(outcome: Outcome, choice: Choice) -> Any:
    """What `partition` left, as a plan of the graph that was chosen.

    Raises:  DfcError D062 where a later step has made nodes without a stage.
    """
    from dfc.planning.planfile import planned

    stands = any(p.name == "partition" for p in outcome.passes)  # it was not taken back
    if not stands or not len(choice.graph) or choice.graph is not outcome.graph:
        return None
    return planned(outcome.products["plan"], choice.graph)


def _name(model: Any) -> str:
    if isinstance(model, Graph):
        return model.name
    return str(getattr(model, "__name__", type(model).__name__))


def _proof(
    report: Report, probes: Any, mode: str, lossy: bool, judges: tuple[str, ...] = ()
) -> None:
    report.lossy = lossy
    if probes is None or mode == "none":
        report.proof = "unproved"
        return
    count = len(probes.probes)
    errors = [e.error for e in report.engines if e.verdict == "chosen" and e.error is not None]
    report.error = max(errors, default=0.0)
    if lossy:
        by = f"judged by {', '.join(judges)}" if judges else "no metric judges the result"
        report.proof = f"{by}: the recipe changes results on purpose"
        return
    report.original_error = own_error(probes)
    report.proved = True
    report.proof = (
        f"proved on {counted(count, 'probe')} (largest error {report.error:.3g}, "
        f"the original's own {report.original_error:.3g})"
    )
