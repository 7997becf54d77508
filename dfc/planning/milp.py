"""Partitioning as a mixed-integer linear program, solved by HiGHS, with its certificate.

Cumulative variables y[v, s] say whether node v is in stage s or before, which makes order, load,
memory and traffic linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dfc.planning.problem import Partition, Problem, value_of, why_not


def solve_milp(
    problem: Problem, seconds: float, gap: float = 1e-3, most: float = np.inf
) -> tuple[Partition | None, float]:
    """The best partition found, and a lower bound that is proved; None when none is better than
    `most`, or none was found in time.

    Needs:  HiGHS, as scipy brings it.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    model = _Model(problem)
    model.build()
    upper = model.upper.copy()
    scale = model.scale
    upper[model.value] = min(upper[model.value], most / scale)
    result = milp(
        c=model.objective(),
        constraints=LinearConstraint(model.matrix(), -np.inf, np.array(model.limits)),
        integrality=model.integral(),
        bounds=Bounds(model.lower, upper),
        options={"time_limit": seconds, "mip_rel_gap": gap},
    )
    bound = 0.0 if result.mip_dual_bound is None else float(result.mip_dual_bound) * scale
    if result.status == 2:  # infeasible: nothing is better than `most`
        return None, most
    if result.x is None:
        return None, max(bound, 0.0)
    stage = model.stages_of(result.x)
    if why_not(problem, stage) is not None:  # rounding: a row was met within tolerance only
        return None, max(bound, 0.0)
    found = value_of(problem, stage)
    return Partition(stage, found, min(max(bound, 0.0), found), "milp"), max(bound, 0.0)


