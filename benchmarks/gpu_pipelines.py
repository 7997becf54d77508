"""Pipelines with a CUDA device: stages on streams of one, and a processor beside one.

python benchmarks/gpu_pipelines.py [FILE]     also write what is printed to FILE

Ratios are of medians of alternating rounds in one run; in brackets the lowest and the highest
ratio of a single round.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from _nets import Layers
from _timing import alternating, ratio, say, write

import dfc
from dfc.ir.graph import Graph
from dfc.runtime.engines import find_engine
from dfc.runtime.pipeline.local import Pipeline

M = 64  # microbatches: filling and emptying two stages is 1.6 % of a step
TURNS = 5
DEVICES = ["cpu", "cuda:0"]
THREADS = torch.get_num_threads()


def traced(each: int, width: int, layers: int) -> tuple[Graph, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(M * each, width)
    dim = torch.export.Dim("B", min=1, max=1 << 20)
    return dfc.trace(Layers(width, layers).eval(), (x[:each],), dynamic_shapes=({0: dim},)), x


def one_gpu(each: int, width: int, dtype: torch.dtype) -> None:
    """Four stages on streams of one device, beside the unsplit graph on the same microbatches."""
    torch.manual_seed(0)
    x = torch.randn(M * each, width, device="cuda", dtype=dtype)
    dim = torch.export.Dim("B", min=1, max=1 << 20)
    model = Layers(width, 8).eval().to(dtype)
    graph = dfc.trace(model, (x[:each].cpu(),), dynamic_shapes=({0: dim},))
    nodes = list(graph.nodes)
    placed = {n: i * 4 // len(nodes) for i, n in enumerate(nodes)}
    for engine in ("eager", "eager:cuda_graph"):
        whole = find_engine(engine).build(graph, "cuda")

        def unsplit(whole: Any = whole) -> None:
            for part in x.split(each):
                whole([part])
            torch.cuda.synchronize()

        devices = ["cuda:0"] * 4
        with Pipeline(graph, placed, engine=engine, microbatches=M, devices=devices) as pipeline:
            took = alternating(
                {"unsplit": unsplit, "stages": lambda: pipeline.run_flat([x])}, TURNS
            )
        say(f"  {each} x {width} {str(dtype)[6:]}, {engine}: "
            f"{ratio(took['stages'], took['unsplit'])} times the unsplit graph")  # fmt: skip


def beside(each: int, width: int, layers: int, on_cpu: int, engine: str) -> None:
    """The first layers on the processor, the others on the device; each stage's time alone, with
    the threads that the pipeline gives it."""
    graph, x = traced(each, width, layers)
    nodes = list(graph.nodes)
    cut = len(nodes) * on_cpu // layers
    placed = {n: int(i >= cut) for i, n in enumerate(nodes)}
    half = torch.relu(x.cuda())
    parts: Sequence[torch.Tensor] = x.split(each)
    engines = ["eager", engine]
    with Pipeline(graph, placed, microbatches=M, devices=DEVICES, engine=engines) as pipeline:
        first, second = (
            find_engine(e).build(s.graph, d)
            for e, s, d in zip(engines, pipeline.stages, DEVICES, strict=True)
        )
        torch.set_num_threads(pipeline.threads[0])

        def processor() -> None:
            for part in parts:
                first([part])

        def device() -> None:
            for part in half.split(each):
                second([part])
            torch.cuda.synchronize()

        took = alternating({
            "cpu": processor, "gpu": device, "both": lambda: pipeline.run_flat([x]),
        }, TURNS)  # fmt: skip
        busy = pipeline.report().busy
    torch.set_num_threads(THREADS)
    slow = max(("cpu", "gpu"), key=lambda n: sum(took[n]))
    a, b = (sorted(took[n])[len(took[n]) // 2] / M * 1e3 for n in ("cpu", "gpu"))
    say(f"  {on_cpu} of {layers} layers on the processor, {each} x {width}, {engine}: {a:.2f} and "
        f"{b:.2f} ms alone; together {ratio(took['both'], took[slow])} times the slower; busy "
        f"{busy[0]:.2f} and {busy[1]:.2f}")  # fmt: skip


def main() -> None:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {torch.get_num_threads()} "
        f"threads, {M} microbatches")  # fmt: skip
    say("four stages on streams of one device (goal 1.02)")
    one_gpu(256, 1024, torch.bfloat16)
    one_gpu(1024, 4096, torch.float32)
    one_gpu(4096, 4096, torch.bfloat16)
    say("a processor and a device (goal 1.05)")
    for engine in ("eager", "eager:cuda_graph"):
        beside(256, 1024, 33, 1, engine)
        beside(1024, 2048, 65, 1, engine)
    for file in sys.argv[1:]:
        write(file)


if __name__ == "__main__":
    main()
