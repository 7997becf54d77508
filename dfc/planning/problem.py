"""What is to be partitioned: nodes with times and bytes, tensors between them, devices and links.

A partition gives every node a stage; stage s runs on device s of the problem. Stages are convex: a
node's stage is never before that of what it reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from dfc.errors import DfcError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

INFINITE = float("inf")
# What is made small: the time between two microbatches, the time of one, the largest stage's bytes.
Objective = Literal["throughput", "latency", "memory"]


@dataclass(frozen=True)
class Tensor:
    """What a node produces for others: it travels once to each stage that reads it."""

    producer: int
    bytes: float
    readers: tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """One place in the pipeline: a device, its memory, and what comes in and goes out of it.

    Units:  bytes, and bytes a second for `receive` and `send`; `latency`: seconds until the first
            byte that comes in is there; `stream`: bytes a second at which weights beyond the memory
            come for every microbatch, beside computing. Without it the memory is a limit.
    """

    kind: int = 0  # the column of `Problem.time`
    memory: float = INFINITE
    receive: float = INFINITE
    send: float = INFINITE
    in_flight: int = 1  # microbatches whose activations are held at once
    latency: float = 0.0
    stream: float = 0.0


@dataclass(frozen=True)
class Problem:
    """Nodes in a topological order, to be cut into at most `len(slots)` stages in order.

    `time[v][k]` is the seconds of node v for one microbatch on a device of kind k, infinite where
    it cannot run; `weights[v]` and `activations[v]` are bytes. `pins` gives nodes their stage,
    `together` are groups that share a stage, `tied` are (bytes, readers) of parameters that every
    stage with a reader holds a copy of (not counted in `weights`). `idle` says that stages may be
    empty.
    """

    time: Floats
    tensors: tuple[Tensor, ...]
    slots: tuple[Slot, ...]
    weights: Floats
    activations: Floats
    pins: Mapping[int, int] = field(default_factory=dict)
    together: tuple[tuple[int, ...], ...] = ()
    tied: tuple[tuple[float, tuple[int, ...]], ...] = ()
    names: tuple[str, ...] = ()
    objective: Objective = "throughput"
    idle: bool = True

    @property
    def n(self) -> int:
        return len(self.time)

    @property
    def stages(self) -> int:
        return len(self.slots)

    @cached_property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """(producer, reader), each once."""
        return tuple(dict.fromkeys((t.producer, v) for t in self.tensors for v in t.readers))

    def name(self, v: int) -> str:
        return self.names[v] if self.names else f"node {v}"

    def with_stages(self, slots: Sequence[Slot]) -> Problem:
        return replace(self, slots=tuple(slots))

    def check(self) -> None:
        """Raises:  DfcError N030 for nodes out of order, N031 for a pin that cannot be."""
        for u, v in self.edges:
            if not 0 <= u < v < self.n:
                raise DfcError(
                    "N030", f"{self.name(v)} comes before {self.name(u)}, which it reads"
                )
        for v, s in self.pins.items():
            if not 0 <= s < self.stages:
                raise DfcError(
                    "N031", f"{self.name(v)} is pinned to stage {s}, and there are {self.stages}"
                )


@dataclass(frozen=True)
class Partition:
    """A stage for each node, and how good it is.

    `value` is what the problem's objective says of it; `bound` is proved: no partition is better.
    """

    stage: tuple[int, ...]
    value: float
    bound: float
    method: str

    @property
    def gap(self) -> float:
        """How far it can be from the best: 0.01 is one per cent."""
        return self.value / self.bound - 1 if self.bound > 0 else 0.0


@dataclass(frozen=True)
class Loads:
    """What each stage does for one microbatch: seconds, and the bytes that it holds."""

    compute: Floats
    receive: Floats
    send: Floats
    memory: Floats
    wait: Floats  # for the first byte that comes in
    stream: Floats  # the seconds that weights take which the memory does not hold

    @property
    def latency(self) -> float:
        """The time of one microbatch that finds the pipeline empty, stage after stage."""
        import numpy as np

        busy = np.maximum(self.compute, self.stream)
        return float(busy.sum() + self.receive.sum() + self.wait.sum())

    @property
    def peak(self) -> float:
        """The bytes of the stage that holds most."""
        return float(self.memory.max(initial=0.0))

    @property
    def bottleneck(self) -> float:
        import numpy as np

        busy = [self.compute, self.receive, self.send, self.stream]
        return float(np.max(busy, initial=0.0))


def loads(problem: Problem, stage: Sequence[int]) -> Loads:
    """The load of each stage under a partition."""
    import numpy as np

    k = problem.stages
    compute, held = np.zeros(k), np.zeros(k)
    received, sent, wait = np.zeros(k), np.zeros(k), np.zeros(k)
    for v, s in enumerate(stage):
        slot = problem.slots[s]
        compute[s] += problem.time[v][slot.kind]
        held[s] += problem.weights[v] + slot.in_flight * problem.activations[v]
    for t in problem.tensors:
        own = stage[t.producer]
        others = {stage[v] for v in t.readers} - {own}
        sent[own] += t.bytes if others else 0
        for s in others:
            received[s] += t.bytes
            wait[s] = problem.slots[s].latency
    for size, readers in problem.tied:
        for s in {stage[v] for v in readers}:
            held[s] += size
    into = np.array([s.receive for s in problem.slots])
    out = np.array([s.send for s in problem.slots])
    rates = np.array([s.stream or INFINITE for s in problem.slots])
    beyond = np.maximum(held - np.array([s.memory for s in problem.slots]), 0.0)
    return Loads(compute, received / into, sent / out, held, wait, beyond / rates)


def value_of(problem: Problem, stage: Sequence[int]) -> float:
    """What is made small, under a partition."""
    found = loads(problem, stage)
    if problem.objective == "latency":
        return found.latency
    return found.peak if problem.objective == "memory" else found.bottleneck


def why_not(problem: Problem, stage: Sequence[int]) -> str | None:
    """Why a partition is not allowed, None when it is."""
    import numpy as np

    for u, v in problem.edges:
        if stage[u] > stage[v]:
            return f"{problem.name(v)} would run before {problem.name(u)}, which it reads"
    for v, s in problem.pins.items():
        if stage[v] != s:
            return f"{problem.name(v)} is pinned to stage {s}"
    for group in problem.together:
        if len({stage[v] for v in group}) > 1:
            return f"{problem.name(group[0])} and {problem.name(group[1])} share a stage"
    empty = set(range(problem.stages)) - set(stage)
    if empty and not problem.idle:
        return f"stage {min(empty)} is empty"
    found = loads(problem, stage)
    for s, slot in enumerate(problem.slots):
        if found.memory[s] > slot.memory * (1 + 1e-12) and not slot.stream:
            return f"stage {s} holds {found.memory[s]:.6g} of {slot.memory:.6g} bytes"
        if not np.isfinite(found.compute[s]):
            return f"stage {s} has an operator that its device cannot run"
    return None
