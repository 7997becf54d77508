"""The bound over devices that differ: never more than the best of all orders, and near it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from dfc.planning.ideals import lower_bound
from dfc.planning.partition import partition
from dfc.planning.path_bound import path_bound
from dfc.planning.problem import Problem, Slot, Tensor
from tests.planning_problems import brute_force, made

SHAPES: tuple[dict[str, bool], ...] = (
    {}, {"memory": True}, {"links": True, "wishes": True}, {"streams": True},
    {"memory": True, "links": True, "wishes": True}, {"streams": True, "wishes": True},
)  # fmt: skip


def anywhere(problem: Problem) -> Problem:
    """With a device of its own for each slot, which holds as little as in any order."""
    least = min(s.in_flight for s in problem.slots)
    slots = [replace(s, kind=i, in_flight=least) for i, s in enumerate(problem.slots)]
    return problem.with_stages(slots)


def in_order(problem: Problem, row: Sequence[int]) -> Problem:
    """Devices keep their times and memory, places what they hold at once."""
    places = [(problem.slots[d], problem.slots[i]) for i, d in enumerate(row)]
    slots = [
        replace(own, kind=d, in_flight=place.in_flight, keeping=place.keeping)
        for d, (own, place) in zip(row, places, strict=True)
    ]
    pins = {v: row.index(d) for v, d in problem.pins.items()}
    return replace(problem.with_stages(slots), pins=pins)


@pytest.mark.parametrize("shape", SHAPES, ids=" ".join)
@pytest.mark.parametrize("chain", [True, False], ids=["chain", "graph"])
def test_no_order_of_any_devices_beats_it(shape: dict[str, bool], chain: bool) -> None:
    for seed in range(12):
        problem = made(random.Random(seed), 5, 3, chain=chain, kinds=3, **shape)
        bound = path_bound(anywhere(problem), 5.0)
        for row in permutations(range(3)):
            best = brute_force(in_order(problem, row))
            assert best is None or bound <= best.value * (1 + 1e-9)


def layers(count: int, devices: int, seed: int, *, branches: bool) -> Problem:
    """Layers of two operators, each of which is quicker on some devices; with branches a third
    stands beside the second. The first two devices are alike, and memory is short."""
    rng = random.Random(seed)
    each = np.array([[rng.uniform(1, 4) for _ in range(devices)] for _ in range(3)])
    each[:, 1] = each[:, 0]
    each[2] /= 10
    wide = 3 if branches else 2
    n = count * wide
    time = np.vstack([each[:wide]] * count)
    tensors = []
    for v in range(0, n, wide):
        tensors += [Tensor(v + i, 0.0, (v + wide,)) for i in range(1, wide) if v + wide < n]
        tensors.append(Tensor(v, 0.0, tuple(range(v + 1, v + wide))))
    memory = [1.3 * n / devices * (1 + (d == devices - 1)) for d in range(devices)]
    slots = tuple(Slot(kind=d, memory=m) for d, m in enumerate(memory))
    return Problem(time, tuple(tensors), slots, np.ones(n), np.zeros(n))


@pytest.mark.parametrize("branches", [False, True], ids=["chain", "branches"])
@pytest.mark.parametrize("devices", [3, 4])
def test_it_is_near_the_best_order(devices: int, branches: bool) -> None:
    """Where work that could be divided at will leaves much more open."""
    gains = []
    for seed in range(4):
        problem = layers(40, devices, seed, branches=branches)
        rows = set(permutations(range(devices)))
        rows = {row for row in rows if row.index(0) < row.index(1)}  # these are alike
        best = min(partition(in_order(problem, row)).value for row in rows)
        bound = path_bound(problem, 5.0)
        assert best * 0.97 <= bound <= best * (1 + 1e-9)
        gains.append(bound / lower_bound(problem))
    assert max(gains) > 1.1


def test_what_it_cannot_judge_has_no_bound() -> None:
    problem = layers(4, 3, 0, branches=False)
    nowhere = problem.time.copy()
    nowhere[0] = np.inf
    assert path_bound(replace(problem, time=nowhere), 1.0) == 0.0
    slots = [replace(problem.slots[0], kind=d % 3, memory=100.0 + d) for d in range(24)]
    assert path_bound(problem.with_stages(slots), 1.0) == 0.0  # too many sets of devices


def test_memory_that_only_a_slow_device_has_is_charged_for_in_full() -> None:
    """Most of the weights must go where all of them take eleven times as long."""
    n = 40
    time = np.tile([1.0, 1.0, 11.0], (n, 1))
    tensors = tuple(Tensor(v, 0.0, (v + 1,)) for v in range(n - 1))
    slots = tuple(Slot(kind=d, memory=m) for d, m in enumerate((6.0, 6.0, 100.0)))
    problem = Problem(time, tensors, slots, np.ones(n), np.zeros(n))
    assert path_bound(problem, 5.0) == pytest.approx(28 * 11)
