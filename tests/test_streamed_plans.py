"""Plans whose stages do not fit their devices: what they stream, by the formulas of tiers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import dfc
from dfc.cli import main
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.planning.machine import Device, Machine, Wire
from dfc.planning.model import Wish
from dfc.planning.pipeline import Plan, plan
from dfc.planning.planfile import of_text, to_text
from dfc.planning.streamed_stages import streamed_text
from dfc.planning.tier_plan import DISK, host_memory, stream_hops
from dfc.planning.weight_blocks import weight_bytes

LAYERS, WIDTH = 12, 64
B = torch.export.Dim("B", min=1, max=64)


@pytest.fixture(scope="module")
def chain() -> Graph:
    torch.manual_seed(0)
    layers = [m for _ in range(LAYERS) for m in (nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU())]
    return dfc.trace(nn.Sequential(*layers), (torch.randn(4, WIDTH),), dynamic_shapes=({0: B},))


def machine(memory: float, link: float, count: int = 2, flops: float = 1e9) -> Machine:
    """GPUs with so much memory each, and a host that computes next to nothing."""
    gpus = tuple(Device(f"gpu{i}", "cuda", memory, 1e12, {"f32": flops}) for i in range(count))
    host = Device("host", "cpu", 1e12, 1e6, {"f32": 1e3})
    n = count + 1
    wires = {(i, j): Wire(1e12) for i in range(n) for j in range(n) if i != j}
    wires |= {(count, i): Wire(link) for i in range(count)}
    return Machine("gpus", (*gpus, host), wires)


def streamed(graph: Graph, target: Machine, batch: int = 8, each: int | None = None) -> Plan:
    hops = stream_hops(target)
    return plan(graph, target, sizes={"B": batch}, wish=Wish(microbatches=4), hops=hops,
                stages_per_device=each)  # fmt: skip


def whole(graph: Graph) -> int:
    return sum(weight_bytes(p) for p in graph.parameters.values())


def test_streaming_is_no_way_for_a_device_that_holds_no_layer(chain: Graph) -> None:
    largest = max(weight_bytes(p) for p in chain.parameters.values())
    target = machine(largest / 2 / 0.9, link=1e6)
    with pytest.raises(DfcError, match="N060") as e:
        plan(chain, target.at([0, 1]), sizes={"B": 1})
    assert "--stream" not in str(e.value)
    with pytest.raises(DfcError, match=r"N060.*not even streamed"):
        streamed(chain, target.at([0, 1]), batch=1)


def test_stages_stream_what_does_not_fit_and_take_as_long(chain: Graph) -> None:
    target = machine(whole(chain) / 3, link=1e6)
    with pytest.raises(DfcError, match="N060") as e:
        plan(chain, target.at([0, 1]), sizes={"B": 8})
    assert "streamed within the pipeline (`--stream`)" in str(e.value)
    found = streamed(chain, target)
    assert [s.device for s in found.stages] == ["gpu0", "gpu1"] and set(found.tiers) == {0, 1}
    for s in found.stages:
        tiers = found.tiers[s.index]
        assert s.limit == "streaming" and s.streams == tiers.bytes_per_pass > 0
        assert s.seconds == pytest.approx(float(tiers.pass_seconds))
        assert s.seconds >= s.streams / 1e6 * (1 - 1e-9)  # the link's bound
        assert s.memory <= 0.9 * s.capacity
        held = s.weights - 0.9 * s.capacity
        assert s.streams >= held  # what is beyond the memory, and slots
    assert found.bottleneck == pytest.approx(max(s.seconds for s in found.stages))
    assert found.partition.value == pytest.approx(found.bottleneck)
    assert found.step_seconds >= 4 * found.bottleneck


@pytest.mark.parametrize(("each", "share"), [(2, 0.35), (2, 0.45), (3, 0.45)])
def test_several_stages_of_a_device_share_its_memory_and_its_link(
    chain: Graph, each: int, share: float
) -> None:
    target = machine(whole(chain) * share, link=1e6)
    found = streamed(chain, target, each=each)
    assert found.program.placement == tuple(range(2)) * each and found.tiers
    usable = target.devices[0].usable
    for d in (0, 1):
        mine = [s for s in found.stages if s.index % 2 == d]
        tiers = [found.tiers[s.index] for s in mine]
        assert any(t.streamed for t in tiers) and sum(t.memory for t in tiers) <= usable
        assert sum(t.held_bytes for t in tiers) <= usable
        assert all(s.memory == mine[0].memory <= usable * (1 + 1e-9) for s in mine)
        assert [s.streams for s in mine] == [t.bytes_per_pass for t in tiers]
        for s, t in zip(mine, tiers, strict=True):
            assert s.seconds == pytest.approx(float(t.pass_seconds))
            assert s.limit == "streaming" or not t.streamed
        # What no division of the memory spares the link, and the passes one after the other.
        beyond = sum(s.weights for s in mine) - usable
        assert sum(s.streams for s in mine) >= beyond
        assert found.bottleneck >= sum(s.seconds for s in mine) * (1 - 1e-9)
    assert found.step_seconds >= 4 * found.bottleneck * (1 - 1e-9)
    told = streamed_text(found.tiers, [s.device for s in found.stages])
    assert len(told) == sum(bool(t.streamed) for t in found.tiers.values())
    graph = chain.copy()
    for node, s in zip(graph.nodes, found.partition.stage, strict=True):
        graph.set_stage(node, s)
    assert of_text(to_text(found), graph).stages == found.stages


def test_several_stages_fill_sooner_where_copies_hide(chain: Graph) -> None:
    """Slots of every stage take memory, and nobody waits for what they bring."""
    target = machine(whole(chain) * 0.4, link=1e9, flops=1e7)
    one, two = streamed(chain, target), streamed(chain, target, each=2)
    assert one.tiers and two.tiers and len(two.stages) == 4
    assert two.bottleneck == pytest.approx(one.bottleneck, rel=0.02)
    assert two.step_seconds < 0.95 * one.step_seconds


def test_the_partition_takes_copies_into_account(chain: Graph) -> None:
    """A device with twice the memory gets more layers, so that both are as long."""
    target = machine(whole(chain) / 4, link=1e6, flops=1e12)
    first, second, host = target.devices
    uneven = replace(target, devices=(first, replace(second, memory=2 * second.memory), host))
    found = streamed(chain, uneven)
    weights = {s.device: s.weights for s in found.stages}
    assert weights["gpu1"] > weights["gpu0"]
    seconds = [s.seconds for s in found.stages]
    assert max(seconds) <= 2 * min(seconds)
    even = whole(chain) / 2  # what halves would take
    least = (even - 0.9 * first.memory) / 1e6
    assert found.bottleneck < least + 3 * WIDTH * WIDTH * 4 / 1e6


def test_nothing_is_streamed_where_all_fits_or_copies_would_hide(chain: Graph) -> None:
    roomy = streamed(chain, machine(10 * whole(chain), link=1e6))
    assert not roomy.tiers and not any(s.streams for s in roomy.stages)
    slow = streamed(chain, machine(whole(chain) / 3, link=1e9, flops=1e7))
    assert slow.tiers
    for s, tiers in slow.tiers.items():
        computing = float(sum(x.seconds for x in tiers.layers))
        assert float(tiers.pass_seconds) <= 1.02 * computing
        assert slow.stages[s].limit != "streaming"


def test_faster_links_and_more_memory_never_hurt(chain: Graph) -> None:
    last = float("inf")
    for share in (0.25, 0.35, 0.45, 0.6):
        now = streamed(chain, machine(whole(chain) * share, link=1e6)).bottleneck
        assert now <= last * (1 + 1e-9)
        last = now
    slow, fast = (streamed(chain, machine(whole(chain) / 4, link=x)) for x in (1e6, 4e6))
    assert fast.bottleneck < slow.bottleneck / 2


def test_what_the_host_does_not_hold_either_comes_from_disk(chain: Graph) -> None:
    target = machine(whole(chain) / 3, link=1e6)
    hops, wish = stream_hops(target), Wish(microbatches=4)
    above = streamed(chain, target)
    copied = sum(s.streams for s in above.stages)
    for share in (2.0, 0.6):
        host = int(copied * share)
        found = plan(chain, target, sizes={"B": 8}, wish=wish, hops=hops, host=host)
        below = [t.below for t in found.tiers.values() if t.below is not None]
        assert [s.streams for s in found.stages] == [s.streams for s in above.stages]
        if share > 1:
            assert not any(b.streamed for b in below)
            assert found.bottleneck == above.bottleneck
            continue
        assert all(b.streamed for b in below) and len(below) == 2
        assert sum(b.held_bytes for b in below) <= host
        assert found.bottleneck >= above.bottleneck * (1 - 1e-9)
        told = streamed_text(found.tiers, [s.device for s in found.stages])
        assert all("reads from disk each time" in x for x in told)
    with pytest.raises(DfcError, match=r"N060.*the host.*stages 0 and 1 need.*would do, .* more"):
        plan(chain, target, sizes={"B": 8}, wish=wish, hops=hops, host=1000)


def test_a_stage_on_the_host_shares_its_memory_and_disk(chain: Graph) -> None:
    """What is copied to a device lies where the host's own stage has its weights."""
    for share in (2.0, 0.95, 0.75, 0.6, 0.4):
        some = machine(whole(chain) / 4, link=1e9, count=1)
        gpu, host = some.devices
        host = replace(host, memory=whole(chain) * share, bandwidth=1e12, peaks={"f32": 1e9})
        target = replace(some, devices=(gpu, host))
        room = host_memory(target)
        assert room is not None
        found = plan(chain, target, sizes={"B": 8}, wish=Wish(microbatches=4), host=room,
                     hops=stream_hops(target))  # fmt: skip
        assert [s.device for s in found.stages] == ["gpu0", "host"]
        below, own = found.tiers[0].below, found.tiers[1]
        assert below is not None and below.held_bytes + own.held_bytes <= room
        assert found.stages[1].memory <= room
        if share == 2.0:  # all is there
            assert not below.streamed and not own.streamed
            continue
        reads = [own.bytes_per_pass, below.bytes_per_pass]
        assert all(reads)
        for size, hop in zip(reads, (own.hop, below.hop), strict=True):  # each as long as both take
            assert size * float(hop.per_byte) == pytest.approx(sum(reads) / DISK, rel=0.1)


