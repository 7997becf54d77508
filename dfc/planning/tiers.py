"""Which weights stay on a device and which are streamed to it, in a memory that does not hold all.

What is streamed is spread evenly over the computing, so that copies hide behind it; how many slots
that takes, the simulator finds. Weights that several layers read are streamed for each of them, or
stay as long as one of those layers does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from dfc.errors import DfcError
from dfc.lang.units import amount_text
from dfc.planning.simulate import Number
from dfc.planning.streaming import Hop, Layer, Stream, break_even, evenly, stream

ALIGN = 256  # of each weight in a slot: what CUDA's allocator and vector loads want
MOST_SLOTS = 8
_CAPS = 6  # how many limits on the size of a slot are tried
ALIKE = 1.002  # times that are no different
Weights = Mapping[str, int]  # bytes by name


@dataclass(frozen=True)
class Tiers:
    """A plan: layers that are streamed into slots, everything else stays.

    `weights` are the bytes of each layer's weights by name, `fixed` bytes that stay in any case.
    `below` is the plan of the memory that streamed layers come from, where that does not hold them
    all either: its layers are the loads.
    """

    layers: tuple[Layer, ...]
    weights: tuple[Weights, ...]
    streamed: tuple[int, ...]
    hop: Hop
    memory: int
    fixed: int = 0
    below: Tiers | None = None

    @cached_property
    def resident(self) -> frozenset[str]:
        """Names of the weights that stay."""
        gone = set(self.streamed)
        stay = (w for i, w in enumerate(self.weights) if i not in gone)
        return frozenset(name for w in stay for name in w)

    @cached_property
    def loads(self) -> tuple[Weights, ...]:
        """What each streamed layer's copy brings."""
        return tuple(
            {n: b for n, b in self.weights[i].items() if n not in self.resident}
            for i in self.streamed
        )

    @cached_property
    def resident_bytes(self) -> int:
        sizes = {n: b for w in self.weights for n, b in w.items() if n in self.resident}
        return self.fixed + sum(map(aligned, sizes.values()))

    @cached_property
    def slot_bytes(self) -> int:
        return max((slot_bytes(w) for w in self.loads), default=0)

    @property
    def slots(self) -> int:
        return self.hop.slots if self.streamed else 0

    @property
    def held_bytes(self) -> int:
        """What the plan takes of the memory."""
        return self.resident_bytes + self.slots * self.slot_bytes

    @property
    def bytes_per_pass(self) -> int:
        """What is copied in each pass, to the byte."""
        return sum(sum(w.values()) for w in self.loads)

    @cached_property
    def simulation(self) -> Stream:
        copied = dict(zip(self.streamed, self.loads, strict=True))
        layers = [
            replace(x, bytes=sum(copied[i].values()) if i in copied else 0)
            for i, x in enumerate(self.layers)
        ]
        return stream(layers, self.streamed, self.hops)

    @property
    def hops(self) -> list[Hop]:
        """From the lowest tier up."""
        if self.below is None or not self.below.streamed:
            return [self.hop]
        carries = tuple(self.streamed[j] for j in self.below.streamed)
        return [replace(self.below.hop, carries=carries), self.hop]

    @property
    def pass_seconds(self) -> Number:
        return self.simulation.pass_seconds

    @property
    def bound(self) -> Number:
        return self.simulation.bound

    @property
    def break_even(self) -> int:
        """So many batches with the same weights would hide the copies."""
        s = self.simulation
        return break_even(s.layers, s.streamed, s.hops)


def aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def slot_bytes(weights: Weights) -> int:
    return sum(map(aligned, weights.values()))


def plan_tiers(
    layers: Sequence[Layer],
    weights: Sequence[Weights],
    memory: int,
    hop: Hop,
    fixed: int = 0,
    slots: int | None = None,
    placement: str = "even",
) -> Tiers:
    """The plan with the shortest pass, and of those alike the one with fewest slots.

    `fixed` is what else is in the memory. With `slots` there are so many; a `placement` of "tail"
    streams the last layers, as what fills the memory first does.
    Raises:  DfcError N064 (status 6) when the memory cannot hold what stays and one slot.
    """
    everything = Tiers(tuple(layers), tuple(weights), (), hop, memory, fixed)
    if everything.held_bytes <= memory:
        return everything
    found = list(_candidates(everything, slots, placement))
    if not found:
        raise _too_small(everything, slots or 1)
    best = min(plan.pass_seconds for plan in found)
    alike = [plan for plan in found if plan.pass_seconds <= best * ALIKE]
    return min(alike, key=lambda plan: (plan.slots, plan.bytes_per_pass))


