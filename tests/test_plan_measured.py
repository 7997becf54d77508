"""Measured times in place of the model's, and plans of fewer devices that are as fast."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dfc
from dfc.cli import main
from dfc.cli.measured import measure_times, read_times
from dfc.cli.sources import Source
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.planning.fewer import fewer_devices, fewer_text
from dfc.planning.machine import Device, Machine, Wire

MODEL = """
import torch
from torch import nn

def build():
    layers = [m for _ in range(4) for m in (nn.Linear(64, 64), nn.ReLU())]
    shapes = ({0: torch.export.Dim("B", min=1, max=64)},)
    return nn.Sequential(*layers), (torch.ones(4, 64),), {}, shapes
"""
HOST = Device("host", "cpu", 1e9, 1e10, {"f32": 1e10}, 1e-6, cores=2)


def tower(device: str = "cpu") -> Graph:
    with torch.device(device):
        layers = [m for _ in range(4) for m in (nn.Linear(64, 64), nn.ReLU())]
        return dfc.trace(nn.Sequential(*layers), (torch.ones(4, 64),))


def pair(*devices: Device) -> Machine:
    wires = {(0, 1): Wire(1e9, 1e-6), (1, 0): Wire(1e9, 1e-6)}
    return Machine("pair", devices, wires)


def test_measured_times_are_those_of_devices_of_one_kind() -> None:
    graph = tower()
    gpu = replace(HOST, name="gpu", kind="cuda")
    times = {n: 1.0 for n in graph.nodes}
    everywhere = dfc.plan(graph, pair(HOST, gpu), measured=times.get)
    assert everywhere.bottleneck == 4.0
    found = dfc.plan(graph, pair(HOST, gpu), measured=times.get, measured_on="cpu")
    assert found.bottleneck < 4.0


def write(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_times_are_read_by_the_names_of_results(tmp_path: Path) -> None:
    graph = tower()
    names = [n.results[0].name for n in graph.nodes]
    times = read_times(write(tmp_path / "t.json", {"nodes": {names[1]: 2e-3}}), graph)
    assert list(times.values()) == [2e-3] and next(iter(times)).results[0].name == names[1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "cannot read times"),
        ([1], "has no times of nodes"),
        ({"nodes": {"linera": 1.0}}, r"there is no node `linera`(.|\n)*did you mean `linear"),
        ({"nodes": {"relu": "fast"}}, "`relu` takes 'fast', which is no time"),
        ({"nodes": {"relu": -1}}, "`relu` takes -1, which is no time"),
    ],
)
def test_what_is_no_file_of_times(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DfcError, match=f"D058(.|\n)*{message}"):
        read_times(write(tmp_path / "t.json", data), tower())


def test_a_model_without_weights_cannot_be_measured() -> None:
    graph = tower("meta")
    with pytest.raises(DfcError, match=r"K021.*nothing to measure"):
        measure_times(Source("tower", "graph", graph), graph, {"B": 1}, 1)


def test_parts_of_a_device_talk_over_its_own_link_and_share_its_cores() -> None:
    machine = Machine("m", (HOST,), {(0, 0): Wire(2e9, 5e-5)}).only(["host"] * 4)
    assert machine.wire(0, 1) == Wire(2e9, 5e-5)
    assert machine.devices[0].launch == 2 * HOST.launch  # two parts wait for each core
    assert HOST.part(0, 2).launch == HOST.launch and HOST.part(0, 2).cores == 1


def test_one_process_is_best_where_parts_gain_nothing() -> None:
    graph = tower()

    def make(names: list[str], most: int | None) -> Any:
        machine = Machine("m", (HOST,), {(0, 0): Wire(1e6, 1e-4)}).only(names)
        return dfc.plan(graph, machine, max_stages=most, microbatches=2)

    pinned = dfc.plan(
        graph, Machine("m", (HOST,), {(0, 0): Wire(1e6, 1e-4)}).only(["host", "host"]),
        pins={"0": "host.0", "6": "host.1"}, microbatches=2,
    )  # fmt: skip
    assert len(pinned.stages) == 2
    other = fewer_devices(pinned, ["host", "host"], make)
    assert other is not None and [s.device for s in other.stages] == ["host"]
    assert other.step_seconds < pinned.step_seconds
    assert "one process with all threads of host is best: a step" in fewer_text(pinned, other)
    longer = dfc.plan(graph, Machine("m", (HOST,), {}), microbatches=3)
    assert "of host would do: a step takes 1.50 times as long" in fewer_text(other, longer)


def test_pins_on_several_devices_leave_no_fewer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One device would be as fast, and cannot have both parts: the command ended with an error."""
    model = f"{write(tmp_path / 'model.py', MODEL)}:build"
    figures = "cpu(cores=2, mem=1GB, bw=10GB/s, peak=10GFLOPS)"
    devices = f"device a : {figures}\n  device b : {figures}"
    text = (
        f"dfc 1\n\ntarget pair {{\n  {devices}\n  link a <-> b : net(bw=1KB/s, latency=1ms)\n}}\n"
    )
    target = write(tmp_path / "pair.dfc", text)
    given = ["plan", model, "-t", str(target), "--pin", "0=a"]
    assert main([*given, "--pin", "6=b"]) == 0
    assert "alone would do" not in capsys.readouterr().out
    assert main([*given, "--pin", "0=b"]) == 2
    assert "N048" in capsys.readouterr().err


def test_where_every_device_pays_nothing_is_said() -> None:
    graph = tower()
    gpus = pair(*(replace(HOST, name=f"gpu{i}", kind="cuda", launch=1e-3) for i in range(2)))
    found = dfc.plan(graph, gpus)
    assert len(found.stages) == 2
    tried: list[int] = []

    def make(names: list[str], most: int) -> Any:
        tried.append(most)
        return dfc.plan(graph, gpus, max_stages=most)

    assert fewer_devices(found, [], make) is None
    assert not tried  # one device's own work takes longer
    idle = replace(found, idle=("gpu2",))  # which may be quicker than these
    assert fewer_devices(idle, [], make) is None and tried == [1]


def test_the_command_measures_and_reads_what_it_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"{write(tmp_path / 'model.py', MODEL)}:build"
    arguments = ["plan", model, "--on", "host,host", "--size", "B=4", "--max-stages", "2"]
    assert main([*arguments, "--measure", "--json"]) == 0
    printed = capsys.readouterr().out
    data = json.loads(printed)
    assert len(data["nodes"]) == 8 and all(t > 0 for t in data["nodes"].values())
    assert sum(data["measured_nodes"]) == 8 and "fewer_devices" in data
    total = sum(s["seconds"] for s in data["stages"])
    assert total == pytest.approx(sum(data["nodes"].values()))
    times = write(tmp_path / "t.json", printed)
    assert main([*arguments, "--measured", str(times)]) == 0
    told = capsys.readouterr().out
    assert "measured times: all of stage 0" in told
    classes = data["classes"]
    assert set(classes) == {"matmul", "plain"} and classes["matmul"]["predicted"] > 0
    assert sum(c["measured"] for c in classes.values()) == pytest.approx(total)
    assert "the target's own figures give" in told and "matmul" in told.splitlines()[-1]
