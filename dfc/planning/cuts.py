"""Cutting a long chain into stages: the bottleneck is searched, each try is a walk of vectors.

A chain can be cut with bottleneck T if and only if stages, each as long as T and the memory allow,
reach its end; what crosses a cut bounds where cuts may lie. Latency adds up instead: the best way
to each cut is the least of a window that moves on with it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dfc.planning.ideals import lower_bound
from dfc.planning.problem import Partition, Problem, value_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

_STEPS = 60  # halvings: more than a double's 53 bits


def is_chain(problem: Problem) -> bool:
    """Whether each node hands on to the next one only, and nothing else ties nodes together.

    Parts that hand nothing on could stand in another order, which cuts do not try.
    Where stages hold what comes in, a longer one may hold less: memory does not bound its length.
    """
    simple = not (problem.tied or problem.together or problem.pins)
    simple = simple and not any(slot.taken for slot in problem.slots)
    handed = {t.producer for t in problem.tensors}
    simple = simple and len(handed) == max(problem.n - 1, 0)
    return simple and all(t.readers == (t.producer + 1,) for t in problem.tensors)


def cut_chain(problem: Problem) -> Partition | None:
    """The best cuts of a chain, None when its memory does not allow any.

    Needs:  `is_chain`.
    Cost:   O(n K) for each of 60 halvings, in vectors of n; once for latency.
    """
    if problem.objective == "latency":
        return _made(problem, _Chain(problem).quickest(), 0.0)
    chain = _Chain(problem if problem.objective == "throughput" else _of_bytes(problem))
    low, high = lower_bound(problem), chain.most()
    ends = chain.cuts(high)
    if ends is None:
        return None
    best = chain.bottleneck(ends)
    for _ in range(_STEPS):
        if best <= low * (1 + 1e-12):
            break
        middle = (low + best) / 2
        tried = chain.cuts(middle)
        if tried is None:
            low = middle
        elif chain.bottleneck(tried) < best:
            ends, best = tried, chain.bottleneck(tried)
        else:
            break  # as near as doubles come
    return _made(problem, ends, low)


def _made(problem: Problem, ends: list[int] | None, bound: float) -> Partition | None:
    """The partition whose stages end there; without a bound it is the best."""
    if ends is None:
        return None
    stage = np.repeat(np.arange(problem.stages), np.diff(ends, prepend=0)).tolist()
    found = value_of(problem, stage)
    return Partition(tuple(stage), found, min(bound, found) if bound else found, "chain")


def _of_bytes(problem: Problem) -> Problem:
    """A problem whose bottleneck is the largest stage's bytes."""
    columns = []
    for slot in problem.slots:
        held = problem.held(slot)
        columns.append(np.where(np.isfinite(problem.time[:, slot.kind]), held, np.inf))
    slots = tuple(
        replace(slot, kind=s, receive=np.inf, send=np.inf) for s, slot in enumerate(problem.slots)
    )
    return replace(problem, time=np.stack(columns, axis=1), slots=slots)


