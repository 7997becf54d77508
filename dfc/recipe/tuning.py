"""A package measured again: its engine is chosen anew, on this machine.

The engine that it has stays unless another one is faster beyond noise. A package holds no engine's
code, so all that changes is a name, the timings, and the machine that they are of.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dfc.compiled import Compiled
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.package import Package, read_package
from dfc.recipe.bench import FINALISTS, Bench, forms, own_probes
from dfc.report import Decision, EngineReport
from dfc.rewrite.probe import Probes

BUDGET_S = 300.0
MARGIN = 0.02  # an engine that is less faster than this takes no other's place
SECONDS = 1.0  # of measuring, for each engine
# What building takes at the least: not begun with less time left.
_LEAST_S = {"inductor": 30.0}
# Cheap ones first: when the budget ends, most has been tried.
_ORDER = ("eager", "eager:channels_last", "eager:cuda_graph", "eager:channels_last:cuda_graph",
          "eager:floats", "eager:floats:cuda_graph",
          "onnxruntime", "openvino", "openvino:hint",
          "inductor", "inductor:cuda_graph")  # fmt: skip
_LONGEST = ("inductor:max_autotune:cuda_graph",)  # measures kernels: on GPUs, where that pays


@dataclass
class Tuned:
    """A package with its engine chosen on this machine."""

    compiled: Compiled
    before: str
    decision: Decision

    @property
    def engines(self) -> list[EngineReport]:
        return self.compiled.report.engines

    @property
    def after(self) -> str:
        return self.compiled.engine.name


def tune(
    path: Path,
    engines: Sequence[str] | None = None,
    *,
    budget_s: float = BUDGET_S,
    seconds: float = SECONDS,
    device: str = "cpu",
    inputs: Sequence[Any] | None = None,
    say: Callable[[str], None] = lambda what: None,
) -> Tuned:
    """Measure a package on engines, and choose.

    `engines` are names (default: all that are installed); the package's own is always among them.
    `inputs` are the flat inputs to measure on (default: the example that it was compiled with).
    Building stops when the budget is spent; the engine that is being built is waited for.
    Raises:  DfcError D family for a damaged package or one without probes, K021 for one
             without weights, K005 when no engine runs it.
    """
    say(f"reading {path}")
    package = read_package(path)
    _require_runnable(package, inputs)
    job = _Tuning(package, device, inputs, say, time.monotonic() + budget_s, budget_s)
    return job.run(engines, seconds)


class _Tuning:
    def __init__(
        self, package: Package, device: str, inputs: Sequence[Any] | None,
        say: Callable[[str], None], deadline: float, budget_s: float,
    ) -> None:  # fmt: skip
        self.package = package
        self.say = say
        self.deadline = deadline
        self.budget_s = budget_s
        graph = package.graph
        probes = Probes(graph, package.probes)
        if not package.report.proved:  # its results differ from the original's on purpose
            probes = own_probes(probes, graph)
        rtol = package.report.rtol
        self.bench = Bench(graph, probes, "auto", device, say, rtol, keep=16, example=inputs)

    def run(self, engines: Sequence[str] | None, seconds: float) -> Tuned:
        current = self.package.engine
        reports = {n: self._build(n) for n in self._names(engines, current)}
        right = [n for n, r in reports.items() if r.verdict == "right"]
        if not right:
            reasons = "; ".join(f"{n}: {r.reason}" for n, r in reports.items())
            raise DfcError("K005", f"no engine runs the package: {reasons}")
        self.say(f"measuring {', '.join(right)} for about {seconds * len(right):.0f} s")
        graph = self.package.graph
        timings = self.bench.times([(graph, n) for n in right], seconds=seconds)
        p50 = {n: t.p50_ms for n, t in zip(right, timings, strict=True)}
        chosen, decision = self._choose(p50, current)
        for n, t in zip(right, timings, strict=True):
            verdict = "chosen" if n == chosen else "slower"
            reports[n] = replace(reports[n], verdict=verdict, p50_ms=t.p50_ms,
                                 spread_ms=t.spread_ms)  # fmt: skip
        return Tuned(self._compiled(chosen, reports, p50[chosen], decision), current, decision)

    def _names(self, engines: Sequence[str] | None, current: str) -> list[str]:
        """The engines to try: the package's own first, then the cheap ones."""
        from dfc.runtime.engines import installed_engines

        wanted = list(engines) if engines is not None else self._all(installed_engines())
        rank = {n: i for i, n in enumerate(_ORDER)}
        wanted.sort(key=lambda n: rank.get(n, len(rank)))
        return list(dict.fromkeys([current, *wanted]))

    def _all(self, installed: list[str]) -> list[str]:
        device = self.bench.device
        compiled = (*FINALISTS, *_LONGEST) if device.startswith("cuda") else ()
        return [*installed, *forms(self.graph, device), *compiled]

    @property
    def graph(self) -> Graph:
        return self.package.graph

    def _build(self, name: str) -> EngineReport:
        left = self.deadline - time.monotonic()
        least = _LEAST_S.get(name.partition(":")[0], 0.0)
        if left < least or left <= 0:
            reason = f"the budget of {self.budget_s:.0f} s has {max(left, 0):.0f} s left"
            if least:
                reason += f", compiling takes at least {least:.0f} s"
            return EngineReport(name, "not tried", reason)
        self.say(f"building for {name}")
        try:
            ready = self.bench.ready(self.graph, name)
        except DfcError as e:
            return EngineReport(name, "refused", e.message)
        if ready.wrong is not None:
            return EngineReport(name, "wrong", f"it gives other results: {ready.wrong}")
        note = getattr(ready.runner, "note", "")
        return EngineReport(
            name, "right", note, error=ready.verdict.worst if ready.verdict else None
        )

    def _choose(self, p50: dict[str, float], current: str) -> tuple[str, Decision]:
        """The fastest, if it is faster than the present engine beyond noise."""
        best = min(p50, key=lambda n: p50[n])
        if current not in p50:
            reason = f"`{current}` does not run the package here"
            return best, Decision("tune", "taken", reason, best)
        if best == current:
            return current, Decision("tune", "kept", "it is the fastest", current)
        self.say(f"comparing {best} with {current}")
        c = self.bench.compare_engines(self.graph, current, best, margin=MARGIN)
        words = f"`{best}` is {c} as `{current}`" if c.verdict == "faster" else f"`{best}`: {c}"
        taken = c.verdict == "faster"
        decision = Decision(
            "tune", "taken" if taken else "kept", words if taken else f"not faster: {words}",
            best if taken else current, c.ratio, c.low, c.high, c.runs,
        )  # fmt: skip
        return (best if taken else current), decision

    def _compiled(
        self, name: str, reports: dict[str, EngineReport], after_ms: float, decision: Decision
    ) -> Compiled:
        from dfc.planning.host import this_machine

        package, report = self.package, self.package.report
        report.engines = list(reports.values())
        report.before_ms, report.after_ms = None, after_ms  # the original is not in the package
        report.machine = this_machine(self.bench.device)
        report.decisions = [d for d in report.decisions if d.step != "tune"] + [decision]
        ready = self.bench.ready(self.graph, name)
        return Compiled(
            self.graph, ready.engine, ready.runner, report, package.probes, self.bench.device,
            package.recipe,
        )  # fmt: skip


def _require_runnable(package: Package, inputs: Sequence[Any] | None) -> None:
    missing = [p.name for p in package.graph.parameters.values() if p.data is None]
    if missing:
        raise DfcError("K021", f"the package has no weights (`{missing[0]}`)", status=2)
    if not package.probes:
        raise DfcError(
            "D045", "the package holds no probes: engines cannot be proved", status=2,
            help="compile the model with an example",
        )  # fmt: skip
