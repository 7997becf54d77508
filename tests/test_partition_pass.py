"""The pass `partition`, the plan that it leaves, `plan.json`, and `dfc.plan`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dfc
from dfc.cli import main
from dfc.errors import DfcError
from dfc.planning import planfile
from dfc.planning.machine import Device, Machine, Wire
from dfc.planning.pipeline import stage_of
from dfc.planning.stages import split

TARGET = """
target trio {
  device gpu0 : cuda(mem=1GB, peak=1TFLOPS, bw=100GB/s)
  device gpu1 : cuda(mem=1GB, peak=1TFLOPS, bw=100GB/s)
  device host : cpu(mem=8GB, peak=20GFLOPS, bw=10GB/s)
  link gpu0 <-> gpu1 : nvlink(bw=50GB/s, latency=1us)
  link gpu1 <-> host : pcie(bw=10GB/s, latency=5us)
}
"""


def recipe(*steps: str, target: str = TARGET) -> str:
    body = "\n".join(f"  {s}" for s in steps)
    return f"dfc 1\n{target}\nrecipe staged for trio {{\n{body}\n}}\n"


class Layers(nn.Module):
    """Residual layers, and one that reads the first layer's result again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
        self.head = nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x = torch.relu(self.layers[0](x))
        for layer in list(self.layers)[1:]:
            x = x + torch.relu(layer(x))
        return self.head(x + first)


ARGS = (torch.linspace(-1, 1, 4 * 64).reshape(4, 64),)
SHAPES = ({0: torch.export.Dim("B", min=1, max=64)},)


@pytest.fixture(scope="module")
def graph() -> dfc.Graph:
    return dfc.trace(Layers().eval(), ARGS, dynamic_shapes=SHAPES)


@pytest.fixture(scope="module")
def compiled() -> dfc.Compiled:
    text = recipe("partition on gpu0, gpu1, host by time with max_stages=2, microbatches=4")
    model = Layers().eval()
    return dfc.compile(model, ARGS, dynamic_shapes=SHAPES, recipe=text, engine="eager")


def test_a_recipe_gives_every_node_a_stage_and_leaves_a_plan(compiled: dfc.Compiled) -> None:
    plan = compiled.plan
    assert plan is not None and [s.device for s in plan.stages] == ["gpu0", "gpu1"]
    assert tuple(n.stage for n in compiled.graph.nodes) == plan.partition.stage
    assert set(plan.partition.stage) == {0, 1} and plan.wish.microbatches == 4
    assert plan.sizes == {"B": 4}  # the example's
    stages = split(compiled.graph, stage_of(plan))
    assert [len(s.graph) for s in stages] == [s.nodes for s in plan.stages]
    assert "2 stages on gpu0, gpu1" in str(compiled.report)
    expected = Layers().eval()(*ARGS)
    assert torch.equal(compiled(*ARGS), expected)


def test_a_recipe_says_how_stages_recompute(tmp_path: Path) -> None:
    text = recipe("partition on gpu0, gpu1 with train=true, microbatches=4, recompute=selective")
    made = dfc.compile(Layers(), ARGS, dynamic_shapes=SHAPES, recipe=text, engine="eager")
    assert made.plan is not None
    assert set(made.plan.program.ways.values()) == {"selective"}
    made.save(tmp_path / "m.dfcpkg")
    assert dfc.load(tmp_path / "m.dfcpkg", engine="eager").plan == made.plan
    wrong = recipe("partition with recompute=auto")
    with pytest.raises(DfcError, match="nothing is kept for a backward pass"):
        dfc.compile(Layers(), ARGS, dynamic_shapes=SHAPES, recipe=wrong, engine="eager")


