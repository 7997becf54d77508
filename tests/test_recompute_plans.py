"""Recomputation in plans: where a step would not fit, in the way that costs least."""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dfc
from dfc.cli.plan import show_plan
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.planning.actions import FULL, SELECTIVE
from dfc.planning.check import check
from dfc.planning.pipeline import Plan
from dfc.planning.planfile import of_text, to_text
from dfc.planning.recompute_choice import replays
from dfc.runtime.pipeline.training import Trainer
from tests.recomputed import B, Block, Skips, equal
from tests.training_models import adamw


@cache
def decoder() -> Graph:
    """Many activations beside few weights."""
    torch.manual_seed(0)
    args = torch.randint(31, (16, 64)), torch.randint(31, (16, 64))
    return dfc.trace(Skips().train(), args)


def target(memory: str, devices: int = 2) -> str:
    lines = [f"  device d{i} : cuda(mem={memory}, peak=1GFLOPS, bw=1GB/s)" for i in range(devices)]
    links = [f"  link d{i} <-> d{i + 1} : nvlink(bw=1GB/s)" for i in range(devices - 1)]
    return "\n".join(("dfc 1", "", "target some {", *lines, *links, "}", ""))


def planned(memory: str, recompute: str, schedule: str = "1f1b", m: int = 8) -> Plan:
    return dfc.plan(decoder(), target(memory), train=True, recompute=recompute, schedule=schedule,
                    microbatches=m)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tight"), [("1f1b", "1.5MB"), ("gpipe", "4MB"), ("auto", "1.5MB")]
)
def test_a_plan_recomputes_where_it_would_not_fit(name: str, tight: str) -> None:
    roomy = planned("1GB", "never", name)
    assert not roomy.program.recomputes
    assert planned("1GB", "auto", name).program == roomy.program  # it would only cost time
    always = planned("1GB", "always", name)
    assert always.program.recomputes == set(range(len(always.stages)))
    assert always.step_seconds > roomy.step_seconds
    with pytest.raises(DfcError, match="recompute auto") as e:
        planned(tight, "never", name)
    assert e.value.status == 6
    found = planned(tight, "auto", name)
    assert found.program.recomputes
    rooms = [0.9 * s.capacity for s in found.stages]
    assert all(s.memory <= r * (1 + 1e-9) for s, r in zip(found.stages, rooms, strict=True))
    check(found.program, found.costs)
    told = replays(found.program, found.costs)
    assert {r.stage for r in told} == found.program.recomputes
    assert any(r.saves > 0 for r in told) and all(r.costs >= 0 for r in told)


def test_less_memory_never_makes_a_plan_faster() -> None:
    times: list[float] = []
    for memory in (1.5, 2.5, 3.5, 4, 6, 8, 10, 14, 1000):
        try:
            times.append(planned(f"{memory}MB", "auto", "gpipe").step_seconds)
        except DfcError as e:
            assert e.status == 6 and not times
    assert len(times) > 3 and all(a >= b * 0.99 for a, b in pairwise(times))
    assert times[0] > 1.05 * times[-1]


@pytest.mark.parametrize(("recompute", "way"), [("always", FULL), ("selective", SELECTIVE)])
def test_a_plan_that_recomputes_is_read_back_and_trains_so(recompute: str, way: str) -> None:
    graph = decoder()
    plan = planned("1GB", recompute)
    text = to_text(plan)
    copy = graph.copy()
    for node, s in zip(copy.nodes, plan.partition.stage, strict=True):
        copy.set_stage(node, s)
    read = of_text(text, copy)
    assert (read.program, read.costs) == (plan.program, plan.costs)
    assert to_text(read) == text
    with Trainer(graph, plan, optimizer=adamw) as trainer:
        assert trainer.programs.first.ways == {0: way, 1: way}
        assert all(t.recomputes == way for t in trainer.trained)


def test_ways_that_there_are_not_are_refused() -> None:
    with pytest.raises(DfcError, match="no way to recompute"):
        planned("1GB", "sometimes")
    with pytest.raises(DfcError, match="backward pass"):
        dfc.plan(decoder(), target("1GB"), recompute="auto")


