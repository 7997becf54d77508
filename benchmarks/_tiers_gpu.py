"""Weights streamed from pinned memory to a GPU that could hold them all: what streaming costs.

    python benchmarks/tiers.py --gpu [seconds]        default 85

A decoder of 14.5 GB in bf16 (the shape of Llama-3-8B with 32 000 tokens) with half of its weights
on the device: (i) one short prompt, which only copies limit, beside the link's measured bandwidth
and beside `accelerate`, with as many bytes of weights on the device; (ii) a batch that hides the
copies, beside all weights on the device; (iii) a batch that just hides them, streamed layers spread
evenly beside the last ones, as what fills the device first streams.
"""

from __future__ import annotations

import gc
import time
import zlib
from collections.abc import Callable
from statistics import median
from typing import Any

import _decoder
import torch
from _timing import ratio, say

import dfc
from dfc.ir.graph import Graph, ParameterData
from dfc.ir.interpret import bind_inputs
from dfc.planning.model import live_bytes
from dfc.planning.weight_blocks import weight_bytes
from dfc.runtime.engines import find_engine
from dfc.runtime.tiers.cuda import pinned
from dfc.runtime.tiers.places import Cuda
from dfc.runtime.tiers.streamed import Streamed
from dfc.runtime.tiers.within import Wanted, within

SHAPE = {"layers": 32, "d": 4096, "kv": 1024, "inner": 14336, "vocab": 32000}
DTYPE = torch.bfloat16
COPY = 1 << 27  # bytes of a copy when the link is measured
PROMPT, BATCH = (1, 16), (8, 2048)
ROUNDS, EACH = 5, 2  # rounds that alternate, passes of each in a row


