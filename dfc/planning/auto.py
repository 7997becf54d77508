"""`auto`: the schedule with the shortest simulated step that fits: known ones, and ones made here.

By construction it is never worse than a known schedule that fits. What is made here is a list
schedule for the stages' own times: at every moment a rank takes a backward that is ready, else a
forward if memory allows, else weights' gradients that are left; variants differ in how many
microbatches they hold and how long they wait for a better action. Then weights' gradients are moved
about while that helps.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from dfc.counting import counted
from dfc.errors import DfcError
from dfc.planning.actions import FULL, JOINED, SELECTIVE, Kind, Program
from dfc.planning.recompute import in_ways, needed
from dfc.planning.schedules import SCHEDULES, schedule, why_not
from dfc.planning.simulate import Costs, Number, Simulation, simulate

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PATIENCE = (0.0, 0.5, 1.0)  # parts of W that a rank waits for something better than W
_MOVES = 60  # tries of the local search
_SMALL = 3000  # actions, beyond which there is no local search


@dataclass(frozen=True)
class Found:
    """The schedule that was chosen, and how near it is to what no schedule can beat."""

    program: Program
    simulation: Simulation
    bound: Number

    @property
    def gap(self) -> float:
        return float(self.simulation.makespan / self.bound) - 1 if self.bound else 0.0


def auto(
    ranks: int,
    microbatches: int,
    costs: Costs,
    caps: Sequence[float] = (),
    placement: Sequence[int] | None = None,
    recompute: Mapping[int, str] | None = MappingProxyType({}),
) -> Found:
    """The best schedule for these costs, within `caps` bytes of each rank.

    `placement` is the rank of each stage; by default each rank has one. `recompute` are the stages
    that recompute, and how; with None each schedule has as few as it needs to fit, in the best way.
    Raises:  DfcError N062 (status 6) when none fits, with the smallest memory that would do, and
             N002 when there is none for these numbers.
    """
    where = tuple(range(ranks)) if placement is None else tuple(placement)
    plain = _portfolio(where, microbatches, costs)
    tried = [simulate(x, costs) for p in plain for x in _again(p, costs, caps, recompute)]
    if not tried:
        of, on = counted(len(where) // ranks, "stage"), counted(ranks, "rank")
        message = f"no schedule of {of} a rank has {counted(microbatches, 'microbatch')} on {on}"
        raise DfcError("N002", message)
    fit = [t for t in tried if _fits(t, caps)]
    if not fit:
        least = min(max(t.peaks) for t in tried)
        raise DfcError(
            "N062", f"no schedule fits: the smallest holds {least:.6g} bytes on one rank",
            help="use more microbatches of fewer items, or recompute activations", status=6,
        )  # fmt: skip
    best = min(fit, key=lambda t: (t.makespan, max(t.peaks)))
    best = _improved(best, costs, caps)
    if len(where) > ranks:
        return Found(best.program, best, _looped_bound(where, microbatches, costs))
    return Found(best.program, best, lower_bound(ranks, microbatches, costs))


def fitting(program: Program, costs: Costs, caps: Sequence[float]) -> Simulation:
    """The shortest step of a program in which as few stages recompute as leave ranks room.

    Raises:  DfcError N062 (status 6) where a rank does not fit, whatever it recomputes.
    """
    needed(program, costs, caps, ways_of(costs))
    tried = (simulate(x, costs) for x in _again(program, costs, caps, None))
    fit = [t for t in tried if _fits(t, caps)]
    return min(fit, key=lambda t: (t.makespan, max(t.peaks)))


def ways_of(costs: Costs) -> tuple[str, ...]:
    """The ways to recompute that there are costs of."""
    return (FULL, SELECTIVE) if costs.kept else (FULL,)


def _again(
    program: Program, costs: Costs, caps: Sequence[float], recompute: Mapping[int, str] | None
) -> list[Program]:
    """The program with stages that recompute; where they are not given, in each way alone and in
    all of them; where it never fits, with all stages."""
    if recompute is not None:
        return [in_ways(program, recompute)]
    if not caps:
        return [program]
    every = ways_of(costs)
    found: list[dict[int, str]] = []
    for ways in dict.fromkeys([*((way,) for way in every), every]):
        try:
            some = needed(program, costs, caps, ways)
        except DfcError:  # it is told of all programs together
            some = dict.fromkeys(range(program.stages), ways[0])
        if some not in found:
            found.append(some)
    return [in_ways(program, some) for some in found]


def _looped_bound(placement: Sequence[int], m: int, costs: Costs) -> Number:
    """What no order beats where ranks have several stages of a chain: each rank waits for its first
    input, and works."""
    f, i, w = costs.forward, costs.inputs, costs.weights
    best: Number = 0
    for rank in range(1 + max(placement)):
        own: Number = sum(f[s] + i[s] + w[s] for s, at in enumerate(placement) if at == rank)
        before: Number = sum(f[: placement.index(rank)])
        best = max(best, before + m * own)
    return best


def lower_bound(ranks: int, m: int, costs: Costs) -> Number:
    """What no order of the actions beats, with stage s on rank s of a chain.

    Source:  each rank waits for its first input, works, and its results go back to the first.
    """
    f, i, w = costs.forward, costs.inputs, costs.weights
    best: Number = 0
    before_f: Number = 0
    before_i: Number = 0
    way: Number = 0
    for r in range(ranks):
        best = max(best, before_f + way + m * (f[r] + i[r] + w[r]))
        best = max(best, before_f + before_i + 2 * way + m * (f[r] + i[r]) + w[0])
        before_f, before_i = before_f + f[r], before_i + i[r]
        if r + 1 < ranks:
            way = way + costs.link_of(r, r + 1).latency
    return best


def _fits(tried: Simulation, caps: Sequence[float]) -> bool:
    return not caps or all(p <= c for p, c in zip(tried.peaks, caps, strict=True))


def _portfolio(placement: tuple[int, ...], m: int, costs: Costs) -> Iterator[Program]:
    ranks = 1 + max(placement)
    chunks = len(placement) // ranks
    for name, shape in SCHEDULES.items():
        alike = shape.chunks == "1" if chunks == 1 else shape.chunks in ("any", str(chunks))
        if shape.trains and alike and why_not(shape, ranks, m, chunks) is None:
            program = schedule(name, ranks, m, chunks)
            if program.placement == placement:
                yield program
    for held in _held(ranks, m) if chunks == 1 else ():
        for patience in _PATIENCE:
            for taper in (False, True):
                yield list_schedule(ranks, m, costs, held, patience, taper)


def _held(ranks: int, m: int) -> list[int]:
    """How many microbatches a rank may hold in the schedules that are made here."""
    return sorted({1, ranks, ranks + 1, (3 * ranks) // 2, 2 * ranks - 1, min(m, 2 * ranks)})


def list_schedule(
    ranks: int, m: int, costs: Costs, held: int, patience: float = 0.0, taper: bool = False
) -> Program:
    """A schedule for these costs; no rank holds more than `held` microbatches.

    With `taper` later ranks hold fewer, as in 1F1B. `patience` is how much of W's time a rank waits
    for a forward or a backward that is under way rather than begin with W.
    """
    return _ListScheduler(ranks, m, costs, held, patience, taper).run()


class _ListScheduler:
    def __init__(
        self, ranks: int, m: int, costs: Costs, held: int, patience: float, taper: bool
    ) -> None:
        self.p, self.m, self.costs, self.patience = ranks, m, costs, patience
        self.held = [max(1, held - r if taper else held) for r in range(ranks)]
        self.clock: list[Number] = [0] * ranks
        # When the next forward and backward of each rank can begin, for each microbatch.
        self.can_f: list[list[Number | None]] = [[None] * m for _ in range(ranks)]
        self.can_i: list[list[Number | None]] = [[None] * m for _ in range(ranks)]
        self.can_f[0] = [0] * m
        self.f, self.i, self.w = [0] * ranks, [0] * ranks, [0] * ranks  # how many are done
        self.rows: list[list[tuple[int, int, int]]] = [[] for _ in range(ranks)]

    def run(self) -> Program:
        heap: list[tuple[Number, int]] = [(0, r) for r in range(self.p)]
        while heap:
            now, r = heapq.heappop(heap)
            if now < self.clock[r]:
                continue  # an older alarm
            action = self._choose(r, now)
            if action is None:
                alarm = self._next_alarm(r, now)
                if alarm is not None:
                    heapq.heappush(heap, (alarm, r))
                continue
            for other in self._do(r, now, action):
                heapq.heappush(heap, (max(self.clock[other], now), other))
            heapq.heappush(heap, (self.clock[r], r))
        rows = tuple(np.array(x, dtype=np.int32).reshape(-1, 3) for x in self.rows)
        return Program("auto", tuple(range(self.p)), self.m, rows)

    def _choose(self, r: int, now: Number) -> Kind | None:
        ready_i, ready_f = self._ready(self.can_i, self.i, r), self._ready(self.can_f, self.f, r)
        room = self.f[r] - self.w[r] < self.held[r]
        if ready_i is not None and ready_i <= now:
            return Kind.I
        if ready_f is not None and ready_f <= now and room:
            return Kind.F
        if self.w[r] == self.i[r]:
            return None
        wait = self.patience * float(self.costs.weights[r])
        soon = [t for t in (ready_i, ready_f if room else None) if t is not None]
        return None if soon and float(min(soon) - now) < wait else Kind.W

    def _next_alarm(self, r: int, now: Number) -> Number | None:
        room = self.f[r] - self.w[r] < self.held[r]
        ready = [self._ready(self.can_i, self.i, r)]
        ready += [self._ready(self.can_f, self.f, r)] if room else []
        later = [t for t in ready if t is not None and t > now]
        return min(later, default=None)

    def _ready(self, can: list[list[Number | None]], done: list[int], r: int) -> Number | None:
        return can[r][done[r]] if done[r] < self.m else None

    def _do(self, r: int, now: Number, kind: Kind) -> list[int]:
        """Carry out an action; the ranks that may go on because of it."""
        if kind == Kind.W:
            self.clock[r] = now + self.costs.weights[r]
            self.rows[r].append((kind, r, self.w[r]))
            self.w[r] += 1
            return []
        done, took = (self.f, self.costs.forward) if kind == Kind.F else (self.i, self.costs.inputs)
        b = done[r]
        self.rows[r].append((kind, r, b))
        done[r] += 1
        end = self.clock[r] = now + took[r]
        if kind == Kind.F and r + 1 < self.p:
            self.can_f[r + 1][b] = end + self.costs.link_of(r, r + 1).latency
            return [r + 1]
        if kind == Kind.F:
            self.can_i[r][b] = end
        elif r:
            self.can_i[r - 1][b] = end + self.costs.link_of(r, r - 1).latency
            return [r - 1]
        return []


def _improved(best: Simulation, costs: Costs, caps: Sequence[float]) -> Simulation:
    """Swap neighbours around the longest gaps while the step gets shorter."""
    if len(best.program) > _SMALL:
        return best
    left = _MOVES
    going = True
    while going and left > 0:
        going = False
        for program in _neighbours(best):
            left -= 1
            tried = _try(program, costs)
            if tried is not None and _fits(tried, caps) and tried.makespan < best.makespan:
                best, going = tried, True
                break
            if left <= 0:
                break
    return best


def _try(program: Program, costs: Costs) -> Simulation | None:
    try:
        return simulate(program, costs)
    except DfcError:  # a deadlock
        return None


def _neighbours(found: Simulation) -> Iterator[Program]:
    """Programs with one action exchanged with the one before it, where a rank had to wait; joined
    ones go together."""
    program = found.program
    gaps: list[tuple[float, int, int]] = []
    for r, (first, last) in enumerate(found.tasks.lanes[: len(program.ranks)]):
        for task, after in pairwise(range(first, last)):
            idle = float(found.start[after] - found.end[task])
            if idle > 0:
                gaps.append((-idle, r, after - first))
    for _, r, at in sorted(gaps):
        groups = _joined(program.ranks[r])
        for a, b in ((at - 1, at), (at, at + 1)):
            if a >= 0 and b < len(groups) and _may_swap(groups[a], groups[b]):
                rows = np.concatenate([*groups[:a], groups[b], groups[a], *groups[b + 1 :]])
                ranks = (*program.ranks[:r], rows, *program.ranks[r + 1 :])
                yield Program("auto", program.placement, program.microbatches, ranks)


def _joined(rows: NDArray[np.int32]) -> list[NDArray[np.int32]]:
    """A rank's actions, those that are joined as one: the tasks of its lane."""
    alone = np.flatnonzero(rows[:-1, 0] & JOINED == 0) + 1
    return np.split(rows, alone)


def _may_swap(first: NDArray[np.int32], second: NDArray[np.int32]) -> bool:
    """Whether two neighbours of a rank are of different microbatches and different kinds."""
    return all(
        a[0] & ~JOINED != b[0] & ~JOINED and a[1:] != b[1:]
        for a in first.tolist()
        for b in second.tolist()
    )
