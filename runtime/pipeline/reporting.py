"""What a step took, beside what the simulator says it should have taken."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

from dfc.planning.actions import Kind, Program
from dfc.planning.simulate import Costs, Simulation, simulate
from dfc.planning.stages import HOST
from dfc.planning.timeline import chrome_trace
from dfc.runtime.pipeline.lanes import Step


@dataclass(frozen=True)
class Report:
    """What a step took, beside what was predicted from the stages' own times.

    Units:  seconds; `busy` is the computing share of each rank, `bubble` what is left of the
            busiest one's time; `bytes` of each pair of stages.
    """

    program: Program
    step: Step
    stage_seconds: tuple[float, ...]  # the median of a microbatch at each stage
    simulation: Simulation

    @property
    def seconds(self) -> float:
        return self.step.seconds

    @property
    def predicted(self) -> float:
        return float(self.simulation.makespan)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        took = [0.0] * len(self.program.ranks)
        for s in self.step.spans:
            took[s.rank] += s.end - s.start
        return tuple(t / self.seconds for t in took)

    @property
    def bubble(self) -> float:
        return 1 - max(self.busy)

    @property
    def bytes(self) -> dict[tuple[int, int], int]:
        found: dict[tuple[int, int], int] = {}
        for edge, size in self.step.bytes.items():
            if HOST not in (edge.source, edge.target):
                pair = edge.source, edge.target
                found[pair] = found.get(pair, 0) + size
        return found

    @property
    def streamed(self) -> tuple[int, ...]:
        """Bytes of weights that each rank was brought."""
        return self._over(0)

    @property
    def read(self) -> tuple[int, ...]:
        """Those of them that were not in the host's memory before either."""
        return self._over(1)

    def _over(self, hop: int) -> tuple[int, ...]:
        found = [0] * len(self.program.ranks)
        for (stage, which), size in self.step.streamed.items():
            if which == hop:
                found[self.program.placement[stage]] += size
        return tuple(found)

    def trace(self, names: list[str]) -> dict[str, Any]:
        """Events for Perfetto: the measured lanes as one process, the predicted as another."""
        predicted = chrome_trace(self.simulation, names)
        events = [
            {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}
            for pid, name in enumerate(("measured", "predicted"))
        ]
        events += [
            {"ph": "M", "pid": 0, "tid": i, "name": "thread_name", "args": {"name": name}}
            for i, name in enumerate(names)
        ]
        for s in self.step.spans:
            events.append({
                "ph": "X", "pid": 0, "tid": s.rank, "name": str(s.action),
                "cat": s.action.kind.name, "ts": s.start * 1e6, "dur": (s.end - s.start) * 1e6,
                "args": {"stage": s.action.stage, "microbatch": s.action.microbatch},
            })  # fmt: skip
        events += [{**e, "pid": 1} for e in predicted["traceEvents"]]
        return {"traceEvents": events, "displayTimeUnit": "ms"}


def report_of(program: Program, step: Step) -> Report:
    """The report of a step; its prediction takes the median of each stage's measured times."""
    times: dict[tuple[Kind, int], list[float]] = {}
    for s in step.spans:
        times.setdefault((s.action.kind, s.action.stage), []).append(s.end - s.start)

    def medians(*kinds: Kind) -> list[float]:
        found = [[median(times[k, s]) for k in kinds if (k, s) in times]
                 for s in range(program.stages)]  # fmt: skip
        return [sum(f) for f in found]

    forward = medians(Kind.F)
    edges = sorted({
        (e.source, e.target, 0) for e in step.bytes
        if not e.backward and HOST not in (e.source, e.target)
    })  # fmt: skip
    inputs = medians(Kind.I, Kind.B) if program.trains else []
    weights = medians(Kind.W) if program.trains else []
    replay = medians(Kind.R, Kind.S) if program.recomputes else []
    found = simulate(program, Costs(forward, inputs, weights, edges=edges, replay=replay))
    return Report(program, step, tuple(forward), found)
