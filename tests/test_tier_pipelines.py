"""Pipelines whose ranks have less memory than weights: the same results, bytes as planned."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfc
from dfc.api import opened
from dfc.cli import main
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.ir.weights import SafetensorsData
from dfc.planning.machine import Device, Machine, Wire
from dfc.planning.model import Wish
from dfc.planning.pipeline import plan, stage_of
from dfc.planning.streaming import Hop, Layer
from dfc.planning.tier_plan import stream_hops
from dfc.planning.tiers import ALIGN, Tiers, least_bytes, plan_tiers, shares
from dfc.planning.weight_blocks import weight_bytes
from dfc.runtime.kernels.graph import are_built
from dfc.runtime.pipeline.local import Pipeline
from dfc.runtime.pipeline.processes import Processes
from dfc.runtime.tiers.reader import Reader
from dfc.runtime.tiers.streamed import Streamed
from tests.test_pipeline import leaves, one_by_one, stages
from tests.test_processes import during
from tests.test_torchrun import environment

B = torch.export.Dim("B", min=1, max=64)


class Tower(nn.Module):
    """A tied table that the first stage reads and the last one, turned, too."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(64, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(layers)
        )

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(ids)
        for layer in self.layers:
            x = x + layer(x)
        return x @ self.table.weight.T, x


def ids(size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (size, 12), generator=torch.Generator().manual_seed(seed))


def saved(path: Path, layers: int, width: int, recipe: str | None = None) -> Path:
    torch.manual_seed(0)
    with_passes: dict[str, Any] = {"passes": []} if recipe is None else {"recipe": recipe}
    compiled = dfc.compile(
        Tower(layers, width).eval(), (ids(6),), dynamic_shapes=({0: B},), engine="eager",
        **with_passes,
    )  # fmt: skip
    compiled.save(path)
    return path


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("tiers") / "tower.dfcpkg", 8, 96)


@pytest.fixture
def graph(tower: Path) -> Graph:
    return opened(tower, build=False).graph


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name == "dfc weights"]


def memory_of(graph: Graph, placed: dict[Node, int], share: float) -> list[int]:
    """So much of the weights of each of as many ranks as stages, and room for a microbatch."""
    found = [1 << 16] * (1 + max(placed.values()))
    for p in graph.parameters.values():
        for s in {placed[n] for n in p.users}:
            found[s] += int(weight_bytes(p) * share)
    return found


def equal(pipeline: Pipeline, x: Tensor) -> None:
    """The pipeline's results are those of its microbatches one after another, to the bit."""
    found = leaves(pipeline(x))
    for f, e in zip(found, one_by_one(pipeline.graph, pipeline, [x]), strict=True):
        assert torch.equal(f, e)


@pytest.mark.parametrize(("count", "placement"), [(2, None), (3, None), (4, [0, 1, 0, 1])])
def test_results_are_bit_equal_and_bytes_as_planned(
    graph: Graph, count: int, placement: list[int] | None
) -> None:
    placed = stages(graph, count)
    memory = memory_of(graph, placed, 0.5)
    if placement:
        memory = [sum(m for m, r in zip(memory, placement, strict=True) if r == k) for k in (0, 1)]
    with Pipeline(
        graph, placed, microbatches=4, placement=placement, memory=memory, example=[ids(8)]
    ) as pipeline:
        assert sum(bool(t.streamed) for t in pipeline.tiers) >= 2
        for rank, limit in enumerate(memory):
            mine = [t for t, r in zip(pipeline.tiers, pipeline.placement, strict=True) if r == rank]
            assert sum(t.held_bytes for t in mine) <= limit
        runners = [r for r in pipeline._runners if isinstance(r, Streamed)]
        readers = [r.carrier for r in runners if isinstance(r.carrier, Reader)]
        for size, parts in ((8, 4), (11, 4), (3, 3)):
            before = [settled(r) for r in readers]
            equal(pipeline, ids(size, size))
            planned = [parts * t.bytes_per_pass for t in pipeline.tiers if t.streamed]
            read = [settled(r) - b for r, b in zip(readers, before, strict=True)]
            assert [x for x in read if x] == planned
            assert pipeline.last is not None
            assert list(pipeline.last[1].streamed.values()) == planned
            assert sum(pipeline.report().streamed) == sum(planned)


