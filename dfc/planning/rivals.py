"""The splits of simpler tools: what a partition is compared with, and never worse than."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dfc.planning.machine import Machine
from dfc.planning.problem import Partition, Problem, value_of, why_not


def rivals(problem: Problem, machine: Machine) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Splits by one number for each node, those of them that are allowed."""
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
        stage = tuple(np.minimum(np.searchsorted(ends, middle), k - 1).tolist())
        if why_not(problem, stage) is None:
            yield name, stage


def no_worse(problem: Problem, machine: Machine, found: Partition) -> Partition:
    """The partition, or a simpler tool's where that is better: it may be between two cuts tried."""
    for name, stage in rivals(problem, machine):
        value = value_of(problem, stage)
        if value < found.value:
            found = Partition(stage, value, min(found.bound, value), name)
    return found


def compared(problem: Problem, machine: Machine, found: Partition) -> tuple[tuple[str, float], ...]:
    """How many times as much of what is made small each split takes."""
    return tuple(
        (name, value_of(problem, stage) / found.value)
        for name, stage in rivals(problem, machine)
        if found.value > 0
    )
