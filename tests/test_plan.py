"""Plans of real captured models: costs by hand, memory, what does not fit, pictures, command."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dfc
from dfc.cli.plan import show_plan
from dfc.cli.tables import bytes_text
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.lang.units import byte_count
from dfc.planning.catalogue import CATALOGUE, known_device
from dfc.planning.cost import default_sizes, work_of
from dfc.planning.machine import Device, Machine, Wire
from dfc.planning.model import Wish, modelled
from dfc.planning.pipeline import plan
from dfc.planning.schedules import schedule
from dfc.planning.simulate import Costs, simulate
from dfc.planning.timeline import chrome_trace, svg_timeline
from dfc.recipe.machines import machine_of
from dfc.recipe.sources import plan_of

LINK = Wire(1e9, 1e-6)
FAST = Device("a", "cuda", 1e9, 1e9, {"f32": 1e9})


def machine(n: int, *, memory: float = 1e9, wire: Wire | None = LINK) -> Machine:
    devices = tuple(replace(FAST, name=f"gpu{i}", memory=memory) for i in range(n))
    wires = {(i, j): wire for i in range(n) for j in (i - 1, i + 1) if 0 <= j < n and wire}
    return Machine("test", devices, wires)


class Tower(nn.Module):
    """Equal layers with a residual, and a table that the head shares."""

    def __init__(self, layers: int = 6, width: int = 32, vocabulary: int = 50) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return self.head(x)


@pytest.fixture(scope="module")
def tower() -> Graph:
    batch = torch.export.Dim("B", min=1, max=64)
    with torch.device("meta"):
        model = Tower()
        ids = torch.zeros(4, 7, dtype=torch.long)
    return dfc.trace(model, (ids,), dynamic_shapes=({0: batch},))


def test_the_work_of_a_linear_layer_is_what_one_counts_by_hand(tower: Graph) -> None:
    sizes = default_sizes(tower, {"B": 4})
    linear = next(n for n in tower.nodes if n.op == "aten.linear.default")
    work = work_of(linear, sizes)
    rows, width = 4 * 7, 32
    assert work.flops == 2 * rows * width * width and work.dtype == "f32"
    assert work.read == 4 * (rows * width + width * width + width)
    assert work.written == 4 * rows * width
    table = next(n for n in tower.nodes if n.op == "aten.embedding.default")
    assert work_of(table, sizes).read == 4 * rows * width + 8 * rows  # its rows, not the table
    device = replace(FAST, launch=1e-6)
    assert work.seconds(device) == work.flops / 1e9  # a GPU starts it while another runs
    assert work.seconds(replace(device, launch=1e-3)) == 1e-3
    assert work.seconds(replace(device, kind="cpu")) == work.flops / 1e9 + 1e-6


def test_a_convolution_and_attention() -> None:
    graph = dfc.trace(nn.Conv2d(4, 8, 3, padding=1, groups=2), (torch.zeros(2, 4, 5, 6),))
    (conv,) = [n for n in graph.nodes if "conv" in n.op]
    assert work_of(conv, {}).flops == 2 * (2 * 8 * 5 * 6) * (2 * 3 * 3)

    class Attend(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, k)

    graph = dfc.trace(Attend(), (torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8)))
    (attention,) = [n for n in graph.nodes if "attention" in n.op]
    assert work_of(attention, {}).flops == (2 * 8 + 2 * 8 + 12) * 2 * 3 * 5 * 7


def test_stages_share_the_work_and_the_simulator_agrees_with_the_formula(tower: Graph) -> None:
    found = plan(tower, machine(3), sizes={"B": 64}, wish=Wish(microbatches=5))
    assert [s.device for s in found.stages] == ["gpu0", "gpu1", "gpu2"]
    times = [s.seconds for s in found.stages]
    assert found.bottleneck == pytest.approx(max(times))
    least = sum(times) + 4 * max(times)  # and what the links take
    assert least <= found.step_seconds <= least * 1.2
    assert sum(s.nodes for s in found.stages) == len(tower)
    assert all(ratio >= 1 - 1e-9 for _, ratio in found.splits)
    assert found.partition.gap <= 0.05


def test_a_shared_table_is_counted_on_every_stage_that_reads_it(tower: Graph) -> None:
    model = modelled(tower, machine(2), default_sizes(tower))
    ((size, readers),) = model.problem.tied
    assert size == 4 * 50 * 32 and readers[0] == 0 and readers[-1] == model.problem.n - 1
    found = plan(tower, machine(2), sizes={"B": 64})
    assert all(held >= size for held in found.costs.resident)
    assert sum(s.weights for s in found.stages) == model.problem.weights.sum() + 2 * size


def test_memory_decides_where_the_cut_lies(tower: Graph) -> None:
    wide = plan(tower, machine(2), sizes={"B": 2})
    need = sum(s.weights for s in wide.stages) - 4 * 50 * 32
    live = (
        0.9 * 1e9
        - modelled(tower, machine(2), default_sizes(tower, {"B": 2})).problem.slots[0].memory
    )
    tight = machine(2, memory=(need * 0.75 + live) / 0.9)
    found = plan(tower, tight, sizes={"B": 2})
    assert len(found.stages) == 2
    assert all(s.memory <= s.capacity * 0.9 + 1 for s in found.stages)


def test_of_rows_that_hold_as_much_the_quicker_one_is_taken(tower: Graph) -> None:
    pair = machine(2)
    slow = replace(pair.devices[0], peaks={"f32": 1e8}, name="slow")
    rows = [(slow, pair.devices[1]), (pair.devices[1], slow)]
    found = [
        plan(tower, replace(pair, devices=row), sizes={"B": 2}, objective="memory") for row in rows
    ]
    assert max(found[0].simulation.peaks) == max(found[1].simulation.peaks)
    assert found[0].simulation.makespan == pytest.approx(found[1].simulation.makespan)
    assert [s.device for s in found[0].stages] == [s.device for s in found[1].stages]


def test_what_does_not_fit_says_by_how_much(tower: Graph) -> None:
    with pytest.raises(DfcError, match=r"N060.*does not fit: its parameters take .* kB") as e:
        plan(tower, machine(2, memory=20_000), sizes={"B": 1})
    said = str(e.value)
    assert e.value.status == 6 and "too much" in said and "3 devices like `gpu0`" in said
    assert re.search(r"weights that are streamed to `gpu.` .*from memory in each pass", said)
    kb = float(re.search(r"with ([\d.]+) kB of memory", said)[1])  # type: ignore[index]
    for remedy in (machine(2, memory=kb * 1000), machine(3, memory=20_000)):
        assert plan(tower, remedy, sizes={"B": 1}).peak <= remedy.devices[0].memory
    with pytest.raises(DfcError, match="N060"):
        plan(tower, machine(2, memory=kb * 1000 * 0.995), sizes={"B": 1})


def test_one_device_may_be_the_best_plan(tower: Graph) -> None:
    """Where the link is slower than computing all, nothing is sent."""
    found = plan(tower, machine(2, wire=Wire(1e3, 1.0)), sizes={"B": 2})
    assert len(found.stages) == 1 and not found.links


def test_a_microbatch_takes_no_longer_than_a_step_of_it(tower: Graph) -> None:
    """Weights' gradients of one stage beside another's: the sum of the stages' times is longer."""
    wish = Wish(microbatches=1, trains=True)
    found = plan(tower, machine(3, wire=Wire(1e12)), wish=wish, schedule="zb1p")
    assert len(found.stages) == 3
    assert found.latency == found.step_seconds < sum(s.seconds for s in found.stages)