def test_parts_of_a_processor_share_its_disk() -> None:
    host = Device("cpu0", "cpu", 1e9, 1e10, {"f32": 1e9}, cores=2)
    whole = Machine("m", (host,))
    alone, halves = (whole.only(["cpu0"] * n) for n in (1, 2))
    (one,) = stream_hops(alone, whole).values()
    assert one.name == "disk"
    assert [h.per_byte for h in stream_hops(halves, whole).values()] == [2 * one.per_byte] * 2


def test_the_host_need_not_be_one_of_the_stages() -> None:
    whole = machine(1e6, link=1e6)
    some = whole.only(["gpu1", "gpu0", "gpu0"])
    hops = stream_hops(some, whole)
    assert host_memory(whole) == int(0.9e12) and host_memory(some) is None
    assert len(hops) == 3 and {h.per_byte for h in hops.values()} == {1e-6}


def test_plans_that_stream_are_written_and_read(chain: Graph) -> None:
    found = streamed(chain, machine(whole(chain) / 3, link=1e6))
    graph = chain.copy()
    for node, s in zip(graph.nodes, found.partition.stage, strict=True):
        graph.set_stage(node, s)
    read = of_text(to_text(found), graph)
    assert read.stages == found.stages and read.step_seconds == found.step_seconds


