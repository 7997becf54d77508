"""Pipelines over two hops: ranks of one host share its memory and its disk. The devices are copies
in this process, as in the tests of the relay."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import pytest

from dfc.api import opened
from dfc.cli import main
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.planning.streaming import Hop, Layer
from dfc.planning.tier_chain import read_bytes, share_host, sharing
from dfc.planning.tiers import ALIGN, Tiers, plan_tiers
from dfc.planning.weight_blocks import weight_bytes
from dfc.runtime.pipeline.local import Pipeline
from dfc.runtime.pipeline.processes import Processes
from dfc.runtime.pipeline.spawn import Spawner
from dfc.runtime.tiers.places import KINDS
from dfc.runtime.tiers.relay import Relay
from dfc.runtime.tiers.streamed import Streamed
from tests.test_pipeline import stages
from tests.test_tier_pipelines import equal, ids, memory_of, saved
from tests.test_tier_relay import settled
from tests.upper_tier import Device

DISK = Hop(Fraction(1, 64 * ALIGN), name="disk")


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("chains") / "tower.dfcpkg", 8, 96)


@pytest.fixture
def graph(tower: Path) -> Graph:
    return opened(tower, build=False).graph


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "cpu", lambda device: Device())


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name == "dfc weights"]


def all_bytes(graph: Graph) -> int:
    return sum(weight_bytes(p) for p in graph.parameters.values())


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(
    ("count", "placement", "timed"),
    [(2, None, True), (3, None, False), (4, [0, 1, 0, 1], False)],
)
def test_both_hops_carry_what_was_planned_and_results_are_bit_equal(
    graph: Graph, count: int, placement: list[int] | None, timed: bool
) -> None:
    placed = stages(graph, count)
    memory = memory_of(graph, placed, 0.4)
    if placement:
        memory = [sum(m for m, r in zip(memory, placement, strict=True) if r == k) for k in (0, 1)]
    host = all_bytes(graph) * 3 // 10
    with Pipeline(
        graph, placed, microbatches=4, placement=placement, memory=memory, host=host,
        example=[ids(8)] if timed else None,
    ) as pipeline:  # fmt: skip
        below = [t.below for t in pipeline.tiers if t.below is not None]
        assert len(below) == count and sum(bool(b.streamed) for b in below) >= 2
        assert sum(b.memory for b in below) <= host
        carriers = [r.carrier for r in pipeline._runners if isinstance(r, Streamed)]
        relays = [c for c in carriers if isinstance(c, Relay)]
        assert sum(c.host_bytes for c in relays) <= host
        for size, parts in ((8, 4), (11, 4), (3, 3)):
            before = [settled(c) for c in relays]
            equal(pipeline, ids(size, size))
            read = [settled(c) - b for c, b in zip(relays, before, strict=True)]
            assert read == [parts * b.bytes_per_pass for b in below if b.streamed]
            report = pipeline.report()
            assert sum(report.read) == sum(read)
            assert sum(report.streamed) == parts * sum(t.bytes_per_pass for t in pipeline.tiers)


@pytest.mark.usefixtures("devices")
def test_a_host_that_holds_it_all_reads_nothing(graph: Graph) -> None:
    placed = stages(graph, 2)
    memory = memory_of(graph, placed, 0.4)
    with Pipeline(graph, placed, microbatches=2, memory=memory, host="1GiB") as pipeline:
        assert all(t.streamed and t.below and not t.below.streamed for t in pipeline.tiers)
        equal(pipeline, ids(6))
        assert sum(pipeline.report().read) == 0 < sum(pipeline.report().streamed)


def test_processes_carry_the_same_over_both_hops(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    from functools import partial

    monkeypatch.setitem(KINDS, "cpu", lambda device: Device())
    placed = stages(graph, 2)
    memory, host = memory_of(graph, placed, 0.4), all_bytes(graph) // 4
    use = str(Path(__file__).with_name("use_upper_tier.py"))
    launcher = partial(Spawner, entry=("dfc.cli.used_rank", use, "--"))
    with Processes(
        graph, placed, microbatches=2, memory=memory, host=host, launcher=launcher
    ) as pipeline:
        for _ in range(2):
            equal(pipeline, ids(6))
            report = pipeline.report()
            assert list(report.streamed) == [2 * t.bytes_per_pass for t in pipeline.tiers]
            assert list(report.read) == [2 * read_bytes(t, "disk") for t in pipeline.tiers]
            assert min(report.read) > 0


@pytest.mark.usefixtures("devices")
def test_a_host_that_is_too_small_says_by_how_much(graph: Graph) -> None:
    placed = stages(graph, 2)
    memory = memory_of(graph, placed, 0.4)
    with pytest.raises(DfcError, match=r"N064.*stages 0 and 1 need.*would do, .* more") as e:
        Pipeline(graph, placed, memory=memory, host=1000)
    assert e.value.status == 6
    with pytest.raises(DfcError, match=r"K074.*goes with"):
        Pipeline(graph, placed, host="1GiB")


def test_ranks_on_the_processor_have_no_memory_between(graph: Graph) -> None:
    placed = stages(graph, 2)
    with pytest.raises(DfcError, match=r"K074.*no memory between"):
        Pipeline(graph, placed, memory=memory_of(graph, placed, 0.4), host="1GiB")


def streaming(count: int, size: int, hop: str = "memory") -> Tiers:
    layers = tuple(Layer(1, size * ALIGN, f"l{i}") for i in range(count))
    weights: tuple[Mapping[str, int], ...] = tuple({f"w{i}": size * ALIGN} for i in range(count))
    link = Hop(Fraction(1, 1000 * ALIGN), name=hop)
    return plan_tiers(layers, weights, 2 * size * ALIGN, link)


def test_a_host_gives_to_each_what_it_needs() -> None:
    plans = {0: streaming(8, 1), 1: streaming(8, 4), 2: streaming(6, 2, "disk")}
    least = (1 + 4 + 2) * ALIGN
    whole = sum(sum(map(sum, (w.values() for w in p.weights))) for p in plans.values())
    alone = {0: 0, 1: 1, 2: 2}
    with pytest.raises(DfcError, match=r"N064.*0 and 1 and 2 need.*256 B more") as e:
        share_host(plans, least - ALIGN, DISK, alone)
    assert e.value.status == 6
    last = None
    for memory in range(least, whole, ALIGN * 3):
        found = share_host(plans, memory, DISK, alone)
        held = [p.below.held_bytes if p.below else p.held_bytes for p in found.values()]
        assert sum(held) <= memory
        assert found[2].held_bytes <= plans[2].memory
        reads = {s: read_bytes(p, "disk") for s, p in found.items()}
        assert last is None or sum(reads.values()) <= last + 2 * 4 * ALIGN  # one slot more at most
        last = sum(reads.values())
        # One disk for all: none is as fast as if it read alone, all are bound by the whole.
        for s, p in found.items():
            if reads[s]:
                assert p.bound >= last * DISK.per_byte


def test_a_lane_is_shared_by_what_each_brings() -> None:
    assert sharing({0: 10, 1: 30, 2: 0}, {0: 0, 1: 1, 2: 2}) == {0: 4, 1: pytest.approx(4 / 3)}
    assert sharing({0: 10, 1: 30, 2: 40}, {0: 0, 1: 1, 2: 0}) == {
        0: pytest.approx(8 / 5), 1: pytest.approx(8 / 3), 2: pytest.approx(8 / 5)
    }  # fmt: skip
    assert sharing({}, {}) == {}


def test_stages_of_one_device_take_turns_at_the_disk() -> None:
    """All devices read as long as the disk takes for everything, however many stages they have."""
    plans = {0: streaming(8, 1), 1: streaming(8, 4), 2: streaming(6, 2), 3: streaming(6, 2, "disk")}
    owners = {0: 0, 1: 1, 2: 0, 3: 2}
    apart = {s: s for s in plans}
    for memory in (12 * ALIGN, 24 * ALIGN):
        found = share_host(plans, memory, DISK, owners)
        total = sum(read_bytes(p, "disk") for p in found.values()) * DISK.per_byte
        for device in (0, 1, 2):
            took = 0.0
            for s in (s for s, d in owners.items() if d == device):
                lower = found[s].below or found[s]
                took += float(read_bytes(found[s], "disk") * lower.hop.per_byte)
            assert took == pytest.approx(float(total), rel=0.1)
        other = share_host(plans, memory, DISK, apart)
        mine, others = found[0].below, other[0].below
        assert mine is not None and others is not None
        assert mine.hop.per_byte < others.hop.per_byte


@pytest.mark.usefixtures("devices")
def test_the_command(tower: Path, graph: Graph, capsys: pytest.CaptureFixture[str]) -> None:
    memory = ",".join(map(str, memory_of(graph, stages(graph, 2), 0.5)))
    host = all_bytes(graph) // 4
    given = ["run", str(tower), "--size", "B=8", "--pipeline", "2", "-m", "4", "--memory"]
    assert main([*given, f"{memory},host={host}", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["pipeline"]
    each = [s["tiers"] for s in told["stages"]]
    assert told["read_bytes"] == [4 * t["below"]["bytes_per_pass"] for t in each]
    assert told["host"] == {
        "memory": host,
        "held_bytes": sum(t["below"]["held_bytes"] for t in each),
    }
    assert main([*given, f"{memory},host={host}"]) == 0
    out = capsys.readouterr().out
    assert "the host holds" in out and "from disk" in out
    assert main([*given, f"{memory},host=1KB"]) == 6
    assert "more" in capsys.readouterr().err
    assert main([*given, "cuda=1GiB,host=1GiB"]) == 2
    assert main([*given, "host=1GiB"]) == 2
    capsys.readouterr()
