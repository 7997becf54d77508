"""What passes within a memory took, beside what was planned."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from dfc.planning.tier_advice import tiers_data
from dfc.runtime.tiers.relay import Relay
from dfc.runtime.tiers.streamed import Streamed

PASSES = 5


def passes_taken(runner: Streamed, inputs: Sequence[Any], passes: int = PASSES) -> list[float]:
    """Seconds of each of several passes after a warm one."""
    found = []
    for _ in range(passes + 1):
        start = time.perf_counter()
        runner(inputs)
        runner.finish()
        found.append(time.perf_counter() - start)
    return found[1:]


def measured(runner: Streamed, inputs: Sequence[Any], passes: int = PASSES) -> dict[str, Any]:
    """The plan and what was measured, as data."""
    took = median(passes_taken(runner, inputs, passes))
    copied = runner.carrier.copied()
    bytes_, seconds = sum(b for b, _ in copied), sum(s for _, s in copied)
    plan = runner.plan
    return {
        **tiers_data(plan),
        "held_bytes": runner.held_bytes,
        "bandwidth": bytes_ / seconds if seconds else None,
        "pass_seconds": took,
        "predicted_seconds": float(plan.pass_seconds) if plan.streamed else None,
        **_below(runner),
    }


def _below(runner: Streamed) -> dict[str, Any]:
    """Of the host's memory, where that streams as well."""
    plan, carrier = runner.plan.below, runner.carrier
    if plan is None or not isinstance(carrier, Relay):
        return {}
    read = carrier.reader.copied()
    seconds = sum(s for _, s in read)
    return {
        "below": {
            "memory": plan.memory,
            "held_bytes": carrier.host_bytes,
            "streamed": [plan.layers[j].name for j in plan.streamed],
            "slots": plan.slots,
            "slot_bytes": plan.slot_bytes,
            "bytes_per_pass": plan.bytes_per_pass,
            "from": plan.hop.name,
            "bandwidth": sum(b for b, _ in read) / seconds if seconds else None,
        }
    }
