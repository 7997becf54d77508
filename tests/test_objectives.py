"""What is made small: each objective against brute force, and by what must never hurt."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise, permutations
from typing import Any, get_args

import numpy as np
import pytest

from dfc.planning.cuts import cut_chain, is_chain
from dfc.planning.devices import Wanted, best_row, price
from dfc.planning.ideals import all_ideals, best_chain, prefixes
from dfc.planning.machine import Device, Machine, Wire
from dfc.planning.model import Modelled, Wish, on_row
from dfc.planning.partition import Effort, partition
from dfc.planning.problem import Objective, Problem, Slot
from tests.planning_problems import SHAPES, agree, brute_force, made, solvers_find_the_best

OBJECTIVES: tuple[Objective, ...] = ("throughput", "latency", "memory")


def drawn(rng: random.Random, objective: Objective, n: int, **shape: Any) -> Problem:
    problem = made(rng, n, rng.randint(2, 3), **shape)
    slots = [replace(s, latency=rng.choice([0.0, 0.5, 2.0])) for s in problem.slots]
    return replace(problem.with_stages(slots), objective=objective, idle=rng.random() < 0.7)


@pytest.mark.parametrize(
    ("objective", "shape"),
    [(o, s) for o in OBJECTIVES for s in SHAPES if o == "throughput" or "streams" not in s],
    ids=lambda x: x if isinstance(x, str) else "+".join(x) or "plain",
)  # weights are streamed in plans by time alone
@pytest.mark.parametrize("seed", range(4))
def test_every_solver_finds_what_brute_force_finds(
    objective: Objective, shape: dict[str, Any], seed: int
) -> None:
    rng = random.Random(seed)
    problem = drawn(rng, objective, rng.randint(3, 7), **shape)
    solvers_find_the_best(problem)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nine_nodes_on_three_devices(objective: Objective) -> None:
    problem = drawn(random.Random(11), objective, 9, memory=True, links=True)
    best = brute_force(problem)
    assert best is not None
    found = partition(problem)
    agree(problem, found, best)
    assert found.gap == 0


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("seed", range(10))
def test_a_chain_is_cut_as_well_as_can_be(objective: Objective, seed: int) -> None:
    rng = random.Random(seed)
    problem = drawn(rng, objective, rng.randint(2, 8), chain=True, **SHAPES[seed % 5])
    assert is_chain(problem)
    agree(problem, cut_chain(problem), brute_force(problem))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_long_chain_agrees_with_the_ideals_of_its_order(objective: Objective) -> None:
    rng = random.Random(3)
    problem = drawn(rng, objective, 80, chain=True, links=True, memory=True)
    exact = best_chain(problem, prefixes([range(80)]), complete=True)
    agree(problem, cut_chain(problem), exact)


def better(problem: Problem) -> list[Problem]:
    """The same with more of something."""
    slots = list(problem.slots)
    return [
        problem.with_stages([*slots, Slot()]),
        problem.with_stages([replace(s, memory=s.memory * 2) for s in slots]),
        problem.with_stages([replace(s, receive=s.receive * 2) for s in slots]),
        problem.with_stages([replace(s, send=s.send * 2) for s in slots]),
        problem.with_stages([replace(s, latency=s.latency / 2) for s in slots]),
        replace(problem, pins={}, together=()),
    ]


def value(problem: Problem) -> float:
    ideals = all_ideals(problem, 10**6)
    assert ideals is not None
    found = best_chain(problem, ideals, complete=True)
    return found.value if found else float("inf")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("seed", range(5))
def test_more_devices_memory_or_bandwidth_never_hurt_and_pins_never_help(
    objective: Objective, seed: int
) -> None:
    rng = random.Random(seed)
    problem = drawn(rng, objective, 8, memory=True, links=True, wishes=True)
    problem = replace(problem, idle=True)
    best = value(problem)
    assert all(value(other) <= best * (1 + 1e-9) for other in better(problem))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("seed", range(5))
def test_units_and_names_do_not_matter(objective: Objective, seed: int) -> None:
    rng = random.Random(seed)
    problem = drawn(rng, objective, 8, memory=True, links=True)
    best = value(problem)
    longer = replace(
        problem, time=problem.time * 4,
        slots=tuple(replace(s, receive=s.receive / 4, send=s.send / 4, latency=s.latency * 4)
                    for s in problem.slots),
    )  # fmt: skip
    assert value(longer) == pytest.approx(best if objective == "memory" else 4 * best)
    order = _other_order(problem, rng)
    at = {v: i for i, v in enumerate(order)}
    relabelled = replace(
        problem, time=problem.time[order], weights=problem.weights[order],
        activations=problem.activations[order],
        kept=None if problem.kept is None else problem.kept[order],
        tensors=tuple(
            replace(t, producer=at[t.producer], readers=tuple(sorted(at[v] for v in t.readers)))
            for t in problem.tensors
        ),
    )  # fmt: skip
    assert value(relabelled) == pytest.approx(best)


def _other_order(problem: Problem, rng: random.Random) -> list[int]:
    """A topological order by chance."""
    left, order = set(range(problem.n)), []
    while left:
        ready = [v for v in left if not any(u in left for u, w in problem.edges if w == v)]
        order.append(rng.choice(sorted(ready)))
        left.discard(order[-1])
    return order


def test_latency_may_use_fewer_devices_and_memory_uses_all() -> None:
    n = 6
    problem = made(random.Random(1), n, 3, chain=True)
    problem = replace(problem, weights=np.ones(n), activations=np.zeros(n))
    problem = problem.with_stages([Slot(receive=1.0, latency=1.0)] * 3)
    assert len(set(partition(replace(problem, objective="latency")).stage)) == 1
    assert partition(replace(problem, objective="memory")).value == 2.0


# Which devices, and in which order


def every_row(model: Modelled, machine: Machine, most: int, aim: Wanted) -> float:
    """The best value over all rows and all partitions that leave no device out."""
    best = float("inf")
    objective: Objective = "throughput" if aim == "cost" else aim
    for k in range(1, most + 1):
        for row in permutations(range(len(machine.devices)), k):
            if any(machine.way(a, b) is None for a, b in pairwise(row)):
                continue
            if not set(model.pins.values()) <= set(row):
                continue
            part = machine.at(row)
            problem = on_row(model, part, row, Wish()).problem
            found = brute_force(replace(problem, objective=objective, idle=False))
            by = price(part) if aim == "cost" else 1.0
            best = min(best, found.value * by if found else best)
    return best


def unlike(rng: random.Random, alike: bool) -> Machine:
    """Three devices and links of different kinds."""
    devices = tuple(
        Device(f"d{i}", "cpu", 1e6 * rng.choice([1, 2]), 1e9,
               {"f32": 1e6 * (1 if alike else rng.choice([1, 2, 5]))}, price=rng.choice([1.0, 3.0]))
        for i in range(3)
    )  # fmt: skip
    pairs = [(0, 1), (1, 2)] + ([(0, 2)] if rng.random() < 0.5 else [])
    wires = {}
    for a, b in pairs:
        wires[a, b] = wires[b, a] = Wire(rng.choice([1e3, 1e5, 1e7]), rng.choice([0.0, 1e-4]))
    return Machine("unlike", devices, wires)


@pytest.mark.parametrize("aim", get_args(Wanted))
@pytest.mark.parametrize("seed", range(6))
def test_the_best_row_of_devices_is_that_of_trying_all(aim: Wanted, seed: int) -> None:
    rng = random.Random(seed)
    problem = made(rng, 6, 3)
    machine = unlike(rng, alike=seed % 2 == 0)
    speed = np.array([d.peaks["f32"] for d in machine.devices])
    problem = replace(problem, time=problem.time[:, :1] * 1e3 / speed)
    model = Modelled(problem, (), (), 0.0, {0: 1} if seed == 3 else {})
    found = best_row(model, machine, Wish(), aim, 2 if seed == 4 else None, Effort())
    expected = every_row(model, machine, 2 if seed == 4 else 3, aim)
    assert found.partition.value == pytest.approx(expected)
    assert found.partition.gap == pytest.approx(0.0, abs=1e-9)
    assert len(set(found.partition.stage)) == len(found.machine.devices)


@pytest.mark.parametrize("aim", get_args(Wanted))
def test_many_unlike_devices_are_searched_from_the_given_order(aim: Wanted) -> None:
    rng = random.Random(5)
    devices = tuple(Device(f"d{i}", "cpu", 1e9, 1e9, {"f32": 1e6 * (1 + i % 4)}) for i in range(8))
    wires = {(a, b): Wire(1e6 + a) for a in range(8) for b in range(8) if a != b}
    machine = Machine("many", devices, wires)
    problem = made(rng, 30, 8, chain=True)
    speed = np.array([d.peaks["f32"] for d in devices])
    problem = replace(problem, time=problem.time[:, :1] * 1e3 / speed)
    model = Modelled(problem, (), (), 0.0, {})
    found = best_row(model, machine, Wish(), aim, 4, Effort())
    given = on_row(model, machine.at(range(4)), range(4), Wish()).problem
    first = partition(replace(given, objective="throughput" if aim == "cost" else aim)).value
    by = price(machine.at(range(4))) if aim == "cost" else 1.0
    assert found.partition.bound <= found.partition.value <= first * by * (1 + 1e-9)
    if aim == "throughput":
        assert 0 < found.partition.gap < 1.0


def test_prices_decide_which_device_is_used() -> None:
    devices = (
        Device("fast", "cuda", 1e9, 1e9, {"f32": 4e6}, price=10.0),
        Device("slow", "cpu", 1e9, 1e9, {"f32": 1e6}, price=1.0),
    )
    machine = Machine("two", devices, {(0, 1): Wire(1e9), (1, 0): Wire(1e9)})
    problem = made(random.Random(0), 6, 2, chain=True)
    problem = replace(problem, time=problem.time[:, :1] * np.array([[0.25, 1.0]]))
    model = Modelled(problem, (), (), 0.0, {})
    cheap = best_row(model, machine, Wish(), "cost", None, Effort())
    assert [d.name for d in cheap.machine.devices] == ["slow"]
    quick = best_row(model, machine, Wish(), "latency", None, Effort())
    assert [d.name for d in quick.machine.devices] == ["fast"]
    both = best_row(model, machine, Wish(), "throughput", None, Effort())
    assert len(both.machine.devices) == 2
