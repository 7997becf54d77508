"""Pipelines in one process: what an action costs, two stages beside one process, no step hangs.

python benchmarks/pipeline.py [FILE]     also write what is printed to FILE

Ratios are of medians of alternating rounds in one run; in brackets the lowest and the highest
ratio of a single round.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _apart import Apart, told
from _nets import Layers
from _timing import ROUNDS, alternating, ratio, say, threads, write

import dfc
from dfc.planning.actions import Action, Kind
from dfc.planning.balanced import balanced
from dfc.planning.host import machine_text, this_machine
from dfc.planning.schedules import forward_program, schedule
from dfc.runtime.engines import find_engine
from dfc.runtime.pipeline.bundle import read_bundle
from dfc.runtime.pipeline.lanes import Lanes, Values
from dfc.runtime.pipeline.local import Pipeline
from dfc.runtime.pipeline.routes import Edge

M = 16  # microbatches
TRAINED = ("gpipe", "1f1b", "zb1p", "interleaved", "interleaved_zb", "breadth_first", "zb_v",
           "dualpipe_v")  # fmt: skip


def chain_edges(stages: int) -> list[Edge]:
    found = [Edge(s, s + 1, ("x",)) for s in range(stages - 1)]
    return found + [Edge(s + 1, s, ("g",), backward=True) for s in range(stages - 1)]


def nothing(action: Action, values: Values) -> Values:
    return {} if action.kind == Kind.W else {"x": 0, "g": 0}


def overhead() -> None:
    """Actions that compute nothing: all of the time is the lanes'."""
    say("What an action costs (nothing is computed; goal 30 us), and of that the processor's time")
    for name, ranks, count in (("forward", 1, 1000), ("forward", 2, 1000), ("1f1b", 2, 1000),
                               ("zb1p", 2, 1000), ("zb_v", 2, 500), ("1f1b", 4, 500)):  # fmt: skip
        program = schedule(name, ranks, count)
        longest = max(len(rows) for rows in program.ranks)
        with Lanes(chain_edges(program.stages), nothing, [1] * ranks) as lanes:
            lanes.step(program, [{}] * count)
            start = time.process_time()
            times = [lanes.step(program, [{}] * count).seconds for _ in range(ROUNDS)]
            used = (time.process_time() - start) / ROUNDS / len(program) * 1e6
        own, every = median(times) / longest * 1e6, median(times) / len(program) * 1e6
        say(
            f"  {name:8} {ranks} ranks: {own:5.1f} us an action of a rank, {every:5.1f} us of all, "
            f"{used:5.1f} us of a processor"
        )


def steps(count: int = 1000) -> None:
    say(f"{count} steps of each schedule, 4 ranks (2 for zb_v and dualpipe_v), 8 microbatches")
    for name in ("forward", *TRAINED):
        ranks = 2 if name in ("zb_v", "dualpipe_v") else 4
        program = schedule(name, ranks, 8)
        with Lanes(chain_edges(program.stages), nothing, [1] * ranks) as lanes:
            start = time.perf_counter()
            for _ in range(count):
                assert len(lanes.step(program, [{}] * 8).spans) == len(program)
            took = time.perf_counter() - start
        say(f"  {name:15} {len(program):3} actions a step: all ended, {took / count * 1e3:.2f} ms")


def traced(each: int, width: int = 768, layers: int = 8) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(M * each, width)
    dim = torch.export.Dim("B", min=1, max=65536)
    return dfc.trace(Layers(width, layers).eval(), (x,), dynamic_shapes=({0: dim},)), x


