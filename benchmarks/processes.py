"""Pipelines in processes: two stages beside one process, what an action costs, no step hangs.

python benchmarks/processes.py [FILE]     also write what is printed to FILE

Ratios are of medians of alternating rounds in one run; in brackets the lowest and the highest
ratio of a single round. Wants two idle cores; six minutes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

import torch
from _apart import Apart, told
from _ping import Ring
from _timing import alternating, ratio, say, stolen, threads, write
from torch import nn

import dfc
from dfc.ir.types import TensorType
from dfc.planning.balanced import balanced
from dfc.planning.host import machine_text, this_machine
from dfc.runtime.engines import find_engine
from dfc.runtime.pipeline.local import Pipeline
from dfc.runtime.pipeline.messages import Layout
from dfc.runtime.pipeline.processes import Processes

M = 16  # microbatches
KINDS = ("local", "gloo")  # links between processors
STEPS = 1000


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


def layers_of(layers: int, width: int, rows: int) -> None:
    """Equal layers, and messages that are large beside what a stage computes."""
    graph, x = traced(layers, width, M * rows)
    weights, message = layers * width**2 * 4 >> 20, rows * width * 4 >> 10
    two_stages(f"{layers} layers of {width} ({weights} MiB)", graph, (x,), f"{message} KiB")


def bert_base() -> None:
    """A model as people have them: microbatches of one sequence of 128 tokens."""
    from engines import models

    model, (ids, mask) = models()["bert-base-b1-s128"]()
    inputs = ids.repeat(M, 1), mask.repeat(M, 1)
    batch = torch.export.Dim("B", min=1, max=4096)
    graph = dfc.trace(model, inputs, dynamic_shapes=({0: batch}, {0: batch}))
    two_stages("BERT-base", graph, inputs, "384 KiB")


def two_stages(what: str, graph: dfc.Graph, inputs: tuple[torch.Tensor, ...], message: str) -> None:
    """The same microbatches in one process with one thread, and in two with one thread each."""
    parts = list(zip(*(x.chunk(M) for x in inputs), strict=True))
    placed = balanced(graph, 2, list(inputs))
    whole = find_engine("eager").build(graph, "cpu", 1)

    def one(count: int) -> None:
        with threads(count):
            for part in parts:
                whole(list(part))

    with (
        Processes(graph, placed, microbatches=M, threads=2) as local,
        Processes(graph, placed, microbatches=M, threads=2, links="gloo") as gloo,
        Pipeline(graph, placed, microbatches=M, threads=2) as lanes,
    ):
        apart = Apart(graph, lanes.stages, "eager", parts)
        took = alternating({
            "one process, one thread": lambda: one(1),
            "one process, two threads": lambda: one(2),
            "two threads as lanes": lambda: lanes(*inputs),
            "two processes": lambda: local(*inputs),
            "two processes over gloo": lambda: gloo(*inputs),
            "two lanes that wait not": apart,
        })  # fmt: skip
        apart.close()
        reports = {"two processes": local.report(), "two processes over gloo": gloo.report()}
    alone = median(took["one process, one thread"]) / M / 2
    say(
        f"two balanced stages, {what}, {M} microbatches of {message}, one thread each (theory: "
        f"{2 * M / (M + 1):.2f} times one thread, goal 1.75)"
    )
    for name, times in took.items():
        speed = ratio(took["one process, one thread"], times)
        say(f"  {name:26} {median(times) * 1e3:8.1f} ms  {speed} times one thread")
    lone, lanes_time = took["one process, one thread"], took["two lanes that wait not"]
    say(f"  {told(lone, lanes_time, took['two processes'], M)}")
    say(f"  half of the model alone takes {alone * 1e3:.2f} ms a microbatch")
    for name, report in reports.items():
        stages = ", ".join(f"{s * 1e3:.2f} ms" for s in report.stage_seconds)
        busy = ", ".join(f"{b:.0%}" for b in report.busy)
        say(f"  {name}, last step: stages {stages}; predicted {report.predicted * 1e3:.1f} ms, "
            f"took {report.seconds * 1e3:.1f} ms; busy {busy}")  # fmt: skip


def small_actions() -> None:
    """Stages that compute next to nothing: what is left is taking, giving and waiting.

    An action is one RECV, F or SEND of a rank; a microbatch is three of them on either rank, and a
    message each from the host to the first, between them, and back to the host. A chain is limited
    by its slower rank: its step divided by the microbatches, and by three, is what an action takes.
    Beside it a ring of three processes that pass such a message on and compute nothing.
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

    options: dict[str, Any] = {"microbatches": count, "threads": 2}
    with ExitStack() as stack, threads(1):
        runs: dict[str, Callable[[], Any]] = {"one": one}
        pipelines = {k: stack.enter_context(Processes(graph, placed, links=k, **options))
                     for k in KINDS}  # fmt: skip
        for kind, pipeline in pipelines.items():
            runs[kind] = partial(pipeline, x)
            ring = stack.enter_context(Ring(kind, Layout([TensorType.of(x[:1])], {}).nbytes or 0))
            runs[f"{kind} ring"] = partial(ring.laps, count)
        took = alternating(runs)
        spans = {kind: pipeline.report().step.spans for kind, pipeline in pipelines.items()}
    each = {name: [t / count * 1e6 for t in times] for name, times in took.items()}
    say(f"small tensors, {count} microbatches on two ranks (goal 250 us an action over gloo); in "
        f"one process {median(each['one']):.0f} us for both stages")  # fmt: skip
    for kind in KINDS:
        computing = median([s.end - s.start for s in spans[kind]]) * 1e6
        whole_, ring_ = each[kind], each[f"{kind} ring"]
        say(f"  {kind:5}: {median(whole_) / 3:.0f} us an action ({min(whole_) / 3:.0f} to "
            f"{max(whole_) / 3:.0f}), {median(whole_):.0f} us a microbatch, of which a rank "
            f"computes {computing:.0f}; the three messages alone, around a ring: "
            f"{median(ring_):.0f} us ({min(ring_):.0f} to {max(ring_):.0f})")  # fmt: skip


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
    before, start = stolen()
    bert_base()
    layers_of(8, 1024, 64)  # weights that no cache holds: each microbatch reads them from memory
    layers_of(16, 512, 256)  # of half the size, for four times the rows
    for part in (small_actions, many_steps, recovery):
        part()
    after, end = stolen()
    say(f"the host took {(after - before) / (end - start):.1%} of the time meanwhile")
    for file in sys.argv[1:]:
        write(file)


if __name__ == "__main__":
    main()
