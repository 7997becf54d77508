"""Three tiers: what is streamed to a device comes from a memory that does not hold it all either.

The loads of the device's plan are the layers of a plan of their own: some stay in the memory below,
the others are read into its slots, evenly in what is computed between them. Both hops go on beside
each other; how many slots the lower one needs, the simulation of all three lanes says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dfc.errors import DfcError
from dfc.lang.units import amount_text
from dfc.planning.simulate import Number
from dfc.planning.streaming import Hop, Layer
from dfc.planning.tiers import ALIKE, MOST_SLOTS, Tiers, least_bytes, plan_tiers


def with_below(plan: Tiers, memory: int, hop: Hop) -> Tiers:
    """The plan with what it streams in so much memory, and the rest behind one more hop.

    Of plans that are as fast, the one with fewest slots below.
    Raises:  DfcError N064 (status 6) for a memory that is too small.
    """
    if not plan.streamed:
        return plan
    loads = _loads(plan, memory, hop)
    if loads.held_bytes <= memory:
        return replace(plan, below=loads)
    found = [replace(plan, below=below) for below in _candidates(loads)]
    if not found:
        least = least_bytes(loads)
        raise DfcError(
            "N064", f"{amount_text(memory, 'bytes')} of the host's memory do not hold what is "
            f"copied to the device, not even streamed from disk: {amount_text(least, 'bytes')} "
            "would do", help="the largest part that is copied at once has "
            f"{amount_text(plan.slot_bytes, 'bytes')}; more memory of the device takes less of the "
            "host's", status=6,
        )  # fmt: skip
    best = min(p.pass_seconds for p in found)
    alike = [p for p in found if p.pass_seconds <= best * ALIKE]
    return min(alike, key=lambda p: (p.below.slots, p.below.bytes_per_pass) if p.below else (0, 0))


def _loads(plan: Tiers, memory: int, hop: Hop) -> Tiers:
    """The device's loads as layers, each with what is computed since the load before."""
    layers, weights = [], []
    before = 0
    for j, (i, load) in enumerate(zip(plan.streamed, plan.loads, strict=True)):
        seconds: Number = sum(x.seconds for x in plan.layers[before : i + 1])
        layers.append(Layer(seconds, sum(load.values()), plan.layers[i].name))
        weights.append({f"{j}:{name}": size for name, size in load.items()})
        before = i + 1
    return Tiers(tuple(layers), tuple(weights), (), hop, memory)


def _candidates(loads: Tiers) -> Iterator[Tiers]:
    for slots in range(1, MOST_SLOTS + 1):
        try:
            yield plan_tiers(loads.layers, loads.weights, loads.memory, loads.hop, 0, slots)
        except DfcError:
            return  # more slots take more