def test_a_link_that_is_missing_is_told_and_relays_are_found(tower: Graph) -> None:
    with pytest.raises(DfcError, match=r"N043.*no link from `gpu0` to `gpu1`"):
        plan(tower, machine(2, wire=None))
    relay = machine(3).wire(0, 2)
    assert relay.bandwidth == pytest.approx(0.5e9) and relay.latency == pytest.approx(2e-6)


def test_what_does_not_fit_for_want_of_a_way_back_says_so(tower: Graph) -> None:
    """Gradients go against the arrow: without a link back one device has to hold all stages."""
    wish = Wish(trains=True)
    alone = plan(tower, machine(1), wish=wish).peak
    two = machine(2, memory=0.9 * alone)
    assert {s.device for s in plan(tower, two, wish=wish).stages} == {"gpu0", "gpu1"}
    one_way = replace(two, wires={k: w for k, w in two.wires.items() if k != (1, 0)})
    with pytest.raises(
        DfcError, match=r"(?s)N060.*no way from `gpu1` to `gpu0`.*help: write a"
    ) as e:
        plan(tower, one_way, wish=wish)
    assert e.value.status == 6


def test_training_keeps_activations_and_chooses_a_schedule(tower: Graph) -> None:
    wish = Wish(microbatches=8, trains=True)
    found = plan(tower, machine(3), sizes={"B": 16}, wish=wish)
    assert found.simulation.program.trains
    for name in ("1f1b", "gpipe", "zb1p"):
        other = plan(tower, machine(3), sizes={"B": 16}, wish=wish, schedule=name)
        assert found.step_seconds <= other.step_seconds * (1 + 1e-9)
    assert max(found.simulation.peaks) > max(found.costs.resident)


