"""Stages of equal time for threads of this machine, from the measured time of every node."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.ir.interpret import bind_inputs, interpret


def balanced(graph: Graph, stages: int, inputs: Sequence[Any], threads: int = 1) -> dict[Node, int]:
    """Stages of equal time, fewer where there are not as many nodes that take any.

    Raises:  DfcError N053 for fewer stages than one.
    """
    from dfc.planning.machine import Device, Machine, Wire
    from dfc.planning.pipeline import plan, stage_of

    if stages < 1:
        raise DfcError("N053", f"a pipeline has at least one stage, not {stages}")
    took = node_seconds(graph, inputs, threads)
    lane = Device("lane", "cpu", 1e18, 1e18, {"f32": 1e18})
    wires = {(i, j): Wire() for i in range(stages) for j in range(stages) if i != j}
    lanes = tuple(replace(lane, name=f"lane{i}") for i in range(stages))
    sizes = bind_inputs(graph, inputs)
    found = plan(graph, Machine("threads", lanes, wires), sizes=sizes, measured=took.get)
    return stage_of(found)


def node_seconds(
    graph: Graph, inputs: Sequence[Any], threads: int = 1, repeats: int = 5
) -> dict[Node, float]:
    """Seconds of each node on PyTorch's kernels with so many threads, after one warm run."""
    import torch

    took: dict[Node, list[float]] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(repeats + 1):
            clock = [time.perf_counter()]

            def observe(node: Node, results: Sequence[Any], clock: list[float] = clock) -> None:
                now = time.perf_counter()
                took.setdefault(node, []).append(now - clock[0])
                clock[0] = time.perf_counter()

            interpret(graph, list(inputs), observe=observe)
    finally:
        torch.set_num_threads(before)
    return {node: median(times[1:]) for node, times in took.items()}