def two_stages(engine: str, each: int = 96) -> None:
    graph, x = traced(each)
    parts = x.split(each)
    with threads(1):
        placed = balanced(graph, 2, [x[:each]])
    alone = {n: find_engine(engine).build(graph, "cpu", n) for n in (1, 2)}

    def one_process(count: int) -> None:
        with threads(count):
            for part in parts:
                alone[count]([part])

    def whole_batch() -> None:
        with threads(1):
            alone[1]([x])

    with Pipeline(graph, placed, engine=engine, microbatches=M, threads=[1, 1]) as pipeline:
        reports = []
        apart = Apart(graph, pipeline.stages, engine, [[p] for p in parts])

        def step() -> None:
            pipeline.run_flat([x])
            reports.append(pipeline.report())

        took = alternating({
            "one": lambda: one_process(1), "two": lambda: one_process(2), "whole": whole_batch,
            "pipeline": step, "apart": apart,
        })  # fmt: skip
        apart.close()
        report = sorted(reports[1:], key=lambda r: r.seconds)[ROUNDS // 2]
    theory = 2 * M / (M + 1)
    stages = " and ".join(f"{s * 1e3:.1f} ms" for s in report.stage_seconds)
    off = [abs(r.predicted / r.seconds - 1) for r in reports[1:]]
    say(f"Two stages of {stages}, {M} microbatches, {engine}, one thread each")
    say(f"  over one process with one thread:   {ratio(took['one'], took['pipeline'])} times as "
        f"fast (theory {theory:.2f}, goal 1.75)")  # fmt: skip
    say(f"  {told(took['one'], took['apart'], took['pipeline'], M)}")
    say(f"  the same on the whole batch at once: {ratio(took['whole'], took['pipeline'])}")
    say(f"  over one process with two threads:  {ratio(took['two'], took['pipeline'])}")
    say(f"  bubble {report.bubble:.1%} (theory {1 / (M + 1):.1%}); step {report.seconds * 1e3:.1f} "
        f"ms, predicted {report.predicted * 1e3:.1f} ms, off by {median(off):.1%} in the median, "
        f"{max(off):.1%} at most (goal 10 %)")  # fmt: skip


def buckets(each: int = 96) -> None:
    """Three sizes in turn in one pipeline, beside three pipelines of one size each."""
    graph, x = traced(each)
    sizes = [x, x[: M * each // 2], x[: M * each // 4 + 1]]
    with threads(1):
        placed = balanced(graph, 2, [x[:each]])
    with contextlib.ExitStack() as stack:
        one, *three = [
            stack.enter_context(Pipeline(graph, placed, microbatches=M, threads=[1, 1]))
            for _ in range(4)
        ]
        took = alternating({
            "one": lambda: [one.run_flat([s]) for s in sizes],
            "three": lambda: [p.run_flat([s]) for p, s in zip(three, sizes, strict=True)],
        })  # fmt: skip
    say("Three shape buckets in one pipeline over a pipeline for each (goal 1.02)")
    say(f"  {ratio(took['one'], took['three'])}")


def onnx_stages(each: int = 96) -> None:
    graph, x = traced(each)
    compiled = dfc.compile(graph, [x[:each]], engine="eager", passes=[])
    with tempfile.TemporaryDirectory() as folder, threads(1):
        path = Path(folder) / "layers.stages"
        compiled.export(path, stages=balanced(compiled.graph, 2, [x[:each]]))
        whole = find_engine("onnxruntime").build(graph, "cpu", 1)
        placed = balanced(graph, 2, [x[:each]])
        with (
            read_bundle(path).pipeline(microbatches=M, threads=2) as stages,
            Pipeline(graph, placed, microbatches=M, threads=[1, 1]) as pipeline,
        ):
            took = alternating({
                "one": lambda: [whole([part]) for part in x.split(each)],
                "stages": lambda: stages.run_flat([x]),
                "torch": lambda: pipeline.run_flat([x]),
            })  # fmt: skip
    say("A folder of two ONNX stages, one thread each")
    say(f"  {ratio(took['one'], took['stages'])} times as fast as the whole model there with one "
        "thread")  # fmt: skip
    say(f"  {ratio(took['torch'], took['stages'])} times as fast as the pipeline in PyTorch (goal "
        "0.9 at least)")  # fmt: skip


def chunks(each: int = 96) -> None:
    """Two stages a rank, as schedules with chunks have them."""
    graph, x = traced(each)
    with threads(1):
        two, four = (balanced(graph, n, [x[:each]]) for n in (2, 4))
    with (
        Pipeline(graph, two, microbatches=M, threads=[1, 1]) as plain,
        Pipeline(graph, four, microbatches=M, threads=[1, 1], placement=[0, 1, 0, 1],
                 program=lambda m: forward_program([0, 1, 0, 1], m)) as looped,
    ):  # fmt: skip
        took = alternating({
            "plain": lambda: plain.run_flat([x]), "looped": lambda: looped.run_flat([x]),
        })  # fmt: skip
    say(f"Two stages a rank over one: {ratio(took['plain'], took['looped'])} times as fast")


def main() -> None:
    say(f"{machine_text(this_machine())}, torch {torch.__version__}")
    overhead()
    two_stages("eager")
    two_stages("onnxruntime")
    chunks()
    buckets()
    onnx_stages()
    steps()
    for file in sys.argv[1:]:
        write(file)


if __name__ == "__main__":
    main()