def test_sizes_are_named_as_in_the_graph(tower: Graph) -> None:
    with pytest.raises(DfcError, match=r"N040.*no size `C`"):
        plan(tower, machine(2), sizes={"C": 3})


def test_the_timeline_is_a_picture_and_a_trace(tower: Graph) -> None:
    found = plan(tower, machine(2), sizes={"B": 64}, wish=Wish(microbatches=4, trains=True))
    names = [s.device for s in found.stages]
    picture = ET.fromstring(svg_timeline(found.simulation, names, "a <title>"))
    boxes = [e for e in picture.iter() if e.get("class") == "box"]
    assert len(boxes) == len(found.simulation.tasks.took)
    events = [e for e in chrome_trace(found.simulation, names)["traceEvents"] if e["ph"] == "X"]
    assert len(events) == len(boxes)
    last = max(e["ts"] + e["dur"] for e in events)
    assert last == pytest.approx(found.step_seconds * 1e6)


def test_boxes_have_numbers_that_are_read_on_them() -> None:
    ones = [1] * 4
    step = simulate(schedule("zb_v", 2, 12), Costs(forward=ones, inputs=ones, weights=ones))
    picture = ET.fromstring(svg_timeline(step, ["a", "b"], "V"))
    boxes = [e for e in picture.iter() if e.get("class") == "box"]
    words = [e for e in picture.iter() if "mb" in (e.get("class") or "")]
    assert {w.text for w in words} == {str(b) for b in range(10)}, "two digits have no room there"
    pale = [b for b in boxes if b.get("fill-opacity")]
    assert 0 < sum(w.get("class") == "mb pale" for w in words) < len(pale) < len(boxes)


TARGET = """dfc 1

target pair {
  device gpu0 : h100
  device gpu1 : cuda(mem=80GB, peak=40TFLOPS, peak_bf16=500TFLOPS, bw=2TB/s, launch=5us)
  link gpu0 <-> gpu1 : nvlink(bw=450GB/s, latency=5us)
}
"""


def test_a_target_names_known_devices_or_gives_their_figures() -> None:
    target = plan_of("O0", target=TARGET).target
    assert target is not None
    first, second = machine_of(target).devices
    assert first.peak("bf16") == pytest.approx(0.7 * 989.5e12) and first.memory == 80e9
    assert second.peak("bf16") == 500e12 and second.peak("f64") == 40e12
    assert second.launch == pytest.approx(5e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("device a : cuda(mem=80GB)", "device `a` has no `peak`"),
        ("device a : h1000", "did you mean `h100`"),
        ("device a : h100(mem=0GB)", "impossible `mem`"),
        ("device a : cuda(mem=0GB, peak=1TFLOPS, bw=1GB/s)", "impossible `mem`"),
    ],
)
def test_a_target_that_cannot_be_planned_for(text: str, message: str, tower: Graph) -> None:
    with pytest.raises(DfcError) as e:
        target = plan_of("O0", target=f"dfc 1\ntarget t {{ {text} }}\n").target
        assert target is not None
        plan(tower, machine_of(target))
    assert message in str(e.value)


@pytest.mark.parametrize("number", ["1e400", "1" * 99])
def test_a_number_that_is_none_is_told_once(number: str) -> None:
    text = f"dfc 1\ntarget t {{ device a : cuda(mem=1GB, peak={number}TFLOPS, bw=1GB/s) }}\n"
    with pytest.raises(DfcError) as e:
        plan_of("O0", target=text)
    assert [d.code for d in e.value.diagnostics] == ["P005"]


def test_all_that_is_wrong_with_a_target_is_told_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dfc.cli import main

    target = tmp_path / "t.dfc"
    target.write_text("""dfc 1
target t {
  device a : cuda(mem=0GB, peak=-40TFLOPS, bw=2TB/s, launch=0us)
  device b : h100(price=0)
  link a <-> b : nvlink(bw=0GB/s, latency=-5us)
}
""")
    for command in (["plan", "no.py:model", "-t"], ["check"]):
        assert main([*command, str(target)]) == 2
        said = re.findall(r"t\.dfc:(\d+):\d+: error\[N045\]: (.*)", capsys.readouterr().err)
        assert said == [
            ("3", "device `a` has an impossible `mem`: 0GB"),
            ("3", "device `a` has an impossible `peak`: -40TFLOPS"),
            ("4", "device `b` has an impossible `price`: 0"),
            ("5", "the link from `a` to `b` has an impossible `bw`: 0GB/s"),
            ("5", "the link from `a` to `b` has an impossible `latency`: -5us"),
        ]
    target.write_text(
        "dfc 1\ntarget t {\n  device a : cpu(mem=1GB)\n  device b : cpu(bw=1GB/s)\n}\n"
    )
    assert main(["plan", "no.py:model", "-t", str(target)]) == 2
    said = capsys.readouterr().err
    assert "t.dfc:3:10: error[N045]: device `a` has no `peak` and no `bw`" in said
    assert "t.dfc:4:10: error[N045]: device `b` has no `mem` and no `peak`" in said


