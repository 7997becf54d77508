"""Pipelines in processes: equal to the model, mended when a rank is lost, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dfc
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.ir.types import NONE, ScalarType, TensorType
from dfc.planning.stages import split
from dfc.runtime.pipeline.control import Channel, Door, Stranger, knock
from dfc.runtime.pipeline.crew import lost_error
from dfc.runtime.pipeline.folder import assembly, read_assembly, write_assembly
from dfc.runtime.pipeline.messages import Layout
from dfc.runtime.pipeline.processes import Processes
from dfc.runtime.pipeline.routes import stage_edges
from dfc.runtime.pipeline.spawn import owner_is_gone, private_folder
from dfc.runtime.pipeline.world import World
from tests.fair_clock import FairClock
from tests.kept_graph import keep
from tests.test_pipeline import captured, leaves, one_by_one, stages

B = torch.export.Dim("B", min=1, max=64)
ROOT = Path(__file__).resolve().parent.parent


def equal(pipeline: Processes, args: Sequence[Any]) -> None:
    """The pipeline's results are those of its microbatches one after another, to the bit."""
    found = leaves(pipeline(*args))
    for f, x in zip(found, one_by_one(pipeline.graph, pipeline, list(args)), strict=True):
        assert torch.equal(f, x)


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def gone(pids: Sequence[int], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while any(alive(p) for p in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def gone_in_two(pids: Sequence[int]) -> bool:
    with FairClock() as clock:
        begin = clock.now
        while any(alive(p) for p in pids):
            if clock.since(begin) > 2:
                return False
            time.sleep(0.02)
    return True


def during(
    pipeline: Processes, rank: int, signal_: int, clock: FairClock | None = None
) -> tuple[threading.Thread, list[float]]:
    """Send a signal to a rank in the middle of the next step; when it was sent.

    On a machine that stood still the step may be over before: `struck` then takes the next one.
    """
    sent: list[float] = []
    step = pipeline._ranks._steps

    def wait() -> None:
        until = time.monotonic() + 30
        while pipeline._ranks._steps == step and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.05)
        sent.append(clock.now if clock is not None else 0.0)
        os.kill(pipeline._ranks.crew.members[rank].pid, signal_)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread, sent


def struck(pipeline: Processes, rank: int, signal_: int, args: Sequence[Any]) -> str:
    """What is told of a rank that gets a signal in a step, which loses nothing by it."""
    known = len(pipeline.incidents)
    thread, _ = during(pipeline, rank, signal_)
    equal(pipeline, args)
    thread.join()
    if len(pipeline.incidents) == known:  # the step was over
        equal(pipeline, args)
    return pipeline.incidents[known]


def test_values_keep_their_bits_and_their_layout() -> None:
    values = [
        torch.randn(3, 4).T, torch.randn(3, 1, 5).expand(3, 7, 5), 3.25, True, -7, None,
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.empty(0, 3),
        torch.tensor(2.5), torch.randn(5, 2, dtype=torch.complex64).conj(),
        torch.randn(6, 4)[:, ::2], torch.randn(4).bfloat16(),
    ]  # fmt: skip
    types = [
        TensorType.of(x) if isinstance(x, torch.Tensor)
        else NONE if x is None else ScalarType(type(x).__name__)
        for x in values
    ]  # fmt: skip
    layout = Layout(types, {})
    tensors = Layout([TensorType.of(x) for x in values if isinstance(x, torch.Tensor)], {})
    for one in (layout, tensors):
        given = values if one is layout else [x for x in values if isinstance(x, torch.Tensor)]
        came_back(one, given)
    rows = [x.contiguous() for x in values if isinstance(x, torch.Tensor)]
    came_back(tensors, rows)  # the header that is known beforehand
    assert tensors._plain is not None and tensors._plain.fits(rows)


def came_back(layout: Layout, values: Sequence[Any]) -> None:
    """However they go, as one block or in parts."""
    message = layout.message(values)
    joined = torch.frombuffer(bytearray(b"".join(message.parts)), dtype=torch.uint8)
    for block in (layout.pack(values), message.block(), joined):
        assert block.nbytes == layout.nbytes == message.nbytes
        for x, y in zip(values, layout.unpack(block), strict=True):
            if isinstance(x, torch.Tensor):
                assert torch.equal(x, y) and x.dtype == y.dtype
                if x.numel() == x.untyped_storage().nbytes() // x.dtype.itemsize:
                    assert x.stride() == y.stride()
            else:
                assert x == y and type(x) is type(y)


def test_who_does_not_know_the_key_is_sent_away() -> None:
    met: list[dict[str, Any]] = []
    came = threading.Event()

    def welcome(channel: Channel, hello: dict[str, Any]) -> None:
        met.append(hello)
        came.set()
        channel.send({"do": "end"})

    door = Door(welcome, "127.0.0.1")
    try:
        assert door.address[0] == "127.0.0.1"
        with pytest.raises((Stranger, EOFError, OSError)):
            knock(door.address, b"guessed" * 4)
        mine = knock(door.address, door.key)
        assert mine.send({"did": "hello", "rank": 3})
        assert came.wait(60) and met == [{"did": "hello", "rank": 3}]
        assert mine.receive() == {"do": "end"}
        mine.close()
    finally:
        door.close()


def test_a_loss_is_told_with_what_it_holds_up() -> None:
    lost = lost_error({1: "killed by SIGKILL"}, ["rank 0 waits in RECV(e7, mb4)"])
    assert lost.message == "rank 1 lost while rank 0 waits in RECV(e7, mb4): killed by SIGKILL"
    assert "all wait for others: rank 0 waits" in lost_error({}, ["rank 0 waits in F"]).message


def test_a_rank_with_other_versions_says_so(tmp_path: Path) -> None:
    _, _, graph = captured("chain")
    parts = split(graph, stages(graph, 2))
    made, _ = assembly(parts, stage_edges(parts, graph.outputs), [0, 1], ["eager"] * 2, [1, 1])
    write_assembly(tmp_path, made, parts)
    assert read_assembly(tmp_path).digest == made.digest
    data = json.loads((tmp_path / "pipeline.json").read_text())
    data["versions"]["torch"] = "1.0"
    (tmp_path / "pipeline.json").write_text(json.dumps(data))
    with pytest.raises(DfcError, match=r"N055.*made with torch 1\.0, this rank has"):
        read_assembly(tmp_path)


@pytest.mark.parametrize("links", ["local", "gloo"])
def test_tied_weights_skips_and_several_stages_a_rank(links: str) -> None:
    """Three stages on two ranks; inputs to all of them, any batch, an uneven last microbatch."""
    _, args, graph = captured("tied")
    options: dict[str, Any] = {"placement": [0, 1, 0], "microbatches": 4, "threads": 2}
    with Processes(graph, stages(graph, 3), links=links, **options) as pipeline:
        for size in (6, 7, 1, 3):
            equal(pipeline, (torch.randint(40, (size, 5)), args[1]))
        report = pipeline.report()
        assert len(report.busy) == 2 and report.predicted <= report.seconds
        assert [report.bytes[0, 1] > 0, report.bytes[1, 2] > 0] == [True, True]
        assert not report.bytes.get((0, 2))  # of one rank
        events = report.trace(["rank 0", "rank 1"])["traceEvents"]
        assert sum(e["ph"] == "X" and e["pid"] == 0 for e in events) == 3 * 3
        # A stage that fails is named, and the pipeline goes on.
        with pytest.raises(DfcError, match=r"K050.*stage 0 failed on microbatch 2: .*out of range"):
            pipeline(torch.tensor([[1] * 5] * 2 + [[77] * 5]), args[1])
        equal(pipeline, args)
        assert not pipeline.incidents
        ranks = pipeline.pids
    assert gone_in_two(ranks)
    with pytest.raises(DfcError, match="K051"):
        pipeline(*args)


def test_one_row_is_rounded_in_ranks_as_it_is_here() -> None:
    """Products of one row depend on where weights lie: in a file behind 12 odd bytes, elsewhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 3), nn.Linear(3, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    x = torch.randn(5, 64)
    graph = dfc.trace(model.eval(), (x,), dynamic_shapes=({0: B},))
    with Processes(graph, stages(graph, 2), microbatches=5) as pipeline:
        for size in (1, 3, 5):
            equal(pipeline, (torch.randn(size, 64),))


class Heavy(nn.Module):
    """Long enough to be killed in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(512, 512) for _ in range(8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x, x.sum(-1)


@cache
def heavy() -> tuple[Graph, tuple[torch.Tensor]]:
    torch.manual_seed(0)
    args = (torch.randn(64, 40, 512),)
    return dfc.trace(Heavy().eval(), args, dynamic_shapes=({0: B},)), args


@pytest.fixture(scope="module")
def heavies() -> Iterator[tuple[Processes, tuple[torch.Tensor]]]:
    graph, args = heavy()
    with Processes(graph, stages(graph, 2), microbatches=16, threads=2) as pipeline:
        pipeline(*args)
        yield pipeline, args


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_restarted_and_nothing_is_lost(
    heavies: tuple[Processes, tuple[torch.Tensor]], rank: int
) -> None:
    pipeline, args = heavies
    before = pipeline.pids
    told = struck(pipeline, rank, signal.SIGKILL, args)
    equal(pipeline, args)  # a rank that had no more to do is started again for the next step
    assert pipeline.pids[rank] != before[rank]  # the other too, if it was deaf for seconds
    assert f"rank {rank} lost" in told and "SIGKILL" in told


def test_large_values_survive_a_killed_rank() -> None:
    """Half a megabyte each lies in memory that a rank shares; results that have come stay."""
    torch.manual_seed(0)
    layers = [m for _ in range(8) for m in (nn.Linear(1024, 1024), nn.Tanh())]
    x = torch.randn(16 * 128, 1024)
    rows = torch.export.Dim("B", min=1, max=4096)
    graph = dfc.trace(nn.Sequential(*layers).eval(), (x,), dynamic_shapes=({0: rows},))
    with Processes(graph, stages(graph, 2), microbatches=16, threads=2) as pipeline:
        first = pipeline(x)
        assert "rank 0 lost" in struck(pipeline, 0, signal.SIGKILL, [x])
        equal(pipeline, [x + 1])
        assert torch.equal(first, pipeline(x))


def test_a_rank_that_hangs_is_noticed_in_five_seconds(
    heavies: tuple[Processes, tuple[torch.Tensor]],
) -> None:
    """A rank that was stopped before it began with the step, on a machine that stood still, keeps
    nobody waiting: then the next one is stopped.
    """
    told = "last in idle"
    for _ in range(3):
        if "last in idle" in told:
            told = stopped(*heavies)
    assert "rank 1 lost while rank 0 waits in SEND(e1, mb" in told


def stopped(pipeline: Processes, args: tuple[torch.Tensor]) -> str:
    """What is told of rank 1, which is stopped in a step: in five seconds, and it ends."""
    stuck, known = pipeline.pids[1], len(pipeline.incidents)
    with FairClock() as clock:
        thread, sent = during(pipeline, 1, signal.SIGSTOP, clock)
        noticed: list[float] = []

        def watch() -> None:
            while len(pipeline.incidents) == known:
                time.sleep(0.01)
            noticed.append(clock.since(sent[0]))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        equal(pipeline, args)
        thread.join()
        if len(pipeline.incidents) == known:  # the step was over
            sent[0] = clock.now
            equal(pipeline, args)
        watcher.join(timeout=60)
    assert gone_in_two([stuck])
    assert noticed[0] < 5
    return pipeline.incidents[known]


def test_without_restarts_the_loss_is_raised_in_two_seconds(
    heavies: tuple[Processes, tuple[torch.Tensor]],
) -> None:
    pipeline, args = heavies
    pipeline._ranks.restarts = 0
    try:
        with FairClock() as clock:
            thread, sent = during(pipeline, 0, signal.SIGKILL, clock)
            with pytest.raises(DfcError, match=r"rank 0 lost.*: killed by SIGKILL") as caught:
                pipeline(*args)
                thread.join()  # the step was over
                sent[0] = clock.now
                pipeline(*args)
            assert clock.since(sent[0]) < 2
            thread.join()
        assert caught.value.code == "K058" and caught.value.status == 8
    finally:
        pipeline._ranks.restarts = 3
    equal(pipeline, args)


def test_over_gloo_too_a_killed_rank_is_mended() -> None:
    graph, args = heavy()
    options: dict[str, Any] = {"microbatches": 16, "threads": 2, "links": "gloo"}
    with Processes(graph, stages(graph, 2), **options) as pipeline:
        pipeline(*args)
        told = struck(pipeline, 1, signal.SIGKILL, args)
        assert "rank 1 lost" in told and "SIGKILL" in told


_HOST = """
import sys, torch
from dfc.runtime.pipeline.processes import Processes
from tests.kept_graph import kept
with Processes(*kept(sys.argv[1]), microbatches=16, threads=2) as pipeline:
    print(*pipeline.pids, pipeline._folder.name, flush=True)
    while True:
        pipeline(torch.randn(64, 40, 512))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_and_the_hosts_death_end_everything(how: int, tmp_path: Path) -> None:
    graph, _ = heavy()
    keep(tmp_path, graph, stages(graph, 2))
    host = subprocess.Popen(
        [sys.executable, "-c", _HOST, str(tmp_path)], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert host.stdout is not None
        *said, folder = host.stdout.readline().split()
        ranks = [int(p) for p in said]
        assert len(ranks) == 2 and all(alive(p) for p in ranks)
        time.sleep(0.5)
        os.killpg(host.pid, how) if how == signal.SIGINT else host.kill()
        assert gone_in_two([*ranks, host.pid])
        host.wait(timeout=120)
        assert host.returncode == -how
        assert not Path(folder).exists()
    finally:
        host.kill()
        host.communicate(timeout=10)


_KILLED = """
import os, signal
from dfc.runtime.pipeline.spawn import private_folder
made = private_folder()
print(made.name, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def left_by_a_killed_one(within: Path) -> Path:
    """The folder of a process that was killed before it had any rank."""
    host = subprocess.run(
        [sys.executable, "-c", _KILLED], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={**os.environ, "TMPDIR": str(within), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    folder = Path(host.stdout.strip())
    assert host.returncode == -signal.SIGKILL and folder.is_dir() and owner_is_gone(folder)
    return folder


def test_folders_of_those_that_were_killed_are_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed = left_by_a_killed_one(tmp_path)
    others = [tmp_path / "dfc-ranks-empty", tmp_path / "dfc-ranks-of-another-machine"]
    for folder in others:
        folder.mkdir()
    (others[1] / "owner").write_text("1 2 00000000")
    with private_folder() as first, private_folder() as second:
        assert not killed.exists()
        assert all(f.exists() for f in (Path(first), Path(second), *others))


def test_a_rank_that_finds_no_host_takes_its_folder_away(tmp_path: Path) -> None:
    folder = left_by_a_killed_one(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        closed = other.getsockname()[1]
    rank = subprocess.run(
        [sys.executable, "-m", "dfc.runtime.pipeline.worker", str(folder), "0", "1", "127.0.0.1",
         str(closed)], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DFC_RANK_KEY": "00"},
    )  # fmt: skip
    assert (rank.returncode, rank.stderr) == (3, "")
    assert not folder.exists()


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_is_seen_while_a_message_is_waited_for() -> None:
    """PyTorch's store does not see it: torchrun would kill such a rank half a minute later."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world, main = World(0, 1, store), threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        world.get("never", 30)
    timer.join()
    assert time.monotonic() - began < 25
    world.put("now", 1)
    assert world.get("now", 30) == 1  # the thread that still waits is in nobody's way
    world.put("never", 1)  # it is over for it: Python might end as it wakes up, which C++ resents


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing_and_double_nothing() -> None:
    """Ranks are killed whatever they do, while they load and make their links too."""
    import random

    graph, args = heavy()
    choose, ended, killed = random.Random(0), threading.Event(), [0]
    with Processes(graph, stages(graph, 2), microbatches=16, threads=2, restarts=50) as pipeline:
        expected = one_by_one(graph, pipeline, list(args))
        crew = pipeline._ranks.crew

        def kill() -> None:
            while killed[0] < 100 and not ended.is_set():
                time.sleep(choose.uniform(0.5, 4.0))
                member = crew.members.get(choose.randrange(2))
                if member is not None and member.pid and alive(member.pid):
                    os.kill(member.pid, signal.SIGKILL)
                    killed[0] += 1

        thread = threading.Thread(target=kill)
        thread.start()
        try:
            while killed[0] < 100:
                for f, x in zip(leaves(pipeline(*args)), expected, strict=True):
                    assert torch.equal(f, x)
        finally:
            ended.set()
            thread.join()
        equal(pipeline, args)
        assert len(pipeline.incidents) >= 50  # two kills may be one loss


@pytest.mark.slow
def test_a_thousand_steps_of_skips_end() -> None:
    _, args, graph = captured("unet")
    with Processes(graph, stages(graph, 3), microbatches=6, threads=3) as pipeline:
        first = pipeline(*args)
        for _ in range(1000):
            assert torch.equal(pipeline(*args), first)
        assert not pipeline.incidents
