"""A program with its edges, as what each rank takes, computes and gives; checked before it runs.

Every transfer of an edge that crosses ranks needs a slot. A rank that is as far ahead of a reader
as there are slots waits for it, so memory is bounded; how many there must be for the program to
end is found here, by going through it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dfc.errors import DfcError
from dfc.planning.actions import AGAIN, Action, Kind, Program
from dfc.planning.check import check
from dfc.planning.simulate import Costs
from dfc.planning.stages import HOST, StageGraph
from dfc.runtime.pipeline.merged import merged

SLOTS = 2  # microbatches between two stages: one that is read, one that is ready

_KEPT = 64  # programs whose check is remembered

Key = tuple[int, int]  # the number of an edge, and the microbatch


@dataclass(frozen=True)
class Edge:
    """What the actions of one stage give to those of another, by name.

    Forward edges go from F to F. Backward ones go from I or B to I or B, against the order of
    stages. HOST stands for whoever calls: its values are in what a step is given, and in its
    results.
    """

    source: int
    target: int
    values: tuple[Any, ...]
    backward: bool = False


@dataclass(frozen=True)
class Task:
    """One action, with the numbers of the edges that it takes from and gives to."""

    action: Action
    takes: tuple[int, ...]
    gives: tuple[int, ...]


@dataclass(frozen=True)
class Routes:
    """What each rank does, in order; `slots[e]` is None for an edge within a rank, or between ranks
    of one driver. `drivers[r]` is who drives rank r, `driven[d]` what driver d does in order, for
    which rank."""

    program: Program
    edges: tuple[Edge, ...]
    ranks: tuple[tuple[Task, ...], ...]
    slots: tuple[int | None, ...]
    drivers: tuple[int, ...]
    driven: tuple[tuple[tuple[int, Task], ...], ...]
    orders: dict[Any, Any] = field(default_factory=dict, compare=False)  # kept by `links.orders`


class Routed:
    """The routes of programs over the same edges: each program is checked once. `drivers` are those
    of the ranks, each its own by default."""

    def __init__(self, edges: Sequence[Edge], drivers: Sequence[int] | None = None) -> None:
        self.edges, self.drivers = tuple(edges), drivers
        self._known: dict[int, Routes] = {}

    def __getitem__(self, program: Program) -> Routes:
        """
        Raises:  DfcError N020.. for what is wrong with the program.
        """
        found = self._known.get(id(program))
        if found is None:
            if len(self._known) >= _KEPT:
                self._known.clear()
            found = routes(program, self.edges, drivers=self.drivers)
            self._known[id(program)] = found
        return found  # it holds the program, whose number nobody else gets


def stage_edges(stages: Sequence[StageGraph], outputs: Sequence[Any]) -> list[Edge]:
    """The forward edges between the stages of a graph, from its inputs and to its outputs."""
    values: dict[tuple[int, int], list[Any]] = {}
    wanted = set(outputs)
    for i, stage in enumerate(stages):
        for v, source in zip(stage.takes, stage.sources, strict=True):
            values.setdefault((source, i), []).append(v)
        kept = [v for v in stage.gives if v in wanted]
        if kept:
            values[i, HOST] = kept
    return [Edge(source, target, tuple(found)) for (source, target), found in values.items()]


def routes(
    program: Program,
    edges: Sequence[Edge],
    least: int = SLOTS,
    drivers: Sequence[int] | None = None,
) -> Routes:
    """Check a program and say what each of its ranks does, and each of their drivers.

    Raises:  DfcError N021 for an edge between stages that there are not, N022, N023 for actions
             that are missing or too early, N020 for a deadlock.
    Cost:    some microseconds an action.
    """
    inner = [e for e in edges if HOST not in (e.source, e.target)]
    ones, n = [1] * program.stages, program.stages
    for e in inner:
        low, high = (e.target, e.source) if e.backward else (e.source, e.target)
        if not 0 <= low < high < n:
            way = "backward" if e.backward else "forward"
            raise DfcError(
                "N021", f"there is no {way} edge from stage {e.source} to {e.target} of {n}"
            )
    back = ones if program.trains else ()
    pairs = sorted({(e.source, e.target, 1) for e in inner if not e.backward})
    check(program, Costs(ones, back, back, edges=pairs), slots=0)  # slots are fitted below
    ranks = tuple(_tasks(program, rank, edges) for rank in range(len(program.ranks)))
    who = tuple(range(len(ranks)) if drivers is None else drivers)
    driven = tuple(
        tuple((rank, ranks[rank][i]) for rank, i in order) for order in merged(program, pairs, who)
    )
    slots = _fit(program, edges, driven, who, least)
    return Routes(program, tuple(edges), ranks, slots, who, driven)


def _tasks(program: Program, rank: int, edges: Sequence[Edge]) -> tuple[Task, ...]:
    into: dict[tuple[int, bool], list[int]] = {}
    out: dict[tuple[int, bool], list[int]] = {}
    for number, edge in enumerate(edges):
        into.setdefault((edge.target, edge.backward), []).append(number)
        out.setdefault((edge.source, edge.backward), []).append(number)
    found = []
    for action in program.actions(rank):
        at = (action.stage, action.kind != Kind.F)
        silent = action.kind == Kind.W
        takes, gives = ((), ()) if silent else (into.get(at, ()), out.get(at, ()))
        if action.kind in AGAIN.values():  # the caller has what it gave, and draws masks again
            given = into.get((action.stage, False), ())
            takes, gives = [e for e in given if edges[e].source == HOST], ()
        found.append(Task(action, tuple(takes), tuple(gives)))
    return tuple(found)


def _fit(
    program: Program,
    edges: Sequence[Edge],
    driven: Sequence[Sequence[tuple[int, Task]]],
    drivers: Sequence[int],
    least: int,
) -> tuple[int | None, ...]:
    """The slots of each edge: a few, and more where the program would wait for itself.

    What skips stages waits for those between, so that it has a slot for each of them.
    """
    slots: dict[int, int] = {}
    for number, e in enumerate(edges):
        inner = HOST not in (e.source, e.target)
        if inner and len({drivers[program.placement[s]] for s in (e.source, e.target)}) > 1:
            slots[number] = least + abs(e.target - e.source) - 1
    _Rehearsal([[task for _, task in order] for order in driven], slots).run()
    return tuple(slots.get(number) for number in range(len(edges)))


class _Rehearsal:
    """A program gone through without computing, each driver as far as it comes: a rank where it is
    its own."""

    def __init__(self, ranks: Sequence[Sequence[Task]], slots: dict[int, int]) -> None:
        self.ranks, self.slots = ranks, slots
        self.made: set[Key] = set()
        self.used = dict.fromkeys(slots, 0)
        self.head = [0] * len(ranks)
        self.owed: list[list[int]] = [[] for _ in ranks]  # edges that a rank still has to give to

    def run(self) -> None:
        while any(self.head[r] < len(tasks) or self.owed[r] for r, tasks in enumerate(self.ranks)):
            if any([self.advance(rank) for rank in range(len(self.ranks))]):
                continue
            full = next((owed[0] for owed in self.owed if owed), None)
            if full is None:
                raise DfcError("N020", f"the program waits for itself: {self._waits()}")
            self.slots[full] += 1

    def advance(self, rank: int) -> bool:
        """Whether the rank came any further."""
        moved = False
        tasks = self.ranks[rank]
        while self._give(rank) and self.head[rank] < len(tasks):
            task = tasks[self.head[rank]]
            b = task.action.microbatch
            takes = [e for e in task.takes if e in self.slots]
            if any((e, b) not in self.made for e in takes):
                return moved
            for e in takes:
                self.made.discard((e, b))
                self.used[e] -= 1
            self.head[rank] += 1
            self.owed[rank] = [e for e in task.gives if e in self.slots]
            moved = True
        return moved

    def _give(self, rank: int) -> bool:
        """Whether everything that the last action made is handed on."""
        owed = self.owed[rank]
        while owed:
            e = owed[0]
            if self.used[e] >= self.slots[e]:
                return False
            self.used[e] += 1
            self.made.add((e, self.ranks[rank][self.head[rank] - 1].action.microbatch))
            owed.pop(0)
        return True

    def _waits(self) -> str:
        heads = [
            f"rank {r} in {tasks[self.head[r]].action}"
            for r, tasks in enumerate(self.ranks)
            if self.head[r] < len(tasks)
        ]
        return "; ".join(heads[:4])