class Seeded(ParameterData):
    """Numbers that are drawn on the device whenever they are asked for."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape = name, shape

    def tensor(self) -> torch.Tensor:
        if len(self.shape) == 1:
            return torch.ones(self.shape, dtype=DTYPE, device="cuda")
        g = torch.Generator("cuda").manual_seed(zlib.crc32(self.name.encode()))
        drawn = torch.empty(self.shape, dtype=DTYPE, device="cuda")
        return drawn.normal_(std=0.02, generator=g)

    def sha256(self) -> str:
        return f"{zlib.crc32(self.name.encode()):064x}"


class Bench:
    def __init__(self, seconds: float) -> None:
        self.began = time.perf_counter()
        self.seconds = seconds
        self.place = Cuda("cuda", kept=True)
        self.graph = self._graph()
        self.weights = sum(weight_bytes(p) for p in self.graph.parameters.values())
        self.bandwidth = self._bandwidth()

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.began)

    def told(self, line: str) -> None:
        say(f"[{time.perf_counter() - self.began:5.1f} s] {line}")

    def _graph(self) -> Graph:
        b, s = torch.export.Dim("B", min=1, max=64), torch.export.Dim("S", min=2, max=8192)
        ids = torch.zeros(2, 64, dtype=torch.long, device="meta")
        model = _decoder.on_meta(**SHAPE, dtype=DTYPE)
        graph = dfc.trace(model, (ids,), dynamic_shapes=({0: b, 1: s},))
        for p in graph.parameters.values():
            p.data = Seeded(p.name, tuple(int(n) for n in p.tensor_type.shape))
        self.told(f"traced {len(graph)} nodes")
        return graph

    def _bandwidth(self) -> float:
        """Bytes a second of pinned copies to the device that follow each other."""
        source, target = pinned(COPY), torch.empty(COPY, dtype=torch.uint8, device="cuda")
        rates = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(16):
                target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            rates.append(16 * COPY / (time.perf_counter() - start))
        found = max(rates)
        self.told(f"pinned memory to {torch.cuda.get_device_name()}: {found / 1e9:.1f} GB/s")
        return found

    def ids(self, size: tuple[int, int]) -> torch.Tensor:
        g = torch.Generator().manual_seed(0)
        return torch.randint(SHAPE["vocab"], size, generator=g).cuda()

    def half(self, ids: torch.Tensor) -> int:
        """Memory for half of the weights, and for what is computed of these ids."""
        return int(self.weights / 2 + live_bytes(self.graph, bind_inputs(self.graph, [ids])))

    def streamed(self, ids: torch.Tensor, **wanted: Any) -> Streamed:
        runner = within(
            self.graph, Wanted(self.half(ids), **wanted), "cuda", [ids], place=self.place
        )
        plan = runner.plan
        self.told(
            f"{list(ids.shape)} {wanted or 'as planned'}: {plan.slots} slots of "
            f"{plan.slot_bytes / 1e6:.0f} MB, {plan.bytes_per_pass / 1e9:.2f} GB a pass in "
            f"{len(plan.streamed)} of {len(plan.layers)} blocks; planned "
            f"{float(plan.pass_seconds) * 1e3:.1f} ms, bound {float(plan.bound) * 1e3:.1f} ms"
        )
        return runner


def passes(run: Callable[[list[Any]], Any], ids: torch.Tensor, count: int = EACH) -> float:
    """Seconds of one pass of several."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        run([ids])
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def rounds(
    runs: dict[str, Callable[[list[Any]], Any]], ids: torch.Tensor, count: int = ROUNDS
) -> dict[str, list[float]]:
    """Seconds a pass of each, in turn, after a warm round."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(count + 1):
        for name, run in runs.items():
            seconds = passes(run, ids)
            if i:
                took[name].append(seconds)
    return took


def copies_only(bench: Bench, resident: Callable[[list[Any]], list[Any]]) -> tuple[float, Streamed]:
    """(i) What a pass that only copies limit takes: beside the link, and the same results."""
    ids = bench.ids(PROMPT)
    runner = bench.streamed(ids)
    same = torch.equal(runner([ids])[0], resident([ids])[0])
    took = median(passes(runner, ids) for _ in range(ROUNDS))
    rate = runner.plan.bytes_per_pass / took
    bench.told(
        f"(i) {took * 1e3:.1f} ms a pass, {rate / 1e9:.1f} GB/s: "
        f"{rate / bench.bandwidth:.1%} of the link (goal 95 %); results "
        f"{'equal bit for bit' if same else 'DIFFER'}"
    )
    return took, runner


def hidden(bench: Bench, resident: Callable[[list[Any]], list[Any]]) -> float:
    """(ii) A batch that hides the copies; seconds of a pass with all weights there."""
    ids = bench.ids(BATCH)
    runner = bench.streamed(ids)
    took = rounds({"resident": resident, "streamed": runner}, ids)
    bench.told(
        f"(ii) resident {median(took['resident']) * 1e3:.1f} ms, streamed "
        f"{median(took['streamed']) * 1e3:.1f} ms: {ratio(took['streamed'], took['resident'])} "
        "times as long (goal 1.03)"
    )
    runner.close()
    return median(took["resident"])


def placements(bench: Bench, resident_seconds: float) -> None:
    """(iii) A batch whose computing takes as long as the copies: evenly, and the tail."""
    copies = bench.weights / 2 / bench.bandwidth
    tokens = BATCH[0] * BATCH[1] * copies / resident_seconds
    ids = bench.ids((4, max(64, round(tokens / 4 / 64) * 64)))
    runs: dict[str, Streamed] = {"even": bench.streamed(ids)}
    slots = runs["even"].plan.slots
    runs["tail"] = bench.streamed(ids, placement="tail", slots=slots)
    runs["tail, best slots"] = bench.streamed(ids, placement="tail")
    took = rounds(dict(runs), ids, 3)
    even = took.pop("even")
    bench.told(f"(iii) evenly {median(even) * 1e3:.1f} ms")
    for name, times in took.items():
        bench.told(f"(iii) {name} ({runs[name].plan.slots} slots): {ratio(times, even)} times as "
                   "long (goal 1.2)")  # fmt: skip
    for runner in runs.values():
        runner.close()


def peer(bench: Bench, ours: float) -> None:
    """`accelerate` with as many bytes of weights on the device: the first layers, as it does."""
    try:
        from accelerate import dispatch_model
    except ImportError as e:
        bench.told(f"accelerate is not here: {e}")
        return
    room, places = bench.weights // 2, {"embed": "cpu", "norm": 0, "head": "cpu"}
    model = _decoder.on_meta(**SHAPE, dtype=DTYPE)
    for i, layer in enumerate(model.layers):
        size = sum(p.numel() * 2 for p in layer.parameters())
        places[f"layers.{i}"] = 0 if room >= size else "cpu"
        room -= size
    for name, p in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        where = places.get(path) or places.get(".".join(path.split(".")[:2]), 0)
        drawn = Seeded(name, tuple(p.shape)).tensor()
        tensor = drawn.cpu() if where == "cpu" else drawn
        holder = model.get_submodule(path)
        setattr(holder, leaf, torch.nn.Parameter(tensor, requires_grad=False))
    bench.told("made the model for accelerate")
    model = dispatch_model(model, places, main_device=0)
    ids = bench.ids(PROMPT)

    def run(inputs: list[Any]) -> Any:
        with torch.no_grad():
            return model(*inputs)

    run([ids])
    took = [passes(run, ids, 1) for _ in range(3)]
    bench.told(
        f"(i) accelerate: {median(took) * 1e3:.1f} ms a pass, {median(took) / ours:.2f} times as "
        "long as dfc (goal 1.8)"
    )


def main(seconds: float) -> None:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return
    bench = Bench(seconds)
    resident = find_engine("eager").build(bench.graph, "cuda")
    bench.told(f"{bench.weights / 1e9:.2f} GB of weights on the device, for comparison")
    ours, runner = copies_only(bench, resident)
    runner.close()
    resident_seconds = hidden(bench, resident)
    if bench.left > 12:
        placements(bench, resident_seconds)
    del resident
    gc.collect()
    if bench.left > 15:
        peer(bench, ours)
    bench.told("done")