class _Chain:
    def __init__(self, problem: Problem) -> None:
        self.problem, self.n = problem, problem.n
        kinds = range(problem.time.shape[1])
        time = np.where(np.isfinite(problem.time), problem.time, 0.0)
        self.time = [_sums(time[:, k]) for k in kinds]
        self.cannot = [_sums((~np.isfinite(problem.time[:, k])).astype(float)) for k in kinds]
        self.held = [_sums(problem.held(slot)) for slot in problem.slots]
        self.crossing = np.zeros(self.n + 1)  # bytes over the cut before each node
        for t in problem.tensors:
            self.crossing[t.producer + 1] += t.bytes

    def most(self) -> float:
        """A bottleneck that every partition meets."""
        slowest = max(float(t[-1]) for t in self.time)
        rates = [r for s in self.problem.slots for r in (s.receive, s.send)]
        whole = max(held[-1] for held in self.held)
        beyond = [(float(whole) - s.memory) / s.stream for s in self.problem.slots if s.stream]
        return slowest + float(self.crossing.max()) / min(rates) + max(0.0, *beyond, 0.0)

    def bottleneck(self, ends: list[int]) -> float:
        worst, start = 0.0, 0
        for slot, held, end in zip(self.problem.slots, self.held, ends, strict=True):
            if end > start:
                work = float(self.time[slot.kind][end] - self.time[slot.kind][start])
                into, out = self.crossing[start] / slot.receive, self.crossing[end] / slot.send
                beyond = max(0.0, float(held[end] - held[start]) - slot.memory)
                streamed = beyond / slot.stream if slot.stream else 0.0
                worst = max(worst, work, float(into), float(out), streamed)
            start = end
        return worst

    def cuts(self, bottleneck: float) -> list[int] | None:
        """Where stages end that have no greater bottleneck, None when there are none."""
        limit = bottleneck * (1 + 1e-15)
        reached = np.zeros(self.n + 1, dtype=bool)
        reached[0] = True
        came: list[Ints] = []
        for s in range(self.problem.stages):
            reached, source = self._stage(s, reached, limit)
            came.append(source)
        if not reached[self.n]:
            return None
        ends = [self.n]
        for s in range(self.problem.stages - 1, 0, -1):
            ends.append(int(came[s][ends[-1]]))
        return ends[::-1]

    def _stage(
        self, s: int, starts: NDArray[np.bool_], limit: float
    ) -> tuple[NDArray[np.bool_], Ints]:
        """Where stage s can end, and from which start: the last one that it can have."""
        slot = self.problem.slots[s]
        able = starts & (self.crossing <= limit * slot.receive)
        first = self._first_start(s, limit)
        positions = np.arange(self.n + 1)
        last = np.maximum.accumulate(np.where(able, positions, -1))
        if not self.problem.idle:
            last = np.concatenate([[-1], last[:-1]])
        # The last start before i that can be: of those from first[i] on, if there is any.
        ends = (last >= first) & (self.crossing <= limit * slot.send)
        source = last.copy()
        if self.problem.idle:
            source[starts] = positions[starts]  # an empty stage
            ends = ends | starts
        return ends, source

    def quickest(self) -> list[int] | None:
        """Where the stages end through which one microbatch comes soonest."""
        best = np.full(self.n + 1, np.inf)
        best[0] = 0.0
        came: list[Ints] = []
        for s, slot in enumerate(self.problem.slots):
            work = self.time[slot.kind]
            arrives = self.crossing / slot.receive + slot.latency
            arrives[0] = 0.0  # the graph's inputs are there
            least, source = _window(best + arrives - work, self._first_start(s, np.inf))
            stays = (best <= least + work) & self.problem.idle
            best = np.where(stays, best, least + work)
            came.append(np.where(stays, np.arange(self.n + 1), source))
        if not np.isfinite(best[self.n]):
            return None
        ends_at = [self.n]
        for s in range(self.problem.stages - 1, 0, -1):
            ends_at.append(int(came[s][ends_at[-1]]))
        return ends_at[::-1]

    def _first_start(self, s: int, limit: float) -> Ints:
        """For each end, the earliest start from which work and memory fit."""
        slot = self.problem.slots[s]
        held, work = self.held[s], self.time[slot.kind]
        first = np.zeros(self.n + 1, dtype=np.int64)
        if np.isfinite(limit):
            first = np.searchsorted(work, work - limit * (1 + 1e-12))
        memory = slot.memory + (slot.stream * limit if slot.stream else 0.0)
        if np.isfinite(memory):
            first = np.maximum(first, np.searchsorted(held, held - memory * (1 + 1e-12)))
        cannot = self.cannot[slot.kind]
        return np.maximum(first, np.searchsorted(cannot, cannot, side="left"))


def _window(values: NDArray[np.float64], first: Ints) -> tuple[NDArray[np.float64], Ints]:
    """For each i the least of values[first[i]:i], and where it is.

    Needs:  `first` never falls.
    """
    least = np.full(len(values), np.inf)
    where = np.full(len(values), -1, dtype=np.int64)
    near: deque[int] = deque()  # the least of what follows each, in order
    numbers = values.tolist()
    for i, begin in enumerate(first.tolist()):
        while near and near[0] < begin:
            near.popleft()
        if near:
            least[i], where[i] = numbers[near[0]], near[0]
        while near and numbers[near[-1]] >= numbers[i]:
            near.pop()
        near.append(i)
    return least, where


def _sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(values)])