def test_a_plan_with_several_stages_a_device_streams_what_it_says(graph: Graph) -> None:
    """Two parts of this processor with 45 % of their weights each, and two stages each."""
    size = sum(weight_bytes(p) for p in graph.parameters.values())
    one = Device("part0", "cpu", size * 0.25, 1e10, {"f32": 1e10})
    target = Machine("parts", (one, replace(one, name="part1")),
                     {(0, 1): Wire(1e9), (1, 0): Wire(1e9)})  # fmt: skip
    found = plan(graph, target, sizes={"B": 2}, wish=Wish(microbatches=4), stages_per_device=2,
                 hops=stream_hops(target))  # fmt: skip
    assert sum(bool(t.streamed) for t in found.tiers.values()) >= 2
    memory = [sum(found.tiers[s].memory for s in mine) for mine in ((0, 2), (1, 3))]
    with Pipeline(
        graph, stage_of(found), microbatches=4, placement=found.program.placement, memory=memory
    ) as pipeline:
        equal(pipeline, ids(8))
        streamed = pipeline.report().streamed
    brought = [4 * s.streams for s in found.stages]
    assert list(streamed) == [brought[0] + brought[2], brought[1] + brought[3]]


def test_the_command_runs_a_plan_with_several_stages_a_device_within_memories(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = (
        "dfc 1\ntarget pair {\n  device a : cpu(mem=1GB, peak=10GFLOPS, bw=10GB/s)\n"
        "  device b : cpu(mem=1GB, peak=10GFLOPS, bw=10GB/s)\n"
        "  link a <-> b : local(bw=1GB/s, latency=1us)\n}\nrecipe staged for pair {\n"
        "  partition on a, b with stages_per_device=2, microbatches=4\n}\n"
    )
    path = saved(tmp_path / "m.dfcpkg", 8, 96, recipe)
    found = opened(path, build=False).plan
    assert found is not None and found.program.placement == (0, 1, 0, 1)
    sums = memory_of(found.graph, stage_of(found), 0.5)
    memory = f"{sums[0] + sums[2]},{sums[1] + sums[3]}"
    given = ["run", str(path), "--random", "--size", "B=8", "--pipeline", "plan", "--json"]
    for on in ("threads", "processes"):
        assert main([*given, "--memory", memory, "--on", on]) == 0
        told = json.loads(capsys.readouterr().out)["pipeline"]
        each = [s["tiers"] for s in told["stages"]]
        assert [s["rank"] for s in told["stages"]] == [0, 1, 0, 1]
        assert sum(bool(t["streamed"]) for t in each) >= 2
        brought = [4 * t["bytes_per_pass"] for t in each]
        assert told["streamed_bytes"] == [brought[0] + brought[2], brought[1] + brought[3]]


def settled(reader: Reader) -> int:
    reader.settle()
    return reader.bytes_read


def test_a_stage_that_fits_streams_nothing_and_keeps_its_engine(graph: Graph) -> None:
    placed = stages(graph, 2)
    small, _ = memory_of(graph, placed, 0.5)
    with Pipeline(graph, placed, microbatches=2, memory=[small, "1GiB"]) as pipeline:
        first, second = pipeline.tiers
        assert first.streamed and not second.streamed and second.memory == 1 << 30
        equal(pipeline, ids(6))
        assert pipeline.report().streamed == (2 * first.bytes_per_pass, 0)
    with pytest.raises(DfcError, match=r"K073.*stage 0"):
        Pipeline(graph, placed, memory=[small, "1GiB"], engine=["inductor", "eager"])


@pytest.mark.skipif(not are_built(), reason="the kernels are not built")
@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_are_streamed_as_the_kernels_have_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, in_files: bool
) -> None:
    """GELU among them, which has other bits where it stands alone."""
    if in_files:
        monkeypatch.setattr("dfc.runtime.kernels.packed.LEAST_BYTES", 1)
        monkeypatch.setattr("dfc.runtime.kernels.packed.cache_folder", lambda name: tmp_path)
    recipe = f"dfc 1\nrecipe q {{ quantize int{bits} }}"
    package = saved(tmp_path / "small.dfcpkg", 4, 256, recipe=recipe)
    graph = opened(package, build=False).graph
    placed = stages(graph, 2)
    with Pipeline(graph, placed, microbatches=2) as pipeline:
        expected = leaves(pipeline(ids(6)))
    memory = memory_of(graph, placed, 0.6)
    with Pipeline(graph, placed, microbatches=2, memory=memory) as pipeline:
        assert any(t.streamed for t in pipeline.tiers)
        for f, e in zip(leaves(pipeline(ids(6))), expected, strict=True):
            assert torch.equal(f, e)


