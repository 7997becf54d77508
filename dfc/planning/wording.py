"""A plan in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dfc.counting import counted
from dfc.lang.units import amount_text

if TYPE_CHECKING:
    from dfc.planning.pipeline import Plan, Stage


def summary(plan: Plan) -> str:
    """In one line: stages and devices, the step, and what the partition is worth."""
    count = len(plan.stages)
    devices = f"on {', '.join(s.device for s in plan.stages)}"
    if count > len(plan.device_stages):
        devices = f"{plan.wish.layout.word} ({layout_text(plan)})"
    step = amount_text(plan.step_seconds, "time")
    m = plan.wish.microbatches
    return (
        f"{counted(count, 'stage')} {devices}; a step of "
        f"{counted(m, 'microbatch')} takes {step} by the model ({plan.schedule}), "
        f"{plan.simulation.bubble:.0%} of it waiting; by {plan.objective} {certificate(plan)}"
    )


def described(plan: Plan) -> str:
    """In a few lines: a plan's stages, and what `summary` says."""
    lines = [_stage_line(s) for s in plan.stages]
    return "\n".join([*lines, summary(plan)])


def _stage_line(s: Stage) -> str:
    weights, memory, capacity, sent = (
        amount_text(x, "bytes") for x in (s.weights, s.memory, s.capacity, s.sent)
    )
    return (
        f"stage {s.index} on {s.device} from {s.starts or 'the start'}: "
        f"{counted(s.nodes, 'node')}, {amount_text(s.seconds, 'time')} ({s.limit}), "
        f"{weights} of weights, sends {sent}; the device holds {memory} of {capacity}"
    )


def layout_text(plan: Plan) -> str:
    """Which stages devices have that have several."""
    return "; ".join(
        f"{name} has stages {', '.join(map(str, stages))}"
        for name, stages in plan.device_stages.items()
    )


def certificate(plan: Plan) -> str:
    gap = plan.partition.gap
    return f"no partition is more than {gap:.1%} better" if gap > 1e-6 else "no partition is better"