class Attends(nn.Module):
    """Layers of a small transformer, with its loss."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.table, self.heads = nn.Embedding(31, width), heads
        self.layers = nn.ModuleList(
            nn.ModuleDict({"a": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width),
                           "out": nn.Linear(width, width), "mlp": Block(width)})
            for _ in range(4)
        )  # fmt: skip

    def forward(self, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.layers:
            b, t, w = x.shape
            parts = layer["qkv"](layer["a"](x)).chunk(3, -1)  # type: ignore[index]
            q, k, v = (p.view(b, t, self.heads, -1).transpose(1, 2) for p in parts)
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + F.dropout(layer["out"](seen.transpose(1, 2).reshape(b, t, w)), 0.1)  # type: ignore[index]
            x = layer["mlp"](x)  # type: ignore[index]
        return F.cross_entropy((x @ self.table.weight.T).flatten(0, 1), y.flatten())


@cache
def attending() -> tuple[Graph, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    args = torch.randint(31, (16, 64)), torch.randint(31, (16, 64))
    return dfc.trace(Attends().train(), args, dynamic_shapes=({0: B}, {0: B})), args


def attending_plan(recompute: str, memory: str = "1GB") -> Plan:
    return dfc.plan(attending()[0], target(memory), train=True, recompute=recompute,
                    schedule="gpipe", microbatches=4, sizes={"B": 4})  # fmt: skip


def test_a_plan_knows_what_a_trainer_keeps_in_each_way() -> None:
    graph, args = attending()
    losses = []
    for way, expected in (("never", {}), ("always", {0: FULL, 1: FULL}),
                          ("selective", {0: SELECTIVE, 1: SELECTIVE})):  # fmt: skip
        plan = attending_plan(way)
        assert plan.program.ways == expected
        with Trainer(graph, plan, optimizer=adamw, threads=1) as trainer:
            losses.append(trainer.step(*args))
            report = trainer.report()
        c, taken = plan.costs, plan.costs.taken
        for s in range(2):
            saved, kept = report.saved_bytes[s], report.taken_bytes[s]
            if way == "selective":
                assert c.kept[s] == pytest.approx(kept, rel=0.01)
                assert c.remade[s] == pytest.approx(saved, rel=0.01)
                assert c.kept[s] + c.remade[s] == pytest.approx(c.activations[s], rel=0.01)
                continue
            assert taken[s] == kept
            # what comes from another stage counts where it is read
            assert saved * 0.99 <= c.activations[s] <= (saved + kept) * 1.01
    equal(losses[:1] * 2, losses[1:])


def test_the_way_of_each_stage_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(attending_plan("selective"))
    told = capsys.readouterr().out
    assert "stage 0 recomputes selectively: saves 1.7 MB, costs no time" in told
    assert re.search(r"stage 1 recomputes selectively: saves 1\.\d MB, costs .* a step", told)
    show_plan(attending_plan("always"))
    assert "stage 1 recomputes: saves 3." in capsys.readouterr().out
    show_plan(planned("1GB", "always"))
    assert re.search(r"stage 1 recomputes: takes \S+ [kM]?B more,", capsys.readouterr().out)


def test_no_plan_is_better_of_those_that_always_recompute() -> None:
    """Its bound counts the second forward, as its value does."""
    for name in ("1f1b", "interleaved"):
        never, always = planned("1GB", "never", name), planned("1GB", "always", name)
        assert always.partition.bound > never.partition.bound * 1.3
        assert always.partition.gap < never.partition.gap + 0.02
        assert always.bottleneck == pytest.approx(always.partition.value)


def test_a_plan_takes_the_better_way_that_fits() -> None:
    """Keeping all is quickest; then cheap operators alone, then whole forwards."""
    found = {}
    for memory in ("8MB", "6MB", "4.5MB", "3.5MB"):
        plan = attending_plan("auto", memory)
        assert all(s.memory <= 0.9 * s.capacity * (1 + 1e-9) for s in plan.stages)
        found[memory] = set(plan.program.ways.values()), plan.step_seconds
        told = {r.stage: r.way for r in replays(plan.program, plan.costs)}
        assert told == plan.program.ways
    assert [ways for ways, _ in found.values()][:2] == [set(), {SELECTIVE}]
    assert FULL in found["3.5MB"][0]
    assert [t for _, t in found.values()] == sorted(t for _, t in found.values())


class Bulge(nn.Module):
    """Narrow layers with one in the middle whose result is wide, where an even cut would be."""

    def __init__(self) -> None:
        super().__init__()
        widths = [8, 8, 8, 8, 8, 256, 8, 8, 8]
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(widths))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


@pytest.mark.parametrize("way", ["always", "auto"])
def test_a_cut_is_found_whose_inputs_fit(way: str) -> None:
    """An even cut has a stage take what is wide, eight times; beside it there is room."""
    graph = dfc.trace(Bulge(), (torch.zeros(64, 8),))

    def planned(memory: str, objective: str = "time") -> Plan:
        return dfc.plan(graph, target(memory), train=True, recompute=way, schedule="gpipe",
                        microbatches=8, measured=lambda node: 1.0, objective=objective)  # fmt: skip

    roomy, tight = planned("1GB"), planned("400KB")
    assert tight.peak <= 0.9 * 400e3
    assert tight.modelled is not None
    check(tight.program, tight.costs, [0.9 * 400e3 - tight.modelled.live] * 2)
    wide, narrow = (max(plan.costs.taken) for plan in (roomy, tight))
    assert wide == 64 * 256 * 4 and narrow == 64 * 8 * 4
    if way == "always":
        assert roomy.peak > 0.9 * 400e3, "the even cut does not fit"
        assert planned("1GB", "memory").peak <= tight.peak
    with pytest.raises(DfcError, match=r"N06[02]") as e:
        planned("150KB")
    assert e.value.status == 6
