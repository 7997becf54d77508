"""One rank of a program: it takes from its edges, computes and gives, action by action.

Where the rank lives does not matter to it: a process of this host, one that torchrun started, an
actor of Ray.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfc.planning.actions import Action
from dfc.planning.stages import HOST
from dfc.runtime.pipeline.lanes import Run, failure_of
from dfc.runtime.pipeline.links import Abandoned, Doing, LinkLost, Traffic, member
from dfc.runtime.pipeline.routes import Routes, Task


@dataclass(frozen=True)
class Done:
    """What a rank did in a step: (action, start, end) in seconds since it began, bytes by edge."""

    spans: list[tuple[Action, float, float]]
    sent: dict[int, int]


def run_rank(
    rank: int, routes: Routes, run: Run, traffic: Traffic, microbatches: Sequence[int], doing: Doing
) -> Done:
    """A rank's row of the program, for these microbatches.

    Raises:  DfcError K050 for an action that fails, LinkLost, Abandoned.
    """
    began = time.perf_counter()
    held: dict[tuple[int, int], Mapping[Hashable, Any]] = {}
    spans = []
    some = set(microbatches)
    for task in routes.ranks[rank]:
        action = task.action
        if action.microbatch not in some:
            continue
        values = _take(rank, routes, task, traffic, held)
        doing.set(action.kind.name, action.stage, action.microbatch)
        start = time.perf_counter()
        try:
            made = run(action, values)
            del values
            end = time.perf_counter()
            spans.append((action, start - began, end - began))
            _give(rank, routes, task, made, traffic, held)
            del made
        except (LinkLost, Abandoned):
            raise
        except Exception as e:  # whatever a kernel raises: it is told with its action
            raise failure_of(action, e) from e
    traffic.finish()
    traffic.settle()
    doing.set("idle")
    return Done(spans, traffic.sent)


def _take(
    rank: int, routes: Routes, task: Task, traffic: Traffic, held: dict[Any, Any]
) -> dict[Hashable, Any]:  # fmt: skip
    values: dict[Hashable, Any] = {}
    b = task.action.microbatch
    for e in task.takes:
        edge = routes.edges[e]
        if edge.source != HOST and routes.program.placement[edge.source] == rank:
            values.update(held.pop((e, b)))
        else:
            values.update(zip(edge.values, traffic.receive(e, b), strict=True))
    return values


def _give(
    rank: int, routes: Routes, task: Task, made: Any, traffic: Traffic, held: dict[Any, Any]
) -> None:
    b = task.action.microbatch
    for e in task.gives:
        edge = routes.edges[e]
        if member(edge.target, routes.program.placement) == rank:
            held[e, b] = {v: made[v] for v in edge.values}
        else:
            traffic.send(e, b, [made[v] for v in edge.values])