@dataclass
class _Model:
    problem: Problem
    rows: list[tuple[list[int], list[float]]] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        p = self.problem
        n, k = p.n, p.stages
        finite = p.time[np.isfinite(p.time)]
        self.time_scale = float(finite.sum()) / max(k, 1) or 1.0  # times near 1 suit the solver
        self.memory_scale = float(p.weights.sum() + p.activations.sum()) or 1.0
        self.scale = self.memory_scale if p.objective == "memory" else self.time_scale
        self.count = n * (k - 1)
        self.value = self.count  # what is made small
        self.count += 1
        self.delays: list[tuple[int, float]] = []  # what latency adds up, and a constant
        self.at_least = 0.0
        self.receive_of: dict[tuple[int, int], int] = {}
        self.send_of: dict[tuple[int, int], int] = {}
        self.taken_of: dict[tuple[int, int], int] = {}
        self.tied_of: dict[tuple[int, int], int] = {}
        self.wait_of: dict[int, int] = {}
        for i, t in enumerate(p.tensors):
            for s in range(k):
                if np.isfinite(p.slots[s].receive) and t.bytes and p.objective != "memory":
                    self.receive_of[i, s] = self._variable()
                if np.isfinite(p.slots[s].send) and t.bytes and p.objective == "throughput":
                    self.send_of[i, s] = self._variable()
                if p.slots[s].taken and t.bytes:
                    self.taken_of[i, s] = self._variable()
        for i in range(len(p.tied)):
            for d in sorted(set(p.shares)):
                self.tied_of[i, d] = self._variable()
        if p.objective == "latency":
            self.wait_of = {s: self._variable() for s in range(k) if p.slots[s].latency}
        self.lower, self.upper = np.zeros(self.count), np.ones(self.count)
        self.upper[self.value] = np.inf

    def _variable(self) -> int:
        self.count += 1
        return self.count - 1

    def in_stage(self, v: int, s: int, by: float = 1.0) -> tuple[list[int], list[float], float]:
        """`by` times x[v, s] as columns, coefficients and a constant."""
        columns, values, constant = [], [], 0.0
        for at, sign in ((s, 1.0), (s - 1, -1.0)):
            if at == self.problem.stages - 1:
                constant += sign * by
            elif at >= 0:
                columns.append(v * (self.problem.stages - 1) + at)
                values.append(sign * by)
        return columns, values, constant

    def on_device(
        self, v: int, s: int, by: float = 1.0
    ) -> list[tuple[list[int], list[float], float]]:
        """`by` for a node in any stage that shares the device of stage s."""
        shares = self.problem.shares
        return [
            self.in_stage(v, x, by) for x in range(self.problem.stages) if shares[x] == shares[s]
        ]

    def add(self, parts: list[tuple[list[int], list[float], float]], limit: float = 0.0) -> None:
        """sum of the parts <= limit."""
        columns = [c for part in parts for c in part[0]]
        values = [x for part in parts for x in part[1]]
        self.rows.append((columns, values))
        self.limits.append(limit - sum(part[2] for part in parts))

    def build(self) -> None:
        p, k = self.problem, self.problem.stages
        for v in range(p.n):
            for s in range(k - 2):
                y = v * (k - 1) + s
                self.add([([y, y + 1], [1.0, -1.0], 0.0)])
        for u, v in p.edges:
            for s in range(k - 1):
                self.add([([v * (k - 1) + s, u * (k - 1) + s], [1.0, -1.0], 0.0)])
        for s in range(k):
            self._possible(s)
        for device in sorted(set(p.shares)):
            mine = [s for s in range(k) if p.shares[s] == device]
            self._load(mine)
            self._memory(mine)
        self._traffic()
        self._wishes()
        if p.objective == "latency":
            columns, values = [c for c, _ in self.delays], [x for _, x in self.delays]
            self.add([(columns, values, self.at_least), ([self.value], [-1.0], 0.0)])
        for s in range(k if not p.idle else 0):
            self.add([self.in_stage(v, s, -1.0) for v in range(p.n)], -1.0)

    def _possible(self, s: int) -> None:
        p = self.problem
        for v in range(p.n):
            pinned = p.pins.get(v, p.device_of[s])
            if not np.isfinite(p.time[v][p.slots[s].kind]) or pinned != p.device_of[s]:
                self.add([self.in_stage(v, s)])  # x <= 0: it cannot run there

    def _load(self, stages: Sequence[int]) -> None:
        """What the stages of one device take."""
        p, parts = self.problem, []
        for s in stages:
            time = p.time[:, p.slots[s].kind] / self.time_scale
            runs = np.flatnonzero(np.isfinite(time)).tolist()
            parts += [self.in_stage(v, s, float(time[v])) for v in runs]
        if p.objective == "throughput":
            self.add([*parts, ([self.value], [-1.0], 0.0)])
        elif p.objective == "latency":
            self.delays += [x for part in parts for x in zip(part[0], part[1], strict=True)]
            self.at_least += sum(part[2] for part in parts)

    def _memory(self, stages: Sequence[int]) -> None:
        """What the stages of one device hold together."""
        p, room = self.problem, min(self.problem.slots[s].memory for s in stages)
        if not np.isfinite(room) and p.objective != "memory":
            return
        parts = []
        for s in stages:
            held = p.held(p.slots[s]) / self.memory_scale
            parts += [self.in_stage(v, s, float(held[v])) for v in range(p.n)]
            parts += self._taken(s)
        for i, (size, readers) in enumerate(p.tied):
            g = self.tied_of[i, p.shares[stages[0]]]
            parts.append(([g], [size / self.memory_scale], 0.0))
            for v in readers:
                self.add([*self.on_device(v, stages[0]), ([g], [-1.0], 0.0)])
        if np.isfinite(room):
            stream = p.slots[stages[0]].stream
            rate = stream * self.time_scale / self.memory_scale  # what is beyond takes time
            beyond = [([self.value], [-rate], 0.0)] if stream else []
            self.add([*parts, *beyond], room / self.memory_scale)
        if p.objective == "memory":
            self.add([*parts, ([self.value], [-1.0], 0.0)])

    def _taken(self, s: int) -> list[tuple[list[int], list[float], float]]:
        """What a stage holds of what comes in from other stages."""
        p, parts = self.problem, []
        for i, t in enumerate(p.tensors):
            if (i, s) in self.taken_of:
                g = self.taken_of[i, s]
                parts.append(([g], [p.slots[s].taken * t.bytes / self.memory_scale], 0.0))
                for v in t.readers:
                    self.add([self.in_stage(v, s), self.in_stage(t.producer, s, -1.0),
                              ([g], [-1.0], 0.0)])  # fmt: skip
        return parts

    def _traffic(self) -> None:
        p = self.problem
        received: dict[int, list[tuple[int, float]]] = {}  # by device
        sent: dict[int, list[tuple[int, float]]] = {}
        for (i, s), r in self.receive_of.items():
            t = p.tensors[i]
            for v in t.readers:
                self.add([self.in_stage(v, s), *self.on_device(t.producer, s, -1.0),
                          ([r], [-1.0], 0.0)])  # fmt: skip
            received.setdefault(p.shares[s], []).append(
                (r, t.bytes / p.slots[s].receive / self.time_scale)
            )
        for (i, s), o in self.send_of.items():
            t = p.tensors[i]
            for v in t.readers:
                self.add([self.in_stage(t.producer, s), *self.on_device(v, s, -1.0),
                          ([o], [-1.0], 0.0)])  # fmt: skip
            sent.setdefault(p.shares[s], []).append(
                (o, t.bytes / p.slots[s].send / self.time_scale)
            )
        for s, w in self.wait_of.items():
            for u, v in p.edges:
                self.add([self.in_stage(v, s), *self.on_device(u, s, -1.0), ([w], [-1.0], 0.0)])
            self.delays.append((w, p.slots[s].latency / self.time_scale))
        if p.objective == "latency":
            self.delays += [x for terms in received.values() for x in terms]
            return
        for traffic in (received, sent):
            for terms in traffic.values():
                columns, values = [c for c, _ in terms], [x for _, x in terms]
                self.add([(columns, values, 0.0), ([self.value], [-1.0], 0.0)])

    def _wishes(self) -> None:
        p, k = self.problem, self.problem.stages
        for group in p.together:
            first = group[0]
            for v in group[1:]:
                for s in range(k - 1):
                    a, b = v * (k - 1) + s, first * (k - 1) + s
                    self.add([([a, b], [1.0, -1.0], 0.0)])
                    self.add([([b, a], [1.0, -1.0], 0.0)])

    def matrix(self) -> Any:
        from scipy.sparse import coo_array

        row = np.repeat(np.arange(len(self.rows)), [len(c) for c, _ in self.rows])
        column = np.array([c for columns, _ in self.rows for c in columns], dtype=np.int64)
        value = np.array([x for _, values in self.rows for x in values])
        return coo_array((value, (row, column)), shape=(len(self.rows), self.count)).tocsr()

    def objective(self) -> Any:
        c = np.zeros(self.count)
        c[self.value] = 1.0
        return c

    def integral(self) -> Any:
        kinds = np.zeros(self.count)
        kinds[: self.problem.n * (self.problem.stages - 1)] = 1
        return kinds

    def stages_of(self, x: Any) -> tuple[int, ...]:
        k = self.problem.stages
        y = np.round(x[: self.problem.n * (k - 1)]).reshape(self.problem.n, k - 1)
        return tuple((k - 1 - y.sum(axis=1)).astype(int).tolist())