def _candidates(everything: Tiers, slots: int | None, placement: str) -> Iterator[Tiers]:
    """For each number of slots, and largest layer that may be streamed, what just fits."""
    for count in [slots] if slots else range(1, MOST_SLOTS + 1):
        hop = replace(everything.hop, slots=count)
        for cap in _caps(everything):
            plan = _least(replace(everything, hop=hop), cap, placement)
            if plan is not None:
                yield plan


def _caps(everything: Tiers) -> list[int]:
    """Sizes of layers, the largest first; a few of many."""
    sizes = sorted({slot_bytes(w) for w in everything.weights if w}, reverse=True)
    step = max(1, -(-len(sizes) // _CAPS))
    return sizes[::step]


def _least(everything: Tiers, cap: int, placement: str) -> Tiers | None:
    """The fewest layers to stream so that the rest fits, of those not larger than `cap`."""
    able = [i for i, w in enumerate(everything.weights) if w and slot_bytes(w) <= cap]
    for streamed in _sets(everything.layers, able, placement):
        plan = replace(everything, streamed=streamed)
        if plan.held_bytes <= everything.memory:
            # What another reader keeps anyway is not copied.
            needed = zip(streamed, plan.loads, strict=True)
            return replace(plan, streamed=tuple(i for i, load in needed if load))
    return None


def _sets(layers: Sequence[Layer], able: list[int], placement: str) -> Iterator[tuple[int, ...]]:
    """More and more of the layers that may be streamed."""
    if placement == "tail":
        yield from (tuple(able[-count:]) for count in range(1, len(able) + 1))
        return
    # What cannot be streamed computes as well: copies hide behind it.
    seconds: list[Number] = []
    waiting: Number = 0
    among = set(able)
    for i, x in enumerate(layers):
        waiting += x.seconds
        if i in among:
            seconds.append(waiting)
            waiting = 0
    for count in range(1, 2 * len(able)):
        yield tuple(able[i] for i in evenly(seconds, count))
    yield tuple(able)


def least_bytes(everything: Tiers, slots: int = 1) -> int:
    """The smallest memory that there is a plan for."""
    every = tuple(i for i, w in enumerate(everything.weights) if w)
    hop = replace(everything.hop, slots=slots)
    streaming = (
        replace(everything, streamed=able, hop=hop).held_bytes
        for cap in _caps(everything)
        for able in [tuple(i for i in every if slot_bytes(everything.weights[i]) <= cap)]
    )
    return min(everything.held_bytes, *streaming)


def shares(memory: int, parts: Sequence[Tiers]) -> list[int]:
    """A memory divided among parts: to each what it needs at least, and the rest by what is left.

    `parts` have all weights there. Less than they need goes by what they need.
    """
    least = [least_bytes(p) for p in parts]
    whole = [p.held_bytes for p in parts]
    room = memory - sum(least)
    if room < 0 or sum(whole) <= memory:
        by = least if room < 0 else whole
        return [memory * w // max(1, sum(by)) for w in by]
    more = [b - a for a, b in zip(least, whole, strict=True)]
    return [a + room * m // sum(more) for a, m in zip(least, more, strict=True)]


def _too_small(everything: Tiers, slots: int) -> DfcError:
    least = least_bytes(everything, slots)
    largest = max(range(len(everything.weights)), key=lambda i: slot_bytes(everything.weights[i]))
    size = amount_text(slot_bytes(everything.weights[largest]), "bytes")
    name = everything.layers[largest].name or f"layer {largest}"
    memory = everything.memory
    return DfcError(
        "N064",
        f"{amount_text(max(memory, 0), 'bytes')} do not hold this model, not even streamed: it "
        f"takes {amount_text(least, 'bytes')}, {amount_text(least - memory, 'bytes')} more",
        help=f"the largest part that is streamed at once is `{name}` with {size}; what always "
        f"stays has {amount_text(everything.fixed, 'bytes')}",
        status=6,
    )
