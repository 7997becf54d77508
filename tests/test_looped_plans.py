"""Plans with several stages a device: partitions, schedules, files, runs and training."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dfc
from dfc.cli import main
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.planning import planfile
from dfc.planning.layouts import Layout
from dfc.planning.machine import Device, Machine, Wire
from dfc.planning.model import Limits, Wish, modelled
from dfc.planning.partition import Effort, partition
from dfc.planning.pipeline import Plan, plan, stage_of
from dfc.planning.problem import Objective, value_of, why_not
from dfc.planning.simulate import peaks
from dfc.runtime.pipeline.training import Trainer
from tests.planning_problems import SHAPES, agree, brute_force, made
from tests.training_models import adamw, captured, close, reference

LOOPS, V = (0, 1, 0, 1), (0, 1, 1, 0)
FREE = Wire()


@pytest.mark.parametrize("devices", [LOOPS, V], ids=["loops", "V"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_partitions_are_those_of_brute_force(
    devices: tuple[int, ...], shape: dict[str, Any]
) -> None:
    for seed in range(2):
        rng = random.Random(f"{shape} {seed}")
        problem = made(rng, 6, 4, devices=devices, **shape)
        best = brute_force(problem)
        try:
            found = partition(problem, Effort(gap=0.0))
        except DfcError as e:
            assert e.code == "N060"
            found = None
        agree(problem, found, best)
        if found is not None and best is not None:
            assert found.bound <= best.value * (1 + 1e-6)


@pytest.mark.parametrize("objective", ["memory", "latency"])
def test_other_objectives_too(objective: Objective) -> None:
    problem = made(random.Random(5), 6, 4, devices=V, memory=True, links=True)
    problem = replace(problem, objective=objective)
    agree(problem, partition(problem, Effort(gap=0.0)), brute_force(problem))


def test_what_devices_do_and_hold_adds_up_and_stays_within_one_device() -> None:
    """A tensor that is read on its own device does not travel; a shared table is held once."""
    problem = made(random.Random(1), 4, 4, chain=True, links=True, devices=V)
    time, stage = problem.time[:, 0], (0, 1, 2, 3)
    alone = value_of(replace(problem, objective="memory"), stage)
    tied = replace(problem, objective="memory", tied=((100.0, (0, 3)),))
    assert value_of(tied, stage) == max(
        problem.weights[[0, 3]].sum() + problem.activations[[0, 3]].sum() + 100,
        problem.weights[[1, 2]].sum() + problem.activations[[1, 2]].sum(),
    )  # fmt: skip
    assert value_of(tied, stage) > alone
    quick = replace(problem, tensors=problem.tensors[1:2])  # from stage 1 to 2: no link at all
    assert value_of(quick, stage) == max(time[[0, 3]].sum(), time[[1, 2]].sum())


class Layers(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@cache
def layers(count: int) -> Graph:
    batch = torch.export.Dim("B", min=1, max=64)
    shapes = ({0: batch},)
    return dfc.trace(Layers(count).eval(), (torch.zeros(4, 8),), dynamic_shapes=shapes)


def machine(n: int, *, memory: float = 1e9, wire: Wire = FREE, line: bool = False) -> Machine:
    one = Device("a", "cpu", memory, 1e9, {"f32": 1e9})
    devices = tuple(replace(one, name=f"gpu{i}") for i in range(n))
    near = [(i, j) for i in range(n) for j in range(n) if i != j and (not line or abs(i - j) == 1)]
    return Machine("test", devices, dict.fromkeys(near, wire))


def of_layers(p: int, m: int, schedule: str, **options: Any) -> Plan:
    """A plan of 16 layers, whose F, I and W take a second each."""
    wish = Wish(microbatches=m, trains=True)
    return plan(layers(16), machine(p), wish=wish, schedule=schedule,
                measured=lambda node: 1.0, **options)  # fmt: skip


@pytest.mark.parametrize(("p", "m", "v"), [(2, 4, 2), (2, 6, 4), (4, 8, 2), (4, 4, 4)])
def test_the_bubbles_are_those_of_the_papers(p: int, m: int, v: int) -> None:
    f = i = w = 16 / p  # of a whole rank
    looped = (p - 1) * (f + i + w) / v
    zero = (p - 1) * max(f, i, f + i - w) / v
    for name, bubble in (("interleaved", looped), ("breadth_first", looped),
                         ("interleaved_zb", zero)):  # fmt: skip
        found = of_layers(p, m, name, stages_per_device=v)
        assert found.program.placement == Layout(v).placement(p)
        assert [s.seconds for s in found.stages] == [3 * 16 / (p * v)] * (p * v)
        assert found.simulation.sync_bubble == pytest.approx(bubble)
        assert found.partition.gap == pytest.approx(0)


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8)])
def test_a_v_has_half_the_bubble_of_its_first_rank(p: int, m: int) -> None:
    found = of_layers(p, m, "zb_v")
    assert found.program.placement == Layout(2, turns=True).placement(p)
    assert found.simulation.sync_bubble == pytest.approx((p - 1) * (16 / p) / 2)
    assert found.simulation.span_bubble == pytest.approx(0)
    assert of_layers(p, m, "dualpipe_v").program.placement == found.program.placement


def test_inference_in_loops_fills_in_half_the_time() -> None:
    graph, one = layers(8), Wish(microbatches=4)
    alone = plan(graph, machine(2), wish=one, measured=lambda node: 1.0)
    looped = plan(graph, machine(2), wish=one, measured=lambda node: 1.0, stages_per_device=2)
    assert (alone.step_seconds, looped.step_seconds) == (4 * 4 + 4, 4 * 4 + 2)
    assert len(alone.stages) == 2 and len(looped.stages) == 4  # it is not chosen unasked


def test_auto_is_never_worse_than_one_stage_a_device() -> None:
    several = 0
    for seed in range(8):
        rng = random.Random(seed)
        graph, p, m = layers(rng.choice([6, 12])), rng.choice([2, 3]), rng.choice([3, 4, 8])
        slow = Wire(rng.choice([1e3, 1e6]), rng.choice([0.0, 1.0]))
        times = {n: float(rng.randint(1, 3)) for n in graph.nodes}
        wish = Wish(microbatches=m, trains=True)
        found = plan(graph, machine(p, wire=slow), wish=wish, measured=times.get)
        one = plan(graph, machine(p, wire=slow), wish=wish, measured=times.get, stages_per_device=1)
        assert found.step_seconds <= one.step_seconds * (1 + 1e-9)
        several += len(found.stages) > len(one.stages)
    assert 0 < several < 8


@pytest.mark.parametrize("schedule", ["interleaved", "breadth_first", "zb_v", "gpipe", "auto"])
def test_memory_is_that_of_all_stages_of_a_device(schedule: str) -> None:
    graph, wish = layers(12), Wish(microbatches=4, trains=True)
    roomy = plan(graph, machine(2), wish=wish, schedule=schedule, measured=lambda node: 1.0)
    need = max(s.memory for s in roomy.stages)
    tight = machine(2, memory=need * 1.02 / 0.9)
    found = plan(graph, tight, wish=wish, schedule=schedule, measured=lambda node: 1.0)
    assert found.peak <= tight.devices[0].usable
    assert found.modelled is not None
    live = found.modelled.live
    assert max(peaks(found.program, found.costs)) + live == pytest.approx(found.peak)
    with pytest.raises(DfcError, match=r"N060.*does not fit") as e:
        plan(graph, machine(2, memory=need * 0.5), wish=wish, schedule=schedule)
    assert e.value.status == 6


def test_links_that_go_around_are_priced_and_pins_name_devices() -> None:
    """Of a line of devices the way from the last to the first is through those between."""
    graph, wire = layers(12), Wire(1e9, 1e-3)
    wish = Wish(microbatches=4, trains=True)
    options: dict[str, Any] = {"wish": wish, "schedule": "interleaved", "stages_per_device": 2}
    found = plan(graph, machine(3, wire=wire, line=True), **options)
    around = [x for x in found.links if x[:2] == ("gpu2", "gpu0")]
    assert around and 2 * around[0][2] == found.links[0][2]  # once a microbatch, and not twice
    assert found.costs.link_of(2, 0).latency == pytest.approx(2e-3)
    last = list(graph.nodes)[-1]
    assert stage_of(found)[last] == 5 and found.devices[5].name == "gpu2"
    pinned = plan(graph, machine(3, wire=wire, line=True), limits=Limits({last: "gpu0"}), **options)
    assert pinned.devices[stage_of(pinned)[last]].name == "gpu0"
    assert pinned.modelled is not None
    problem = pinned.modelled.problem
    of_node = stage_of(pinned)
    assert why_not(problem, [of_node[g[0]] for g in pinned.modelled.groups]) is None


def test_numbers_that_schedules_do_not_have_are_told() -> None:
    graph, wish = layers(6), Wish(microbatches=4, trains=True)
    for options, message in (
        ({"schedule": "zb_v", "stages_per_device": 3}, r"N066.*`zb_v` has 2 stages.*, not 3"),
        ({"schedule": "1f1b", "stages_per_device": 2}, r"N066.*has 1 stage a device.*\n.*zb_v"),
        ({"schedule": "interleaved_1f1b"}, r"N001.*\n.*did you mean `interleaved`"),
        ({"schedule": "forward"}, r"N067.*has no backward pass"),
        ({"schedule": "interleaved", "stages_per_device": 4}, r"N068.*6 parts for 8 stages"),
        ({"stages_per_device": 0}, r"N066.*at least one stage"),
        ({"stages_per_device": 4, "max_stages": 2}, r"N066.*more than the 2"),
        ({"schedule": "dualpipe_v", "wish": replace(wish, microbatches=3)}, r"N002.*4 microb"),
    ):  # fmt: skip
        with pytest.raises(DfcError, match=message):
            plan(graph, machine(2), **{"wish": wish, **options})  # type: ignore[arg-type]
    with pytest.raises(
        DfcError, match=r"N067.*has a backward pass(.|\n)*`--train`; else there is forward"
    ):
        plan(graph, machine(2), schedule="zb_v")
    assert len(plan(graph, machine(2), wish=wish, max_stages=2).stages) == 2


TARGET = """
target pair {
  device gpu0 : cpu(mem=1GB, peak=1TFLOPS, bw=100GB/s)
  device gpu1 : cpu(mem=1GB, peak=1TFLOPS, bw=100GB/s)
  link gpu0 <-> gpu1 : nvlink(bw=50GB/s, latency=1us)
}
"""


def staged(steps: str) -> str:
    return f"dfc 1\n{TARGET}\nrecipe staged for pair {{\n  {steps}\n}}\n"


@pytest.mark.parametrize("schedule", ["interleaved", "zb_v"])
def test_a_package_holds_the_plan_and_it_runs(
    schedule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = (
        f"partition on gpu0, gpu1 with train=true, schedule={schedule}, stages_per_device=2, "
        "microbatches=4"
    )
    batch = torch.export.Dim("B", min=1, max=64)
    model, args = Layers(8).eval(), (torch.linspace(-1, 1, 64).reshape(8, 8),)
    compiled = dfc.compile(model, args, dynamic_shapes=({0: batch},), recipe=staged(steps),
                           engine="eager")  # fmt: skip
    found = compiled.plan
    assert found is not None and len(found.stages) == 4
    assert found.device_stages == {
        "interleaved": {"gpu0": [0, 2], "gpu1": [1, 3]}, "zb_v": {"gpu0": [0, 3], "gpu1": [1, 2]},
    }[schedule]  # fmt: skip
    compiled.save(tmp_path / "m.dfcpkg")
    again = dfc.load(tmp_path / "m.dfcpkg").plan
    assert again is not None and planfile.to_text(again) == planfile.to_text(found)
    assert again.program == found.program and again.wish == found.wish
    data = json.loads(planfile.to_text(found))
    data["program"]["placement"] = [1, 0, 1, 0]
    with pytest.raises(DfcError, match=r"D063|N011"):
        planfile.of_text(json.dumps(data), again.graph)
    for s in data["stages"]:
        s["device"] = "gpu0"
    data["program"]["placement"] = list(found.program.placement)
    with pytest.raises(DfcError, match=r"D063.*other devices"):
        planfile.of_text(json.dumps(data), again.graph)
    package = str(tmp_path / "m.dfcpkg")
    assert main(["run", package, "--random", "--size", "B=8", "--pipeline", "plan", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["pipeline"]
    assert [s["rank"] for s in told["stages"]] == list(found.program.placement)
    assert main(["show", package, "--plan"]) == 0
    assert "gpu1 has stages 1, " in capsys.readouterr().out


@pytest.mark.parametrize(("name", "schedule"), [("tied", "zb_v"), ("unet", "interleaved")])
def test_a_planned_step_is_that_of_one_process(name: str, schedule: str) -> None:
    model, args = captured(name)
    graph = dfc.trace(model, args, dynamic_shapes=tuple({0: torch.export.Dim("B", min=1, max=64)}
                                                        for _ in args))  # fmt: skip
    found = plan(graph, machine(2, wire=Wire(1e12, 0.0)), schedule=schedule, stages_per_device=2,
                 wish=Wish(microbatches=4, trains=True))  # fmt: skip
    assert len(found.stages) == 4
    loss, expected = reference(model, args, 4)
    with Trainer(graph, found, optimizer=adamw, threads=1) as trainer:
        torch.testing.assert_close(trainer.backward(*args), loss)
        close({n: p.grad for n, p in trainer.parameters.items()}, expected)
        assert trainer.report().program == found.program
    other = plan(graph, machine(2))
    with pytest.raises(DfcError, match=r"N073.*no backward"):
        Trainer(graph, other, optimizer=adamw)
    with pytest.raises(DfcError, match=r"N073.*another graph"):
        Trainer(layers(2), found, optimizer=adamw)


def test_the_command_says_and_draws_which_stages_a_device_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\nfrom tests.test_looped_plans import Layers\n\n\n"
        "def build():\n    return Layers(8), (torch.zeros(4, 8),)\n"
    )
    (tmp_path / "pair.dfc").write_text(f"dfc 1\n{TARGET}")
    options = [
        "plan", f"{tmp_path}/net.py:build", "-t", f"{tmp_path}/pair.dfc", "--train", "--schedule",
        "interleaved", "--stages-per-device", "2",
    ]  # fmt: skip
    assert main([*options, "--svg", str(tmp_path / "t.svg")]) == 0
    said = capsys.readouterr().out
    assert "gpu0 has stages 0, 2; gpu1 has stages 1, 3" in said and "interleaved" in said
    picture = (tmp_path / "t.svg").read_text()
    assert "gpu0 (0, 2)" in picture and "gpu0 → gpu1" in picture
    assert picture.count('fill-opacity="0.7"') > 0, "the second stages of devices are lighter"
    assert main([*options, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["devices"] == {"gpu0": [0, 2], "gpu1": [1, 3]}
    assert main([*options[:-1], "0"]) == 2
    assert modelled(layers(2), machine(2), {"B": 4}).problem.devices == ()
