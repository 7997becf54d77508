"""Lanes of one process: a thread for each stage, tensors handed over without copies.

Each lane takes the microbatches in order. What a stage makes for another waits in a queue of their
own; a lane that is `slots` microbatches ahead of a reader waits for it, so memory stays bounded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from dfc.errors import DfcError
from dfc.planning.engine import Runner
from dfc.planning.stages import HOST, StageGraph

SLOTS = 2  # microbatches between two stages: one that is read, one that is ready


@dataclass
class Span:
    """When a stage computed a microbatch, in seconds since the step began."""

    stage: int
    microbatch: int
    start: float
    end: float


@dataclass
class Step:
    """The results of one step, a list of the stages' values for each microbatch, and its times."""

    values: list[dict[Any, Any]]
    spans: list[Span]
    seconds: float


class _Stop:
    """What lanes hand on instead of tensors when one of them failed."""


_STOP = _Stop()


@dataclass
class Lane:
    """One stage's thread. It lives as long as the pipeline, and sleeps between steps."""

    index: int
    stage: StageGraph
    run: Runner
    threads: int
    work: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    thread: threading.Thread | None = None


class Lanes:
    """Runs the microbatches of a step through stages in threads.

    Needs:   stages in pipeline order, runners that may be called from any one thread.
    """

    def __init__(
        self,
        stages: Sequence[StageGraph],
        runners: Sequence[Runner],
        threads: int,
        wanted: set[Any],
    ) -> None:
        self.wanted = wanted  # the values of the whole graph's outputs
        self.lanes = [
            Lane(i, stage, run, threads)
            for i, (stage, run) in enumerate(zip(stages, runners, strict=True))
        ]
        self._lock = threading.Lock()
        self._closed = False
        for lane in self.lanes:
            lane.thread = threading.Thread(
                target=self._serve, args=(lane,), name=f"dfc-stage-{lane.index}", daemon=True
            )
            lane.thread.start()

    def step(self, microbatches: Sequence[dict[Any, Any]]) -> Step:
        """Run a step: each microbatch gives values to the graph's inputs.

        Raises:  DfcError K050 for a stage that fails, with the microbatch; K051 once closed.
        """
        with self._lock:  # one step at a time: lanes keep the order of their microbatches
            if self._closed:
                raise DfcError("K051", "the pipeline is closed")
            job = _Job(self, microbatches)
            for lane in self.lanes:
                lane.work.put(job)
            return job.wait()

    def close(self) -> None:
        """End the threads; the pipeline cannot be used again."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for lane in self.lanes:
                    lane.work.put(None)
        for lane in self.lanes:
            if lane.thread is not None and lane.thread is not threading.current_thread():
                lane.thread.join()

    def _serve(self, lane: Lane) -> None:
        import torch

        torch.set_num_threads(lane.threads)  # of this thread's kernels
        while True:
            job = lane.work.get()
            if job is None:
                return
            job.run(lane)


class _Job:
    """One step under way."""

    def __init__(self, lanes: Lanes, microbatches: Sequence[dict[Any, Any]]) -> None:
        self.lanes, self.microbatches = lanes, microbatches
        self.results: list[dict[Any, Any]] = [{} for _ in microbatches]
        self.spans: list[list[Span]] = [[] for _ in lanes.lanes]
        self.failure: DfcError | None = None
        self.done: SimpleQueue[int] = SimpleQueue()
        self.queues: dict[tuple[int, int], SimpleQueue[Any]] = {}
        self.room: dict[tuple[int, int], threading.Semaphore] = {}
        for lane in lanes.lanes:
            for source in set(lane.stage.sources) - {HOST}:
                self.queues[source, lane.index] = SimpleQueue()
                # A tensor that skips stages waits for those between.
                ahead = SLOTS + lane.index - source - 1
                self.room[source, lane.index] = threading.Semaphore(ahead)
        self.began = time.perf_counter()

    def wait(self) -> Step:
        for _ in self.lanes.lanes:
            self.done.get()
        if self.failure is not None:
            raise self.failure
        seconds = time.perf_counter() - self.began
        spans = [s for of_lane in self.spans for s in of_lane]
        return Step(self.results, spans, seconds)

    def run(self, lane: Lane) -> None:
        """All microbatches of one lane. However it ends, others are told and none waits."""
        open_ = {source for source in lane.stage.sources if source != HOST}
        readers = sorted(b for a, b in self.queues if a == lane.index)
        gives = _for_readers(lane, self.lanes.lanes, readers)
        left = len(self.microbatches)
        try:
            for number, given in enumerate(self.microbatches):
                values = self._take(lane, open_, given)
                left -= 1
                made = None if values is None else self._compute(lane, number, values)
                if made is None:
                    break
                self._hand_on(lane, number, made, readers, gives)
            else:
                left = -1
        finally:
            if left >= 0:
                if self.failure is None:
                    self.failure = DfcError("K050", f"stage {lane.index} ended early")
                for reader in readers:
                    self.queues[lane.index, reader].put(_STOP)
                for _ in range(left):
                    self._take(lane, open_, {})
            self.done.put(lane.index)

    def _take(self, lane: Lane, open_: set[int], given: dict[Any, Any]) -> dict[Any, Any] | None:
        """The next microbatch's values, None when a stage before this one has stopped."""
        values = dict(given)
        for source in sorted(open_):
            sent = self.queues[source, lane.index].get()
            self.room[source, lane.index].release()
            if sent is _STOP:
                open_.discard(source)
            else:
                values.update(sent)
        return values if open_ == {s for s in lane.stage.sources if s != HOST} else None

    def _compute(self, lane: Lane, number: int, values: dict[Any, Any]) -> dict[Any, Any] | None:
        start = time.perf_counter() - self.began
        try:
            results = lane.run([values[v] for v in lane.stage.takes])
        except (DfcError, RuntimeError, ValueError, TypeError, IndexError, MemoryError) as e:
            where = f"stage {lane.index} failed on microbatch {number}"
            self.failure = self.failure or DfcError("K050", f"{where}: {e}")
            self.failure.__cause__ = e
            return None
        end = time.perf_counter() - self.began
        self.spans[lane.index].append(Span(lane.index, number, start, end))
        return dict(zip(lane.stage.gives, results, strict=True))

    def _hand_on(
        self, lane: Lane, number: int, made: dict[Any, Any], readers: list[int],
        gives: Callable[[int], list[Any]],
    ) -> None:  # fmt: skip
        for reader in readers:
            self.room[lane.index, reader].acquire()
            self.queues[lane.index, reader].put({v: made[v] for v in gives(reader)})
        kept = {v: x for v, x in made.items() if v in self.lanes.wanted}
        if kept:
            self.results[number].update(kept)


def _for_readers(
    lane: Lane, lanes: Sequence[Lane], readers: Sequence[int]
) -> Callable[[int], list[Any]]:
    """The values that each reader takes from this stage."""
    table = {
        r: [
            v for v, s in zip(lanes[r].stage.takes, lanes[r].stage.sources, strict=True)
            if s == lane.index
        ]
        for r in readers
    }  # fmt: skip
    return lambda reader: table[reader]
