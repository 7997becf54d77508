"""Measuring a machine: facts from times, a target that reads back, links, the command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from dfc.cli import main
from dfc.cli.calibrate import _one_each, _show, busy_text
from dfc.errors import DfcError
from dfc.planning.cost import Work, work_of
from dfc.planning.machine import Device
from dfc.recipe.calibrated import doubt_text, fact_text, require_word, target_text
from dfc.recipe.machines import machine_of
from dfc.recipe.sources import plan_of
from dfc.recipe.targets import RATES
from dfc.runtime.calibrate import sampling
from dfc.runtime.calibrate.blocks import blocks
from dfc.runtime.calibrate.device import Measured
from dfc.runtime.calibrate.equations import readings_of
from dfc.runtime.calibrate.fitting import fitted, solve
from dfc.runtime.calibrate.inplace import Clocked, clocked, quiet_seconds
from dfc.runtime.calibrate.links import MeasuredLink, messages
from dfc.runtime.calibrate.probes import CPU, GPU, Sizes, chains_of, sizes_for
from dfc.runtime.calibrate.sampling import Reading, quiet, reading, sample_all

FACTS = {"cores": 2.0, "mem": 24e9, "cache": 32e6}


def test_a_reading_is_the_median_and_how_far_the_quartiles_are_apart() -> None:
    found = reading([5.0, 1.0, 2.0, 4.0, 300.0])
    assert (found.value, found.spread, found.samples) == (4.0, 0.75, 5)
    assert found.per(8.0).value == 2.0 and found.per(8.0).spread == 0.75
    assert quiet([float(n) for n in range(30)]).value == 3.0


def test_samples_are_taken_in_turns_and_time_ends_them() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    found = sample_all(runs, rounds=50, seconds=0.0)
    assert found["a"].samples == found["b"].samples == 5
    turns = [x for x, before in zip(order, [None, *order], strict=False) if x != before]
    assert turns == ["a", "b"] * 6  # a warm-up and five rounds


class Queue:
    """A clock of a host that leaves work to a device, and waits for it where it is told to."""

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def call(self, starting: float, working: float) -> None:
        self.host += starting
        self.device = max(self.device, self.host) + working

    def wait(self) -> None:
        self.host = max(self.host, self.device) + 4e-6

    def perf_counter(self) -> float:
        return self.host


def test_a_call_takes_what_keeps_the_host_or_the_device_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue = Queue()
    monkeypatch.setattr(sampling, "time", queue)
    runs = {"small": partial(queue.call, 2e-5, 3e-6), "large": partial(queue.call, 2e-5, 2e-3)}
    found = sample_all(runs, rounds=5, seconds=1.0, wait=queue.wait)
    assert found["small"].value == pytest.approx(2e-5, rel=0.02)
    assert found["large"].value == pytest.approx(2e-3, rel=0.02)


def test_a_small_difference_is_no_measurement() -> None:
    took = Reading(10e-6, 0.02, 9)
    assert took.minus(4e-6).spread == pytest.approx(0.02 * 10 / 6)
    assert took.minus(10e-6).value == pytest.approx(1e-6)  # a tenth is left
    each = took.beyond(4e-6, 100)
    assert each.is_seen and each.value == pytest.approx(60e-9)
    assert each.spread == pytest.approx(2e-9 / 60e-9)
    for start in (9.9e-6, 12e-6):
        nothing = took.beyond(start, 100)
        assert not nothing.is_seen and nothing.least == pytest.approx(2e-9)
        assert doubt_text(nothing, "time") == "not told from nothing: below 2ns"
        assert doubt_text(nothing.at(1e-8), "time") == "quartiles 20% apart"  # others told more


@pytest.mark.parametrize(
    ("spread", "text"),
    [
        (0.05, ""),
        (0.42, "quartiles 42% apart"),
        (376.24, "unsteady: measure again on a quiet machine"),
    ],
)
def test_spreads_are_told_as_what_they_mean(spread: float, text: str) -> None:
    assert doubt_text(Reading(1e-6, spread, 9), "time") == text


def test_the_table_tells_what_was_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    readings = {
        "launch": Reading(3e-6, 0.03, 9), "bw": Reading(1e9, 376.24, 9),
        "launch_each": Reading(0.0, 0.0, 9, least=5e-9),
    }  # fmt: skip
    _show("host.dfc", [Measured("cpu0", "cpu", FACTS, readings)], [])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["cpu0", "launch", "3", "µs", "3%"] in rows
    assert ["cpu0", "launch_each", "below", "5", "ns"] in rows
    assert ["cpu0", "bw", "1", "GB/s", "unsteady"] in rows
    assert any(row[:1] == ["unsteady:"] for row in rows)


def modelled_times(device: Device, sizes: Sizes = CPU) -> dict[str, Reading]:
    """The time of every chain on a device that is as the model says."""
    return {
        fact: Reading(sum(work_of(n, {}).seconds(device) for n in chain.graph().nodes), 0.01, 9)
        for fact, chain in chains_of(sizes, device.kind).items()
    }


def test_facts_are_those_of_a_device_that_is_as_the_model_says() -> None:
    kinds = ("view", "matmul", "conv", "unfold", "norm", "attention")
    launches = {k: (4 + i) * 1e-6 for i, k in enumerate(kinds)} | {"conv": 6e-5, "unfold": 2e-5}
    device = Device(
        "d", "cpu", 24e9, 11e9, {"f32": 80e9, "f16": 3e9, "bf16": 5e9, "f64": 40e9}, 4e-6,
        rates={"conv": 60e9, "attention": 50e9, "math": 6e9}, launches=launches,
        grain=6.0, cache=8e6, cache_bandwidth=90e9, layout_bandwidth=8e9, each_matrix=7e-7,
        each_product=2e-7, fresh_bandwidth=3e9,
    )  # fmt: skip
    facts = readings_of(modelled_times(device), CPU, 32e6, "cpu")
    found = {k: r.value for k, r in facts.items()}
    wanted: Mapping[str, float] = {
        "peak": 80e9, "peak_f16": 3e9, "peak_bf16": 5e9, "peak_f64": 40e9, "bw": 11e9,
        "rate_conv": 60e9, "rate_attention": 50e9, "rate_math": 6e9, "launch": 4e-6,
        "bw_cache": 90e9, "bw_conv": 8e9, "launch_each": 7e-7, "grain": 6.0,
        "launch_product": 2e-7, "bw_fresh": 3e9, "cache": 8e6,
        **{f"launch_{k}": v for k, v in launches.items()},
    }  # fmt: skip
    for fact, value in wanted.items():
        assert found[fact] == pytest.approx(value, rel=0.15), fact


def test_a_gpu_starts_operators_while_others_run() -> None:
    kinds = ("view", "matmul", "conv", "unfold", "norm", "attention")
    launches = {k: (6 + 4 * i) * 1e-6 for i, k in enumerate(kinds)}
    device = Device(
        "d", "cuda", 80e9, 2.6e12, {"f32": 50e12, "f16": 800e12, "bf16": 800e12, "f64": 60e12},
        8e-6, rates={"conv": 100e12, "attention": 40e12, "math": 4e12}, launches=launches,
        grain=60.0, cache=50e6, cache_bandwidth=4e12, layout_bandwidth=2e12,
    )  # fmt: skip
    found = {
        k: r.value for k, r in readings_of(modelled_times(device, GPU), GPU, 50e6, "cuda").items()
    }
    wanted: Mapping[str, float] = {
        "peak": 50e12, "peak_f16": 800e12, "peak_bf16": 800e12, "peak_f64": 60e12, "bw": 2.6e12,
        "rate_conv": 100e12, "rate_attention": 40e12, "rate_math": 4e12, "launch": 8e-6,
        "bw_cache": 4e12, "bw_conv": 2e12, "grain": 60.0, "cache": 50e6,
        **{f"launch_{k}": v for k, v in launches.items()},
    }  # fmt: skip
    for fact, value in wanted.items():
        assert found[fact] == pytest.approx(value, rel=0.15), fact
    assert not {"launch_each", "launch_product"} & found.keys()


def test_no_probe_of_a_gpus_rates_is_hidden_by_its_start() -> None:
    """On a fast GPU with a slow host, as an H100 was measured with."""
    fast = Device(
        "d", "cuda", 80e9, 2.7e12, {"f32": 54e12, "f16": 810e12, "bf16": 850e12, "f64": 67e12},
        0.0, rates={"conv": 100e12, "attention": 50e12, "math": 6e12}, grain=40.0, cache=50e6,
        cache_bandwidth=4e12, layout_bandwidth=2.7e12,
    )  # fmt: skip
    starts = {"rate_conv": 37e-6, "bw_conv": 15e-6, "rate_attention": 33e-6, "rate_math": 8e-6,
              "bw_cache": 2 * 8e-6, "peak": 30e-6, "bw": 8e-6, "grain": 4 * 30e-6,
              "peak_bf16": 30e-6}  # fmt: skip
    for quick in (False, True):
        sizes = sizes_for("cuda", quick)
        took = modelled_times(fast, sizes)
        for fact, start in starts.items():
            assert took[fact].value > start, fact
    assert sizes_for("cpu", True) != sizes_for("cpu", False)


def test_blocks_show_what_starts_take_on_a_gpu() -> None:
    kinds = ("view", "matmul", "conv", "norm", "attention", "reduce", "gather")
    real = Device(
        "d", "cuda", 80e9, 2e12, {"f32": 50e12}, 9e-6,
        launches={k: (5 + 3 * i) * 1e-6 for i, k in enumerate(kinds)},
    )  # fmt: skip
    start = replace(real, launch=2e-6, launches=dict.fromkeys(kinds, 9e-5))
    few, many = (
        [(w, w.launching(real)) for name, b in blocks().items() for w in b.works
         if name.startswith("many") == wide] for wide in (False, True)
    )  # fmt: skip
    found = fitted(start, few, many)
    assert found.launch == pytest.approx(9e-6)
    for kind in kinds:
        assert found.launches[kind] == pytest.approx(real.launches[kind]), kind
    assert replace(found, launch=0.0, launches={}) == replace(real, launch=0.0, launches={})


def test_a_device_is_fitted_to_what_blocks_of_mixed_operators_take() -> None:
    rates = {"math": 6e9, "norm": 6e9, "reduce": 6e9, "attention": 5e10, "conv": 6e10}
    start = Device(
        "d", "cpu", 1e9, 1e10, {"f32": 1e11}, 5e-6, rates=rates, grain=8.0, cache=1e7,
        launches={"view": 4e-6, "matmul": 8e-6, "conv": 5e-5, "norm": 9e-6, "attention": 2e-5},
        cache_bandwidth=5e10, layout_bandwidth=1e10,
    )  # fmt: skip
    kinds = ("view", "matmul", "conv", "norm", "attention", "reduce", "gather")
    real = replace(
        start, launch=7e-6, launches={k: (6 + 3 * i) * 1e-6 for i, k in enumerate(kinds)},
        rates={**rates, "math": 4e9, "norm": 4e9, "reduce": 4e9, "gather": 1e9},
        cache_bandwidth=5e10 / 1.5, grain=12.0, each_matrix=5e-7, layout_bandwidth=6e9,
    )  # fmt: skip
    works = {wide: [w for name, b in blocks().items() for w in b.works
                    if name.startswith("many") == wide] for wide in (False, True)}  # fmt: skip
    assert {w.kind for w in works[True]} >= {*kinds, "plain", "math"}
    few, many = ([(w, w.seconds(real)) for w in works[wide]] for wide in (False, True))
    found = fitted(start, few, many)
    for nodes in (few, many):
        total = sum(t for _, t in nodes)
        assert sum(w.seconds(found) for w, _ in nodes) == pytest.approx(total, rel=0.05)
    assert found.launch == pytest.approx(7e-6, rel=0.1)
    for kind in kinds:
        assert found.launches[kind] == pytest.approx(real.launches[kind], rel=0.1), kind
    assert found.layout_bandwidth == pytest.approx(6e9, rel=0.15)
    assert found.each_matrix == pytest.approx(5e-7, rel=0.1)
    assert found.grain == pytest.approx(12.0, rel=0.1)
    assert found.rates["gather"] == pytest.approx(1e9, rel=0.1)
    assert found.rates["math"] == pytest.approx(4e9, rel=0.2)
    assert found.rates["conv"] == 6e10 and found.peaks == start.peaks


def test_where_a_function_takes_a_value() -> None:
    assert solve(lambda x: x * x, 9.0, 0.0, 10.0) == pytest.approx(3.0)
    assert solve(lambda x: x, 20.0, 0.0, 10.0) == pytest.approx(10.0)


def test_nodes_are_timed_where_they_stand() -> None:
    block = blocks()["lookups"]
    run = clocked(block.graph, block.inputs)
    first, second = run(), run()
    assert len(first.nodes) == len(second.nodes) == len(block.works)
    assert all(0 < t < 10 for t in (*second.nodes, second.around))
    runs = [Clocked((2.0, 3.0), 1.0), Clocked((3.0, 2.5), 9.0)]
    # The quickest of each, 2 and 2.5, as the run of 5 has them; half of the least around for each.
    assert quiet_seconds(runs) == pytest.approx([2.0 / 0.9 + 0.5, 2.5 / 0.9 + 0.5])
    assert quiet_seconds([Clocked((1.0, 9.0), 0.0), Clocked((9.0, 1.0), 0.0)]) == [1.3, 1.3]


def measured(name: str = "cpu0") -> Measured:
    values = {
        "time": 3.217e-6, "flops/s": 81.239e9, "bytes/s": 23.456e9, "bytes": 1e6, "number": 11.5,
    }  # fmt: skip
    readings = {f: Reading(values[d], 0.3, 9) for f, d in RATES.items() if f not in FACTS}
    return Measured(name, "cpu", FACTS, readings)


def test_a_target_says_what_was_measured_and_reads_back_equal() -> None:
    link = MeasuredLink("a", "b", "loopback", Reading(6e-5, 0, 9), Reading(1.5e9, 0, 9))
    own = replace(link, sink="a")
    text = target_text("here", [measured("a"), measured("b")], [link, own], ["on a machine"])
    target = plan_of("O0", target=text).target
    assert target is not None and "# on a machine" in text and "30% apart" in text
    again = plan_of("O0", target=f"dfc 1\n{target}\n").target
    assert again == target and again.devices == target.devices
    machine = machine_of(target)
    machine.check()
    first = machine.devices[0]
    assert first.bandwidth == pytest.approx(23.46e9) and first.launch == pytest.approx(3.217e-6)
    assert first.rates["norm"] == first.rates["math"] and first.launches["conv"] == first.launch
    assert machine.only(["a", "a"]).wire(0, 1).bandwidth == 1.5e9
    assert machine.wire(0, 1).bandwidth == 1.5e9 and machine.wire(0, 1).latency == pytest.approx(
        6e-5
    )


@pytest.mark.parametrize(
    ("value", "dimension", "text"),
    [
        (81.2394e9, "flops/s", "81.24GFLOPS"),
        (3.2e-6, "time", "3.2us"),
        (0.0, "time", "0ns"),
        (999.99e6, "bytes/s", "1000MB/s"),
        (31.166, "number", "31.17"),
    ],
)
def test_facts_have_four_digits_and_a_unit(value: float, dimension: str, text: str) -> None:
    assert fact_text(value, dimension) == text


def test_a_name_that_no_target_has_is_refused_before_measuring() -> None:
    require_word("lane_0")
    with pytest.raises(DfcError, match=r"N049.*`two words`"):
        require_word("two words")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ("cache=32MB", "one of `cache` and `bw_cache`, not both"),
        ("grain=4, launch_view=0us, bw_cache=0GB/s, cache=1MB", "impossible `bw_cache`: 0"),
    ],
)
def test_facts_that_cannot_be(facts: str, message: str) -> None:
    text = f"dfc 1\ntarget t {{ device a : cpu(mem=1GB, peak=1GFLOPS, bw=1GB/s, {facts}) }}\n"
    with pytest.raises(DfcError, match=rf"N045.*{message}"):
        machine_of(plan_of("O0", target=text).target or pytest.fail("no target"))


def test_small_matrices_cached_bytes_and_classes_have_times_of_their_own() -> None:
    device = Device(
        "d", "cpu", 1e9, 1e9, {"f32": 1e9}, 5e-6, rates={"conv": 1e8},
        launches={"view": 1e-6, "conv": 9e-6}, grain=10.0, cache=1e3, cache_bandwidth=1e10,
    )  # fmt: skip
    product = Work(2e3, 0.0, 0.0, "f32", "matmul", (10.0, 10.0, 10.0))
    assert product.seconds(replace(device, kind="cuda")) == pytest.approx(8 * 2e-6)
    assert Work(1e3, 0.0, 0.0, "f32").seconds(replace(device, kind="cuda")) == 5e-6
    assert product.seconds(device) == pytest.approx(1.25 * 4 * 2 * 2e-6 + 5e-6)
    inside = Work(0.0, 0.0, 0.0, "f32", "attention", inner=2, fresh=1e3)  # a mask, and new pages
    assert inside.seconds(replace(device, fresh_bandwidth=1e9)) == pytest.approx(15e-6 + 1e-6)
    assert Work(1e3, 0.0, 0.0, "f32", "conv").seconds(device) == pytest.approx(1e-5 + 9e-6)
    assert Work(0.0, 0.0, 0.0, "f32", "view").seconds(device) == 1e-6
    heads = Work(0.0, 0.0, 0.0, "f32", "attention", matrices=8.0)
    assert heads.seconds(replace(device, each_matrix=1e-6)) == pytest.approx(13e-6)
    moved = replace(device, layout_bandwidth=1e9)  # beside computing, not instead of it
    assert Work(1e3, 1e3, 0.0, "f32", "conv").seconds(moved) == pytest.approx(2e-5)
    assert Work(0.0, 1e3, 1e3, "f32").seconds(device) == pytest.approx(1e-7 + 1e-6 + 5e-6)


def test_a_target_has_the_links_that_a_pipeline_takes_and_tells_of_others() -> None:
    sockets = MeasuredLink("a", "a", "sockets", Reading(1e-5, 0, 9), Reading(5e9, 0, 9))
    gloo = MeasuredLink("a", "a", "loopback", Reading(6e-5, 0, 9), Reading(1.5e9, 0, 9))
    links, notes = _one_each([sockets, gloo], ["on a machine"])
    assert links == [sockets]
    assert notes == ["on a machine", "a -> a by loopback: 1.5 GB/s, 60 µs"]
    text = target_text("here", [measured("a")], links, notes)
    target = plan_of("O0", target=text).target
    assert target is not None
    assert machine_of(target).only(["a", "a"]).wire(0, 1).bandwidth == 5e9


def test_figures_that_were_measured_beside_other_work_say_so() -> None:
    assert busy_text(0.3, 2) == "" and "11.0 tasks on 2 cores" in busy_text(11.0, 2)


@pytest.mark.parametrize("kind", ["local", "gloo"])
def test_messages_between_two_processes_are_measured(kind: str) -> None:
    link = messages("cpu0", kind, quick=True)
    assert link.latency.samples == 110 and 1e-6 < link.latency.value < 1
    assert 1e6 < link.bandwidth.value < 1e12


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "host.dfc")
    arguments = ["calibrate", "-o", path, "--quick", "--no-links", "--threads", "1", "--no-gpus"]
    assert main([*arguments, "--json"]) == 0
    (device,) = json.loads(capsys.readouterr().out)["devices"]
    assert device["measured"]["peak"]["value"] > 1e8 and device["cores"] == 1
    target = plan_of("O0", target=Path(path)).target
    assert target is not None
    (found,) = machine_of(target).devices
    assert found.peak("f32") == pytest.approx(device["measured"]["peak"]["value"], rel=1e-3)
    machine_of(target).check()  # what a plan asks of it
    assert set(found.launches) == {
        "view", "matmul", "conv", "unfold", "attention", "norm", "reduce", "gather"
    }  # fmt: skip
    assert main(["check", path]) == 0 and main(["fmt", "--check", path]) == 0
    before = Path(path).read_text()
    assert main(arguments) == 2  # it is not overwritten, and nothing is measured
    assert "--force" in capsys.readouterr().err and Path(path).read_text() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_and_its_links(tmp_path: Path) -> None:
    path = tmp_path / "host.dfc"
    assert main(["calibrate", "-o", str(path), "--quick"]) == 0
    target = plan_of("O0", target=path).target
    assert target is not None
    machine = machine_of(target)
    assert machine.devices[1].kind == "cuda"
    assert machine.devices[1].peak("f16") > machine.devices[0].peak("f32")
    assert machine.wire(0, 1).bandwidth > 1e9 and machine.wire(1, 0).bandwidth > 1e9
