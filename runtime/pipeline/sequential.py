"""A program without threads: each rank as far as it comes, in this one. The reference of all ways
to run a program, and the one-process witness of training."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from dfc.errors import DfcError
from dfc.planning.actions import Program
from dfc.planning.stages import HOST
from dfc.runtime.pipeline.lanes import Run, Span, Step, failure_of
from dfc.runtime.pipeline.routes import Edge, Task, routes


class Sequential:
    """What `Lanes` is, without threads."""

    def __init__(self, edges: Sequence[Edge], run: Run) -> None:
        self.edges, self.run = tuple(edges), run

    def step(self, program: Program, given: Sequence[Mapping[Any, Any]]) -> Step:
        """Run a program; `given` holds the host's values for each microbatch.

        Raises:  DfcError K050 for an action that fails, N020.. for what is wrong with the program.
        """
        return _Walk(self, routes(program, self.edges).ranks, given).step()

    def close(self) -> None:
        """Nothing is left to end."""


class _Walk:
    """One step under way."""

    def __init__(
        self, way: Sequential, ranks: Sequence[Sequence[Task]], given: Sequence[Mapping[Any, Any]]
    ) -> None:
        self.edges, self.run, self.ranks, self.given = way.edges, way.run, ranks, given
        self.mail: dict[tuple[int, int], dict[Any, Any]] = {}  # edge and microbatch
        self.results: list[dict[Any, Any]] = [{} for _ in given]
        self.sent = dict.fromkeys(self.edges, 0)
        self.spans: list[Span] = []
        self.began = time.perf_counter()

    def step(self) -> Step:
        heads = [0] * len(self.ranks)
        while any(head < len(tasks) for head, tasks in zip(heads, self.ranks, strict=True)):
            before = sum(heads)
            for rank, tasks in enumerate(self.ranks):
                while heads[rank] < len(tasks) and self.able(tasks[heads[rank]]):
                    self.perform(rank, tasks[heads[rank]])
                    heads[rank] += 1
            if sum(heads) == before:
                raise DfcError("N020", "the program waits for itself")
        return Step(self.results, self.spans, time.perf_counter() - self.began, self.sent)

    def able(self, task: Task) -> bool:
        b = task.action.microbatch
        return all(self.edges[e].source == HOST or (e, b) in self.mail for e in task.takes)

    def perform(self, rank: int, task: Task) -> None:
        action, b = task.action, task.action.microbatch
        values: dict[Any, Any] = {}
        for e in task.takes:
            edge = self.edges[e]
            host = edge.source == HOST
            values.update({v: self.given[b][v] for v in edge.values} if host
                          else self.mail.pop((e, b)))  # fmt: skip
        start = time.perf_counter() - self.began
        try:
            made = self.run(action, values)
        except (DfcError, RuntimeError, ValueError, TypeError, IndexError) as e:
            raise failure_of(action, e) from e
        self.spans.append(Span(action, rank, start, time.perf_counter() - self.began))
        for number in task.gives:
            edge = self.edges[number]
            parcel = {v: made[v] for v in edge.values}
            if edge.target == HOST:
                self.results[b].update(parcel)
                continue
            self.sent[edge] += sum(getattr(x, "nbytes", 0) for x in parcel.values())
            self.mail[number, b] = parcel
