"""Stages of a plan whose weights do not fit their devices: what each streams, and what that takes.

The partition takes into account what no stage can do without: weights beyond the memory, copied
once for each microbatch beside computing. Slots and the order of copies come on top: here every
such stage gets its plan of tiers, and its time becomes that of the simulated passes.

Stages of one device have shares of its memory, as those of a rank have. Several microbatches go
through a stage before the device turns to its next one, whose slots are full by then: the link
brings the weights of one stage at a time, and passes add up.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dfc.errors import DfcError
from dfc.lang.units import amount_text
from dfc.planning.devices import Wanted
from dfc.planning.machine import Device, Machine
from dfc.planning.model import Modelled, Wish, live_bytes
from dfc.planning.problem import Loads
from dfc.planning.stages import StageGraph, split
from dfc.planning.streaming import Hop
from dfc.planning.tier_advice import advice, limit
from dfc.planning.tier_chain import share_host
from dfc.planning.tier_plan import DISK, all_there
from dfc.planning.tiers import Tiers, least_bytes, plan_tiers, shares
from dfc.planning.weight_blocks import cut

if TYPE_CHECKING:
    from dfc.ir.graph import Graph
    from dfc.planning.problem import Floats


def check_wish(hops: Mapping[str, Hop], wish: Wish, objective: Wanted) -> None:
    """Raises:  DfcError N065 for what is not planned with streamed weights."""
    if hops and wish.trains:
        raise DfcError("N065", "weights are streamed where a model runs, not where it is trained")
    if hops and objective not in ("throughput", "cost"):
        message = f"streamed weights are not planned by {objective}"
        raise DfcError("N065", message, help="plan it by time, or by cost")


def stage_tiers(
    graph: Graph, model: Modelled, machine: Machine, stage: Sequence[int], load: Loads,
    hops: Mapping[str, Hop], host: int | None = None,
) -> dict[int, Tiers]:  # fmt: skip
    """The tiers of the stages of each device that does not hold them, by stage.

    Stages on devices share the memory of their `host`, and its disk, with those that run there.
    Raises:  DfcError N060 (status 6) for stages that do not fit, not even streamed.
    """
    slots, at = model.problem.slots, model.problem.device_of
    over = {d for d, slot in zip(at, slots, strict=True)
            if slot.stream and load.memory[d] > slot.memory}  # fmt: skip
    if not over:
        return {}
    if host is not None:
        over |= _there(machine, over)
    of_node = {n: s for nodes, s in zip(model.groups, stage, strict=True) for n in nodes}
    parts = split(graph, of_node)
    found: dict[int, Tiers] = {}
    for d in sorted(over):
        mine = [s for s, device in enumerate(at) if device == d]
        seconds = {s: float(load.compute[s]) for s in mine}
        found |= _tiers(parts, seconds, model, machine.devices[d], hops)
    return found if host is None else _on_host(found, host, dict(enumerate(at)))


def _there(machine: Machine, over: Collection[int]) -> set[int]:
    """The devices that are the host of those that do not hold their weights: what these copy lies
    in the same memory. Of several processors it is not known which."""
    mine = {d: x.name.rpartition(".")[0] or x.name for d, x in enumerate(machine.devices)
            if x.kind == "cpu"}  # fmt: skip
    return set(mine) if len({*mine.values()}) == 1 and not mine.keys() >= set(over) else set()


def stage_seconds(load: Loads, tiers: Mapping[int, Tiers]) -> Floats:
    """What a microbatch takes each stage: computing, or the passes of one that streams."""
    import numpy as np

    passes = np.zeros(len(load.compute))
    for s, plan in tiers.items():
        passes[s] = float(plan.pass_seconds)
    return np.asarray(np.maximum(load.compute, passes))


def _on_host(found: Mapping[int, Tiers], host: int, owners: Mapping[int, int]) -> dict[int, Tiers]:
    """What the host does not hold of what is copied to devices comes from disk first."""
    disk = Hop(1 / DISK, name="disk")
    if all(t.hop.name == disk.name for t in found.values()):
        return dict(found)  # devices have none of its memory
    try:
        return share_host(found, host, disk, owners)
    except DfcError as e:
        raise DfcError("N060", e.message, help=e.diagnostics[0].help, status=6) from e


def _tiers(
    parts: Sequence[StageGraph], seconds: Mapping[int, float], model: Modelled, device: Device,
    hops: Mapping[str, Hop],
) -> dict[int, Tiers]:  # fmt: skip
    """Of the stages of a device, with what they compute: its memory is what the partition had for
    weights, and what they compute with."""
    hop = hops[device.name]
    whole = {
        s: _taking(all_there(cut(parts[s].graph), device, hop, model.sizes), x)
        for s, x in seconds.items()
    }
    memory = int(model.problem.slots[min(whole)].memory + live_of(parts, whole, model))
    least = sum(map(least_bytes, whole.values()))
    if least > memory:
        raise _too_large(whole, device, least - memory)
    given = shares(memory, list(whole.values()))
    return {
        s: plan_tiers(x.layers, x.weights, room, hop, x.fixed)
        for (s, x), room in zip(whole.items(), given, strict=True)
    }


def live_of(parts: Sequence[StageGraph], stages: Collection[int], model: Modelled) -> float:
    """What a device's stages compute with; no more than the partition had left for that."""
    each = sum(live_bytes(parts[s].graph, model.sizes) for s in stages)
    return each if len(stages) == 1 else min(each, model.live)


