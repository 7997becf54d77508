"""Which devices, in which order: a partition is found for a row of devices; here rows are tried.

Where devices and links are alike, the first ones of the given order are as good as any. Where they
differ, every row that is different is tried while they are few and there is time; else the given
order is improved device by device.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, permutations
from math import perm
from typing import Literal, cast, get_args

import numpy as np

from dfc.errors import DfcError, did_you_mean
from dfc.planning.fitting import refusal
from dfc.planning.ideals import lower_bound
from dfc.planning.machine import Machine
from dfc.planning.model import Modelled, Wish, on_row
from dfc.planning.partition import Effort, partition
from dfc.planning.path_bound import path_bound
from dfc.planning.problem import Partition, Problem, loads, value_of
from dfc.planning.rivals import no_worse

Row = tuple[int, ...]  # positions of devices, in the order of the pipeline
# What a plan makes small: a problem's objective, or the devices' seconds times their prices.
Wanted = Literal["throughput", "latency", "memory", "cost"]
_MOST = 64  # rows that are tried
_WORK = 500_000  # nodes times devices of all of them
_BOUND_SECONDS = 1.0  # for a better bound


def wanted(objective: str) -> Wanted:
    """An objective by its name; `time` is throughput.

    Raises:  DfcError N032.
    """
    name = "throughput" if objective == "time" else objective
    if name not in get_args(Wanted):
        known = ("time", *get_args(Wanted)[1:])
        help = did_you_mean(name, known) or f"there are {', '.join(known)}"
        raise DfcError("N032", f"`{objective}` is no objective", help=help, status=2)
    return cast(Wanted, name)


@dataclass(frozen=True)
class Chosen:
    """The best row that was found: its machine, the problem on it, and the partition; every device
    of it has a stage. `solved` is the partition in terms of the problem's own objective."""

    machine: Machine
    model: Modelled
    partition: Partition
    solved: Partition


def price(machine: Machine) -> float:
    """What all devices of a machine cost for a second."""
    return sum(d.price for d in machine.devices)