def test_a_rank_that_is_lost_streams_again(tmp_path: Path) -> None:
    graph = opened(saved(tmp_path / "wide.dfcpkg", 8, 384), build=False).graph
    placed = stages(graph, 2)
    memory = memory_of(graph, placed, 0.4)
    with Processes(graph, placed, microbatches=16, memory=memory) as pipeline:
        assert all(t.streamed for t in pipeline.tiers)
        planned = tuple(16 * t.bytes_per_pass for t in pipeline.tiers)
        equal(pipeline, ids(16))
        assert pipeline.report().streamed == planned
        before = pipeline.pids
        thread, _ = during(pipeline, 1, signal.SIGKILL)
        while thread.is_alive():  # a step may end before the signal comes
            equal(pipeline, ids(16, 1))
        thread.join()
        equal(pipeline, ids(16, 2))
        assert pipeline.incidents and pipeline.pids[1] != before[1]
        assert pipeline.report().streamed == planned


def test_a_memory_that_is_too_small_names_the_rank_and_what_would_do(graph: Graph) -> None:
    placed = stages(graph, 2)
    with pytest.raises(DfcError, match="N064") as e:
        Pipeline(graph, placed, memory=["1GiB", "8KiB"])
    assert e.value.status == 6
    told = str(e.value)
    assert "rank 1 has 8 KiB, which do not hold stage 1" in told and "would do" in told
    with pytest.raises(DfcError, match=r"N064.*stages 0 and 1"):
        Pipeline(graph, placed, placement=[0, 0], memory="8KiB")
    with pytest.raises(DfcError, match="N053"):
        Pipeline(graph, placed, memory=["1GiB", "1GiB", "1GiB"])
    with pytest.raises(DfcError, match="Q010"):
        Pipeline(graph, placed, memory="a lot")


def test_weights_that_are_in_memory_are_refused() -> None:
    torch.manual_seed(0)
    graph = dfc.trace(Tower(4, 64).eval(), (ids(4),), dynamic_shapes=({0: B},))
    placed = stages(graph, 2)
    for made in (Pipeline, Processes):  # before a process is started
        with pytest.raises(DfcError, match="K070"):
            made(graph, placed, memory=memory_of(graph, placed, 0.5))


def test_a_file_that_changes_stops_the_step_with_its_stage(tmp_path: Path) -> None:
    graph = opened(saved(tmp_path / "tower.dfcpkg", 4, 96), build=False).graph
    placed = stages(graph, 2)
    memory = memory_of(graph, placed, 0.5)
    with Pipeline(graph, placed, microbatches=2, memory=memory) as pipeline:
        equal(pipeline, ids(4))
        data = next(iter(graph.parameters.values())).data
        assert isinstance(data, SafetensorsData)
        data.path.touch()
        with pytest.raises(DfcError, match=r"stage [01] failed on microbatch 0.*has changed"):
            pipeline(ids(4))


