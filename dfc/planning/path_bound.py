"""What no partition beats where devices differ, whatever their order: a bound by duality.

The slowest device takes no less than a weighted mean of all, and what is over a device's memory may
be charged for. For given weights and charges that is a sum over nodes, made least by a dynamic
program over one path of the graph: along it stages never fall, so that each device has one part of
the path. A node beside the path is with its neighbours on it where those are together, else
wherever it costs least. The best weights come from a linear program over what was found so far.

Why:  without the path, devices could share the nodes that each is best at, which no stages can.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from dfc.planning.problem import Problem

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dfc.planning.problem import Floats

_NEAR = 64  # nodes of the path between the neighbours of one beside it; others are anywhere
_WORK = 20_000_000  # states times kinds times nodes: a tenth of a second for each weights
_ROUNDS = 80
_ENOUGH = 1e-4  # of the bound, which better weights could still add
_FORBIDDEN = 1e3  # times all work: what a node costs where it cannot run
_ROUNDING = 1e-9


def path_bound(problem: Problem, seconds: float) -> float:
    """A bottleneck that no partition beats, on any of the problem's devices in any order.

    Needs:  a device for each slot, whose column of `time` is the slot's kind.
    Cost:   at most about so many seconds; 0 is the answer where a single step would take longer.
    """
    pinned = (problem.time[v, problem.slots[d].kind] for v, d in problem.pins.items())
    runs = np.isfinite(problem.time).any(axis=1).all() and np.isfinite([*pinned]).all()
    found = _Relaxed(problem) if problem.n and runs else None
    if found is None or found.work > _WORK:
        return 0.0
    return found.best(seconds) * (1 - _ROUNDING)


@dataclass(frozen=True)
class _Found:
    """For some weights and charges the least sum, and what the kinds do for it: the sum is linear
    in these."""

    value: float
    slope: Floats


class _Relaxed:
    """The problem on kinds of devices that are alike, with its path."""

    def __init__(self, problem: Problem) -> None:
        slots = problem.slots
        least = min(slots, key=lambda s: s.in_flight)
        held = problem.weights + least.in_flight * problem.activations
        pinned = set(problem.pins.values())
        kinds: dict[object, list[int]] = {}
        for d, slot in enumerate(slots):
            column = problem.time[:, slot.kind].tobytes()
            own = d if d in pinned else -1
            kinds.setdefault((column, slot.memory, slot.stream, own), []).append(d)
        members = list(kinds.values())
        first = [slots[m[0]] for m in members]
        self.count = np.array([len(m) for m in members])
        self.time = problem.time[:, [s.kind for s in first]].copy()
        for v, d in problem.pins.items():
            self.time[v, [d not in m for m in members]] = np.inf
        runs = np.isfinite(self.time)
        whole = float(np.where(runs, self.time, np.inf).min(axis=1).sum())
        self.scale = whole or 1.0
        slowest = float(np.where(runs, self.time, 0.0).sum(axis=0).max()) / self.scale
        self.most = 4.0 * max(slowest, 1.0)  # charges that no device's time is worth
        self.time = np.where(runs, self.time / self.scale, _FORBIDDEN)
        self.memory_scale = float(held.sum()) or 1.0
        self.held = held / self.memory_scale
        rooms = np.array([s.memory for s in first]) / self.memory_scale
        self.charged = np.isfinite(rooms) & (rooms > 0)
        self.room = np.where(self.charged, rooms, 0.0)
        self.stream = np.array([s.stream for s in first]) * self.scale / self.memory_scale
        self.path, self.before, self.after = _path(problem)
        self.near = np.flatnonzero(
            (self.before >= 0) & (self.after >= 0) & (self.after - self.before <= _NEAR)
        )
        self.beside = np.setdiff1d(np.arange(problem.n), self.path)
        self.states = list(product(*(range(c + 1) for c in self.count)))
        self.work = len(self.states) * len(self.count) * problem.n

    def best(self, seconds: float) -> float:
        """The best of the weights that are tried: those that a linear program thinks best."""
        from scipy.optimize import linprog

        k, end = len(self.count), time.monotonic() + seconds
        norm = np.concatenate([self.count, self.count * self.stream * self.charged])
        known: list[Floats] = []
        best = 0.0
        for x in self._first(norm):
            found = self._least(x)
            best = max(best, found.value)
            known.append(found.slope)
        for _ in range(_ROUNDS):
            if time.monotonic() > end:
                break
            rows = np.array([[*-slope, 1.0] for slope in known])
            top = linprog(
                np.array([0.0] * (2 * k) + [-1.0]), A_ub=rows, b_ub=np.zeros(len(rows)),
                A_eq=[[*norm, 0.0]], b_eq=[1.0],
                bounds=[(0, None)] * k + [(0, self.most * c) for c in self.charged] + [(0, None)],
            )  # fmt: skip
            if top.x is None:
                break
            found = self._least(top.x[: 2 * k])
            best = max(best, found.value)
            known.append(found.slope)
            if top.x[-1] <= best * (1 + _ENOUGH):
                break
        return best * self.scale

    def _first(self, norm: Floats) -> Iterator[Floats]:
        """Equal weights, and the devices' speeds."""
        for weight in (np.ones(len(self.count)), 1 / self.time.sum(axis=0)):
            x = np.concatenate([weight, np.zeros(len(weight))])
            yield x / (norm @ x)

    def _least(self, x: Floats) -> _Found:
        """The least sum for weights and charges that are normed."""
        k = len(self.count)
        cost = self.time * x[:k] + self.held[:, None] * x[k:]
        where = cost.argmin(axis=1)
        least = cost[np.arange(len(cost)), where]
        more = (cost - least[:, None])[self.near]
        size = len(self.path)
        on_path = np.vstack([np.zeros(k), cost[self.path].cumsum(axis=0)])
        end = on_path + _added(more, self.after[self.near] + 1, size)
        begin = on_path + _added(more, self.before[self.near] + 1, size)
        table = self._table(end, begin)
        whole = least[self.beside].sum()
        state = min(self.states, key=lambda s: float(table[s][size]))
        value = float(table[state][size] + whole)
        slope = self._slope(self._parts(table, state, end, begin), where)
        return _Found(value - float((self.count * x[k:]) @ self.room), slope)

    def _table(self, end: Floats, begin: Floats) -> dict[tuple[int, ...], Floats]:
        """For devices that are used, and each place of the path, the least sum up to there."""
        table: dict[tuple[int, ...], Floats] = {}
        for state in self.states:
            least = np.full(len(end), np.inf)
            if not any(state):
                least[0] = 0.0
            for k, used in enumerate(state):
                if used:
                    before = np.minimum.accumulate(table[_less(state, k)] - begin[:, k])
                    least[1:] = np.minimum(least[1:], end[1:, k] + before[:-1])
            table[state] = least
        return table

    def _parts(
        self, table: dict[tuple[int, ...], Floats], state: tuple[int, ...], end: Floats,
        begin: Floats,
    ) -> Iterator[tuple[int, int, int]]:  # fmt: skip
        """Which kind has which part of the path in the least sum."""
        at = len(end) - 1
        while any(state):
            tried = []
            for k, used in enumerate(state):
                if used:
                    before = table[_less(state, k)][:at] - begin[:at, k]
                    i = int(before.argmin())
                    tried.append((float(end[at, k] + before[i]), k, i))
            _, k, i = min(tried)
            yield k, i, at
            state, at = _less(state, k), i

    def _slope(self, parts: Iterator[tuple[int, int, int]], where: NDArray[np.int64]) -> Floats:
        """How the sum depends on weights and charges, with all where it is."""
        k = len(self.count)
        work, held = np.zeros(k), np.zeros(k)
        free = np.zeros(len(self.time))
        free[self.beside] = 1.0
        a, b = self.before[self.near], self.after[self.near]
        for kind, i, j in parts:
            mine = self.path[i:j]
            times = (b < j).astype(float) - (a < i)
            work[kind] += self.time[mine, kind].sum() + times @ self.time[self.near, kind]
            held[kind] += self.held[mine].sum() + times @ self.held[self.near]
            free[self.near] -= times
        least = free * self.time[np.arange(len(where)), where]
        work += np.bincount(where, weights=least, minlength=k)
        held += np.bincount(where, weights=free * self.held, minlength=k)
        return np.concatenate([work, held - self.count * self.room])


