"""What the machine allows two lanes: each runs its own stage and waits for nothing.

Two cores share a cache and the memory behind it, so that both together are slower than each alone;
what a pipeline adds to that is filling, emptying, and handing over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import torch

from dfc.ir.graph import Graph
from dfc.planning.stages import StageGraph
from dfc.runtime.engines import find_engine


class Apart:
    """Two stages on two threads, all microbatches of each at once; `parts` are their inputs."""

    def __init__(
        self, graph: Graph, stages: Sequence[StageGraph], engine: str, parts: Sequence[Any]
    ) -> None:
        first, second = (find_engine(engine).build(s.graph, "cpu", 1) for s in stages)
        work = []
        for part in parts:
            known = dict(zip(graph.inputs, part, strict=True))
            taken = [known[v] for v in stages[0].takes]
            known.update(zip(stages[0].gives, first(taken), strict=True))
            work.append((taken, [known[v] for v in stages[1].takes]))
        one, other = zip(*work, strict=True)
        self._work: list[tuple[Callable[..., Any], Any]] = [(first, one), (second, other)]
        self._pool = ThreadPoolExecutor(2, initializer=_one_thread)

    def __call__(self) -> None:
        list(self._pool.map(_all, self._work))

    def close(self) -> None:
        self._pool.shutdown()


def told(one: Sequence[float], apart: Sequence[float], piped: Sequence[float], count: int) -> str:
    """How much of what two lanes allow a pipeline reaches."""
    lanes = median(one) / median(apart)
    most = lanes * count / (count + 1)
    share = median(one) / median(piped) / most
    return (f"two lanes that wait for nothing are {lanes:.2f} times one; filling and emptying "
            f"leaves {most:.2f}, of which the pipeline has {share:.0%}")  # fmt: skip


def _one_thread() -> None:
    torch.get_num_threads()  # a thread's first use of it would undo what is set
    torch.set_num_threads(1)


def _all(work: tuple[Callable[..., Any], Sequence[Any]]) -> None:
    run, parts = work
    for part in parts:
        run(part)
