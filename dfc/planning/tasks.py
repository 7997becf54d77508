"""A program as arrays: tasks in lanes, what each takes, and what each waits for.

Actions that are joined are one task. A transfer that takes time on its link is a task of a lane of
its own, one for each direction between two ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from dfc.planning.actions import JOINED, Kind, Program
from dfc.planning.lanes import times

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dfc.planning.simulate import Costs


@dataclass
class Tasks:
    """Tasks in lane order: lane l holds the tasks `lanes[l][0]` to `lanes[l][1]`.

    `waits` are the tasks that must have ended, int32[n, d], filled with n; `delay` what passes
    between their end and the start.
    """

    program: Program
    lanes: list[tuple[int, int]]
    lane: NDArray[np.int32]
    took: NDArray[Any]
    waits: NDArray[np.int32]
    delay: NDArray[Any]
    rows: NDArray[np.int32]  # [n, 3] of each task; of the first of joined ones
    links: list[tuple[int, int]]  # the ranks of the lanes that are links

    def run(self) -> tuple[NDArray[Any], NDArray[Any], list[int]]:
        """Start and end of each task, and the tasks that never start: a deadlock's."""
        return times(self.lanes, self.took, self.waits, self.delay)

    def name(self, task: int) -> str:
        kind, stage, b = self.rows[task].tolist()
        what = f"{Kind(kind & ~JOINED).name}({stage},{b})"
        lane = int(self.lane[task])
        ranks = len(self.program.ranks)
        if lane < ranks:
            return f"rank {lane} in {what}"
        return "SEND of {} from rank {} to rank {}".format(what, *self.links[lane - ranks])

    def blocked(self, stuck: Sequence[int]) -> list[tuple[int, int]]:
        """Which of the stuck tasks waits for which other task."""
        heads = {int(self.lane[t]): t for t in stuck}
        found = []
        for t in stuck:
            for other in self.waits[t].tolist():
                if other < len(self.took) and other >= heads.get(int(self.lane[other]), other + 1):
                    found.append((t, other))
                    break
        return found


def tasks_of(program: Program, costs: Costs, scale: int | None) -> Tasks:
    """The tasks of a program; times are integers times `scale`, floats where that is None."""
    return _Builder(program, costs, scale).build()


class _Builder:
    def __init__(self, program: Program, costs: Costs, scale: int | None) -> None:
        self.program, self.costs, self.scale = program, costs, scale
        self.dtype: Any = np.float64 if scale is None else np.int64
        self.rank = np.array(program.placement, dtype=np.int64)
        self.rows = np.concatenate([*program.ranks, np.empty((0, 3), dtype=np.int32)])
        self.kind = self.rows[:, 0] & ~JOINED

    def build(self) -> Tasks:
        task = self.number_tasks()
        first = np.flatnonzero(np.diff(task, prepend=-1))
        n = len(first)
        counts = [len(rows) for rows in self.program.ranks]
        ends = task[np.cumsum(counts) - 1] + 1 if n else np.zeros(0, dtype=np.int64)
        bounds = [0]
        for rank, count in enumerate(counts):
            bounds.append(int(ends[rank]) if count else bounds[-1])
        took = np.zeros(n, dtype=self.dtype)
        np.add.at(took, task, self.durations())
        waits, delay, sends = self.dependencies(task)
        waits, delay = _one_row_each(waits, delay, task, n)
        lanes = list(pairwise(bounds))
        lane = np.repeat(np.arange(len(lanes)), [b - a for a, b in lanes]).astype(np.int32)
        tasks = Tasks(self.program, lanes, lane, took, waits, delay, self.rows[first], [])
        return _with_links(tasks, sends, self) if sends else tasks

    def number_tasks(self) -> NDArray[np.int64]:
        """The task of each action: a joined one has the same as the next."""
        joined = (self.rows[:, 0] & JOINED) != 0
        fresh = np.ones(len(self.rows), dtype=np.int64)
        fresh[1:] = ~joined[:-1]
        return np.asarray(np.cumsum(fresh) - 1)

    def durations(self) -> NDArray[Any]:
        stages = self.program.stages
        table = np.zeros((len(Kind), stages), dtype=self.dtype)
        table[Kind.F] = self.numbers(self.costs.forward)
        table[Kind.R] = self.numbers(self.costs.replay or self.costs.forward)
        remake = self.costs.remake
        table[Kind.S] = self.numbers(remake) if remake else table[Kind.R]
        if self.costs.inputs:
            table[Kind.I] = self.numbers(self.costs.inputs)
            table[Kind.W] = self.numbers(self.costs.weights)
            table[Kind.B] = table[Kind.I] + table[Kind.W]
        return np.asarray(table[self.kind, self.rows[:, 1]])

    def numbers(self, values: Sequence[Any]) -> NDArray[Any]:
        if self.scale is None:
            return np.array([float(x) for x in values])
        return np.array([int(Fraction(x) * self.scale) for x in values], dtype=np.int64)

    def dependencies(
        self, task: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[Any], list[tuple[int, int, int, Kind]]]:
        """What each action waits for: column 0 its own stage, then one for each edge."""
        n, m = int(task[-1]) + 1 if len(task) else 0, self.program.microbatches
        where = np.full((3, self.program.stages, max(m, 1)), n, dtype=np.int32)
        for kinds, slot in (((Kind.F,), 0), ((Kind.I, Kind.B), 1), ((Kind.W,), 2)):
            these = np.isin(self.kind, kinds)
            where[slot, self.rows[these, 1], self.rows[these, 2]] = task[these]
        edges = self.costs.all_edges()
        width = 1 + max(_most(u for u, _, _ in edges), _most(v for _, v, _ in edges))
        waits = np.full((len(self.rows), width), n, dtype=np.int32)
        delay = np.zeros((len(self.rows), width), dtype=self.dtype)
        stage, b = self.rows[:, 1], self.rows[:, 2]
        back, late = np.isin(self.kind, (Kind.I, Kind.B)), self.kind == Kind.W
        waits[back, 0] = where[0, stage[back], b[back]]
        waits[late, 0] = where[1, stage[late], b[late]]
        again = np.isin(
            self.kind, (Kind.R, Kind.S)
        )  # the backward pass comes after it on its own lane
        waits[again, 0] = where[0, stage[again], b[again]]
        sends: list[tuple[int, int, int, Kind]] = []
        used = np.ones((2, self.program.stages), dtype=np.int64)  # the next free column
        by_stage = self._actions_by_stage(back)
        for u, v, size in edges:
            for slot, producer, consumer in ((0, u, v), (1, v, u)):
                mine = by_stage[slot][consumer]
                if not len(mine):
                    continue
                column = used[slot, consumer]
                used[slot, consumer] += 1
                waits[mine, column] = where[slot, producer, b[mine]]
                a, c = int(self.rank[producer]), int(self.rank[consumer])
                if a != c:
                    link = self.costs.link_of(a, c)
                    delay[mine, column] = self.numbers([link.latency])[0]
                    if size and link.per_byte:
                        sends.append((producer, consumer, size, Kind.F if slot == 0 else Kind.I))
        self.where = where
        return waits, delay, sends

    def _actions_by_stage(self, back: NDArray[np.bool_]) -> list[list[NDArray[np.int64]]]:
        """The forwards and the backwards of each stage."""
        found = []
        for mine in (np.flatnonzero(self.kind == Kind.F), np.flatnonzero(back)):
            stages = self.rows[mine, 1]
            order = mine[np.argsort(stages, kind="stable")]
            cuts = np.searchsorted(np.sort(stages), np.arange(self.program.stages + 1))
            found.append([order[a:b] for a, b in pairwise(cuts)])
        return found


