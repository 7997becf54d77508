"""Lanes of one process: one thread for each rank of a program, values handed over as they are.

The contract, for whoever builds on it:

    lanes = Lanes(edges, run, threads=[1, 1])      # a thread a rank, asleep between steps
    step = lanes.step(program, given)              # given[b]: the host's values of microbatch b
    step.results[b], step.spans, step.bytes

Each rank does its row of the program in order. For an action its thread calls `run(action,
values)`: `values` holds, by name, what came along the edges into the action, and the answer holds
what leaves along the edges out of it (other entries are dropped). F takes and gives along forward
edges, I and B along backward ones, W along none. What a stage keeps for its own later actions is
for `run` to keep, by stage and microbatch: all actions of a stage are on one thread. Programs may
change from step to step without new threads; each is checked once, before it first runs.

With `drivers` several ranks share a thread, which does their actions merged into one order (see
`merged`): for ranks on a device that computes while the host goes on.

A rank that gets as far ahead of a reader as an edge has slots waits for it. When an action fails,
the step ends with its stage and microbatch, every rank stops after what it is doing, and the next
step starts afresh.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Protocol

from dfc.errors import DfcError
from dfc.planning.actions import Action, Kind, Program
from dfc.planning.stages import HOST
from dfc.runtime.pipeline.routes import Edge, Routed, Routes, Task

_LOOK_S = 0.25  # after which a caller looks for Ctrl-C at the latest

Values = Mapping[Any, Any]
Run = Callable[[Action, Values], Values]


@dataclass(frozen=True)
class Span:
    """When a rank computed an action, in seconds since the step began."""

    action: Action
    rank: int
    start: float
    end: float


@dataclass(frozen=True)
class Step:
    """What a step gave to the host for each microbatch, its times, and the bytes of each edge.

    `streamed` are the bytes of weights that each stage with too little memory was brought, over
    each hop: 0 is the one that ends at what computes, 1 the one below.
    """

    results: list[dict[Any, Any]]
    spans: Sequence[Span]
    seconds: float
    bytes: dict[Edge, int]
    streamed: Mapping[tuple[int, int], int] = field(default_factory=dict)


class Carrier(Protocol):
    """How values come from one rank to another. HOST is whoever calls."""

    def step(self) -> AbstractContextManager[Any]:
        """What holds in the caller's thread from the start of a step until all ranks are done."""
        ...

    def lane(self, rank: int) -> AbstractContextManager[Any]:
        """What holds on a rank's thread as long as it lives."""
        ...

    def send(self, source: int, target: int, values: Values) -> Any:
        """Called where the values were made; what it returns goes to `receive`."""
        ...

    def receive(self, source: int, target: int, parcel: Any) -> Values:
        """Called where the values are used; for HOST in the caller's thread, at the end."""
        ...