@pytest.mark.parametrize("seed", range(6))
def test_shares_of_a_memory_hold_what_they_must(seed: int) -> None:
    rng = random.Random(seed)
    parts = []
    for k in range(rng.randint(1, 4)):
        sizes = [ALIGN * rng.randint(1, 9) for _ in range(rng.randint(1, 8))]
        weights = tuple({f"w{k}.{i}": size} for i, size in enumerate(sizes))
        layers = tuple(Layer(1, size) for size in sizes)
        parts.append(Tiers(layers, weights, (), Hop(1), 0, fixed=ALIGN * rng.randint(0, 3)))
    least, whole = sum(map(least_bytes, parts)), sum(p.held_bytes for p in parts)
    for memory in (least, (least + whole) // 2, whole - 1, whole, 2 * whole):
        found = shares(max(least, memory), parts)
        assert sum(found) <= max(least, memory)
        for share, p in zip(found, parts, strict=True):
            plan = plan_tiers(p.layers, p.weights, share, p.hop, p.fixed)
            assert plan.held_bytes <= share
            assert memory < whole or not plan.streamed
    assert sum(shares(least // 2, parts)) <= least // 2
    for p in parts:
        with pytest.raises(DfcError, match="N064"):
            plan_tiers(p.layers, p.weights, least_bytes(p) - 1, p.hop, p.fixed)


def test_the_command_tells_what_each_rank_was_brought(
    tower: Path, graph: Graph, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    memory = ",".join(map(str, memory_of(graph, stages(graph, 2), 0.6)))
    given = ["run", str(tower), "--size", "B=8", "--pipeline", "2", "-m", "4"]
    outputs = [tmp_path / "whole.npz", tmp_path / "streamed.npz"]
    assert main([*given, "-o", str(outputs[0])]) == 0
    capsys.readouterr()
    assert main([*given, "--memory", memory, "--json", "-o", str(outputs[1])]) == 0
    told = json.loads(capsys.readouterr().out)["pipeline"]
    each = [s["tiers"] for s in told["stages"]]
    assert any(t["streamed"] for t in each) and "unsplit_seconds" not in told
    assert told["streamed_bytes"] == [4 * t["bytes_per_pass"] for t in each]
    assert all(t["held_bytes"] <= t["memory"] for t in each)
    a, b = (np.load(path) for path in outputs)
    assert all((a[name] == b[name]).all() for name in a.files)
    assert main([*given, "--memory", memory]) == 0
    assert "each of 4 microbatches is a pass" in capsys.readouterr().out
    assert main([*given, "--memory", "1KB"]) == 6
    assert main([*given, "--memory", "1GB,1GB,1GB"]) == 2
    assert main(["run", str(tower), "--memory", "1GB,1GB"]) == 2
    capsys.readouterr()


@pytest.mark.slow
def test_ranks_of_torchrun_take_the_plan_of_the_first(tower: Path, graph: Graph) -> None:
    memory = ",".join(map(str, memory_of(graph, stages(graph, 2), 0.6)))
    given = ["run", str(tower), "--size", "B=8", "--pipeline", "2", "-m", "4", "--memory"]
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m",
                "dfc.cli"]  # fmt: skip
    options = ["--on", "torchrun", "--json"]
    for size, status in ((memory, 0), ("1KB", 1)):
        done = subprocess.run(
            [*launched, *given, size, *options], env=environment(), capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        if status:
            assert "N064" in done.stderr and "do not hold stage 0" in done.stderr
            continue
        told = json.loads(done.stdout)["pipeline"]
        each = [s["tiers"] for s in told["stages"]]
        assert any(t["streamed"] for t in each)
        assert told["streamed_bytes"] == [4 * t["bytes_per_pass"] for t in each]


def test_plans_travel_as_they_are(graph: Graph) -> None:
    from dfc.runtime.tiers.stages import plan_data, plan_of

    placed = stages(graph, 2)
    with Pipeline(graph, placed, memory=memory_of(graph, placed, 0.5)) as pipeline:
        for plan in pipeline.tiers:
            came = plan_of(json.loads(json.dumps(plan_data(plan))))
            assert came == plan and came.pass_seconds == plan.pass_seconds
            assert replace(came, memory=0) != plan