def _most(values: Any) -> int:
    """How often the commonest value occurs."""
    counts = np.bincount(np.fromiter(values, dtype=np.int64))
    return int(counts.max(initial=0))


def _one_row_each(
    waits: NDArray[np.int32], delay: NDArray[Any], task: NDArray[np.int64], n: int
) -> tuple[NDArray[np.int32], NDArray[Any]]:
    """Rows of actions to rows of tasks: a joined one waits for what either does."""
    if len(task) == n:
        return waits, delay
    width = waits.shape[1]
    second = np.flatnonzero(np.diff(task, prepend=-1) == 0)
    first = np.flatnonzero(np.diff(task, prepend=-1))
    wide = np.full((n, 2 * width), n, dtype=np.int32)
    gap = np.zeros((n, 2 * width), dtype=delay.dtype)
    wide[:, :width], gap[:, :width] = waits[first], delay[first]
    wide[task[second], width:], gap[task[second], width:] = waits[second], delay[second]
    own = wide == np.arange(n)[:, None]  # what is done within the task itself
    wide[own] = n
    return wide, gap


def _with_links(tasks: Tasks, sends: list[tuple[int, int, int, Kind]], builder: _Builder) -> Tasks:
    """Transfers as tasks of the lanes of links, in the order in which their ranks produce."""
    n, m = len(tasks.took), builder.program.microbatches
    parts: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for producer, consumer, size, kind in sends:
        slot = 0 if kind == Kind.F else 1
        ranks = (int(builder.rank[producer]), int(builder.rank[consumer]))
        for b in range(m):
            made = int(builder.where[slot, producer, b])
            used = int(builder.where[slot, consumer, b])
            if made < n and used < n:
                parts.setdefault(ranks, []).append((made, used, size, kind, producer, b, consumer))
    total = n + sum(len(transfers) for transfers in parts.values())
    waits, delay = np.where(tasks.waits == n, total, tasks.waits), tasks.delay
    lanes, lane, took, rows = list(tasks.lanes), [tasks.lane], [tasks.took], [tasks.rows]
    more: list[tuple[int, int]] = []  # what each transfer waits for: its data, and a free slot
    at = n
    for ranks, transfers in sorted(parts.items()):
        link = builder.costs.link_of(*ranks)
        transfers.sort()
        lanes.append((at, at + len(transfers)))
        lane.append(np.full(len(transfers), len(lanes) - 1, dtype=np.int32))
        took.append(builder.numbers([t[2] * link.per_byte for t in transfers]))
        rows.append(np.array([t[3:6] for t in transfers], dtype=np.int32))
        taken: dict[tuple[int, int, int], list[int]] = {}  # the readers of each edge's transfers
        for i, (made, used, _size, way, stage, _b, reader) in enumerate(transfers):
            waits[used, np.flatnonzero(waits[used] == made)[0]] = at + i
            readers = taken.setdefault((way, stage, reader), [])
            slots = builder.costs.slots
            free = readers[-slots] if slots and len(readers) >= slots else total
            more.append((made, free))
            readers.append(used)
        at += len(transfers)
    if waits.shape[1] < 2:
        spare = np.full((n, 1), total, dtype=np.int32)
        waits, delay = np.hstack([waits, spare]), np.hstack([delay, np.zeros_like(delay[:, :1])])
    sent = np.full((total - n, waits.shape[1]), total, dtype=np.int32)
    sent[:, :2] = more
    return Tasks(
        tasks.program, lanes, np.concatenate(lane), np.concatenate(took),
        np.concatenate([waits, sent]).astype(np.int32),
        np.concatenate([delay, np.zeros(sent.shape, dtype=delay.dtype)]),
        np.concatenate(rows), sorted(parts),
    )  # fmt: skip
