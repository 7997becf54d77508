"""Partitions in which devices have several stages: even stages, then devices evened out, then a
linear program.

What a device does is the sum over its stages, which no dynamic program over one stage after another
sees. Even stages make even devices, and a schedule with several stages a device waits least with
them; so they come first, with each stage's part of its device's memory. Then cuts move while the
slowest device gets faster. The linear program, whose rows add up over a device's stages, is asked
where that is not near enough to what no partition beats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from dfc.errors import DfcError
from dfc.planning.ideals import lower_bound
from dfc.planning.milp import solve_milp
from dfc.planning.problem import INFINITE, Partition, Problem, loads, value_of, why_not

_TRIES = 400  # moved cuts that are priced, and
_PRICED = 100_000  # nodes of all of them together
_LINEAR = 1000  # nodes times stages: beyond, the linear program takes minutes to begin

Solve = Callable[[Problem], Partition]  # the ladder, for stages that are devices of their own


def best_looped(problem: Problem, solve: Solve, seconds: float, gap: float) -> Partition | None:
    """The best partition that is found, with a proved bound; None when none fits.

    Without `seconds` for the linear program the bound is that of the work and the largest node.
    """
    bound = lower_bound(problem)
    found = [_evened(problem, stage) for stage in _even(problem, solve)]
    best = min(found, key=_ranks(problem), default=None)
    value = INFINITE if best is None else value_of(problem, best)
    method = "even stages"
    small = problem.n * problem.stages <= _LINEAR
    if seconds > 0 and small and value > bound * (1 + gap):
        other, proved = solve_milp(problem, seconds, gap / 2, value)
        bound = max(bound, min(proved, value))
        if other is not None and other.value < value * (1 - 1e-9):
            best, method = _evened(problem, other.stage), "milp"
    if best is None:
        return None
    value = value_of(problem, best)
    return Partition(tuple(best), value, min(bound, value), method)


def _ranks(problem: Problem) -> Callable[[Sequence[int]], tuple[float, float]]:
    """What is better: a smaller value, and of equal ones the faster slowest stage."""
    apart = replace(problem, apart=True, objective="throughput")
    return lambda stage: (value_of(problem, stage), value_of(apart, stage))


def _even(problem: Problem, solve: Solve) -> Iterator[tuple[int, ...]]:
    """Partitions into even stages that fit, by several ways to share the memory of a device.

    Where weights beyond the memory are streamed all of them fit, and are told apart later.
    """
    free: Sequence[int] | None = None
    for share in (_whole, _equal, _as_held, _as_bytes):
        room = share(problem, free, solve)
        if room is None:
            continue
        slots = [replace(s, memory=m) for s, m in zip(problem.slots, room, strict=True)]
        tried = replace(problem, slots=tuple(slots), apart=True)
        stage = _solved(tried, solve)
        if stage is not None:
            free = free or stage
            if why_not(problem, stage) is None:
                yield stage
                if not any(slot.stream for slot in problem.slots):
                    return


def _solved(problem: Problem, solve: Solve) -> tuple[int, ...] | None:
    try:
        return solve(problem).stage
    except DfcError as e:
        if e.code not in ("N060", "N063"):
            raise
        return None


def _whole(problem: Problem, free: Sequence[int] | None, solve: Solve) -> list[float]:
    return [s.memory for s in problem.slots]


def _equal(problem: Problem, free: Sequence[int] | None, solve: Solve) -> list[float]:
    times = np.bincount(problem.shares)
    return [s.memory / times[d] for s, d in zip(problem.slots, problem.shares, strict=True)]


def _as_held(problem: Problem, free: Sequence[int] | None, solve: Solve) -> list[float] | None:
    """In proportion to what even stages hold where memory is no matter."""
    return None if free is None else _in_proportion(problem, free)


def _as_bytes(problem: Problem, free: Sequence[int] | None, solve: Solve) -> list[float] | None:
    """In proportion to what stages hold whose largest is small."""
    slots = tuple(replace(s, memory=INFINITE) for s in problem.slots)
    stage = _solved(replace(problem, slots=slots, apart=True, objective="memory"), solve)
    return None if stage is None else _in_proportion(problem, stage)


def _in_proportion(problem: Problem, stage: Sequence[int]) -> list[float]:
    held = loads(replace(problem, apart=True), stage).memory
    whole = np.bincount(problem.shares, weights=held)
    return [
        s.memory * float(h / whole[d]) if whole[d] else s.memory
        for s, h, d in zip(problem.slots, held, problem.shares, strict=True)
    ]


def _evened(problem: Problem, stage: Sequence[int]) -> tuple[int, ...]:
    """Cuts moved along an order of the nodes, in smaller and smaller steps, while that is better.

    Keeps:  what is allowed: order, memory, pins, stages that are not empty.
    """
    order = sorted(range(problem.n), key=lambda v: (stage[v], v))
    ends = np.cumsum(np.bincount(stage, minlength=problem.stages)).tolist()
    rank = _ranks(problem)
    best, left = rank(stage), min(_TRIES, _PRICED // max(problem.n, 1))
    step = max(1, problem.n // (2 * problem.stages))
    while step:
        moved = False
        for cut in range(problem.stages - 1):
            for way in (-step, step):
                tried = [*ends]
                tried[cut] += way
                if not (tried[cut - 1] if cut else 0) <= tried[cut] <= tried[cut + 1] or not left:
                    continue
                left -= 1
                other = _of_cuts(order, tried)
                found = rank(other)
                if found < best and why_not(problem, other) is None:
                    ends, stage, best, moved = tried, other, found, True
        if not moved:
            step //= 2
    return tuple(stage)


def _of_cuts(order: Sequence[int], ends: Sequence[int]) -> list[int]:
    stage = [0] * len(order)
    s = 0
    for i, v in enumerate(order):
        while i >= ends[s]:
            s += 1
        stage[v] = s
    return stage