def best_row(
    model: Modelled, machine: Machine, wish: Wish, aim: Wanted, most: int | None, effort: Effort
) -> Chosen:
    """The row of at most `most` devices with the smallest value.

    Raises:  DfcError N043 for devices that have no way to each other; N063, N060 when no row has a
             partition.
    """
    machine.check_links()
    model = replace(model, problem=replace(
        model.problem, objective="throughput" if aim == "cost" else aim))  # fmt: skip
    search = _Search(model, machine, wish, aim, effort)
    size = min(most or len(machine.devices), len(machine.devices))
    first = tuple(range(size))
    pinned = frozenset(model.pins.values())
    if is_uniform(machine, pinned):
        sizes = range(size, 0, -1) if aim == "cost" else (size,)
        return search.all([first[:k] for k in sizes])
    few = max(4, min(_MOST, _WORK // max(1, model.problem.n * size)))
    if sum(perm(len(machine.devices), k) for k in range(1, size + 1)) <= 20 * _MOST:
        rows = _different(machine, size, pinned)
        if len(rows) <= few:
            return search.all(rows, idle=False)
    return search.from_here(first, few)


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
    return (i if i in pinned else -1), machine.devices[i].figures


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
    aim: Wanted
    effort: Effort

    def __post_init__(self) -> None:
        self.best: Chosen | None = None
        self.failed: DfcError | None = None
        self.tight: tuple[Modelled, Machine] | None = None  # the first that did not fit
        self.tried: set[Row] = set()
        self.bound = float("inf")
        self.end = time.monotonic() + self.effort.seconds

    def all(self, rows: Sequence[Row], idle: bool = True) -> Chosen:
        """The best of all rows that there are."""
        if len(rows) > 1:
            self.effort = replace(self.effort, seconds=self.effort.seconds / len(rows))
        for row in rows:
            if self.best and time.monotonic() > self.end:
                return self.result(complete=False)
            self.try_row(row, idle)
        return self.result(complete=True)

    def from_here(self, row: Row, tries: int) -> Chosen:
        """The best that is found by exchanging two devices, one for an unused one, or leaving one
        out, while that helps."""
        self.effort = replace(self.effort, seconds=self.effort.seconds / tries)
        self.try_row(row)
        going = True
        while going:
            going = False
            for other in _neighbours(row, len(self.machine.devices)):
                late = self.best is not None and time.monotonic() > self.end
                if len(self.tried) >= tries or late:
                    return self.result(complete=False)
                if self.try_row(other):
                    row, going = other, True
                    break
        return self.result(complete=False)

    def try_row(self, row: Row, idle: bool = True) -> bool:
        """Whether a row is better than those before it."""
        if row in self.tried:
            return False
        self.tried.add(row)
        try:
            chosen = self._solved(row, idle)
        except DfcError as e:
            self.failed = self.failed or e
            return False
        if self.best and not self._better(chosen, self.best):
            return False
        self.best = chosen
        return True

    def _better(self, chosen: Chosen, best: Chosen) -> bool:
        """By the objective; of rows that hold as much, the quicker one."""
        new, old = chosen.partition.value, best.partition.value
        if self.aim != "memory" or abs(new - old) > 1e-9 * old:
            return new < old * (1 - 1e-9)
        return _busiest(chosen) < _busiest(best) * (1 - 1e-9)

    def _solved(self, row: Row, idle: bool) -> Chosen:
        machine = self.machine.at(row)
        model = on_row(self.model, machine, row, self.wish)
        model = replace(model, problem=replace(model.problem, idle=idle))
        try:
            found = no_worse(model, machine, partition(model.problem, self.effort))
        except DfcError as e:
            if e.status == 6 and self.tight is None:
                self.tight = model, machine
            raise
        by = price(machine) if self.aim == "cost" else 1.0
        self.bound = min(self.bound, found.bound * by)
        return self._tight(row, found)

    def _tight(self, row: Row, found: Partition) -> Chosen:
        """Without the devices that have no stage: their neighbours are linked directly."""
        used = sorted(set(found.stage))
        rest = tuple(row[s] for s in used)
        machine = self.machine.at(rest)
        model = on_row(self.model, machine, rest, self.wish)
        stage = tuple(used.index(s) for s in found.stage)
        value = value_of(model.problem, stage)
        made = replace(found, stage=stage, value=value, bound=min(found.bound, value))
        if self.aim == "memory":
            made = self._quickest(model, made)
        by = price(machine) if self.aim == "cost" else 1.0
        return Chosen(machine, model, replace(made, value=made.value * by), made)

    def _quickest(self, model: Modelled, found: Partition) -> Partition:
        """Of the partitions whose largest stage is as small, one with the best throughput."""
        cap = found.value * (1 + 1e-9)
        slots = [replace(s, memory=min(s.memory, cap)) for s in model.problem.slots]
        problem = replace(model.problem, slots=tuple(slots), objective="throughput", idle=False)
        stage = partition(problem, self.effort).stage
        return replace(found, stage=stage, value=value_of(model.problem, stage))

    def result(self, complete: bool) -> Chosen:
        if self.best is None and self.tight is not None:
            raise refusal(*self.tight, self.wish, self.machine)
        if self.best is None:
            assert self.failed is not None
            raise self.failed
        found = self.best.partition
        bound = self.bound if complete else self._least()
        if self.aim == "throughput" and found.value > bound * (1 + self.effort.gap):
            bound = max(bound, path_bound(self._anywhere(), _BOUND_SECONDS))
        return replace(self.best, partition=replace(found, bound=min(bound, found.value)))

    def _least(self) -> float:
        """What no row beats, tried or not."""
        if self.aim == "cost":
            prices = np.array([d.price for d in self.machine.devices])
            return float((self.model.problem.time * prices).min(axis=1).sum())
        return lower_bound(self._anywhere())

    def _anywhere(self) -> Problem:
        """The problem of all devices, each with its own times, and what it holds in any row."""
        problem = self.model.problem
        rows = range(1, problem.stages + 1)
        least = min(min(self.wish.in_flight(count)) for count in rows)
        slots = [replace(s, kind=i, in_flight=least) for i, s in enumerate(problem.slots)]
        return problem.with_stages(slots)


def _busiest(chosen: Chosen) -> float:
    return loads(chosen.model.problem, chosen.partition.stage).bottleneck


def _neighbours(row: Row, devices: int) -> Iterator[Row]:
    for i in range(len(row) if len(row) > 1 else 0):
        yield (*row[:i], *row[i + 1 :])
    for i in range(len(row)):
        for other in [x for x in range(devices) if x not in row]:
            yield (*row[:i], other, *row[i + 1 :])
    for i in range(len(row)):
        for j in range(i + 1, len(row)):
            swapped = list(row)
            swapped[i], swapped[j] = row[j], row[i]
            yield tuple(swapped)