ONE = "target {} {{ device a : cpu(mem=8GB, peak=9GFLOPS, bw=9GB/s) }}\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "`t.dfc` has no target"),
        (ONE.format("t") + ONE.format("u"), "there are 2 targets: `t`, `u`"),
        ("target t { device a : h100(mem=80) }\n", "write it as in mem=80GB"),
        ("target t { device a : h100(launch=8) }\n", "write it as in launch=5us"),
    ],
)
def test_a_file_that_is_no_target_is_told_before_the_model_is_read(
    text: str, told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from dfc.cli import main

    monkeypatch.chdir(tmp_path)
    Path("t.dfc").write_text(f"dfc 1\n{text}")
    assert main(["plan", "no.py:model", "-t", "t.dfc"]) == 2
    assert told in capsys.readouterr().err


def test_what_a_plan_without_a_target_goes_by_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tower: Graph
) -> None:
    from dfc.cli import main

    (tmp_path / "model.dfc").write_text(str(tower))
    assert main(["plan", str(tmp_path / "model.dfc")]) == 0
    assert "figures of this host are nominal, not measured" in capsys.readouterr().out
    (tmp_path / "t.dfc").write_text(f"dfc 1\n{ONE.format('t')}")
    assert main(["plan", str(tmp_path / "model.dfc"), "-t", str(tmp_path / "t.dfc")]) == 0
    assert "nominal" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--on", "gpu0,,gpu1"], "`--on gpu0,,gpu1` has an empty name"),
        (["--svg", "t.png"], "`--svg` writes no `.png` file"),
        (["--trace", "t.txt"], "`--trace` writes no `.txt` file"),
        (["--trace", "t"], "ends in .json"),
    ],
)
def test_a_picture_of_another_format_is_refused_before_the_work(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from dfc.cli import main

    assert main(["plan", "no.py:model", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--pipeline", "2", "--trace", "t.svg"], "ends in .json\n"),
        (["--memory", "1MB", "--trace", "t.txt"], "ends in .json or .svg"),
        (["-o", "out.txt"], "ends in .npz or .safetensors"),
        (["--on", "cpu0,cpu0"], "devices of stages are for --devices"),  # as `dfc plan` has them
    ],
)
def test_what_a_run_cannot_write_is_refused_before_the_work(
    options: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from dfc.cli import main

    assert main(["run", "no.py:model", *options]) == 2
    assert wanted in capsys.readouterr().err


def test_a_plan_keeps_the_step_that_chose_it(tower: Graph) -> None:
    made = plan(tower, machine(2))
    again = simulate(made.program, made.costs)
    assert "simulation" in vars(made)
    assert made.simulation.end.tolist() == again.end.tolist()
    assert made.simulation.peaks == again.peaks


def test_every_known_device_says_where_its_figures_are_from() -> None:
    for name, device in CATALOGUE.items():
        assert device.source and device.peaks["f32"] > 1e12 and device.bandwidth > 1e11, name
    with pytest.raises(DfcError, match="did you mean `h200`"):
        known_device("h20")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], tower: Graph) -> None:
    from dfc.cli import main

    (tmp_path / "model.dfc").write_text(str(tower))
    (tmp_path / "pair.dfc").write_text(TARGET)
    model, target = str(tmp_path / "model.dfc"), str(tmp_path / "pair.dfc")
    svg = tmp_path / "t.svg"
    arguments = ["plan", model, "-t", target, "--size", "B=64", "-m", "4", "--svg", str(svg)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "a step takes" in out and "gpu0" in out and svg.exists()
    assert main(arguments) == 2  # the picture exists
    assert "--force" in capsys.readouterr().err
    assert main(["plan", model, "-t", target, "--size", "B=64", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["schedule"] == "forward" and data["stages"][0]["device"] == "gpu0"
    tiny = tmp_path / "tiny.dfc"
    tiny.write_text("dfc 1\ntarget t { device a : cuda(mem=10KB, peak=1TFLOPS, bw=1TB/s) }\n")
    assert main(["plan", model, "-t", str(tiny)]) == 6


def test_splits_that_take_as_long_share_a_line(
    capsys: pytest.CaptureFixture[str], tower: Graph
) -> None:
    found = plan(tower, machine(2))
    splits = (("equal layers", 1.004), ("equal parameters", 1.2), ("equal operators", 1.0))
    show_plan(replace(found, splits=splits))
    told = capsys.readouterr().out.splitlines()
    assert "equal layers, equal operators: 1.00 times as long for each microbatch" in told
    assert "equal parameters: 1.20 times as long for each microbatch" in told


def test_sizes_that_nobody_asked_for_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tower: Graph
) -> None:
    from dfc.cli import main

    (tmp_path / "graph.dfc").write_text(str(tower))
    (tmp_path / "pair.dfc").write_text(TARGET)
    (tmp_path / "model.py").write_text(MODEL)
    target = ["-t", str(tmp_path / "pair.dfc")]

    def told(model: str, *more: str) -> str:
        assert main(["plan", str(tmp_path / model), *target, *more]) == 0
        return capsys.readouterr().out

    plain = told("graph.dfc")
    assert "microbatches of B=1:" in plain
    assert "B is the least that the model takes: `--size B=N` plans for others" in plain
    example = told("model.py:build", "-m", "1")
    assert "1 microbatch of B=5, S=7:" in example
    assert "B and S are as in the example: `--size B=N,S=N` plans for others" in example
    assert "B is as in the example: `--size B=N`" in told("model.py:build", "--size", "S=3")
    assert "plans for others" not in told("model.py:build", "--size", "S=3,B=2")


MODEL = """
import torch
def build():
    batch, length = torch.export.Dim("B", max=64), torch.export.Dim("S", max=64)
    return torch.nn.Linear(8, 8), (torch.ones(5, 7, 8),), {}, ({0: batch, 1: length},)
"""


def test_sizes_are_those_of_the_arguments_of_a_model() -> None:
    batch = torch.export.Dim("B", max=64)
    given = (torch.nn.Linear(8, 8), machine(1), (torch.ones(5, 8),), None, ({0: batch},))
    assert dfc.plan(*given).sizes == {"B": 5}
    assert dfc.plan(*given, sizes={"B": 3}).sizes == {"B": 3}
    assert dfc.plan(dfc.trace(*given[:1], *given[2:]), machine(1)).sizes == {"B": 1}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sizes": {"B": 65}}, r"N040.*`B` is 65, outside its range 1\.\.64"),
        ({"sizes": {"B": 0}}, r"N040.*`B` is 0, outside"),
        ({"sizes": {"B": "4"}}, r"N040.*`B` is '4', outside"),
        ({"microbatches": 2.5}, r"N002.*at least one microbatch, not 2\.5"),
        ({"microbatches": 0}, r"N002.*not 0"),
        ({"max_stages": 0}, r"N066.*at least one stage, not 0"),
        ({"target": 3}, r"N045.*not of type int"),
    ],
)
def test_what_no_plan_can_be_of_is_told(options: dict[str, Any], told: str, tower: Graph) -> None:
    with pytest.raises(DfcError, match=told) as e:
        dfc.plan(tower, **{"target": machine(2), **options})
    assert e.value.status == 2


