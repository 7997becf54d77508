"""Which weights are brought together, which stay, and that slots are used in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfc
from dfc.api import opened
from dfc.compiled import Compiled, with_state_inputs
from dfc.planning.streaming import Hop
from dfc.planning.tiers import Tiers
from dfc.planning.weight_blocks import cut
from dfc.runtime.tiers.clock import HostClock
from dfc.runtime.tiers.places import Processor
from dfc.runtime.tiers.streamed import Streamed
from dfc.runtime.tiers.within import Wanted, first_plan, within
from tests.tiny_models import tokens
from tests.tower import ids, memory_of
from tests.upper_tier import InProcess

pytestmark = pytest.mark.usefixtures("no_weights_thread_is_left")


def test_what_is_tied_is_brought_to_each_of_its_readers(tower: Path) -> None:
    compiled = opened(tower, build=False)
    graph = with_state_inputs(compiled.graph)
    parts = cut(graph)
    blocks = parts.blocks
    readers = [b for b in blocks if any(p.name == "table.weight" for p in b.weights)]
    assert len(readers) == 2 and all(len(b.weights) == 1 for b in readers)
    plan = first_plan(parts, Wanted(1 << 30), Processor(), {"B": 4})
    chosen = tuple(i for i, b in enumerate(blocks) if b in readers)
    some = Tiers(plan.layers, plan.weights, chosen, Hop(1e-9, slots=1), 1 << 30, plan.fixed)
    inputs = [*compiled.probes[0].inputs, *compiled.state.values()]
    runner = Streamed(parts, some, Processor())
    try:
        assert some.bytes_per_pass == 2 * 64 * 96 * 4
        expected = dfc.load(tower).run_flat(compiled.probes[0].inputs)
        for _ in range(3):
            assert torch.equal(runner(inputs)[0], expected[0])
    finally:
        runner.close()


def test_every_node_and_weight_is_in_one_place(llama: Path) -> None:
    graph = opened(llama, build=False).graph
    _, blocks, stay, _ = cut(graph)
    assert [n for b in blocks for n in b.nodes] == list(graph.nodes)
    inside = {p for b in blocks for p in b.weights}
    assert not inside & set(stay)
    assert {p for p in graph.parameters.values() if p.use_count} == inside | set(stay)
    order = {n: i for i, n in enumerate(graph.nodes)}
    edges = [order[n] for b in blocks if b.first and b.last for n in (b.first, b.last)]
    assert edges == sorted(edges)  # no two are needed at once


def test_a_table_with_most_of_the_bytes_makes_no_block_of_all_the_layers() -> None:
    layers = [m for _ in range(8) for m in (nn.Linear(256, 256), nn.ReLU())]
    model = nn.Sequential(nn.Embedding(4000, 256), *layers).eval()
    sizes = sorted(b.bytes for b in cut(dfc.trace(model, (ids(2),))).blocks)
    assert sizes[-1] == 4000 * 256 * 4 and sizes[-2] <= 2 * 256 * 256 * 4 and len(sizes) >= 5


def test_a_weight_that_is_handed_out_stays() -> None:
    class Shows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.b(self.a(x)), self.a.weight.t()

    graph = dfc.trace(Shows().eval(), (torch.randn(2, 64),))
    inside = [p.name for b in cut(graph).blocks for p in b.weights]
    assert inside == ["b.weight"]


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("placement", ["even", "tail"])
def test_slots_are_used_in_turn_and_read_before_they_are_left(
    held: Compiled, slots: int, placement: str
) -> None:
    """With a model in memory and a carrier as a device's, in any number of slots."""
    whole, x = held, tokens()
    wanted = Wanted(memory_of(whole, 0.5, [x]), slots, placement)
    runner = within(whole.graph, wanted, inputs=[x], place=InProcess())
    carrier: Any = runner.carrier
    assert runner.plan.slots == slots
    expected = whole.run_flat([x])
    for _ in range(3):
        assert torch.equal(runner([x])[0], expected[0])
    filled = [load for what, load in carrier.log if what == "fill"]
    count = len(runner.plan.streamed)
    assert filled == [q % count for q in range(3 * count + slots)]
    runner.close()


def test_a_pass_that_failed_is_no_harm_to_the_next(held: Compiled) -> None:
    whole, x = held, tokens()
    wanted = Wanted(memory_of(whole, 0.5, [x]))
    runner = within(whole.graph, wanted, inputs=[x], place=InProcess())
    runner([x])
    with pytest.raises(RuntimeError):
        runner([x[:, :7]])  # sizes are fixed: an operator refuses in the middle
    assert torch.equal(runner([x])[0], whole.run_flat([x])[0])


def test_blocks_are_timed_in_order(tower: Path) -> None:
    compiled = opened(tower, build=False)
    graph = with_state_inputs(compiled.graph)
    parts = cut(graph)
    inputs = [*compiled.probes[0].inputs, *compiled.state.values()]
    plan = first_plan(parts, Wanted(1 << 30), Processor(), {"B": 4})
    clock = HostClock()
    runner = Streamed(parts, plan, Processor(), clock)
    runner(inputs)
    runner.close()
    assert len(clock.seconds()) == 2 * len(parts.blocks) - 1
