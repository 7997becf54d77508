"""The splits of simpler tools: what a partition is compared with, and never worse than."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from dfc.ir.graph import Node
from dfc.planning.machine import Machine
from dfc.planning.model import Modelled
from dfc.planning.problem import Partition, Problem, value_of, why_not

_NUMBER = re.compile(r"(.*?)\.(\d+)(?:\.|$)")  # `model.layers.7.mlp`: its list, and its place


def rivals(model: Modelled, machine: Machine) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Splits by one number for each node, and by layers: those of them that are allowed."""
    problem = model.problem
    for name, stage in (*_by_number(problem, machine), *_by_layer(model)):
        if why_not(problem, stage) is None:
            yield name, stage


def _by_number(problem: Problem, machine: Machine) -> Iterator[tuple[str, tuple[int, ...]]]:
    k = problem.stages
    memory = np.array([d.memory for d in machine.devices])
    shares = {
        "equal number of operators": (np.ones(problem.n), np.ones(k)),
        "equal parameters": (problem.weights, np.ones(k)),
        "parameters by memory": (problem.weights, memory),
    }
    for name, (by, share) in shares.items():
        if by.sum() <= 0:
            continue
        ends = np.cumsum(share) / share.sum()
        middle = (np.cumsum(by) - by / 2) / by.sum()
        yield name, tuple(np.minimum(np.searchsorted(ends, middle), k - 1).tolist())


def _by_layer(model: Modelled) -> Iterator[tuple[str, tuple[int, ...]]]:
    """As many layers of the longest list of them for each stage; what is before and behind them
    goes to the first and the last."""
    places = [_place(nodes) for nodes in model.groups]
    lists = Counter(name for name, _ in set(places) if name is not None)
    if not lists:
        return
    longest, count = lists.most_common(1)[0]
    if count < model.problem.stages:
        return
    own = [at if name == longest else -1 for name, at in places]
    order = sorted({at for at in own if at >= 0})
    last, seen, stage = max(i for i, at in enumerate(own) if at >= 0), 0, []
    for i, at in enumerate(own):
        if at >= 0:
            seen = max(seen, order.index(at) * model.problem.stages // count)
        stage.append(model.problem.stages - 1 if i > last else seen)
    yield "equal number of layers", tuple(stage)


def _place(nodes: Sequence[Node]) -> tuple[str | None, int]:
    """The list of modules that a group is in, and where."""
    module = next((n.loc.module for n in nodes if n.loc and n.loc.module), "")
    found = _NUMBER.match(module)
    return (found[1], int(found[2])) if found else (None, -1)


def no_worse(model: Modelled, machine: Machine, found: Partition) -> Partition:
    """The partition, or a simpler tool's where that is better: it may be between two cuts tried."""
    for name, stage in rivals(model, machine):
        value = value_of(model.problem, stage)
        if value < found.value:
            found = Partition(stage, value, min(found.bound, value), name)
    return found


def compared(
    model: Modelled, machine: Machine, found: Partition
) -> tuple[tuple[str, float], ...]:  # fmt: skip
    """How many times as much of what is made small each split takes."""
    return tuple(
        (name, value_of(model.problem, stage) / found.value)
        for name, stage in rivals(model, machine)
        if found.value > 0 and model.problem.stages > 1
    )
