"""Weights that are streamed through tiers, simulated: computing beside copies over every hop.

A pass runs through layers in order. The weights of some of them are copied when they are needed,
through one hop or several (disk to memory, memory to device); each hop is a lane of its own. A hop
ends in slots that are used in turn: a copy needs the slot of the copy so many before it, which the
next hop, or the layer that reads it, has left. Copies are made in the order of use, and go on from
pass to pass: those of the next one begin during the last layers. Integers and fractions stay exact.

Source:  the steady times are those of a max-plus system: after some passes each takes the same, in
         the mean over a period.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, pairwise
from math import lcm
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError
from dfc.planning.simulate import Number

if TYPE_CHECKING:
    from numpy.typing import NDArray

PASSES = 12  # that are simulated: the steady time is that of the second half


@dataclass(frozen=True)
class Layer:
    """What is computed with the same weights at hand: seconds of one pass, bytes of weights."""

    seconds: Number
    bytes: int
    name: str = ""


@dataclass(frozen=True)
class Hop:
    """One way between two tiers: seconds a byte, seconds until the first, slots at its end.

    `carries` are the streamed layers that come over it, all where it is None: others are above it.
    """

    per_byte: Number
    latency: Number = 0
    slots: int = 2
    name: str = "copy"
    carries: tuple[int, ...] | None = None

    def seconds(self, size: int) -> Number:
        return self.latency + self.per_byte * size


@dataclass(frozen=True)
class Stream:
    """When everything happens in several passes: lane 0 computes, lane h+1 is hop h.

    `start` and `end` are of every task, lane after lane: PASSES times the layers, then, for each
    hop, PASSES times the layers that come over it.
    """

    layers: tuple[Layer, ...]
    streamed: tuple[int, ...]
    hops: tuple[Hop, ...]
    passes: int
    start: NDArray[Any]
    end: NDArray[Any]
    scale: int  # integers are this many parts of a second; 0 for floats

    @cached_property
    def pass_seconds(self) -> Number:
        """What a pass takes when many follow each other."""
        half = self.passes // 2
        n = len(self.layers)
        last, middle = self.end[self.passes * n - 1], self.end[half * n - 1]
        return self._unit(last - middle, self.passes - half)

    @property
    def bound(self) -> Number:
        """What no order of copies can beat: all computing, or all copies of the slowest hop."""
        return bound(self.layers, self.streamed, self.hops)

    @property
    def lanes(self) -> list[tuple[str, list[tuple[str, float, float]]]]:
        """Of each lane its name, and the name, start and end of all that it does."""
        names = [x.name or f"layer {i}" for i, x in enumerate(self.layers)]
        copied = [[names[i] for i in over(h, self.streamed)] for h in self.hops]
        each = [("compute", names), *((h.name, c) for h, c in zip(self.hops, copied, strict=True))]
        found, at = [], 0
        for lane, tasks in each:
            spans = []
            for name in tasks * self.passes:
                start, end = (float(self._unit(x[at])) for x in (self.start, self.end))
                spans.append((name, start, end))
                at += 1
            found.append((lane, spans))
        return found

    def _unit(self, x: Any, parts: int = 1) -> Number:
        if not self.scale:
            return float(x) / parts
        value = Fraction(int(x), self.scale * parts)
        return int(value) if value.denominator == 1 else value


def over(hop: Hop, streamed: Sequence[int]) -> tuple[int, ...]:
    """The layers that come over a hop."""
    return tuple(streamed) if hop.carries is None else hop.carries


def bound(layers: Sequence[Layer], streamed: Sequence[int], hops: Sequence[Hop]) -> Number:
    copies = [sum(h.seconds(layers[i].bytes) for i in over(h, streamed)) for h in hops]
    return max(sum(x.seconds for x in layers), *copies, 0)


def break_even(layers: Sequence[Layer], streamed: Sequence[int], hops: Sequence[Hop]) -> int:
    """How many batches a pass must take with the same weights for copies to cost nothing."""
    computing = sum(x.seconds for x in layers)
    copies = max((sum(h.seconds(layers[i].bytes) for i in over(h, streamed)) for h in hops),
                 default=0)  # fmt: skip
    if not computing:
        return 1
    whole = -(-copies // computing)  # also exact for fractions
    return max(1, int(whole))


def stream(
    layers: Sequence[Layer], streamed: Sequence[int], hops: Sequence[Hop], passes: int = PASSES
) -> Stream:
    """Simulate passes one after the other.

    Raises:  DfcError N024 for layers that are not there, or a hop without slots.
    """
    n, hops = len(layers), tuple(hops)
    streamed = tuple(sorted(set(streamed)))
    if any(not 0 <= i < n for i in streamed):
        raise DfcError("N024", f"layer {max(streamed)} is streamed and there are {n}")
    if any(h.slots < 1 for h in hops) or (streamed and not hops):
        raise DfcError("N024", "weights are streamed over one hop at least, into one slot at least")
    above = set(streamed)
    for h in reversed(hops):
        if not above >= set(over(h, streamed)):
            raise DfcError("N024", f"what comes over `{h.name}` does not go on to be computed with")
        above = set(over(h, streamed))
    return _Streamed(tuple(layers), streamed, hops, passes).run()


class _Streamed:
    """The tasks of all lanes, and what they wait for."""

    def __init__(
        self, layers: tuple[Layer, ...], streamed: tuple[int, ...], hops: tuple[Hop, ...],
        passes: int,
    ) -> None:  # fmt: skip
        self.layers, self.streamed, self.hops, self.passes = layers, streamed, hops, passes
        self.over = [over(h, streamed) for h in hops]
        self.place = [{i: j for j, i in enumerate(o)} for o in self.over]
        copied = (passes * len(o) for o in self.over)
        self.begins = [*accumulate(copied, initial=passes * len(layers))]
        self.total = self.begins[-1]

    def run(self) -> Stream:
        import numpy as np

        from dfc.planning.lanes import times

        seconds, scale = self.durations()
        took = np.array(seconds, dtype=np.int64 if scale else np.float64)
        waits = np.full((self.total, 2), self.total, dtype=np.int32)
        for task, needs in self.needs():
            waits[task, : len(needs)] = needs
        edges = [0, *self.begins]
        start, end, _ = times(list(pairwise(edges)), took, waits, np.zeros_like(waits))
        return Stream(
            self.layers, self.streamed, self.hops, self.passes, start, end, scale
        )  # fmt: skip

    def durations(self) -> tuple[list[Any], int]:
        """Of all tasks, as integers and their scale, or as floats and 0."""
        computing: list[Number] = [x.seconds for x in self.layers]
        copies = [
            [h.seconds(self.layers[i].bytes) for i in o]
            for h, o in zip(self.hops, self.over, strict=True)
        ]
        parts = [computing, *copies]
        if any(isinstance(t, float) for part in parts for t in part):
            return [float(t) for part in parts for t in part * self.passes], 0
        scale = lcm(*(Fraction(t).denominator for part in parts for t in part))
        return [int(t * scale) for part in parts for t in part * self.passes], scale

    def needs(self) -> list[tuple[int, list[int]]]:
        """A layer needs its copy; a copy the one of the hop before, and a slot that is free."""
        n, last = len(self.layers), len(self.hops) - 1
        found = []
        for h, hop in enumerate(self.hops):
            r = len(self.over[h])
            for q in range(self.passes * r):
                one_pass, j = divmod(q, r)
                layer = self.over[h][j]
                before = []
                if h and layer in self.place[h - 1]:
                    before.append(self.copy(h - 1, one_pass, layer))
                if q >= hop.slots:
                    earlier, k = divmod(q - hop.slots, r)
                    before.append(self.reader(h, earlier, self.over[h][k]))
                found.append((self.begins[h] + q, before))
                if h == last:
                    found.append((one_pass * n + layer, [self.begins[h] + q]))
        return found

    def copy(self, hop: int, one_pass: int, layer: int) -> int:
        return self.begins[hop] + one_pass * len(self.over[hop]) + self.place[hop][layer]

    def reader(self, hop: int, one_pass: int, layer: int) -> int:
        """What empties the slot of a layer's copy at the end of a hop."""
        if hop + 1 < len(self.hops):
            return self.copy(hop + 1, one_pass, layer)
        return one_pass * len(self.layers) + layer


def evenly(seconds: Sequence[Number], count: int) -> tuple[int, ...]:
    """`count` of the layers, evenly in what has been computed before them.

    Fewer where one layer takes longer than the distance between two.
    """
    total, before, found = sum(seconds), 0, []
    for i, c in enumerate(seconds):
        after = before + c
        if total and count * after // total > count * before // total:
            found.append(i)
        before = after  # type: ignore[assignment]
    return tuple(found)