def _too_large(whole: Mapping[int, Tiers], device: Device, more: int) -> DfcError:
    stages = "stage " if len(whole) == 1 else "stages "
    stages += " and ".join(map(str, whole))
    largest = max((x for t in whole.values() for x in t.layers), key=lambda x: x.bytes)
    size = amount_text(largest.bytes, "bytes")
    return DfcError(
        "N060", f"{stages} {'does' if len(whole) == 1 else 'do'} not fit on `{device.name}`, not "
        f"even streamed: {amount_text(more, 'bytes')} more than there is beside a reserve",
        help=f"the largest part that is streamed at once is `{largest.name or 'the first'}` with "
        f"{size}; smaller microbatches or more devices take less", status=6,
    )  # fmt: skip


def _taking(whole: Tiers, seconds: float) -> Tiers:
    """Its layers' times in sum as the partition has them, where nodes were timed."""
    now = float(sum(x.seconds for x in whole.layers))
    by = seconds / now if now else 1.0
    layers = tuple(replace(x, seconds=x.seconds * by) for x in whole.layers)
    return replace(whole, layers=layers)


def streamed_text(tiers: Mapping[int, Tiers], names: Sequence[str]) -> list[str]:
    """What stages stream, a sentence each."""
    found = []
    for s, plan in tiers.items():
        if not plan.streamed:
            continue  # it has its share of a device whose other stages stream
        each, slot, stay = (
            amount_text(x, "bytes")
            for x in (plan.bytes_per_pass, plan.slot_bytes, plan.resident_bytes)
        )
        took = amount_text(float(plan.pass_seconds), "time")
        alone = amount_text(float(sum(x.seconds for x in plan.layers)), "time")
        told = (
            f"stage {s} on `{names[s]}` keeps {stay} and streams {each} from {plan.hop.name} for "
            f"each microbatch, into {plan.slots} slots of {slot}: {took}, where computing takes "
            f"{alone}; limited by {limit(plan)}"
        )
        if plan.below is not None and plan.below.streamed:
            read, held = (
                amount_text(x, "bytes") for x in (plan.below.bytes_per_pass, plan.below.held_bytes)
            )
            told += f"; {read} of it the host, which keeps {held}, reads from disk each time"
        more = advice(plan)
        found.append(f"{told}; {more[0][0]}: {more[0][1]:.2f} times as fast" if more else told)
    return found
