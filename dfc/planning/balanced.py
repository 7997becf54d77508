"""Stages of equal time for threads of this machine, from the measured time of every node."""

from __future__ import annotations

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
    """Seconds of each node on the eager engine with so many threads, after one warm run.

    Raises:  DfcError K020 that names the node when an op fails.
    """
    import torch

    from dfc.runtime.calibrate.inplace import clocked

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        interpret(graph, list(inputs))  # names a node that fails
        run = clocked(graph, inputs)
        run()
        rows = [run().nodes for _ in range(repeats)]
    finally:
        torch.set_num_threads(before)
    columns = zip(*rows, strict=True)
    return {node: median(times) for node, times in zip(graph.nodes, columns, strict=True)}
