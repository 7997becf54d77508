"""Disk to memory to a device, run for real: the upper tier is this process, slots are spoilt."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dfc
from dfc.api import opened
from dfc.cli import main
from dfc.cli.streamed import budgets
from dfc.compiled import Compiled, with_state_inputs
from dfc.errors import DfcError
from dfc.runtime.tiers.relay import Relay
from dfc.runtime.tiers.streamed import Streamed
from dfc.runtime.tiers.within import Wanted, within
from tests.tower import Tower, all_bytes, ids, memory_of, saved_tower
from tests.upper_tier import InProcess, Upper

pytestmark = pytest.mark.usefixtures("no_weights_thread_is_left")


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_tower(tmp_path_factory.mktemp("relay") / "tower.dfcpkg", layers=10)


def relayed(
    compiled: Compiled, share: float, host: float, slots: int | None = None, place: Any = None,
    timed: bool = True,
) -> tuple[Streamed, Relay, list[Any]]:  # fmt: skip
    inputs = compiled.probes[0].inputs
    memory = memory_of(compiled, share, inputs)
    wanted = Wanted(memory, slots, host=int(all_bytes(compiled) * host))
    graph = with_state_inputs(compiled.graph)
    flat = [*inputs, *compiled.state.values()]
    runner = within(graph, wanted, inputs=flat if timed else None, place=place or Upper())
    assert isinstance(runner.carrier, Relay)
    return runner, runner.carrier, flat


@pytest.mark.parametrize("slots", [None, 1, 3])
@pytest.mark.parametrize("host", [0.15, 0.35])
def test_results_are_bit_equal_and_both_hops_carry_what_was_planned(
    tower: Path, host: float, slots: int | None
) -> None:
    compiled = opened(tower, build=False)
    expected = dfc.load(tower).run_flat(compiled.probes[0].inputs)
    runner, carrier, inputs = relayed(compiled, 0.3, host, slots)
    plan, below = runner.plan, runner.plan.below
    try:
        assert below is not None and 0 < below.bytes_per_pass <= plan.bytes_per_pass
        assert bool(carrier.held) == (len(below.streamed) < len(plan.streamed))
        assert carrier.host_bytes <= below.memory and runner.held_bytes <= plan.memory
        carrier.settle()
        carrier.reader.settle()
        runner.cycle.restart()
        before = settled(carrier)
        copier: Any = carrier.copier
        for count in range(1, 5):
            assert torch.equal(runner(inputs)[0], expected[0])
            assert settled(carrier) - before == count * below.bytes_per_pass
        copier.times.clear()
        runner(inputs)
        settled(carrier)
        sizes = sum(size for size, _ in copier.times)
        assert plan.bytes_per_pass <= sizes < plan.bytes_per_pass + 256 * len(plan.loads)
    finally:
        runner.close()


def settled(carrier: Relay) -> int:
    """Bytes read when nothing is under way: both threads have done what they were asked for."""
    until = time.monotonic() + 20
    while not carrier._wanted.empty() and time.monotonic() < until:
        time.sleep(0.001)
    for event in carrier._queued:
        assert event.wait(20)
    carrier.reader.settle()
    return carrier.reader.bytes_read


@pytest.mark.parametrize("slow", ["disk", "copies"])
def test_whichever_hop_is_slower_results_stay(
    tower: Path, slow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dfc.runtime.tiers.files import Files

    read = Files.read
    if slow == "disk":

        def late(self: Files, *args: Any) -> None:
            time.sleep(0.002)
            read(self, *args)

        monkeypatch.setattr(Files, "read", late)
    compiled = opened(tower, build=False)
    expected = dfc.load(tower).run_flat(compiled.probes[0].inputs)
    place = Upper(0.002 if slow == "copies" else 0.0)
    runner, _, inputs = relayed(compiled, 0.3, 0.2, place=place)
    for _ in range(4):
        assert torch.equal(runner(inputs)[0], expected[0])
    runner.close()


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_pass_that_failed_is_no_harm_to_the_next(
    tower: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = opened(tower, build=False)
    expected = dfc.load(tower).run_flat(compiled.probes[0].inputs)
    runner, _, inputs = relayed(compiled, 0.3, 0.2, timed=False)
    assert len(runner.plan.streamed) > 4
    take = runner.cycle.take

    def interrupted(load: int) -> tuple[Tensor, ...]:
        if load == after:
            raise KeyboardInterrupt
        return take(load)

    for _ in range(2):
        assert torch.equal(runner(inputs)[0], expected[0])
        with monkeypatch.context() as patch:
            patch.setattr(runner.cycle, "take", interrupted)
            with pytest.raises(KeyboardInterrupt):
                runner(inputs)
    assert torch.equal(runner(inputs)[0], expected[0])
    runner.close()


def test_a_file_that_cannot_be_read_is_told_and_ends_nothing(
    tower: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dfc.runtime.tiers.files import Files

    compiled = opened(tower, build=False)
    expected = dfc.load(tower).run_flat(compiled.probes[0].inputs)
    runner, carrier, inputs = relayed(compiled, 0.3, 0.2, timed=False)
    assert torch.equal(runner(inputs)[0], expected[0])
    settled(carrier)
    read = Files.read

    def fails(self: Files, *args: Any) -> None:
        raise DfcError("K071", "cannot read the weights: a bad sector", status=8)

    monkeypatch.setattr(Files, "read", fails)
    with pytest.raises(DfcError, match="K071"):
        for _ in range(2):  # what was read ahead is there
            runner(inputs)
    monkeypatch.setattr(Files, "read", read)
    for _ in range(2):
        assert torch.equal(runner(inputs)[0], expected[0])
    runner.close()


def test_a_host_that_holds_it_all_reads_nothing(tower: Path) -> None:
    compiled = opened(tower, build=False)
    inputs = compiled.probes[0].inputs
    wanted = Wanted(memory_of(compiled, 0.4, inputs), host=2 * all_bytes(compiled))

    class Both(Upper):
        carrier = InProcess.carrier  # type: ignore[assignment]

    runner = within(with_state_inputs(compiled.graph), wanted, place=Both())
    assert runner.plan.below is not None and not runner.plan.below.streamed
    assert not isinstance(runner.carrier, Relay)
    runner.close()


def test_what_cannot_be_is_told(tower: Path) -> None:
    compiled = opened(tower, build=False)
    memory = memory_of(compiled, 0.3, compiled.probes[0].inputs)
    with pytest.raises(DfcError, match=r"K074.*no memory between"):
        dfc.load(tower, memory="8MiB", host="16MiB")
    with pytest.raises(DfcError, match=r"K074.*goes with `memory`"):
        dfc.load(tower, host="16MiB")
    with pytest.raises(DfcError, match=r"K074.*no memory between"):
        compiled.within(memory, host="1GiB")
    with pytest.raises(DfcError, match=r"N064.*host's memory.*would do") as e:
        within(with_state_inputs(compiled.graph), Wanted(memory, host=1000), place=Upper())
    assert e.value.status == 6
    held = dfc.compile(Tower(6).eval(), (ids(4),), engine="eager", passes=[], verify="none")
    wanted = Wanted(memory_of(held, 0.3, [ids(4)]), host=all_bytes(held) // 5)
    with pytest.raises(DfcError, match="K070"):
        within(with_state_inputs(held.graph), wanted, place=Upper())


def test_budgets_of_the_command(tower: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert budgets("8GiB", "cuda") == ("cuda", "8GiB", None)
    assert budgets("cuda:1=8GiB,cpu=16GiB", "cpu") == ("cuda:1", "8GiB", "16GiB")
    assert budgets("cpu=2GiB", "cpu") == ("cpu", "2GiB", None)
    for wrong in ("cuda=8GiB,16GiB", "cuda:0=1GiB,cuda:1=1GiB", "cpu=1GiB,cpu=2GiB"):
        with pytest.raises(DfcError, match="Q006"):
            budgets(wrong, "cpu")
    assert main(["run", str(tower), "--memory", "cuda=1GiB,cpu=2GX"]) == 2
    assert main(["run", str(tower), "--memory", "cuda=1GiB,cpu=2GiB", "--pipeline", "2"]) == 2
    assert "one memory each" in capsys.readouterr().err
    assert main(["run", str(tower), "--memory", "cpu=1GiB"]) == 0
    capsys.readouterr()
