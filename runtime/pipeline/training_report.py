"""What a training step took and kept, beside what was predicted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dfc.planning.actions import Program
from dfc.runtime.pipeline.lanes import Step
from dfc.runtime.pipeline.reporting import Report, report_of


@dataclass(frozen=True)
class TrainingReport:
    """One step.

    `in_flight` is how many microbatches each stage kept activations of at once, `allowed` what the
    program says at most; `saved_bytes` what one of them takes, weights and inputs not counted, and
    `taken_bytes` what a stage that recomputes keeps of one until then. `peak_bytes` are the
    activations that each stage held at once.
    """

    program: Program
    step: Step
    allowed: tuple[int, ...]
    in_flight: tuple[int, ...]
    saved_bytes: tuple[int, ...]
    taken_bytes: tuple[int, ...]
    peak_bytes: tuple[int, ...]
    compared: str | None = None  # what can be said of the graph and its model

    @cached_property
    def timing(self) -> Report:
        """Times of the step, beside the simulator's for the stages' own times."""
        return report_of(self.program, self.step)

    @property
    def seconds(self) -> float:
        return self.step.seconds

    def __str__(self) -> str:
        t = self.timing
        lines = [
            f"{self.program.name}: {self.program.microbatches} microbatches, {t.seconds:.4g} s "
            f"(predicted {t.predicted:.4g} s), bubble {t.bubble:.0%}"
        ]
        again = self.program.recomputes
        for s, rank in enumerate(self.program.placement):
            kept = f"{self.saved_bytes[s] / 1e6:.3g} MB each"
            if s in again:
                kept = f"{self.taken_bytes[s] / 1e6:.3g} MB each until {kept} are computed again"
            lines.append(
                f"  stage {s} on rank {rank}: {self.in_flight[s]} of {self.allowed[s]} "
                f"microbatches in flight, {kept}"
            )
        if self.compared:
            lines.append(f"  {self.compared}")
        return "\n".join(lines)
