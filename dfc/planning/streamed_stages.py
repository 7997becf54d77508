"""Stages of a plan whose weights do not fit their devices: what each streams, and what that takes.

The partition takes into account what no stage can do without: weights beyond the memory, copied
once for each microbatch beside computing. Slots and the order of copies come on top: here every
such stage gets its plan of tiers, and its time becomes that of the simulated passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dfc.errors import DfcError
from dfc.lang.units import amount_text
from dfc.planning.devices import Wanted
from dfc.planning.machine import Machine
from dfc.planning.model import Modelled, Wish, live_bytes
from dfc.planning.problem import Loads
from dfc.planning.stages import StageGraph, split
from dfc.planning.streaming import Hop
from dfc.planning.tier_advice import advice, limit
from dfc.planning.tier_chain import share_host
from dfc.planning.tier_plan import DISK, all_there
from dfc.planning.tiers import Tiers, least_bytes, plan_tiers
from dfc.planning.weight_blocks import cut

if TYPE_CHECKING:
    from dfc.ir.graph import Graph


def check_wish(
    hops: Mapping[str, Hop], wish: Wish, objective: Wanted, stages_per_device: int | None = None
) -> None:
    """Raises:  DfcError N065 for what is not planned with streamed weights."""
    if hops and wish.trains:
        raise DfcError("N065", "weights are streamed where a model runs, not where it is trained")
    if hops and objective not in ("throughput", "cost"):
        message = f"streamed weights are not planned by {objective}"
        raise DfcError("N065", message, help="plan it by time, or by cost")
    if hops and (stages_per_device or 1) > 1:
        message = f"streamed weights are planned for one stage a device, not {stages_per_device}"
        raise DfcError("N065", message)


def stage_tiers(
    graph: Graph, model: Modelled, machine: Machine, stage: Sequence[int], load: Loads,
    hops: Mapping[str, Hop], host: int | None = None,
) -> dict[int, Tiers]:  # fmt: skip
    """The tiers of each stage that its device does not hold, by stage.

    Stages on devices share the memory of their `host`, and its disk.
    Raises:  DfcError N060 (status 6) for a stage that does not fit, not even streamed.
    """
    slots = model.problem.slots
    over = [s for s, slot in enumerate(slots) if slot.stream and load.memory[s] > slot.memory]
    if not over:
        return {}
    of_node = {n: s for nodes, s in zip(model.groups, stage, strict=True) for n in nodes}
    parts = split(graph, of_node)
    found = {s: _tiers(parts[s], s, model, machine, float(load.compute[s]), hops) for s in over}
    return found if host is None else _on_host(found, host)


def _on_host(found: Mapping[int, Tiers], host: int) -> dict[int, Tiers]:
    """What the host does not hold of what is copied to devices comes from disk first."""
    disk = Hop(1 / DISK, name="disk")
    copied = {s: t for s, t in found.items() if t.hop.name != disk.name}
    try:
        return {**found, **share_host(copied, host, disk)}
    except DfcError as e:
        raise DfcError("N060", e.message, help=e.diagnostics[0].help, status=6) from e


def _tiers(
    part: StageGraph, s: int, model: Modelled, machine: Machine, seconds: float,
    hops: Mapping[str, Hop],
) -> Tiers:  # fmt: skip
    """Its memory is what the partition had for weights, and what it computes with."""
    device = machine.devices[s]
    hop = hops[device.name]
    whole = _taking(all_there(cut(part.graph), device, hop, model.sizes), seconds)
    memory = int(model.problem.slots[s].memory + live_bytes(part.graph, model.sizes))
    try:
        return plan_tiers(whole.layers, whole.weights, memory, hop, whole.fixed)
    except DfcError as e:
        more = least_bytes(whole) - memory
        raise DfcError(
            "N060", f"stage {s} does not fit on `{device.name}`, not even streamed: it takes "
            f"{amount_text(more, 'bytes')} more than there is beside a reserve",
            help=e.diagnostics[0].help, status=6,
        ) from e  # fmt: skip


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
