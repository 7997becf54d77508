"""Topological orders that are worth cutting: as traced, by depth, branch by branch, balanced."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from dfc.planning.problem import Problem


def promising_orders(problem: Problem) -> list[list[int]]:
    """Different orders of the nodes, the given one first."""
    readers: list[list[int]] = [[] for _ in range(problem.n)]
    for u, v in problem.edges:
        readers[u].append(v)
    depth, height = _levels(problem, readers)
    weight = problem.time.min(axis=1)
    choices: tuple[Callable[[int], tuple[float, ...]], ...] = (
        lambda v: (v,),
        lambda v: (depth[v], v),
        lambda v: (-height[v], v),
        lambda v: (-depth[v], v),  # as deep into a branch as it goes
        lambda v: (-depth[v], -v),
        lambda v: (float(weight[v]), v),
    )
    found: dict[tuple[int, ...], None] = {}
    for choice in choices:
        found.setdefault(tuple(_sorted(problem, readers, choice)))
    return [list(order) for order in found]


def _levels(problem: Problem, readers: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    depth, height = [0] * problem.n, [0] * problem.n
    for u, v in sorted(problem.edges):
        depth[v] = max(depth[v], depth[u] + 1)
    for u in reversed(range(problem.n)):
        height[u] = max((height[v] + 1 for v in readers[u]), default=0)
    return depth, height


def _sorted(
    problem: Problem, readers: Sequence[Sequence[int]], key: Callable[[int], tuple[float, ...]]
) -> list[int]:
    """A topological order that takes the least of what can come next."""
    waits = [0] * problem.n
    for _, v in problem.edges:
        waits[v] += 1
    heap = [(key(v), v) for v in range(problem.n) if not waits[v]]
    heapq.heapify(heap)
    order = []
    while heap:
        _, u = heapq.heappop(heap)
        order.append(u)
        for v in readers[u]:
            waits[v] -= 1
            if not waits[v]:
                heapq.heappush(heap, (key(v), v))
    return order
