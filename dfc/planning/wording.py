"""A plan in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dfc.lang.units import amount_text

if TYPE_CHECKING:
    from dfc.planning.pipeline import Plan


def summary(plan: Plan) -> str:
    """In one line: stages and devices, the step, and what the partition is worth."""
    count = len(plan.stages)
    devices = ", ".join(s.device for s in plan.stages)
    step = amount_text(plan.step_seconds, "time")
    m = plan.wish.microbatches
    return (
        f"{count} stage{'s' * (count != 1)} on {devices}; a step of {m} "
        f"microbatch{'es' * (m != 1)} takes {step} by the model ({plan.schedule}), "
        f"{plan.simulation.bubble:.0%} of it waiting; by {plan.objective} {certificate(plan)}"
    )


def certificate(plan: Plan) -> str:
    gap = plan.partition.gap
    return f"no partition is more than {gap:.1%} better" if gap > 1e-6 else "no partition is better"
