"""Which devices, in which order: a partition is found for a row of devices; here rows are tried.

Where devices and links are alike, the first ones of the given order are as good as any. Where they
differ, every row that is different is tried while they are few; else the given order is improved
device by device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, permutations
from math import perm

from dfc.errors import DfcError
from dfc.planning.machine import Machine
from dfc.planning.model import Modelled, Wish, on_row
from dfc.planning.problem import Partition

Row = tuple[int, ...]  # positions of devices, in the order of the pipeline
Solve = Callable[[Modelled, Machine], Partition]
_MOST = 64  # rows that are tried
_WORK = 500_000  # nodes times devices of all of them


@dataclass(frozen=True)
class Chosen:
    """The best row that was found: its machine, the problem on it, and the partition; every device
    of it has a stage."""

    machine: Machine
    model: Modelled
    partition: Partition


def best_row(
    model: Modelled, machine: Machine, wish: Wish, most: int | None, solve: Solve,
    value: Callable[[Chosen], float],
) -> Chosen:  # fmt: skip
    """The row of at most `most` devices with the smallest value.

    Raises:  what `solve` does, when no row can be solved; DfcError N043 when devices of every row
             have no way to each other.
    """
    search = _Search(model, machine, wish, solve, value)
    size = min(most or len(machine.devices), len(machine.devices))
    first = tuple(range(size))
    pinned = frozenset(model.pins.values())
    if is_uniform(machine, pinned):
        search.try_row(first)
        return search.result(complete=True)
    few = max(4, min(_MOST, _WORK // max(1, model.problem.n * size)))
    if sum(perm(len(machine.devices), k) for k in range(1, size + 1)) <= 20 * _MOST:
        rows = _different(machine, size, pinned)
        if len(rows) <= few:
            for row in rows:
                search.try_row(row)
            return search.result(complete=True)
    search.improve(first, few)
    return search.result(complete=False)


def is_uniform(machine: Machine, pinned: frozenset[int] = frozenset()) -> bool:
    """Whether no row can be better than the first devices in order: they are alike, and no link is
    faster than those between neighbours."""
    devices = {_kind(machine, i, pinned) for i in range(len(machine.devices))}
    if len(devices) > 1:
        return False
    n = len(machine.devices)
    steps = [(i, j) for i in range(n) for j in (i - 1, i + 1) if 0 <= j < n]
    near = {machine.wires.get(step) for step in steps}
    return len(near) <= 1 and None not in near and set(machine.wires.values()) <= near


def _kind(machine: Machine, i: int, pinned: frozenset[int]) -> tuple[object, ...]:
    """What tells a device from another one; one that something is pinned to is like no other."""
    d = machine.devices[i]
    own = i if i in pinned else -1
    return own, d.kind, d.memory, d.bandwidth, d.launch, *sorted(d.peaks.items())


def _different(machine: Machine, size: int, pinned: frozenset[int]) -> list[Row]:
    """Rows of up to `size` devices, one of each that differ by device or link, longest first."""
    found: dict[object, Row] = {}
    for k in range(size, 0, -1):
        for row in permutations(range(len(machine.devices)), k):
            links = [(machine.way(a, b), machine.way(b, a)) for a, b in pairwise(row)]
            if all(there is not None for there, _ in links):
                kinds = tuple(_kind(machine, i, pinned) for i in row)
                found.setdefault((kinds, tuple(links)), row)
    return list(found.values())


@dataclass
class _Search:
    model: Modelled
    machine: Machine
    wish: Wish
    solve: Solve
    value: Callable[[Chosen], float]

    def __post_init__(self) -> None:
        self.best: Chosen | None = None
        self.best_value = float("inf")
        self.failed: DfcError | None = None
        self.tried: set[Row] = set()
        self.bound = float("inf")

    def try_row(self, row: Row) -> bool:
        """Whether a row is better than those before it."""
        if row in self.tried:
            return False
        self.tried.add(row)
        try:
            machine = self.machine.at(row)
            model = on_row(self.model, machine, row, self.wish)
            found = self.solve(model, machine)
            chosen = self._tight(row, found)
        except DfcError as e:
            self.failed = self.failed or e
            return False
        self.bound = min(self.bound, found.bound)
        reached = self.value(chosen)
        if reached >= self.best_value * (1 - 1e-9):
            return False
        self.best, self.best_value = chosen, reached
        return True

    def _tight(self, row: Row, found: Partition) -> Chosen:
        """Without the devices that have no stage: their neighbours are linked directly."""
        used = sorted(set(found.stage))
        rest = tuple(row[s] for s in used)
        machine = self.machine.at(rest)
        stage = tuple(used.index(s) for s in found.stage)
        model = on_row(self.model, machine, rest, self.wish)
        return Chosen(machine, model, replace(found, stage=stage))

    def improve(self, row: Row, tries: int) -> None:
        """Exchange two devices, or one for an unused one, while that helps."""
        self.try_row(row)
        going = True
        while going:
            going = False
            for other in _neighbours(row, len(self.machine.devices)):
                if len(self.tried) >= tries:
                    return
                if self.try_row(other):
                    row, going = other, True
                    break

    def result(self, complete: bool) -> Chosen:
        if self.best is None:
            assert self.failed is not None
            raise self.failed
        found = self.best.partition
        bound = min(self.bound, found.bottleneck) if complete else min(found.bound, self.bound)
        return replace(self.best, partition=replace(found, bound=bound))


def _neighbours(row: Row, devices: int) -> Iterator[Row]:
    for i in range(len(row)):
        for other in [x for x in range(devices) if x not in row]:
            yield (*row[:i], other, *row[i + 1 :])
    for i in range(len(row)):
        for j in range(i + 1, len(row)):
            swapped = list(row)
            swapped[i], swapped[j] = row[j], row[i]
            yield tuple(swapped)
