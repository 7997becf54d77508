"""Three tiers: what is streamed to a device comes from a memory that does not hold it all either.

The loads of the device's plan are the layers of a plan of their own: some stay in the memory below,
the others are read into its slots, evenly in what is computed between them. Both hops go on beside
each other; how many slots the lower one needs, the simulation of all three lanes says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from dfc.errors import DfcError
from dfc.lang.units import amount_text
from dfc.planning.simulate import Number
from dfc.planning.streaming import Hop, Layer
from dfc.planning.tiers import ALIKE, MOST_SLOTS, Tiers, least_bytes, plan_tiers, shares


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
            f"would do, {amount_text(least - memory, 'bytes')} more",
            help="the largest part that is copied at once has "
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


def share_host(
    plans: Mapping[int, Tiers], host: int, disk: Hop, owners: Mapping[int, int]
) -> dict[int, Tiers]:
    """Plans of several stages, by number, all of whose weights lie in one host's memory.

    That is divided by what each needs at least, and the rest by what each lacks then; the disk's
    bandwidth by what each of their `owners` reads, so that all read as long: those are the devices
    (or ranks) that they are on, which run one of their stages at a time. A stage that streams from
    disk itself is on the host: its share is no more than its own memory.
    Raises:  DfcError N064 (status 6) for a memory that is too small, with the stages.
    """
    parts = {
        s: _in_host(p, disk.name) for s, p in plans.items() if p.streamed or p.hop.name == disk.name
    }
    _require(parts, host)
    given = dict(zip(parts, shares(host, list(parts.values())), strict=True))
    reading = {owners[s] for s, p in parts.items() if given[s] < p.held_bytes}
    disks = dict.fromkeys(parts, by_times(disk, max(1, len(reading))))
    for _ in range(2):
        found = {s: _with_host(plans[s], given[s], disks[s]) for s in parts}
        times = sharing({s: read_bytes(p, disk.name) for s, p in found.items()}, owners)
        disks = {s: by_times(disk, times.get(s, 1)) for s in parts}
    return {**plans, **found}


def sharing(copied: Mapping[int, int], owners: Mapping[int, int]) -> dict[int, float]:
    """How many times as long copies of stages take whose lane also brings what others need for each
    pass.

    Each owner gets of its bandwidth by what it brings, for whichever of its stages runs: a pass of
    any waits for the copies of all.
    """
    each: dict[int, int] = {}
    for s, size in copied.items():
        each[owners[s]] = each.get(owners[s], 0) + size
    total = sum(copied.values())
    return {s: total / each[owners[s]] for s in copied if each[owners[s]]}


def by_times(hop: Hop, times: float) -> Hop:
    """A hop whose copies take so many times as long."""
    return hop if times == 1 else replace(hop, per_byte=hop.per_byte * times)


def read_bytes(plan: Tiers, source: str) -> int:
    """What each pass brings from so named a tier."""
    if plan.hop.name == source:
        return plan.bytes_per_pass
    return plan.below.bytes_per_pass if plan.below is not None else 0


def _in_host(plan: Tiers, source: str) -> Tiers:
    """What a stage lays in the host's memory, all of it there."""
    whole = replace(plan, streamed=()) if plan.hop.name == source else _loads(plan, 0, plan.hop)
    return replace(whole, memory=whole.held_bytes)


def _with_host(plan: Tiers, share: int, disk: Hop) -> Tiers:
    if plan.hop.name != disk.name:
        return with_below(plan, share, disk)
    return plan_tiers(plan.layers, plan.weights, min(share, plan.memory), disk, plan.fixed)


def _require(parts: Mapping[int, Tiers], host: int) -> None:
    """Raises:  DfcError N064 (status 6) for a host's memory that does not hold what it must."""
    least = {s: least_bytes(p) for s, p in parts.items()}
    more = sum(least.values()) - host
    if more <= 0:
        return
    worst = max(least, key=lambda s: least[s])
    names = " and ".join(str(s) for s in parts)
    raise DfcError(
        "N064", f"the host's {amount_text(host, 'bytes')} do not hold what stage"
        f"{'s' if len(parts) > 1 else ''} {names} need{'' if len(parts) > 1 else 's'} of it, not "
        f"even streamed from disk: {amount_text(sum(least.values()), 'bytes')} would do, "
        f"{amount_text(more, 'bytes')} more",
        help=f"stage {worst} needs most, {amount_text(least[worst], 'bytes')}; more memory of the "
        "devices takes less of the host's", status=6,
    )  # fmt: skip