class SharedMemory:
    """Lanes of one memory: nothing is copied."""

    def step(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def lane(self, rank: int) -> AbstractContextManager[Any]:
        return nullcontext()

    def send(self, source: int, target: int, values: Values) -> Any:
        return values

    def receive(self, source: int, target: int, parcel: Any) -> Values:
        found: Values = parcel
        return found


class _Stop:
    """What a waiting rank is given instead when the step has failed."""


_STOP = _Stop()


class Lanes:
    """Threads that run programs; see the module for what they ask and give.

    `threads[r]` are those of rank r's kernels; `drivers[r]` is the number of the thread that drives
    it, by default its own.
    Needs:   `run` may be called from several threads, for different stages, at once.
    """

    def __init__(
        self,
        edges: Sequence[Edge],
        run: Run,
        threads: Sequence[int],
        carrier: Carrier | None = None,
        drivers: Sequence[int] | None = None,
    ) -> None:
        import torch

        self.edges, self.run, self.threads = tuple(edges), run, tuple(threads)
        self.drivers = tuple(range(len(threads)) if drivers is None else drivers)
        self.carrier = carrier or SharedMemory()
        self._lock = threading.Lock()
        self._closed = False
        self._routed = Routed(self.edges, self.drivers)
        count = 1 + max(self.drivers)
        self._work: list[SimpleQueue[_Job | None]] = [SimpleQueue() for _ in range(count)]
        ready: SimpleQueue[int] = SimpleQueue()
        self._threads = [
            threading.Thread(
                target=self._serve, args=(driver, ready), name=f"dfc-rank-{driver}", daemon=True
            )
            for driver in range(count)
        ]
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            ready.get()
        torch.set_num_threads(torch.get_num_threads())  # what later threads start with

    def step(self, program: Program, given: Sequence[Values]) -> Step:
        """Run a program; `given` holds the host's values for each microbatch.

        Raises:  DfcError K050 for an action that fails, K051 once closed, N054 for numbers of
                 ranks or microbatches that are not the program's, N020.. for what is wrong with it.
        """
        with self._lock:  # one step at a time
            if self._closed:
                raise DfcError("K051", "the pipeline is closed")
            job = _Job(self, self._routes_of(program, len(given)), given)
            with self.carrier.step(), job:
                for work in self._work:
                    work.put(job)
                job.wait()
            return job.over()

    def here(self, program: Program, given: Sequence[Values]) -> Step:
        """The same, all of it in the caller's thread.

        Needs:   one driver: with several, the first would wait for the others.
        Raises:  what `step` does.
        """
        assert len(self._work) == 1
        with self._lock, self.carrier.step():
            job = _Job(self, self._routes_of(program, len(given)), given)
            job.serve(0, self.carrier.lane)
            job.wait()
            return job.over()

    def _routes_of(self, program: Program, given: int) -> Routes:
        if len(program.ranks) != len(self.threads) or program.microbatches != given:
            raise DfcError(
                "N054",
                f"the program is for {len(program.ranks)} ranks and {program.microbatches} "
                f"microbatches, there are {len(self.threads)} and {given}",
            )
        return self._routed[program]

    def close(self) -> None:
        """End the threads; they cannot be used again."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for work in self._work:
                    work.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _serve(self, driver: int, ready: SimpleQueue[int]) -> None:
        import torch

        ranks = [r for r, d in enumerate(self.drivers) if d == driver]
        torch.get_num_threads()  # a thread's first use of it would undo what is set
        torch.set_num_threads(max(self.threads[r] for r in ranks))  # of this thread's kernels
        alone = len(ranks) == 1
        with self.carrier.lane(ranks[0]) if alone else nullcontext():
            ready.put(driver)
            while (job := self._work[driver].get()) is not None:
                job.serve(driver, nullcontext if alone else self.carrier.lane)
                del job  # between steps nothing of the last one is kept


class _Job:
    """One step under way."""

    def __init__(self, lanes: Lanes, routes: Routes, given: Sequence[Values]) -> None:
        self.run, self.carrier = lanes.run, lanes.carrier
        self.routes, self.given = routes, given
        self.results: list[list[tuple[int, Any]]] = [[] for _ in given]  # parcels, and whose
        self.drivers = routes.drivers
        self.spans: list[list[Span]] = [[] for _ in routes.driven]
        self.sent = [0] * len(routes.edges)
        self.failure: DfcError | None = None
        self.stopped = False
        self.inbox: list[SimpleQueue[Any]] = [SimpleQueue() for _ in routes.driven]
        self.rooms = [_room(slots) for slots in routes.slots]
        self.done: SimpleQueue[int] = SimpleQueue()
        self.began = time.perf_counter()

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, *_: object) -> None:
        """Where the caller is interrupted, also before all ranks have the job, what runs is told to
        stop: it would wait for the others for ever."""
        if kind is not None:
            self.stop()

    def wait(self) -> None:
        left = len(self.routes.driven)
        while left:
            # Not for ever: a signal that comes as Python begins to wait is not seen before it ends.
            with contextlib.suppress(Empty):
                self.done.get(timeout=_LOOK_S)
                left -= 1
        if self.failure is not None:
            raise self.failure

    def over(self) -> Step:
        seconds = time.perf_counter() - self.began
        spans = [s for of_driver in self.spans for s in of_driver]
        sent = dict(zip(self.routes.edges, self.sent, strict=True))
        results: list[dict[Any, Any]] = []
        for parcels in self.results:
            found: dict[Any, Any] = {}
            for rank, parcel in parcels:
                found.update(self.carrier.receive(rank, HOST, parcel))
            results.append(found)
        return Step(results, spans, seconds, sent)

    def stop(self) -> None:
        """Wake every rank that waits; the others end when they are done with their action."""
        self.stopped = True
        for inbox in self.inbox:
            inbox.put(_STOP)
        for room in self.rooms:
            if room is not None:
                room.put(_STOP)

    def serve(self, driver: int, lane: Callable[[int], AbstractContextManager[Any]]) -> None:
        """Do what a driver has to; `lane` is what holds around an action of a rank."""
        held: dict[tuple[int, int], Any] = {}
        watch = _Watch(self)
        with watch:
            for rank, task in self.routes.driven[driver]:
                watch.action = task.action
                with lane(rank):
                    if not self._did(rank, task, held):
                        break
        self.done.put(driver)

    def _did(self, rank: int, task: Task, held: dict[tuple[int, int], Any]) -> bool:
        """Take, compute and give; False when the step has failed."""
        values = self._take(rank, task, held)
        if values is None or self.stopped:
            return False
        start = time.perf_counter()
        made = self.run(task.action, values)
        del values  # what is not used any more must not wait with this rank
        end = time.perf_counter()
        self.spans[self.drivers[rank]].append(
            Span(task.action, rank, start - self.began, end - self.began)
        )
        return self._give(rank, task, made, held)

    def _take(self, rank: int, task: Task, held: dict[tuple[int, int], Any]) -> Values | None:
        """What an action needs, None when the step has failed."""
        values: dict[Any, Any] = {}
        edges, placement, b = self.routes.edges, self.routes.program.placement, task.action[2]
        for e in task.takes:
            source = edges[e].source
            if source == HOST:
                given = self.given[b]
                parcel: Any = {v: given[v] for v in edges[e].values}
                parcel = self.carrier.send(HOST, rank, parcel)
            else:
                while (e, b) not in held:
                    got = self.inbox[self.drivers[rank]].get()
                    if got is _STOP:
                        return None
                    held[got[0]] = got[1]
                parcel = held.pop((e, b))
                source = placement[source]
                room = self.rooms[e]
                if room is not None:
                    room.put(None)
            values.update(self.carrier.receive(source, rank, parcel))
        return values

    def _give(
        self, rank: int, task: Task, made: Values, held: dict[tuple[int, int], Any]
    ) -> bool:  # fmt: skip
        """Hand on what an action made; False when the step has failed."""
        edges, placement, b = self.routes.edges, self.routes.program.placement, task.action[2]
        for e in task.gives:
            edge = edges[e]
            values = {v: made[v] for v in edge.values}
            to = HOST if edge.target == HOST else placement[edge.target]
            parcel = self.carrier.send(rank, to, values)
            if to == HOST:
                self.results[b].append((rank, parcel))
                continue
            if to != rank:
                self.sent[e] += sum(getattr(x, "nbytes", 0) for x in values.values())
            if self.drivers[to] == self.drivers[rank]:
                held[e, b] = parcel
                continue
            room = self.rooms[e]
            if room is not None and room.get() is _STOP:
                return False
            self.inbox[self.drivers[to]].put(((e, b), parcel))
        return True


def _room(slots: int | None) -> SimpleQueue[Any] | None:
    """One token for each free slot of an edge."""
    if slots is None:
        return None
    room: SimpleQueue[Any] = SimpleQueue()
    for _ in range(slots):
        room.put(None)
    return room


@dataclass
class _Watch:
    """Names whatever is raised by the action under way, and stops the step: nothing may get past
    the thread, or the others would wait for it."""

    job: _Job
    action: Action = field(default=Action(Kind.F, 0, 0))

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if error is not None:
            if self.job.failure is None:
                self.job.failure = failure_of(self.action, error)
            self.job.stop()
        return True


def failure_of(action: Action, error: BaseException) -> DfcError:
    """An action's error with its stage, its microbatch, and the model's line."""
    from dfc.emit.places import place_of

    what = {Kind.F: "", Kind.B: "the backward pass of ", Kind.I: "the input gradient of ",
            Kind.W: "the weight gradient of ", Kind.R: "the recomputation of ",
            Kind.S: "the recomputation of "}  # fmt: skip
    where = f"stage {action.stage} failed on {what[action.kind]}microbatch {action.microbatch}"
    said = error.message if isinstance(error, DfcError) else str(error)
    if not isinstance(error, DfcError | RuntimeError | ValueError):
        said = f"{type(error).__name__}: {said}"
    place = place_of(error)
    found = DfcError("K050", f"{where}: {said}{f' ({place})' if place else ''}")
    found.__cause__ = error
    return found
