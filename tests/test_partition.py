"""Partitions against brute force, against each other, and by what must not change them."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest

from dfc.errors import DfcError
from dfc.planning.cuts import cut_chain, is_chain
from dfc.planning.ideals import all_ideals, best_chain, prefixes
from dfc.planning.orders import promising_orders
from dfc.planning.partition import Effort, partition
from dfc.planning.problem import INFINITE, Problem, Slot, Tensor, loads, why_not
from tests.planning_problems import SHAPES, agree, brute_force, made, solvers_find_the_best


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "+".join(s) or "plain")
@pytest.mark.parametrize("seed", range(6))
def test_ideals_and_milp_find_what_brute_force_finds(shape: dict[str, Any], seed: int) -> None:
    rng = random.Random(seed)
    problem = made(rng, rng.randint(3, 7), rng.randint(2, 3), **shape)
    solvers_find_the_best(problem)


@pytest.mark.parametrize("seed", range(12))
def test_a_chain_is_cut_as_well_as_can_be(seed: int) -> None:
    rng = random.Random(seed)
    shape = SHAPES[seed % 5]
    problem = made(rng, rng.randint(2, 8), rng.randint(1, 3), chain=True, **shape)
    assert is_chain(problem)
    agree(problem, cut_chain(problem), brute_force(problem))


@pytest.mark.parametrize("seed", range(4))
def test_a_long_chain_agrees_with_the_ideals_of_its_order(seed: int) -> None:
    rng = random.Random(seed)
    problem = made(rng, 60, 8, chain=True, links=True)
    exact = best_chain(problem, prefixes([range(60)]), complete=True)
    agree(problem, cut_chain(problem), exact)


def test_orders_are_topological_and_cutting_them_is_allowed() -> None:
    problem = made(random.Random(5), 24, 3, links=True)
    orders = promising_orders(problem)
    assert len(orders) > 2
    for order in orders:
        at = {v: i for i, v in enumerate(order)}
        assert all(at[u] < at[v] for u, v in problem.edges) and len(at) == problem.n
    found = best_chain(problem, prefixes(orders), complete=False)
    assert found is not None and why_not(problem, found.stage) is None


@pytest.mark.parametrize("seed", range(4))
def test_what_must_not_matter_does_not(seed: int) -> None:
    rng = random.Random(seed)
    problem = made(rng, 8, 3, links=True)
    best = partition(problem).value
    scaled = replace(problem, time=problem.time * 4, tensors=tuple(
        replace(t, bytes=t.bytes * 4) for t in problem.tensors))  # fmt: skip
    assert partition(scaled).value == pytest.approx(4 * best)
    more = problem.with_stages([*problem.slots, Slot()])
    assert partition(more).value <= best + 1e-9
    faster = problem.with_stages([replace(s, receive=s.receive * 2) for s in problem.slots])
    assert partition(faster).value <= best + 1e-9
    pinned = replace(problem, pins={0: 0, problem.n - 1: 2})
    assert partition(pinned).value >= best - 1e-9


def residual(rng: random.Random, n: int) -> Problem:
    """A residual network: every third node's input is added four nodes on."""
    tensors = []
    for u in range(n - 1):
        readers = {u + 1} | ({u + 4} if u % 3 == 0 and u + 4 < n else set())
        tensors.append(Tensor(u, rng.uniform(1, 4), tuple(sorted(readers))))
    time = np.array([[rng.uniform(1, 9)] for _ in range(n)])
    weights = np.array([rng.uniform(0, 5) for _ in range(n)])
    cap = 1.25 * weights.sum() / 8
    slots = tuple(Slot(memory=cap, receive=10.0, send=10.0) for _ in range(8))
    return Problem(time, tuple(tensors), slots, weights, np.zeros(n))


def test_a_residual_network_of_200_nodes_is_within_one_per_cent() -> None:
    found = partition(residual(random.Random(0), 200))
    assert found.gap <= 0.01 and found.method in ("ideals", "orders")


def test_wide_branches_say_how_far_they_may_be_from_the_best() -> None:
    rng = random.Random(1)
    n, tensors = 42, []
    for branch in range(4):
        nodes = [0, *range(1 + branch * 10, 11 + branch * 10), n - 1]
        tensors += [Tensor(u, 1.0, (v,)) for u, v in pairwise(nodes) if u]
    tensors.append(Tensor(0, 1.0, (1, 11, 21, 31)))
    time = np.array([[rng.uniform(1, 9)] for _ in range(n)])
    slots = tuple(Slot(receive=10.0, send=10.0) for _ in range(4))
    problem = Problem(time, tuple(tensors), slots, np.ones(n), np.zeros(n))
    found = partition(problem, Effort(seconds=3.0, gap=0.05))
    assert why_not(problem, found.stage) is None and 0 <= found.gap <= 0.25
    assert found.value >= found.bound > 0