def test_what_is_not_planned_with_streams_is_refused(chain: Graph) -> None:
    target = machine(whole(chain) / 3, link=1e6)
    hops = stream_hops(target)
    with pytest.raises(DfcError, match=r"N065.*latency"):
        plan(chain, target, objective="latency", hops=hops)
    with pytest.raises(DfcError, match=r"N065.*trained"):
        plan(chain, target, wish=Wish(trains=True), hops=hops)
    tiny = machine(WIDTH * WIDTH * 4, link=1e6)
    with pytest.raises(DfcError, match=r"N060.*not even streamed") as e:
        streamed(chain, tiny, batch=1)
    assert e.value.status == 6
    with pytest.raises(DfcError, match=r"N060.*stages 0 and . do not fit on `gpu0`, not even"):
        streamed(chain, tiny, batch=1, each=2)
    small = machine(whole(chain) * 0.3, link=1e6).at([0, 1])
    with pytest.raises(DfcError, match=r"N060.*\n.*`--stream`\): .* to `gpu0` and .* to `gpu1`"):
        plan(chain, small, sizes={"B": 8}, stages_per_device=2)


def test_the_command(chain: Graph, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, target = tmp_path / "model.dfc", tmp_path / "pair.dfc"
    model.write_text(str(chain))
    memory = whole(chain) // 3
    device = f"cuda(mem={memory}B, peak=1GFLOPS, bw=1TB/s)"
    target.write_text(
        f"dfc 1\ntarget pair {{\n  device gpu0 : {device}\n  device gpu1 : {device}\n"
        "  device host : cpu(mem=1TB, peak=1KFLOPS, bw=1MB/s)\n"
        "  link gpu0 <-> gpu1 : nvlink(bw=450GB/s, latency=5us)\n"
        "  link host <-> gpu0 : pcie(bw=1MB/s, latency=5us)\n"
        "  link host <-> gpu1 : pcie(bw=1MB/s, latency=5us)\n}\n"
    )
    given = ["plan", str(model), "-t", str(target), "--size", "B=8", "--on", "gpu0,gpu1"]
    assert main(given) == 6
    assert "--stream" in capsys.readouterr().err
    assert main([*given, "--stream"]) == 0
    out = capsys.readouterr().out
    assert "stage 0 on `gpu0` keeps" in out and "from memory for each microbatch" in out
    assert "limited by copies from memory" in out  # over the host's link
    assert main([*given, "--stream", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    for s in data["stages"]:
        assert s["streams"] == s["tiers"]["bytes_per_pass"] > 0


def test_stages_of_a_run_are_balanced_with_what_ranks_stream(chain: Graph) -> None:
    from dfc.planning.balanced import balanced_within

    x, size = torch.randn(2, WIDTH), whole(chain)
    memory = [size // 4, size]
    placed, ranks = balanced_within(chain, memory, [x], bandwidth=1e5)  # copies are all
    assert sorted(ranks) == list(range(len(ranks)))
    held = [0, 0]
    for p in chain.parameters.values():
        held[ranks[placed[next(iter(p.users))]]] += weight_bytes(p)
    assert held[1] >= size * 0.6 > held[0]
    even, _ = balanced_within(chain, [10 * size] * 2, [x], bandwidth=1e5)
    assert set(even.values()) == {0, 1}
    fallen, ranks = balanced_within(chain, [1, 1], [x], bandwidth=1e5)  # told by who streams
    assert set(fallen.values()) == {0, 1} and ranks == [0, 1]
