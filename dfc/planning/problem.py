"""What is to be partitioned: nodes with times and bytes, tensors between them, devices and links.

A partition gives every node a stage; stage s runs on device s of the problem, or several stages on
one device. Stages are convex: a node's stage is never before that of what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from dfc.errors import DfcError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dfc.planning.machine import Wire

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
class Flow:
    """Tensors as arrays: the producer and bytes of each, and a (tensor, reader) for each reader."""

    producer: Ints
    bytes: Floats
    tensor: Ints
    reader: Ints


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
    taken: int = 0  # microbatches of which what comes in from other stages is held besides
    keeping: int = 0  # microbatches of which what cheap operators start from is held besides
    latency: float = 0.0
    stream: float = 0.0


@dataclass(frozen=True)
class Problem:
    """Nodes in a topological order, to be cut into at most `len(slots)` stages in order.

    `devices[s]` is the device of stage s where devices have several; what they do, send and hold
    adds up. Without it, or with `apart`, every stage is a device of its own.

    `time[v][k]` is the seconds of node v for one microbatch on a device of kind k, infinite where
    it cannot run; `weights[v]` and `activations[v]` are bytes. `pins` gives nodes their device,
    `together` are groups that share a stage, `tied` are (bytes, readers) of parameters that every
    device with a reader holds a copy of (not counted in `weights`). `idle` says that stages may be
    empty. Solvers take what comes in and goes out to be on the links to the neighbours, which slots
    know; `wire` is from any device to any other, for what skips stages, and when `back` gradients
    come on it as well: a partition is worth what these allow.
    """

    time: Floats
    tensors: tuple[Tensor, ...]
    slots: tuple[Slot, ...]
    weights: Floats
    activations: Floats
    kept: Floats | None = None  # of the activations what is left to cheap operators to start from
    pins: Mapping[int, int] = field(default_factory=dict)
    together: tuple[tuple[int, ...], ...] = ()
    tied: tuple[tuple[float, tuple[int, ...]], ...] = ()
    names: tuple[str, ...] = ()
    objective: Objective = "throughput"
    idle: bool = True
    devices: tuple[int, ...] = ()
    apart: bool = False  # pins go by devices, all else by stages
    wire: Callable[[int, int], Wire] | None = field(default=None, compare=False)
    back: bool = False

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

    @cached_property
    def flow(self) -> Flow:
        import numpy as np

        pairs = [(i, v) for i, t in enumerate(self.tensors) for v in t.readers]
        tensor, reader = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        producer = np.array([t.producer for t in self.tensors], dtype=np.int64)
        return Flow(producer, np.array([t.bytes for t in self.tensors]), tensor, reader)

    @cached_property
    def device_of(self) -> tuple[int, ...]:
        """The device of each stage."""
        return self.devices or tuple(range(self.stages))

    @cached_property
    def shares(self) -> tuple[int, ...]:
        """Of each stage, whose time and memory it takes: stages with the same number share them."""
        return tuple(range(self.stages)) if self.apart else self.device_of

    @property
    def looped(self) -> bool:
        """Whether some stages share a device."""
        return len(set(self.shares)) < self.stages

    def name(self, v: int) -> str:
        return self.names[v] if self.names else f"node {v}"

    def held(self, slot: Slot) -> Floats:
        """The bytes that each node holds on a device, without what comes in and what is tied."""
        held = self.weights + slot.in_flight * self.activations
        return held if self.kept is None else held + slot.keeping * self.kept

    def weights_of(self, nodes: Collection[int]) -> float:
        """The bytes of weights that nodes read, those that others read too once."""
        tied = sum(size for size, readers in self.tied if not set(readers).isdisjoint(nodes))
        return float(sum(self.weights[v] for v in nodes)) + tied

    def with_stages(self, slots: Sequence[Slot]) -> Problem:
        """With other slots: as many, or others that are devices of their own."""
        same = len(slots) == self.stages
        devices, wire = (self.devices, self.wire) if same else ((), None)
        return replace(self, slots=tuple(slots), devices=devices, wire=wire)

    def with_slowest_links(self) -> Problem:
        """With the slowest links of each device to those before and behind it in place of those to
        its neighbours, so that solvers leave what skips stages where these matter."""
        if self.wire is None:
            return self
        slots, at = list(self.slots), self.device_of
        for s, slot in enumerate(self.slots):
            into = [self.wire(d, at[s]) for d in set(at[:s]) - {at[s]}]
            out = [self.wire(at[s], d) for d in set(at[s + 1 :]) - {at[s]}]
            slots[s] = replace(
                slot, receive=min([slot.receive, *(w.bandwidth for w in into)]),
                send=min([slot.send, *(w.bandwidth for w in out)]),
                latency=max([slot.latency, *(w.latency for w in into)]),
            )  # fmt: skip
        return self.with_stages(slots)

    def check(self) -> None:
        """Raises:  DfcError N030 for nodes out of order, N031 for a pin that cannot be."""
        for u, v in self.edges:
            if not 0 <= u < v < self.n:
                raise DfcError(
                    "N030", f"{self.name(v)} comes before {self.name(u)}, which it reads"
                )
        for v, d in self.pins.items():
            if d not in self.device_of:
                count = len(set(self.device_of))
                raise DfcError(
                    "N031", f"{self.name(v)} is pinned to device {d}, and there are {count}"
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
    """What each stage does for one microbatch, in seconds, and the bytes that devices hold.

    `shares[s]` is whose time and memory stage s takes: its place in `memory`. `links` are the
    seconds of each link (from, to) that something goes over, `path` those of the slowest way of a
    microbatch through stages: where the problem knows its links.
    """

    compute: Floats
    receive: Floats
    send: Floats
    memory: Floats
    wait: Floats  # for the first byte that comes in
    stream: Floats  # of devices: the seconds that weights take which the memory does not hold
    shares: tuple[int, ...]
    links: Mapping[tuple[int, int], float] = field(default_factory=dict)
    path: float = 0.0

    @property
    def latency(self) -> float:
        """The time of one microbatch that finds the pipeline empty, stage after stage."""
        import numpy as np

        busy = np.maximum(np.bincount(self.shares, weights=self.compute), self.stream)
        stages = float(busy.sum() + self.receive.sum() + self.wait.sum())
        return max(stages, self.path)

    @property
    def peak(self) -> float:
        """The bytes of the device that holds most."""
        return float(self.memory.max(initial=0.0))

    @property
    def bottleneck(self) -> float:
        return max(float(self.busiest.max(initial=0.0)), *self.links.values(), 0.0)

    @property
    def busiest(self) -> Floats:
        """Of each device the seconds of what takes it longest: computing, receiving or sending."""
        import numpy as np

        kinds = (self.compute, self.receive, self.send)
        sums = [np.bincount(self.shares, weights=x) for x in kinds]
        return np.asarray(np.max([*sums, self.stream], axis=0))


def loads(problem: Problem, stage: Sequence[int]) -> Loads:
    """The load of each stage under a partition."""
    import numpy as np

    k, shares = problem.stages, np.array(problem.shares)
    at, kind = np.asarray(stage, dtype=np.int64), np.array([s.kind for s in problem.slots])
    each = np.stack([problem.held(slot) for slot in problem.slots])
    nodes, flow = np.arange(problem.n), problem.flow
    compute = _summed(problem.time[nodes, kind[at]], at, k)
    held = _summed(each[at, nodes], shares[at], 1 + int(shares.max()))
    own = at[flow.producer]
    reads = np.zeros((len(own), k), dtype=bool)  # which stages read each tensor
    reads[flow.tensor, at[flow.reader]] = True
    away = reads & (shares[own][:, None] != shares)
    received = flow.bytes @ away
    sent = _summed(flow.bytes * away.any(axis=1), own, k)
    wait = np.where(away.any(axis=0), [s.latency for s in problem.slots], 0.0)
    reads[np.arange(len(own)), own] = False
    taken = (flow.bytes @ reads) * [s.taken for s in problem.slots]
    held += _summed(taken, shares, len(held))
    for size, readers in problem.tied:
        for d in set(shares[at[list(readers)]].tolist()):
            held[d] += size
    into = np.array([s.receive for s in problem.slots])
    out = np.array([s.send for s in problem.slots])
    rooms = {d: slot for d, slot in zip(problem.shares, problem.slots, strict=True)}
    stream = np.zeros(len(held))
    for d, slot in rooms.items():
        stream[d] = max(held[d] - slot.memory, 0.0) / (slot.stream or INFINITE)
    links, path = _on_links(problem, own, reads, compute)
    return Loads(
        compute, received / into, sent / out, held, wait, stream, problem.shares, links, path
    )  # fmt: skip


def _on_links(
    problem: Problem, own: Ints, reads: NDArray[np.bool_], compute: Floats
) -> tuple[dict[tuple[int, int], float], float]:
    """The seconds of each link, and those of the slowest way through stages."""
    import numpy as np

    wire, at = problem.wire, problem.device_of
    if wire is None:
        return {}, 0.0
    crossing = np.zeros((problem.stages, problem.stages))
    np.add.at(crossing, own, reads * problem.flow.bytes[:, None])
    links: dict[tuple[int, int], float] = {}
    arrives = np.zeros(problem.stages)
    for s, t in np.argwhere(crossing).tolist():  # by producers: those before s are done
        a, b, size = at[s], at[t], float(crossing[s, t])
        took = 0.0
        if a != b:
            took = wire(a, b).latency + size / wire(a, b).bandwidth
            for pair in ((a, b), (b, a)) if problem.back else ((a, b),):
                links[pair] = links.get(pair, 0.0) + size / wire(*pair).bandwidth
        arrives[t] = max(arrives[t], arrives[s] + compute[s] + took)
    return links, float((arrives + compute).max(initial=0.0))


def _summed(values: Floats, at: Ints, count: int) -> Floats:
    """The sums of values by their places."""
    import numpy as np

    return np.asarray(np.bincount(at, weights=values, minlength=count), dtype=np.float64)


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
    for v, d in problem.pins.items():
        if problem.device_of[stage[v]] != d:
            what = "device" if problem.devices else "stage"
            return f"{problem.name(v)} is pinned to {what} {d}"
    for group in problem.together:
        if len({stage[v] for v in group}) > 1:
            return f"{problem.name(group[0])} and {problem.name(group[1])} share a stage"
    empty = set(range(problem.stages)) - set(stage)
    if empty and not problem.idle:
        return f"stage {min(empty)} is empty"
    found = loads(problem, stage)
    for s, slot in enumerate(problem.slots):
        held = found.memory[problem.shares[s]]
        if held > slot.memory * (1 + 1e-12) and not slot.stream:
            what = "the device of stage" if problem.looped else "stage"
            return f"{what} {s} holds {held:.6g} of {slot.memory:.6g} bytes"
        if not np.isfinite(found.compute[s]):
            return f"stage {s} has an operator that its device cannot run"
    return None
