"""Random partition problems, all their partitions tried, and solvers held to the best of them."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import numpy as np
import pytest

from dfc.planning.ideals import all_ideals, best_chain, lower_bound
from dfc.planning.milp import solve_milp
from dfc.planning.problem import INFINITE, Partition, Problem, Slot, Tensor, value_of, why_not

SHAPES: tuple[dict[str, Any], ...] = (
    {}, {"memory": True}, {"links": True}, {"memory": True, "links": True}, {"kinds": 2},
    {"memory": True, "links": True, "wishes": True}, {"streams": True},
    {"streams": True, "links": True, "wishes": True},
    {"memory": True, "takes": True}, {"memory": True, "takes": True, "links": True, "wishes": True},
)  # fmt: skip


def made(
    rng: random.Random, n: int, k: int, *, chain: bool = False, memory: bool = False,
    links: bool = False, kinds: int = 1, wishes: bool = False,
    streams: bool = False, takes: bool = False, devices: tuple[int, ...] = (),
) -> Problem:  # fmt: skip
    """A random problem; times and bytes are small integers, so that ties happen. `devices` are
    those of the k stages, where devices have several."""
    tensors = []
    for u in range(n - 1):
        readers = (u + 1,) if chain else tuple(v for v in range(u + 1, n) if rng.random() < 0.35)
        if readers:
            tensors.append(Tensor(u, rng.randint(0, 4), readers))
    weights = np.array([float(rng.randint(0, 4)) for _ in range(n)])
    kept = np.array([float(rng.randint(0, 2)) for _ in range(n)])
    whole = float(weights.sum() + kept.sum() * 2)
    at = devices or tuple(range(k))
    count = 1 + max(at)
    tight = (0.2, 1.0) if streams else (1.2, 4.0) if takes else (1.0, 2.0)
    rooms = [whole / count * rng.uniform(*tight) for _ in range(count)]
    rates = [rng.choice([0.25, 0.5, 1.0]) if streams else 0.0 for _ in range(count)]
    slots = [
        Slot(
            kind=at[s] % kinds,
            memory=rooms[at[s]] if memory or streams else INFINITE,
            receive=rng.choice([0.5, 1.0, 3.0]) if links else INFINITE,
            send=rng.choice([0.5, 1.0, 3.0]) if links else INFINITE,
            in_flight=k - s if memory and not takes else 1,
            taken=k - s if takes else 0,
            keeping=rng.randint(0, 1) if memory else 0,
            stream=rates[at[s]],
        )
        for s in range(k)
    ]
    time = np.array([[float(rng.randint(1, 6)) for _ in range(kinds)] for _ in range(n)])
    if kinds > 1:
        time[rng.randrange(n), 0] = INFINITE
    more: dict[str, Any] = {}
    if wishes:
        more["pins"] = {rng.randrange(n): rng.randrange(count)}
        more["together"] = (tuple(sorted(rng.sample(range(n), 2))),)
        more["tied"] = ((2.0, tuple(sorted(rng.sample(range(n), 2)))),)
    if devices:
        more |= {"devices": devices, "idle": False}
    some = np.floor(kept / 2) if memory else None
    return Problem(time, tuple(tensors), tuple(slots), weights, kept, some, **more)


def brute_force(problem: Problem) -> Partition | None:
    """The best partition by trying all, None when none is allowed.

    Needs:  few nodes: there are stages ** nodes to try.
    """
    best: tuple[float, tuple[int, ...]] | None = None
    for stage in product(range(problem.stages), repeat=problem.n):
        if why_not(problem, stage) is None:
            found = value_of(problem, stage)
            if best is None or found < best[0]:
                best = found, stage
    return Partition(best[1], best[0], best[0], "brute force") if best else None


def agree(problem: Problem, found: Partition | None, best: Partition | None) -> None:
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        assert why_not(problem, found.stage) is None
        assert found.value == pytest.approx(value_of(problem, found.stage))
        assert found.value == pytest.approx(best.value, rel=1e-9)
        assert lower_bound(problem) <= found.value * (1 + 1e-9)


def solvers_find_the_best(problem: Problem) -> None:
    """The search over all ideals, and the integer program with its bound."""
    best = brute_force(problem)
    ideals = all_ideals(problem, 10**6)
    assert ideals is not None
    agree(problem, best_chain(problem, ideals, complete=True), best)
    found, bound = solve_milp(problem, 20.0, gap=0.0)
    agree(problem, found, best)
    if best is not None:
        assert bound <= best.value * (1 + 1e-6)
