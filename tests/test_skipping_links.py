"""Links between stages that are no neighbours: what skips stages is priced where it travels."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import dfc
from dfc.ir.graph import Graph
from dfc.planning.machine import Device, Machine, Wire
from dfc.planning.model import Wish
from dfc.planning.partition import partition
from dfc.planning.pipeline import Plan, plan
from dfc.planning.problem import Objective, loads, value_of
from dfc.planning.schedules import schedule
from dfc.planning.simulate import simulate
from tests.planning_problems import brute_force, made

FAST, SLOW = Wire(1e12, 1e-7), Wire(2e7, 1e-6)
GPU = Device("a", "cuda", 1e10, 1e12, {"f32": 1e10}, 1e-7)


class Skips(nn.Module):
    """Layers of one size, the first of which the last one reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        first = y = self.layers[0](x).exp()
        for layer in list(self.layers)[1:]:
            y = layer(y).exp()
        return y + first


@pytest.fixture(scope="module")
def skips() -> Graph:
    return dfc.trace(Skips().eval(), (torch.zeros(32, 64),))


def three(between_ends: Wire) -> Machine:
    near = {(i, j): FAST for i in range(3) for j in range(3) if abs(i - j) == 1}
    devices = tuple(replace(GPU, name=name) for name in "abc")
    return Machine("three", devices, near | {(0, 2): between_ends, (2, 0): between_ends})


def each(found: Plan, trains: bool = False) -> float:
    """Seconds between two microbatches, once the pipeline is full, by the simulator."""
    ranks = len(found.machine.devices)
    name = "1f1b" if trains else "forward"
    short, long = (simulate(schedule(name, ranks, m), found.costs).makespan for m in (50, 100))
    return float(long - short) / 50


def test_a_microbatch_comes_as_often_as_the_link_of_a_skip_allows(skips: Graph) -> None:
    quick, slow = (plan(skips, three(wire)) for wire in (FAST, SLOW))
    assert each(quick) == pytest.approx(quick.bottleneck)
    assert each(slow) == pytest.approx(slow.bottleneck)
    assert slow.bottleneck < 32 * 64 * 4 / SLOW.bandwidth  # nothing skips over it
    assert slow.partition.bound <= quick.bottleneck * (1 + 1e-9)


@pytest.mark.parametrize("objective", ["throughput", "latency"])
def test_partitions_are_worth_what_links_allow_and_bounds_stay_below(
    objective: Objective,
) -> None:
    found_best = 0
    for seed in range(30):
        rng = random.Random(seed)
        problem = replace(made(rng, 6, 3, links=True), objective=objective)
        wires = {(a, b): Wire(rng.choice([0.2, 1.0, 9.0])) for a in range(3) for b in range(3)}
        problem = replace(problem, wire=lambda a, b, w=wires: w[a, b])  # type: ignore[misc]
        best, found = brute_force(problem), partition(problem)
        assert best is not None
        assert found.value == pytest.approx(value_of(problem, found.stage))
        assert found.bound <= best.value * (1 + 1e-9) <= found.value * (1 + 1e-6)
        found_best += found.value <= best.value * (1 + 1e-9)
    assert found_best >= 20


def test_gradients_that_come_back_slowly_count(skips: Graph) -> None:
    machine = three(FAST)
    back = {pair: SLOW if pair[0] > pair[1] else FAST for pair in machine.wires}
    train = Wish(microbatches=4, trains=True)
    found = plan(skips, replace(machine, wires=back), wish=train, schedule="1f1b")
    model = found.modelled
    assert model is not None
    stages = [found.partition.stage[list(skips.nodes).index(g[0])] for g in model.groups]
    load = loads(model.problem, stages)
    assert found.bottleneck == pytest.approx(max(load.busiest.max(), *load.links.values(), 0.0))
    assert each(found, trains=True) >= found.bottleneck * (1 - 1e-9)
