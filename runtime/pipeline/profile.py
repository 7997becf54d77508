"""How long each node takes here: the graph run node by node, several times, medians taken."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from dfc.ir.graph import Graph, Node


def node_seconds(
    graph: Graph, inputs: Sequence[Any], threads: int = 1, repeats: int = 5
) -> dict[Node, float]:
    """Seconds of each node on PyTorch's kernels with so many threads, after one warm run."""
    import torch

    from dfc.ir.interpret import interpret

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