@pytest.mark.parametrize("cost", [float("nan"), -1])
def test_a_cost_that_cannot_be_is_told(cost: float) -> None:
    with pytest.raises(DfcError, match=r"N021.*a cost of `forward` cannot be"):
        simulate(schedule("forward", 2, 2), Costs(forward=[1, cost]))


@pytest.mark.slow
def test_the_example_plans_a_decoder_without_weights_for_gpus_that_are_not_here() -> None:
    from examples.llama import llama_8b

    model, args = llama_8b()
    found = dfc.plan(model, str(Path("examples/four_h100.dfc").resolve()), args, microbatches=16)
    assert [s.device for s in found.stages] == ["gpu0", "gpu1", "gpu2", "gpu3"]
    assert sum(s.weights for s in found.stages) > 16e9


def test_bytes_are_read_as_they_are_told() -> None:
    assert byte_count(bytes_text(24_600)) == byte_count("24.6KB") == 24_600


def test_a_plan_is_printed_as_its_stages_and_its_step(tower: Graph) -> None:
    target = plan_of("O0", target=TARGET).target
    assert target is not None
    found = plan(tower, machine_of(target))
    *stages, step = str(found).splitlines()
    assert [line.split(" from ")[0] for line in stages] == [
        f"stage {s.index} on {s.device}" for s in found.stages
    ]
    assert "a step of 1 microbatch takes" in step
