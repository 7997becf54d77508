"""When everything ends: tasks in lanes, each in order, and what tasks of other lanes wait for.

A lane is one thing that does one task after the other: a rank, one direction of a link, a disk. The
time of a task is the longest path to it; a cycle is a deadlock. Integers stay exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Times = tuple[NDArray[Any], NDArray[Any], list[int]]
Lane = tuple[int, int]  # its tasks: from, to

_WIDE = 40  # lanes; below, waves are too narrow for numpy to pay


def times(
    lanes: Sequence[Lane], took: NDArray[Any], waits: NDArray[np.int32], delay: NDArray[Any]
) -> Times:
    """Start and end of each task, and the tasks that never start: a deadlock's.

    `waits` are the tasks that must have ended, int32[n, d], filled with n; `delay` what passes
    between their end and the start.
    """
    run = _narrow if len(lanes) < _WIDE else _waves
    return run(lanes, took, waits, delay)


def _waves(
    lanes: Sequence[Lane], took: NDArray[Any], waits: NDArray[np.int32], delay: NDArray[Any]
) -> Times:
    """All lanes whose next task can start, at once."""
    n = len(took)
    start = np.zeros(n, dtype=took.dtype)
    end = np.full(n + 1, -1, dtype=took.dtype)
    end[n] = 0  # what nothing waits for
    head = np.array([a for a, _ in lanes], dtype=np.int64)
    stop = np.array([b for _, b in lanes], dtype=np.int64)
    clock = np.zeros(len(lanes), dtype=took.dtype)
    active = np.flatnonzero(head < stop)
    while len(active):
        tasks = head[active]
        ended = end[waits[tasks]]
        able = (ended >= 0).all(axis=1)
        if not able.any():
            return start, end[:n], tasks.tolist()
        moving, tasks = active[able], tasks[able]
        ready = (ended[able] + delay[tasks]).max(axis=1, initial=0)
        begin = np.maximum(ready, clock[moving])
        start[tasks] = begin
        clock[moving] = end[tasks] = begin + took[tasks]
        head[moving] += 1
        active = active[head[active] < stop[active]]
    return start, end[:n], []


def _narrow(
    lanes: Sequence[Lane], took: NDArray[Any], waits: NDArray[np.int32], delay: NDArray[Any]
) -> Times:
    """Lane by lane, each as far as it comes."""
    n = len(took)
    real = waits != n
    bounds = [0, *real.sum(axis=1).cumsum().tolist()]
    lasts, needs, gaps = took.tolist(), waits[real].tolist(), delay[real].tolist()
    start: list[Any] = [0] * n
    end: list[Any] = [None] * n
    head, clock = [a for a, _ in lanes], [0] * len(lanes)
    stop = [b for _, b in lanes]
    todo = [i for i in range(len(lanes)) if head[i] < stop[i]]
    sleeping: dict[int, list[int]] = {}  # the task that lanes wait for
    while todo:
        i = todo.pop()
        while head[i] < stop[i]:
            task, begin = head[i], clock[i]
            for k in range(bounds[task], bounds[task + 1]):
                ended = end[needs[k]]
                if ended is None:
                    sleeping.setdefault(needs[k], []).append(i)
                    break
                if ended + gaps[k] > begin:
                    begin = ended + gaps[k]
            else:
                start[task] = begin
                end[task] = clock[i] = begin + lasts[task]
                head[i] += 1
                if task in sleeping:
                    todo.extend(sleeping.pop(task))
                continue
            break
    stuck = [head[i] for i in range(len(lanes)) if head[i] < stop[i]]
    found = np.array([-1 if e is None else e for e in end], dtype=took.dtype)
    return np.array(start, dtype=took.dtype), found, stuck
