"""Stages of equal time for threads of this machine, from the measured time of every node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.ir.interpret import bind_inputs, interpret

if TYPE_CHECKING:
    from dfc.planning.pipeline import Plan
    from dfc.planning.streaming import Hop


def balanced(graph: Graph, stages: int, inputs: Sequence[Any], threads: int = 1) -> dict[Node, int]:
    """Stages of equal time, fewer where the graph has not as many nodes that can be apart.

    Raises:  DfcError N053 for fewer stages than one.
    """
    count = min(stages, max(len(graph), 1))
    return _as_many(_plan(graph, [1e18] * count, inputs, threads, {}), count)


def _as_many(found: Plan, wanted: int) -> dict[Node, int]:
    """The stages of a plan, the longest of which are halved until there are as many as wanted.

    Why:  a plan has no stage by which no other gets shorter; schedules need their number.
    """
    from dfc.planning.pipeline import stage_of

    placed, model = stage_of(found), found.modelled
    assert model is not None
    seconds = dict(enumerate(model.problem.time[:, 0]))
    stages: list[list[int]] = [[] for _ in found.stages]
    for group, nodes in enumerate(model.groups):
        stages[placed[nodes[0]]].append(group)  # groups are in the order of nodes

    def length(groups: Sequence[int]) -> float:
        return float(sum(seconds[g] for g in groups))

    def cuts(groups: Sequence[int]) -> list[int]:
        sides = [(k, set(groups[:k]), set(groups[k:])) for k in range(1, len(groups))]
        whole = [set(t) for t in model.problem.together]
        return [k for k, a, b in sides if not any(t & a and t & b for t in whole)]

    while len(stages) < wanted and any(map(cuts, stages)):
        i = max((i for i, groups in enumerate(stages) if cuts(groups)),
                key=lambda i: length(stages[i]))  # fmt: skip
        groups = stages[i]
        at = min(cuts(groups), key=lambda k: max(length(groups[:k]), length(groups[k:])))
        stages[i : i + 1] = [groups[:at], groups[at:]]
    return {n: s for s, groups in enumerate(stages) for g in groups for n in model.groups[g]}


def balanced_within(
    graph: Graph, memory: Sequence[int], inputs: Sequence[Any], bandwidth: float
) -> tuple[dict[Node, int], list[int]]:
    """Stages for ranks with so much memory, and the rank of each.

    A rank takes as long as it computes, or as it streams what does not fit its memory: for every
    microbatch, which `inputs` are, with its part of the bandwidth. A memory that is too small is
    refused by what plans the streaming.
    """
    from dfc.planning.pipeline import stage_of
    from dfc.planning.streaming import Hop

    hop = Hop(len(memory) / bandwidth, name="disk")
    hops = {_lane(i): hop for i in range(len(memory))}
    try:
        found = _plan(graph, memory, inputs, 1, hops)
    except DfcError as e:
        if e.status != 6:
            raise
        return balanced(graph, len(memory), inputs), list(range(len(memory)))
    names = [_lane(i) for i in range(len(memory))]
    return stage_of(found), [names.index(s.device) for s in found.stages]


def _lane(i: int) -> str:
    return f"lane{i}"


def _plan(
    graph: Graph, memory: Sequence[float], inputs: Sequence[Any], threads: int,
    hops: Mapping[str, Hop],
) -> Plan:  # fmt: skip
    """On lanes that take what was measured, and hand over at once."""
    from dfc.planning.machine import RESERVE, Device, Machine, Wire
    from dfc.planning.pipeline import plan

    stages = len(memory)
    if stages < 1:
        raise DfcError("N053", f"a pipeline has at least one stage, not {stages}")
    took = node_seconds(graph, inputs, threads)
    lane = Device("lane", "cpu", 1e18, 1e18, {"f32": 1e18})
    wires = {(i, j): Wire() for i in range(stages) for j in range(stages) if i != j}
    lanes = tuple(
        replace(lane, name=_lane(i), memory=m / (1 - RESERVE)) for i, m in enumerate(memory)
    )
    sizes = bind_inputs(graph, inputs)
    machine = Machine("threads", lanes, wires)
    return plan(graph, machine, sizes=sizes, measured=took.get, hops=hops)


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
