"""A graph within a memory: planned by the model's costs, measured, planned again, and built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.ir.interpret import bind_inputs
from dfc.planning.cost import Sizes, default_sizes
from dfc.planning.streaming import Hop
from dfc.planning.tier_chain import with_below
from dfc.planning.tier_plan import DISK, planned
from dfc.planning.tiers import Tiers, plan_tiers
from dfc.planning.weight_blocks import Cut, cut
from dfc.runtime.tiers.clock import block_seconds
from dfc.runtime.tiers.places import Place, is_relayed, place_of
from dfc.runtime.tiers.relay import Relay
from dfc.runtime.tiers.streamed import Streamed

PLACEMENTS = ("even", "tail")
_WARM = 1  # passes before the one that is measured
_BETTER = 1.02  # times as fast a plan must be that replaces one


@dataclass(frozen=True)
class Wanted:
    """What is to be held, in how much memory, and how: the planner's free choices may be taken.

    With a `host` memory, what that does not hold comes from disk, over both hops.
    """

    memory: int
    slots: int | None = None
    placement: str = "even"
    host: int | None = None  # of the host, where what is streamed to a device lies

    def __post_init__(self) -> None:
        """Raises:  DfcError Q055 for choices that are none."""
        if self.slots is not None and (not isinstance(self.slots, int) or self.slots < 1):
            message = f"`slots` is a number from 1, or None, got {self.slots!r}"
            raise DfcError("Q055", message, status=2)
        if self.placement not in PLACEMENTS:
            known = " and ".join(PLACEMENTS)
            message = f"unknown placement {self.placement!r}: there are {known}"
            raise DfcError("Q055", message, status=2)


def within(
    graph: Graph,
    wanted: Wanted,
    device: str = "cpu",
    inputs: Sequence[Any] | None = None,
    say: Callable[[str], None] = lambda what: None,
    place: Place | None = None,
) -> Streamed:
    """A runner that never holds more than the memory for weights and what is computed of `inputs`.

    With `inputs`, blocks and copies are timed, and the plan is made of those times.
    Raises:  DfcError N064 (status 6) for a memory that is too small, K070 for weights that are
             nowhere else, K021 for a model without weights, K074 for a host's memory where the
             device is the host.
    """
    place = place or place_of(device)
    if wanted.host is not None and not is_relayed(place):
        raise no_host_between()
    parts = cut(graph, place.calls(graph))
    sizes = bind_inputs(graph, inputs) if inputs is not None else {}
    plan = first_plan(parts, wanted, place, {**default_sizes(graph), **sizes})
    if inputs is None or not plan.streamed:
        return Streamed(parts, plan, place)
    say("timing each part of the model")
    measured = measured_plan(parts, plan, place, wanted, inputs)
    return Streamed(parts, measured, place)


def no_host_between() -> DfcError:
    return DfcError(
        "K074", "weights come to a processor from disk: there is no memory between",
        help="leave out the host's memory, or name a device: cuda=8GiB,cpu=16GiB", status=2,
    )  # fmt: skip


def first_plan(parts: Cut, wanted: Wanted, place: Place, sizes: Sizes) -> Tiers:
    """By the costs of operators, and a guess of the link."""
    hop = Hop(1 / place.guess, name=place.source)
    memory = wanted.memory
    plan = planned(parts, place.model(), hop, memory, sizes, wanted.slots, wanted.placement)
    return _on_host(plan, wanted, Hop(1 / DISK, name="disk"))


def _on_host(plan: Tiers, wanted: Wanted, disk: Hop) -> Tiers:
    return plan if wanted.host is None else with_below(plan, wanted.host, disk)


def measured_plan(
    parts: Cut,
    plan: Tiers,
    place: Place,
    wanted: Wanted,
    inputs: Sequence[Any],
    sharing: float = 1,
    disk_sharing: float = 1,
) -> Tiers:
    """The plan by what blocks and copies take; another one only where it is clearly faster.

    Copies take so many times as long as was measured where several are `sharing` what brings them,
    and reads from a disk below so many times.
    """
    import torch

    clock = place.clock()
    runner = Streamed(parts, plan, place, clock)
    try:
        with torch.random.fork_rng(enabled=True):
            for _ in range(_WARM + 1):
                clock.seconds()
                clock.stamp()
                runner(inputs)
                clock.stamp()
            between = clock.seconds()
            copied, disk = runner.carrier.copied(), disk_sharing * _disk(runner)
    finally:
        runner.close()
    timed = [i for i, b in enumerate(parts.blocks) if b.first is not None]
    seconds, _ = block_seconds(between, len(timed))
    found = dict(zip(timed, seconds, strict=True))
    layers = [replace(x, seconds=found.get(i, 0.0)) for i, x in enumerate(plan.layers)]
    hop = replace(plan.hop, per_byte=sharing * _per_byte(copied))
    now = replace(plan, layers=tuple(layers), hop=hop)
    if now.below is not None:
        now = replace(now, below=replace(now.below, hop=replace(now.below.hop, per_byte=disk)))
    other = plan_tiers(
        layers, plan.weights, plan.memory, now.hop, plan.fixed, wanted.slots, wanted.placement
    )  # fmt: skip
    try:
        other = _on_host(other, wanted, Hop(disk, name="disk"))
    except DfcError:
        return now  # its larger slots are too much for the host
    return other if other.pass_seconds * _BETTER < now.pass_seconds else now


def _per_byte(copied: Sequence[tuple[int, float]]) -> float:
    return sum(s for _, s in copied) / max(1, sum(b for b, _ in copied))


def _disk(runner: Streamed) -> float:
    """Seconds a byte of the hop below, a guess where there is none yet."""
    carrier = runner.carrier
    return _per_byte(carrier.reader.copied()) if isinstance(carrier, Relay) else 1 / DISK
