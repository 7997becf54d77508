"""Partitions as chains of ideals, best by dynamic programming.

An ideal is a set of nodes closed under predecessors; the stages of a convex partition are the
differences of nested ideals. Over all ideals of a graph the result is the best partition; over some
of them (the prefixes of a few topological orders) it is the best of those.
Source:  J. Tarnawski et al., Efficient Algorithms for Device Placement of DNN Graph Operators.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from dfc.planning.problem import Partition, Problem, Slot, value_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]


def all_ideals(problem: Problem, most: int) -> list[int] | None:
    """Every ideal as a bit mask, smaller ones first; None when there are more than `most`."""
    before = [0] * problem.n
    for u, v in problem.edges:
        before[v] |= 1 << u
    level, found = {0}, [0]
    while level:
        wider: set[int] = set()
        for ideal in level:
            for v in range(problem.n):
                if not ideal >> v & 1 and before[v] & ~ideal == 0:
                    wider.add(ideal | 1 << v)
            if len(found) + len(wider) > most:
                return None
        found.extend(sorted(wider))
        level = wider
    return found


def prefixes(orders: Iterable[Sequence[int]]) -> list[int]:
    """The ideals that are the first nodes of one of the orders."""
    found = {0}
    for order in orders:
        ideal = 0
        for v in order:
            ideal |= 1 << v
            found.add(ideal)
    return sorted(found, key=lambda x: (x.bit_count(), x))


def best_chain(problem: Problem, ideals: Sequence[int], *, complete: bool) -> Partition | None:
    """The best partition whose stages are differences of these ideals; None when none is allowed.

    Needs:  the empty and the full ideal among them, smaller ones first.
    Cost:   I² (K + T) for I ideals, K stages and T tensors that take time on their link.
    """
    pairs = _Pairs(problem, ideals)
    join = np.add if problem.objective == "latency" else np.maximum
    last = len(ideals) - 1
    best = np.full(len(ideals), np.inf)
    best[0] = 0.0
    came: list[NDArray[np.int64]] = []
    for s in range(problem.stages):
        total = join(best[:, None], pairs.cost(s))
        came.append(total.argmin(axis=0))
        best = total[came[-1], np.arange(len(ideals))]
    if not np.isfinite(best[last]):
        return None
    stage = [0] * problem.n
    at = last
    for s in range(problem.stages - 1, -1, -1):
        previous = int(came[s][at])
        for v in _nodes(ideals[at] & ~ideals[previous]):
            stage[v] = s
        at = previous
    found = value_of(problem, stage)
    least = float(best[last])  # less than what is found where links that skip stages are slow
    exact = found if least >= found * (1 - 1e-9) else least
    bound = exact if complete else lower_bound(problem)
    return Partition(tuple(stage), found, min(bound, found), "ideals" if complete else "orders")


def lower_bound(problem: Problem) -> float:
    """What no partition beats: the mean over the devices, and the largest node."""
    if problem.objective == "memory":
        least = min(slot.in_flight for slot in problem.slots)
        held = problem.weights + least * problem.activations
        whole = held.sum() + sum(size for size, _ in problem.tied)
        return float(max(whole / len(set(problem.shares)), held.max(initial=0.0)))
    of_device = {d: slot.kind for d, slot in zip(problem.shares, problem.slots, strict=True)}
    kinds = list(of_device.values())
    fastest = problem.time[:, sorted(set(kinds))].min(axis=1)
    if problem.objective == "latency":
        return float(fastest.sum())
    return float(max(_shared(problem.time[:, kinds]), fastest.max(initial=0.0)))


def _shared(time: Floats) -> float:
    """The time of the slowest device, if the work could be divided at will.

    Why:  with weights that add up to 1, the slowest takes no less than the weighted mean, and that
          no less than each node's least part of it. Weights as the devices' speeds make it tight
          where all nodes gain alike, equal ones where they do not.
    """
    runs = np.isfinite(time)
    total = np.where(runs, time, 0.0).sum(axis=0)
    speed = 1 / np.where(total > 0, total, np.inf)
    best = 0.0
    for weight in (np.ones_like(speed), speed):
        if weight.sum() > 0:
            shares = np.where(runs, time * (weight / weight.sum()), np.inf)
            best = max(best, float(shares.min(axis=1).sum()))
    return best


class _Pairs:
    """For ideals J (rows) and I (columns): what a stage of the nodes of I but not J costs."""

    def __init__(self, problem: Problem, ideals: Sequence[int]) -> None:
        self.problem = problem
        self.member = _members(ideals, problem.n)
        wide = self.member.astype(np.float32)
        self.nested = wide @ (1 - wide).T < 0.5  # nothing of J is outside I
        self.in_line = bool(np.diagonal(self.nested, 1).all())  # each within the next
        self._no_pair = ~self.nested | self._splits_groups()
        if not problem.idle:
            np.fill_diagonal(self._no_pair, True)
        self._of_slot: dict[Slot, Floats] = {}
        self._of_speed: dict[tuple[bytes, float, float], Floats] = {}

    def cost(self, s: int) -> Floats:
        """The cost of stage s for each pair; infinite where it is not allowed."""
        slot = self.problem.slots[s]
        if slot not in self._of_slot:
            self._of_slot[slot] = self._cost_of(slot)
        cost = self._of_slot[slot]
        unpinned = self._breaks_pins(s)
        return cost if unpinned is None else np.where(unpinned, np.inf, cost)

    def _cost_of(self, slot: Slot) -> Floats:
        p = self.problem
        time = p.time[:, slot.kind]
        runs = np.isfinite(time)
        held = self._held(slot)
        if p.objective == "memory":
            cost = held.copy()
        elif p.objective == "latency":
            cost = self._added(np.where(runs, time, 0.0)) + self._waited(slot)
        else:
            # Many devices are alike, or differ in their memory alone.
            speed = time.tobytes(), slot.receive, slot.send
            if speed not in self._of_speed:
                self._of_speed[speed] = self._bottleneck(np.where(runs, time, 0.0), slot)
            cost = self._of_speed[speed].copy()
        if not runs.all():
            cost[self._added((~runs).astype(float)) > 0] = np.inf
        if np.isfinite(slot.memory) and slot.stream:
            cost = np.maximum(cost, (held - slot.memory) / slot.stream)
        elif np.isfinite(slot.memory):
            cost[held > slot.memory * (1 + 1e-12)] = np.inf
        cost[self._no_pair] = np.inf
        return cost

    def _bottleneck(self, time: Floats, slot: Slot) -> Floats:
        cost = self._added(time)
        if np.isfinite(slot.receive):
            cost = np.maximum(cost, self._received / slot.receive)
        if np.isfinite(slot.send):
            cost = np.maximum(cost, self._sent / slot.send)
        return cost

    def _waited(self, slot: Slot) -> Floats:
        """Until all that comes in is there."""
        total = np.zeros(self.nested.shape)
        if np.isfinite(slot.receive):
            total += self._received / slot.receive
        if slot.latency:
            total += slot.latency * self._waits
        return total

    def _held(self, slot: Slot) -> Floats:
        p = self.problem
        if p.objective != "memory" and not np.isfinite(slot.memory):
            return np.zeros(self.nested.shape)
        held = self._added(p.held(slot))
        if slot.taken:
            held = held + slot.taken * self._received
        for size, readers in p.tied:
            held = held + size * (self._added_count(readers) > 0)
        return held

    def _added(self, values: Floats) -> Floats:
        total = self.member @ values
        return np.asarray(np.maximum(total[None, :] - total[:, None], 0.0))

    def _added_count(self, nodes: Sequence[int]) -> NDArray[np.int64]:
        count = self.member[:, list(nodes)].sum(axis=1)
        return np.asarray(count[None, :] - count[:, None])

    @cached_property
    def _received(self) -> Floats:
        """The bytes that come in."""
        return self._coming([t.bytes for t in self.problem.tensors])

    @cached_property
    def _waits(self) -> Bools:
        """Whether anything comes in."""
        return self._coming([1.0] * len(self.problem.tensors)) > 0

    @cached_property
    def _sent(self) -> Floats:
        """The bytes that go out: of what is made here, and read later."""
        if self.in_line:
            return self._sent_in_line()
        before, within = [], []
        for t in self.problem.tensors:
            made = self.member[:, t.producer]
            done = self.member[:, list(t.readers)].all(axis=1)
            before.append(t.bytes * ~made)
            within.append(made & ~done)
        return self._sums(before, within)

    def _coming(self, sizes: Sequence[float]) -> Floats:
        """What comes in, if tensors have these sizes: those that were made before, with more
        readers within I than within J.

        Why:  that J has k of them and I more than k is a product, so that all of it is one of
              matrices; bytes are whole numbers, whose sums are exact in any order.
        """
        if self.in_line:
            return self._coming_in_line(sizes)
        before, within = [], []
        for t, size in zip(self.problem.tensors, sizes, strict=True):
            made = self.member[:, t.producer]
            read = self.member[:, list(t.readers)].sum(axis=1)
            for k in range(len(t.readers)):
                before.append(size * (made & (read == k)))
                within.append(read > k)
        return self._sums(before, within)

    def _sums(self, before: Sequence[NDArray[Any]], within: Sequence[Bools]) -> Floats:
        """For each pair the sum of what `before` says of J where `within` holds of I."""
        if not before:
            return np.zeros(self.nested.shape)
        return np.asarray(np.array(before).T @ np.array(within, dtype=np.float64))

    def _coming_in_line(self, sizes: Sequence[float]) -> Floats:
        """The same for the prefixes of one order: each tensor adds to rectangles of pairs."""
        corners = np.zeros((len(self.nested) + 1, len(self.nested) + 1))
        at = self._places()
        for t, size in zip(self.problem.tensors, sizes, strict=True):
            start = at[t.producer] + 1  # a stage that begins here or later receives it
            for place in sorted(at[v] for v in t.readers):
                if place >= start:
                    _add(corners, (start, place + 1), (place + 1, len(self.nested)), size)
                    start = place + 1
        return np.asarray(corners.cumsum(axis=0).cumsum(axis=1)[:-1, :-1])

    def _sent_in_line(self) -> Floats:
        corners = np.zeros((len(self.nested) + 1, len(self.nested) + 1))
        at = self._places()
        for t in self.problem.tensors:
            own, last = at[t.producer], max(at[v] for v in t.readers)
            _add(corners, (0, own + 1), (own + 1, last + 1), t.bytes)
        return np.asarray(corners.cumsum(axis=0).cumsum(axis=1)[:-1, :-1])

    def _places(self) -> list[int]:
        """The position of each node in the order."""
        return [int(x) for x in (~self.member).sum(axis=0) - 1]

    def _splits_groups(self) -> Bools:
        wrong = np.zeros(self.nested.shape, dtype=bool)
        for group in self.problem.together:
            count = self._added_count(group)
            wrong |= (count != 0) & (count != len(group))
        return wrong

    def _breaks_pins(self, s: int) -> Bools | None:
        """Where a stage has what is pinned to another device."""
        wrong: Bools | None = None
        for v, pinned in self.problem.pins.items():
            if pinned != self.problem.device_of[s]:
                mine = self._added_count([v]) > 0
                wrong = mine if wrong is None else wrong | mine
        return wrong


def _add(corners: Floats, rows: tuple[int, int], columns: tuple[int, int], value: float) -> None:
    """Add to a rectangle, by its corners: summed up along both axes later."""
    for row, sign in zip(rows, (1, -1), strict=True):
        corners[row, columns[0]] += sign * value
        corners[row, columns[1]] -= sign * value


def _members(ideals: Sequence[int], n: int) -> Bools:
    """Which nodes each ideal has."""
    size = (n + 7) // 8
    masks = np.frombuffer(b"".join(i.to_bytes(size, "little") for i in ideals), dtype=np.uint8)
    bits = np.unpackbits(masks.reshape(len(ideals), size), axis=1, count=n, bitorder="little")
    return bits.astype(bool)


def _nodes(mask: int) -> Iterable[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