class Counts(Layers):
    """Layers that count their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x) + self.calls


@pytest.mark.parametrize(
    ("options", "noted"),
    [("max_stages=2", True), ("max_stages=2, train=true", False), ("max_stages=1", False)],
)
def test_stages_that_write_to_buffers_are_noted(options: str, noted: bool) -> None:
    """One stage is the model itself, and training carries its buffers."""
    text = recipe('pin "layers.0" to gpu0', f"partition on gpu0, gpu1 with {options}")
    if "max_stages=2" in options:
        text = text.replace("  partition", '  pin "head" to gpu1\n  partition')
    made = dfc.compile(Counts(), ARGS, dynamic_shapes=SHAPES, recipe=text, engine="eager")
    assert made.plan is not None and (len(made.plan.stages) == 2) == ("=2" in options)
    note = "partition: these stages cannot be run as a pipeline: the model writes to its buffer"
    assert any(n.startswith(f"{note} `calls`") for n in made.report.notes) == noted


def test_the_plan_is_in_the_package_and_read_back_is_the_same(
    compiled: dfc.Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.dfcpkg"
    compiled.save(path)
    manifest = json.loads((path / "manifest.json").read_text())
    assert "plan.json" in {f["path"] for f in manifest["files"]}
    again = dfc.load(path, engine="eager")
    assert again.plan == compiled.plan
    assert again.plan is not None and again.plan.graph is again.graph
    assert str(again.plan.program) == str(compiled.plan.program)  # type: ignore[union-attr]
    again.save(tmp_path / "n.dfcpkg")
    assert (tmp_path / "n.dfcpkg/plan.json").read_bytes() == (path / "plan.json").read_bytes()
    assert main(["verify", str(path)]) == 0
    capsys.readouterr()
    assert main(["show", "--plan", str(path)]) == 0
    assert "gpu1" in (out := capsys.readouterr().out) and "a step takes" in out
    assert main(["show", "--resolved", str(path)]) == 0
    assert "# plan" in capsys.readouterr().out
    data = path / "plan.json"
    data.write_text(data.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(DfcError, match=r"D02\d.*plan.json"):
        dfc.load(path)


def test_a_package_without_stages_has_no_plan(graph: dfc.Graph, tmp_path: Path) -> None:
    plain = dfc.compile(graph, recipe="O0", engine="eager")
    assert plain.plan is None
    plain.save(tmp_path / "m.dfcpkg")
    assert not (tmp_path / "m.dfcpkg/plan.json").exists()
    assert main(["show", "--plan", str(tmp_path / "m.dfcpkg")]) == 2


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda d: d.update(schema=7), "D061"),
        (lambda d: d.pop("costs"), "D060"),
        (lambda d: d["machine"]["devices"][0].update(colour="red"), "D060"),
        (lambda d: d["stages"].pop(), "D062"),
        (lambda d: d["stages"][0].update(nodes=1), "D062"),
        (lambda d: d["costs"]["edges"].clear(), "D062"),
        (lambda d: d["stages"][0].update(device="gpu7"), "D063"),
        (lambda d: d["prediction"].update(step_seconds=1.0), "D063"),
        (lambda d: d["machine"]["devices"][0].update(memory=-1.0), "N045"),
        (lambda d: d["program"]["ranks"].reverse(), "N010"),
        (lambda d: d["program"].update(ranks=["0: F(0,0)", "1: F(1,0) F(1,0)"]), "N022"),
        (lambda d: d["costs"].update(forward=[1.0]), "N021"),
    ],
)
def test_a_plan_that_was_changed_is_refused(
    compiled: dfc.Compiled, change: Change, code: str
) -> None:
    assert compiled.plan is not None
    data = planfile.data_of(compiled.plan)
    change(data)
    with pytest.raises(DfcError) as e:
        planfile.of_text(json.dumps(data), compiled.graph)
    assert code in str(e.value)


def test_a_plan_of_another_graph_is_refused(compiled: dfc.Compiled, graph: dfc.Graph) -> None:
    assert compiled.plan is not None
    with pytest.raises(DfcError, match=r"D062.*has no stage"):
        planfile.of_text(planfile.to_text(compiled.plan), graph)


def test_a_later_step_that_makes_nodes_is_told() -> None:
    class Written(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.sigmoid(x)

    text = recipe("partition on gpu0, gpu1", "apply rules(activations)")
    with pytest.raises(DfcError, match=r"(?s)D062.*the plan has 2 stages.*be the last step"):
        dfc.compile(Written(), ARGS, recipe=text, engine="eager")


def test_a_partition_that_is_taken_back_leaves_no_plan() -> None:
    text = recipe("partition on gpu0, gpu1", "revert partition")
    found = dfc.compile(Layers().eval(), ARGS, recipe=text, engine="eager")
    assert found.plan is None and all(n.stage is None for n in found.graph.nodes)


def test_what_a_recipe_gets_wrong_is_told_before_anything_runs() -> None:
    for step, said in (
        ("partition on gpu0, gpu9", "no device `gpu9`"),
        ("partition by speed", "none of"),
        ("partition on gpu0 with stages=3", "did you mean `max_stages`"),
    ):
        with pytest.raises(DfcError) as e:
            dfc.compile(Layers().eval(), ARGS, recipe=recipe(step), engine="eager")
        assert said in str(e.value)


def test_explain_says_why_a_node_is_on_its_stage_and_why_it_was_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], compiled: dfc.Compiled
) -> None:
    said = str(compiled.explain(Layers().eval(), ARGS, dynamic_shapes=SHAPES, pass_="partition"))
    assert "stage 0 on `gpu0`" in said and "stage 1 on `gpu1` begins here" in said
    assert "instead of" in said or "no better than" in said
    assert "cut" in said and "placed" in said
    node = str(compiled.explain(Layers().eval(), ARGS, dynamic_shapes=SHAPES, node="head"))
    assert "stage 1 on `gpu1`" in node
    (tmp_path / "model.dfc").write_text(str(compiled.graph))
    (tmp_path / "r.dfc").write_text(recipe("partition on gpu0, gpu1"))
    model, file = str(tmp_path / "model.dfc"), str(tmp_path / "r.dfc")
    assert main(["explain", model, "-r", file, "--pass", "partition"]) == 0
    assert "stage 1 on `gpu1`" in capsys.readouterr().out


def test_without_a_target_the_devices_are_those_of_this_host(graph: dfc.Graph) -> None:
    found = dfc.compile(graph, passes=["partition"], engine="eager")
    assert found.plan is not None and found.plan.stages[0].nodes
    halves = dfc.plan(graph, devices=["host", "host"], sizes={"B": 64})
    assert [s.device for s in halves.stages] == ["host.0", "host.1"]
    whole = dfc.plan(graph, devices=["host"], sizes={"B": 64})
    assert halves.stages[0].capacity == pytest.approx(whole.stages[0].capacity / 2)


def machine(n: int, **more: Any) -> Machine:
    facts = {"memory": 1e9, "bandwidth": 1e10, "peaks": {"f32": 1e10}} | more
    devices = tuple(Device(f"gpu{i}", "cuda", **facts) for i in range(n))
    wires = {(i, j): Wire(1e9, 1e-6) for i in range(n) for j in range(n) if i != j}
    return Machine("test", devices, wires)


def test_pins_and_what_stays_together_are_respected(graph: dfc.Graph) -> None:
    free = dfc.plan(graph, machine(3), sizes={"B": 64})
    assert len(free.stages) == 3
    pinned = dfc.plan(graph, machine(3), sizes={"B": 64}, pins={"layers.0": "gpu2"})
    assert pinned.stages[0].device == "gpu2"  # the order of the devices is free
    assert pinned.bottleneck == pytest.approx(free.bottleneck)
    two = dfc.plan(
        graph, machine(3), sizes={"B": 64}, pins={"layers.0": "gpu1", "head": "gpu1"},
    )  # fmt: skip
    assert [s.device for s in two.stages] == ["gpu1"]  # all that lies between is there, too
    kept = dfc.plan(
        graph, machine(3), sizes={"B": 64}, together=['between("layers.1", "layers.4")']
    )
    stage = stage_of(kept)
    names = [n for n in graph.nodes if n.loc and n.loc.module in ("layers.1", "layers.4")]
    assert len({stage[n] for n in names}) == 1
    assert kept.bottleneck >= free.bottleneck
    with pytest.raises(DfcError, match=r"N046.*`gpu7`, which is no device"):
        dfc.plan(graph, machine(3), pins={"head": "gpu7"})
    with pytest.raises(DfcError, match=r"Q021"):
        dfc.plan(graph, machine(3), pins={"tail": "gpu1"})
    with pytest.raises(DfcError, match=r"N048.*\(head\) is pinned to `gpu0` and to `gpu1`"):
        dfc.plan(graph, machine(3), pins={"head": "gpu0", "op(linear)": "gpu1"})


def test_a_machine_with_impossible_numbers_is_refused(graph: dfc.Graph) -> None:
    for facts, said in (
        ({"memory": 0.0}, "impossible `mem`"), ({"bandwidth": float("nan")}, "impossible `bw`"),
        ({"peaks": {"f32": -1.0}}, "impossible `peak of f32`"),
        ({"launch": float("inf")}, "impossible `launch`"),
    ):  # fmt: skip
        with pytest.raises(DfcError, match=said) as e:
            dfc.plan(graph, machine(2, **facts))
        assert e.value.code == "N045" and e.value.status == 2
    two = machine(2)
    for wire, said in ((Wire(0.0), "impossible `bw`"), (Wire(1e9, -1.0), "impossible `latency`")):
        with pytest.raises(DfcError, match=said):
            dfc.plan(graph, Machine("t", two.devices, {(0, 1): wire}))
    with pytest.raises(DfcError, match="has no devices"):
        dfc.plan(graph, Machine("t", ()))
    with pytest.raises(DfcError, match="2 devices are called `gpu0`"):
        dfc.plan(graph, Machine("t", (two.devices[0], two.devices[0])))
    with pytest.raises(DfcError, match=r"(?s)N046.*did you mean `gpu1`"):
        dfc.plan(graph, two, devices=["gpu11"])


def test_a_recipe_pins_and_colocates_in_sentences() -> None:
    def compiled(*steps: str) -> dfc.Compiled:
        text = recipe(*steps, "partition on gpu0, gpu1")
        return dfc.compile(Layers().eval(), ARGS, recipe=text, engine="eager")

    plan = compiled('pin "layers.0" to gpu1', 'pin "head" to gpu0').plan
    assert plan is not None and [s.device for s in plan.stages] == ["gpu1", "gpu0"]
    found = compiled('colocate "layers.0", "layers.4"')
    stage = {n.loc.module: n.stage for n in found.graph.nodes if n.loc and n.op.count("linear")}
    assert stage["layers.0"] == stage["layers.4"] == 0 and stage["head"] == 1
    apart = compiled('colocate "layers.0", "layers.4"', "revert colocate").plan
    assert apart is not None and apart.bottleneck < found.plan.bottleneck  # type: ignore[union-attr]
    said = str(found.explain(Layers().eval(), ARGS, node="layers.0"))
    assert "colocated" in said and "kept together with others" in said


def test_what_pins_get_wrong_is_told() -> None:
    for steps, said in (
        (('pin "layers.9" to gpu0', "partition"), "Q021"),
        (('pin "head" to gpu7',), "no device `gpu7`"),
        (('pin "head"', "partition"), "needs `device`"),
        (("partition on gpu0", 'pin "head" to gpu0'), "cannot come after `partition`"),
        (('pin "head" to gpu0',), "does nothing without a `partition` behind it"),
        (('colocate "head", "layers.0"',), "does nothing without a `partition` behind it"),
        (('pin "head" to gpu0', 'pin op(linear) to gpu1', "partition"), "N048"),
        (('pin "layers.0" to gpu0', 'pin "layers.2" to gpu1', 'pin "head" to gpu0', "partition"),
         "N063"),
        (('pin "layers.0" to gpu0', 'pin "head" to gpu1', "partition with max_stages=1"),
         "allow more `max_stages`"),
    ):  # fmt: skip
        with pytest.raises(DfcError) as e:
            dfc.compile(Layers().eval(), ARGS, recipe=recipe(*steps), engine="eager")
        assert said in str(e.value), steps
        assert e.value.status == 2


def test_nodes_are_where_the_device_and_its_engine_can_run_them(graph: dfc.Graph) -> None:
    @dfc.engine
    class LinearOnly:
        name = "linear_only"
        devices = ("cuda",)

        def supports(self, node: Any) -> str | None:
            return None if node.op == "aten.linear.default" else "it multiplies matrices alone"

        def build(self, graph: Any, device: str = "cpu", threads: int | None = None) -> Any:
            raise AssertionError("nothing is run")

    both = machine(2)
    gpu, host = both.devices
    both = Machine("both", (gpu, replace(host, name="host", kind="cpu")), both.wires)
    found = dfc.plan(graph, both, sizes={"B": 64}, engine={"cuda": "linear_only"})
    device = {n: found.stages[s].device for n, s in stage_of(found).items()}
    assert {d for n, d in device.items() if n.op != "aten.linear.default"} == {"host"}
    with pytest.raises(DfcError, match=r"(?s)N047.*no device can run .*multiplies matrices alone"):
        dfc.plan(graph, machine(2), engine="linear_only")
    with pytest.raises(DfcError, match=r"(?s)N047.*`linear_only` does not run on `cpu`"):
        dfc.plan(graph, both.only(["host"]), engine="linear_only")


def test_a_device_that_lacks_a_dtype_gets_none_of_it() -> None:
    model = Layers().eval().bfloat16()
    target = TARGET.replace("bw=10GB/s)\n  link", "bw=10GB/s, dtypes=(f32, f64))\n  link")
    args = (ARGS[0].bfloat16(),)
    found = dfc.plan(model, f"dfc 1\n{target}", args)
    assert "host" not in {s.device for s in found.stages}
    one = target.replace("dtypes=(f32, f64)", "dtypes=(f32)")
    assert dfc.plan(model, f"dfc 1\n{one}", args).idle == ("host",)
    with pytest.raises(DfcError, match=r"Q012.*`f33` is no dtype"):
        dfc.plan(model, f"dfc 1\n{one.replace('(f32)', '(f33)')}", args)
    with pytest.raises(DfcError, match=r"(?s)N047.*`host`: it does not compute in bf16"):
        dfc.plan(model, f"dfc 1\n{target}", args, devices=["host"])


def test_a_processor_beside_a_gpu_takes_its_share_of_the_work(graph: dfc.Graph) -> None:
    gpu = machine(1).devices[0]
    host = replace(gpu, name="host", kind="cpu", peaks={"f32": 2.5e9}, bandwidth=2.5e9)
    fast = {(0, 1): Wire(1e11), (1, 0): Wire(1e11)}
    both = dfc.plan(graph, Machine("both", (host, gpu), fast), sizes={"B": 64})
    alone = dfc.plan(graph, Machine("gpu", (gpu,)), sizes={"B": 64})
    assert {s.device for s in both.stages} == {"gpu0", "host"}
    assert both.bottleneck < alone.bottleneck
    turned = dfc.plan(graph, Machine("turned", (gpu, host), fast), sizes={"B": 64})
    assert turned.bottleneck == pytest.approx(both.bottleneck)
    quick = dfc.plan(graph, Machine("b", (host, gpu), fast), sizes={"B": 64}, objective="latency")
    assert [s.device for s in quick.stages] == ["gpu0"] and quick.idle == ("host",)


def test_links_that_lack_are_named(graph: dfc.Graph) -> None:
    three = machine(3)
    wires = {k: w for k, w in three.wires.items() if 2 not in k}
    with pytest.raises(DfcError, match=r"N043.*no link from `gpu0` to `gpu2`") as e:
        dfc.plan(graph, Machine("t", three.devices, wires))
    assert e.value.status == 2
    one_way = {(0, 1): Wire(1e9), (1, 2): Wire(1e9)}
    found = dfc.plan(graph, Machine("t", three.devices, one_way), sizes={"B": 64})
    assert [s.device for s in found.stages] == ["gpu0", "gpu1", "gpu2"]
    back = dfc.plan(graph, Machine("t", three.devices, one_way), sizes={"B": 64}, train=True)
    assert len(back.stages) == 1  # gradients have no way back
    with pytest.raises(DfcError, match=r"N043.*no link from `gpu1` to `gpu0`"):
        dfc.plan(
            graph, Machine("t", three.devices, one_way), train=True,
            pins={"layers.0": "gpu0", "head": "gpu1"},
        )  # fmt: skip


def test_what_does_not_fit_names_what_would(graph: dfc.Graph) -> None:
    small = machine(2, memory=45e3)
    with pytest.raises(DfcError, match=r"(?s)N060.*too much.*it would fit with") as e:
        dfc.plan(graph, small, sizes={"B": 1})
    assert e.value.status == 6 and "devices like" in str(e.value)
    with pytest.raises(DfcError, match=r"(?s)N060.*optimizer state.*smaller microbatches") as e:
        dfc.plan(graph, small, sizes={"B": 1}, train=True)
    assert e.value.status == 6


def test_equal_layers_are_never_better(graph: dfc.Graph) -> None:
    for objective in ("throughput", "latency", "memory", "cost"):
        found = dfc.plan(graph, machine(3), sizes={"B": 64}, objective=objective)
        assert all(ratio >= 1 - 1e-9 for _, ratio in found.splits)
    found = dfc.plan(graph, machine(4), sizes={"B": 64})  # six layers: two of them have two
    assert dict(found.splits)["equal number of layers"] > 1.05


@pytest.mark.slow
def test_llama_is_split_better_than_into_equal_layers() -> None:
    from benchmarks.planning import h100s, llama

    graph = llama("8B")
    for stages, goal in ((8, 1.2), (16, 1.38)):
        found = dfc.plan(graph, h100s(stages), microbatches=64)
        assert dict(found.splits)["equal number of layers"] >= goal
        assert found.partition.gap <= 0.05
