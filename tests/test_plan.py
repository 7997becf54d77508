"""Plans of real captured models: costs by hand, memory, and what does not fit."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dfc
from dfc.cli.tables import bytes_text
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.lang.units import byte_count
from dfc.planning.catalogue import CATALOGUE, known_device
from dfc.planning.cost import default_sizes, work_of
from dfc.planning.machine import Wire
from dfc.planning.model import Limits, Wish, modelled
from dfc.planning.pipeline import plan
from dfc.planning.schedules import schedule
from dfc.planning.simulate import Costs, Link, simulate
from dfc.planning.timeline import chrome_trace, svg_timeline
from dfc.recipe.machines import machine_of
from dfc.recipe.sources import plan_of
from tests.planned_tower import FAST, TARGET, machine, traced_tower


@pytest.fixture(scope="module")
def tower() -> Graph:
    return traced_tower()


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


def test_a_picture_tells_the_time_and_what_is_behind_each_row() -> None:
    step = simulate(schedule("gpipe", 2, 4), Costs([0.1] * 2, [0.1] * 2, [0.1] * 2, Link(0, 1e-9),
                    edges=[(0, 1, 1000)]))  # fmt: skip
    notes = {"a": "holds 1 MB", "a → b": "4 kB a step"}
    picture = ET.fromstring(svg_timeline(step, ["a", "b"], "V", notes, ["in short"]))
    words = [e for e in picture.iter() if e.tag.endswith("text")]
    ticks = [e.text for e in words if e.get("class") == "tick"]
    assert ticks == ["0", "200 ms", "400 ms", "600 ms", "800 ms", "1 s", "1.2 s", "1.5 s"]
    told = {e.text: e for e in words}
    for name, note in notes.items():
        assert told[note].get("y") == told[name].get("y")
        assert float(told[note].get("x", 0)) > 1000 + float(told[name].get("x", 0))
    assert float(told["in short"].get("y", 0)) < float(picture.get("height", 0))
    assert {"forward", "backward", "sending"} <= set(told)
    assert "backward, inputs" not in told, "messages have kinds, and the legend is of boxes"
    thin = [e for e in picture.iter() if e.get("class") == "box thin"]
    assert len(thin) == 8, "messages of a microsecond are seen: without a white edge"


def test_a_picture_of_a_long_step_shows_every_row_to_its_end() -> None:
    ones = [1] * 8
    step = simulate(schedule("1f1b", 8, 3000), Costs(forward=ones, inputs=ones, weights=ones))
    picture = ET.fromstring(svg_timeline(step, [f"d{i}" for i in range(8)], "long"))
    ends: dict[str, float] = {}
    boxes = [e for e in picture.iter() if "box" in (e.get("class") or "")]
    for e in boxes:
        end = float(e.get("x", 0)) + float(e.get("width", 0))
        ends[e.get("y", "")] = max(ends.get(e.get("y", ""), 0.0), end)
    right = max(ends.values())
    assert len(ends) == 8 and min(ends.values()) > right - 2
    assert len(boxes) < 8 * 3000


def test_a_picture_says_which_rows_have_no_room() -> None:
    costs = Costs(forward=[1] * 200)
    drawn = svg_timeline(simulate(schedule("forward", 200, 2), costs), ["d"] * 200, "wide")
    assert "104 more rows have no room here" in drawn


def test_boxes_have_numbers_that_are_read_on_them() -> None:
    ones = [1] * 4
    step = simulate(schedule("zb_v", 2, 12), Costs(forward=ones, inputs=ones, weights=ones))
    picture = ET.fromstring(svg_timeline(step, ["a", "b"], "V"))
    boxes = [e for e in picture.iter() if e.get("class") == "box"]
    words = [e for e in picture.iter() if "mb" in (e.get("class") or "")]
    assert {w.text for w in words} == {str(b) for b in range(10)}, "two digits have no room there"
    pale = [b for b in boxes if b.get("fill-opacity")]
    assert 0 < sum(w.get("class") == "mb pale" for w in words) < len(pale) < len(boxes)


def test_a_target_names_known_devices_or_gives_their_figures() -> None:
    target = plan_of("O0", target=TARGET).target
    assert target is not None
    first, second = machine_of(target).devices
    assert first.peak("bf16") == pytest.approx(0.7 * 989.5e12) and first.memory == 80e9
    assert second.peak("bf16") == 500e12 and second.peak("f64") == 40e12
    assert second.launch == pytest.approx(5e-6)


TWO = "device a : h100\n device b : h100\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("device a : cuda(mem=80GB)", "device `a` has no `peak`"),
        ("device a : h1000", "did you mean `h100`"),
        ("device a : h100(mem=0GB)", "impossible `mem`"),
        ("device a : cuda(mem=0GB, peak=1TFLOPS, bw=1GB/s)", "impossible `mem`"),
        (f"{TWO} link a <-> b : pcie(latency=1us)", "from `a` to `b` has no `bw`, which a plan"),
        (f"{TWO} link a <-> b : pcie(dtypes=(f32))", "it has bw, latency"),
        ("device a : h100(colour=3)", "price, dtypes"),
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


@pytest.mark.parametrize(
    ("dtype", "room", "told"),
    [
        (torch.float32, 0.30, "`quantize int8`, with which its parameters take 6"),
        (torch.bfloat16, 0.30, "`quantize int4`, with which its parameters take 3"),
        (torch.bfloat16, 0.60, "`quantize int8`, with which its parameters take 6"),
        (torch.bfloat16, 0.20, None),
    ],
)
def test_what_quantizing_would_do_is_told_by_the_weights_own_type(
    dtype: torch.dtype, room: float, told: str | None
) -> None:
    with torch.device("meta"):
        layers = [nn.Linear(512, 512) for _ in range(24)]
        model, x = nn.Sequential(*layers).to(dtype), torch.ones(1, 512, dtype=dtype)
    graph = dfc.trace(model, (x,))
    whole = sum(p.nbytes for p in model.parameters())
    one = machine(1, memory=(room * whole + 8192) / 0.9)
    with pytest.raises(DfcError, match="N060") as e:
        plan(graph, one)
    if told is None:
        assert "quantize" not in str(e.value)
    else:
        assert told in str(e.value)


def test_a_pin_to_a_device_that_cannot_run_it_says_so(tower: Graph) -> None:
    two = machine(2)
    half = replace(two, devices=(two.devices[0], replace(two.devices[1], dtypes=("bf16",))))
    first = next(iter(tower.nodes))
    with pytest.raises(DfcError, match=r"N047.*pinned to `gpu1`, .* it does not compute in f32"):
        plan(tower, half, limits=Limits({first: "gpu1"}))


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