def test_it_is_never_worse_than_splits_by_count_or_by_weight() -> None:
    rng = random.Random(2)
    for seed in range(6):
        problem = residual(rng, 30 + seed)
        roomy = problem.with_stages([replace(s, memory=INFINITE) for s in problem.slots])
        best = partition(roomy).value
        for by in (np.ones(problem.n), problem.weights, problem.time[:, 0]):
            share = np.minimum((np.cumsum(by) - by) / by.sum() * 8, 7).astype(int)
            assert best <= loads(roomy, tuple(share.tolist())).bottleneck + 1e-9


def test_what_does_not_fit_says_by_how_much() -> None:
    problem = made(random.Random(3), 6, 2)
    tight = problem.with_stages([replace(s, memory=1.0) for s in problem.slots])
    with pytest.raises(DfcError, match=r"N060.*needs .* bytes, the devices have 2") as e:
        partition(tight)
    assert e.value.status == 6


def test_a_problem_that_is_none_is_refused() -> None:
    problem = made(random.Random(4), 4, 2)
    with pytest.raises(DfcError, match="N031"):
        partition(replace(problem, pins={0: 5}))
    with pytest.raises(DfcError, match="N030"):
        partition(replace(problem, tensors=(Tensor(2, 1.0, (1,)),)))


@pytest.mark.parametrize("seed", range(6))
def test_what_crosses_cuts_is_that_of_each_pair(seed: int) -> None:
    """Of one order it comes from rectangles, of all ideals from a product of matrices."""
    from dfc.planning import ideals

    problem = made(random.Random(seed), 9, 3, links=True)
    one, every = prefixes([range(9)]), all_ideals(problem, 2000)
    assert every is not None and len(every) > len(one)
    for some in (one, every):
        pairs = ideals._Pairs(problem, some)
        assert pairs.in_line == (some is one)
        for (j, before), (i, within) in product(enumerate(some), enumerate(some)):
            if before & ~within:
                continue
            come, gone = crossing(problem, before, within)
            found = pairs._received[j, i], pairs._waits[j, i], pairs._sent[j, i]
            assert found == (sum(come), bool(come), sum(gone))


def crossing(problem: Problem, before: int, within: int) -> tuple[list[float], list[float]]:
    """The sizes of what a stage of the nodes of one mask but not another receives, and sends."""
    mine, come, gone = within & ~before, [], []
    for t in problem.tensors:
        if before >> t.producer & 1 and any(mine >> v & 1 for v in t.readers):
            come.append(t.bytes)
        if mine >> t.producer & 1 and not all(within >> v & 1 for v in t.readers):
            gone.append(t.bytes)
    return come, gone


@pytest.mark.parametrize("seed", range(8))
def test_loads_are_what_nodes_and_tensors_add_up_to(seed: int) -> None:
    """Of stages that are devices, and of devices with several stages."""
    rng = random.Random(seed)
    at = (0, 1, 0, 1) if seed % 2 else (0, 1, 2, 3)
    problem = made(rng, 12, 4, links=True, memory=True, takes=True, wishes=True, devices=at)
    slots = [replace(slot, latency=float(rng.randint(0, 2))) for slot in problem.slots]
    problem = replace(problem, slots=tuple(slots))
    stage = sorted(rng.randrange(4) for _ in range(12))
    found = loads(problem, stage)
    for s, slot in enumerate(slots):
        mine = [v for v in range(12) if stage[v] == s]
        assert found.compute[s] == sum(problem.time[v][slot.kind] for v in mine)
        made_here = [t for t in problem.tensors if t.producer in mine]
        away = [t for t in made_here if any(at[stage[v]] != at[s] for v in t.readers)]
        read = [t for t in problem.tensors if any(v in mine for v in t.readers)]
        come = [t for t in read if at[stage[t.producer]] != at[s]]
        assert found.send[s] == sum(t.bytes for t in away) / slot.send
        assert found.receive[s] == sum(t.bytes for t in come) / slot.receive
        assert found.wait[s] == (slot.latency if come else 0.0)
    for d in set(at):
        held = sum(problem.held(slots[s])[v] for v, s in enumerate(stage) if at[s] == d)
        taken = sum(
            slots[s].taken * t.bytes for t in problem.tensors
            for s in {stage[v] for v in t.readers} - {stage[t.producer]} if at[s] == d
        )  # fmt: skip
        tied = sum(size for size, vs in problem.tied if any(at[stage[v]] == d for v in vs))
        assert found.memory[d] == held + taken + tied


def test_thousands_of_nodes_that_are_no_chain() -> None:
    found = partition(residual(random.Random(7), 2600), Effort(seconds=1.0, gap=0.2))
    assert found.gap <= 0.05


def test_chains_beside_each_other_are_no_chain() -> None:
    """Nothing says which comes first, so that cuts in one order are not all there are."""
    time = np.array([[1.0], [1.0], [2.0], [2.0]])
    tensors = (Tensor(0, 1.0, (1,)), Tensor(2, 1.0, (3,)))
    problem = Problem(time, tensors, (Slot(), Slot()), np.ones(4), np.zeros(4))
    found, best = partition(problem), brute_force(problem)
    assert best is not None and found.value == best.value == 3.0