def _less(state: tuple[int, ...], k: int) -> tuple[int, ...]:
    return (*state[:k], state[k] - 1, *state[k + 1 :])


def _added(values: Floats, first: NDArray[np.int64], size: int) -> Floats:
    """For each place of the path the sum of the values that begin there or before."""
    found = np.zeros((size + 1, values.shape[1]))
    np.add.at(found, first, values)
    return found.cumsum(axis=0)


def _path(
    problem: Problem,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The path that takes longest, and for each node beside it the last of it that it depends on,
    and the first that depends on it; -1 where there is none."""
    n = problem.n
    own = np.where(np.isfinite(problem.time), problem.time, np.inf).min(axis=1)
    longest, came = own.copy(), [-1] * n
    for u, v in sorted(problem.edges):
        if longest[u] + own[v] > longest[v]:
            longest[v], came[v] = longest[u] + own[v], u
    nodes = [int(longest.argmax())]
    while came[nodes[-1]] >= 0:
        nodes.append(came[nodes[-1]])
    path = np.array(nodes[::-1])
    before, after = np.full(n, -1), np.full(n, n)
    place = np.full(n, -1)
    place[path] = np.arange(len(path))
    for u, v in sorted(problem.edges):
        before[v] = max(before[v], place[u] if place[u] >= 0 else before[u])
    for u, v in sorted(problem.edges, reverse=True, key=lambda e: (e[0], e[1])):
        after[u] = min(after[u], place[v] if place[v] >= 0 else after[v])
    after[after == n] = -1
    before[path] = after[path] = -1
    return path, before, after
