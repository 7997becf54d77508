"""Pipelines in processes: two stages beside one process, what an action costs, no step hangs.

python benchmarks/processes.py [FILE]     also write what is printed to FILE

Ratios are of medians of alternating rounds in one run; in brackets the lowest and the highest
ratio of a single round. Wants two idle cores; four minutes.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import dfc
from dfc.planning.balanced import balanced
from dfc.planning.host import machine_text, this_machine
from dfc.runtime.engines import find_engine
from dfc.runtime.pipeline.local import Pipeline
from dfc.runtime.pipeline.processes import Processes

M = 16  # microbatches
ROUNDS = 9
STEPS = 1000
_out: list[str] = []


def say(line: str) -> None:
    print(line, flush=True)
    _out.append(line)


def alternating(runs: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each, in turn, after one warm round."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            took[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in took.items()}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> str:
    each = [s / f for s, f in zip(slow, fast, strict=True)]
    return f"{median(slow) / median(fast):.2f} ({min(each):.2f} to {max(each):.2f})"


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Blocks(nn.Module):
    """Equal layers: as many on one stage as on the other."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def traced(layers: int, width: int, rows: int) -> tuple[dfc.Graph, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(rows, width)
    batch = torch.export.Dim("B", min=1, max=4096)
    return dfc.trace(Blocks(layers, width).eval(), (x,), dynamic_shapes=({0: batch},)), x


def two_stages() -> None:
    """The same microbatches in one process with one thread, and in two with one thread each."""
    graph, x = traced(8, 1024, M * 64)
    placed = balanced(graph, 2, [x])
    whole = find_engine("eager").build(graph, "cpu", 1)

    def one(count: int) -> None:
        with threads(count):
            for part in x.split(x.shape[0] // M):
                whole([part])

    with (
        Processes(graph, placed, microbatches=M, threads=2) as processes,
        Pipeline(graph, placed, microbatches=M, threads=2) as lanes,
    ):
        took = alternating({
            "one process, one thread": lambda: one(1),
            "one process, two threads": lambda: one(2),
            "two threads as lanes": lambda: lanes(x),
            "two processes": lambda: processes(x),
        })  # fmt: skip
        report = processes.report()
    say(f"two balanced stages, {M} microbatches (theory: {2 * M / (M + 1):.2f} times one thread)")
    for name, times in took.items():
        speed = ratio(took["one process, one thread"], times)
        say(f"  {name:26} {median(times) * 1e3:8.1f} ms  {speed} times one thread")
    stages = ", ".join(f"{s * 1e3:.2f} ms" for s in report.stage_seconds)
    busy = ", ".join(f"{b:.0%}" for b in report.busy)
    say(f"  stages of the last step: {stages}; predicted {report.predicted * 1e3:.1f} ms, took "
        f"{report.seconds * 1e3:.1f} ms; busy {busy}")  # fmt: skip


def small_actions() -> None:
    """Stages that compute next to nothing: what is left is taking, giving and waiting.

    A chain of two ranks with many microbatches is limited by its slower rank: its step divided by
    the microbatches is what one action with its messages takes.
    """
    graph, _ = traced(2, 8, 8)
    count = 256
    x = torch.randn(count, 8)
    half = len(list(graph.nodes)) // 2
    placed = {n: int(i >= half) for i, n in enumerate(graph.nodes)}
    whole = find_engine("eager").build(graph, "cpu", 1)

    def one() -> None:
        for part in x.split(1):
            whole([part])

    with threads(1), Processes(graph, placed, microbatches=count, threads=2) as pipeline:
        took = alternating({"one": one, "two": lambda: pipeline(x)})
        spans = pipeline.report().step.spans
    computing = median([s.end - s.start for s in spans])
    each = [t / count * 1e6 for t in took["two"]]
    say(f"small tensors, {count} microbatches on two ranks: {median(each):.0f} us an action "
        f"({min(each):.0f} to {max(each):.0f}), of which {computing * 1e6:.0f} us compute; "
        f"in one process {median(took['one']) / count * 1e6:.0f} us for both stages")  # fmt: skip


def many_steps() -> None:
    """Steps one after another: none hangs, all give the same."""
    graph, x = traced(4, 32, 12)
    with Processes(graph, balanced(graph, 2, [x]), microbatches=6, threads=2) as pipeline:
        expected, start = pipeline(x), time.perf_counter()
        for _ in range(STEPS):
            assert torch.equal(pipeline(x), expected)
        took = time.perf_counter() - start
        assert not pipeline.incidents
    say(f"{STEPS} steps of 6 microbatches: {took / STEPS * 1e3:.2f} ms each, all equal, none hung")


def recovery() -> None:
    """A rank is killed in the middle of a step: until the results are there."""
    import os
    import signal
    import threading

    graph, x = traced(8, 1024, M * 64)
    with Processes(graph, balanced(graph, 2, [x]), microbatches=M, threads=2) as pipeline:
        pipeline(x)
        start = time.perf_counter()
        expected = pipeline(x)
        whole = time.perf_counter() - start
        times = []
        for _ in range(3):
            pid = pipeline.pids[1]
            killer = threading.Timer(whole / 2, os.kill, (pid, signal.SIGKILL))
            killer.start()
            start = time.perf_counter()
            assert torch.equal(pipeline(x), expected)
            times.append(time.perf_counter() - start)
            killer.join()
    say(f"a rank killed in the middle of a step of {whole:.2f} s: the same results after "
        f"{median(times):.1f} s, with a new process that imports PyTorch")  # fmt: skip


def main() -> None:
    say(machine_text(this_machine()))
    for part in (two_stages, small_actions, many_steps, recovery):
        part()
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text("\n".join(_out) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
