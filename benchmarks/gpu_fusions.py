"""Fused graphs beside spelled-out ones on a CUDA device, by the eager and the inductor engine.

    python benchmarks/gpu_fusions.py [seconds]         default 150; what does not fit is left out

Both graphs are built for the same engine and timed in alternation with CUDA events. A ratio is the
time of the fused graph over the time of the spelled-out one: below 1 is faster. Fusing must not
make anything slower beyond noise, and must compute the same within the rounding of the dtype.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

import dfc
import dfc.ops
from dfc.ir.graph import Graph
from dfc.rewrite.driver import run_passes
from dfc.rewrite.pass_ import Context, find_pass
from dfc.runtime.engines import find_engine

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

CLEAN = ("canonicalize", "remove_noops")
NOISE = 1.03  # what counts as slower
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class Attention(torch.nn.Module):
    """Scores, softmax and the weighted sum, as models spell them out."""

    def __init__(self, mask: bool) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        if self.mask:
            t = q.shape[-2]
            keep = torch.ones(t, t, dtype=torch.bool, device=q.device).tril()
            scores = scores + torch.where(keep, 0.0, -1e4).to(scores.dtype)
        return torch.matmul(torch.softmax(scores, dim=-1), v)


class RMSNorm(torch.nn.Module):
    """The norm of Llama: computed in f32, rounded, scaled."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(size, dtype=dtype) + 0.5)

    def forward(self, x):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


def llama(dtype: torch.dtype) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=1000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=2,
        num_attention_heads=16, num_key_value_heads=4, use_cache=False,
        attn_implementation="eager",
    )  # fmt: skip
    return LlamaModel(config).to(dtype).eval(), (torch.randint(0, 1000, (4, 512)),)


def bert(dtype: torch.dtype) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    from transformers import BertConfig, BertModel

    config = BertConfig(num_hidden_layers=4, attn_implementation="eager")
    model = BertModel(config, add_pooling_layer=False).to(dtype).eval()
    return model, (torch.randint(0, 1000, (8, 256)), torch.ones(8, 256, dtype=torch.long))


def attention(
    dtype: torch.dtype, shape: tuple[int, ...], mask: bool = False
) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    return Attention(mask).eval(), tuple(torch.randn(shape, dtype=dtype) for _ in range(3))


def norm(dtype: torch.dtype) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    return RMSNorm(4096, dtype).eval(), (torch.randn(4096, 4096, dtype=dtype),)


@dataclass
class Case:
    name: str
    dtype: torch.dtype
    make: Callable[[], tuple[torch.nn.Module, tuple[Any, ...]]]
    engines: tuple[str, ...] = ("eager",)


BF16, F32 = torch.bfloat16, torch.float32
BOTH = ("eager", "inductor")
CASES = [
    Case("attention 4x16x1024x64 bf16", BF16, lambda: attention(BF16, (4, 16, 1024, 64)), BOTH),
    Case("rms norm 4096x4096 bf16", BF16, lambda: norm(BF16), BOTH),
    Case("attention 4x16x1024x64 f32", F32, lambda: attention(F32, (4, 16, 1024, 64))),
    Case("causal attention 2x16x1024x64 bf16", BF16,
         lambda: attention(BF16, (2, 16, 1024, 64), True)),
    Case("rms norm 4096x4096 f32", F32, lambda: norm(F32)),
    Case("Llama, 2 layers, 4x512 bf16", BF16, lambda: llama(BF16), BOTH),
    Case("BERT, 4 layers, 8x256 bf16", BF16, lambda: bert(BF16), BOTH),
    Case("BERT, 4 layers, 8x256 f32", F32, lambda: bert(F32)),
    Case("attention 1x32x2048x128 bf16", BF16, lambda: attention(BF16, (1, 32, 2048, 128))),
]  # fmt: skip


def graphs_of(case: Case) -> tuple[Graph, Graph, int, tuple[Any, ...]]:
    """The spelled-out graph, the fused one, how many rewrites were made, and the inputs."""
    torch.manual_seed(0)
    model, args = case.make()
    graph = dfc.trace(model, args)
    plain = run_passes(graph, [find_pass(p) for p in CLEAN], mode="none").graph
    ctx = Context()
    fused = plain.copy()
    count = find_pass("fuse").run(fused, ctx)
    fused = run_passes(fused, [find_pass("dce")], mode="none").graph
    from dfc.calling import flat_inputs

    return plain, fused, count, tuple(flat_inputs(graph, args, {}))


def alternate(
    runners: Sequence[Callable[[Sequence[Any]], Any]], inputs: Sequence[Any], seconds: float
) -> list[list[float]]:
    """Times in ms of each runner, in turns; a turn runs often enough to take some ms."""
    for run in runners:
        for _ in range(3):
            run(inputs)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    runners[0](inputs)
    torch.cuda.synchronize()
    repeat = max(1, min(50, int(0.005 / max(time.perf_counter() - begin, 1e-5))))
    times: list[list[float]] = [[] for _ in runners]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 10:
        for i, run in enumerate(runners):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeat):
                run(inputs)
            stop.record()
            stop.synchronize()
            times[i].append(start.elapsed_time(stop) / repeat)
    return times


def difference(a: Sequence[Any], b: Sequence[Any]) -> float:
    """The largest difference, of the largest element."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            scale = float(x.double().abs().max()) or 1.0
            worst = max(worst, float((x.double() - y.double()).abs().max()) / scale)
    return worst


def main(seconds: float) -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return 0
    deadline = time.perf_counter() + seconds
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"{'case':38} {'engine':9} {'rewrites':>8} {'spelled ms':>10} {'fused ms':>9} "
          f"{'ratio':>6} {'quartiles':>13} {'differs':>8}")  # fmt: skip
    wrong: list[str] = []
    for case in CASES:
        if time.perf_counter() > deadline:
            print(f"{case.name:38} left out: no time was left")
            continue
        plain, fused, count, args = graphs_of(case)
        inputs = [x.cuda() if isinstance(x, torch.Tensor) else x for x in args]
        for engine in case.engines:
            if engine != "eager" and time.perf_counter() > deadline - 25:
                print(f"{case.name:38} {engine:9} left out: no time was left")
                continue
            line = measured(case, engine, plain, fused, inputs, count)
            print(line[0], flush=True)
            wrong += line[1]
        torch.cuda.empty_cache()
    print("\n".join(["", *wrong]) if wrong else "\nnothing is slower beyond noise, all agree")
    return 9 if wrong else 0


def measured(
    case: Case, engine: str, plain: Graph, fused: Graph, inputs: Sequence[Any], count: int
) -> tuple[str, list[str]]:
    found = find_engine(engine)
    runners = [found.build(g, "cuda") for g in (plain, fused)]
    apart = difference(*(run(inputs) for run in runners))
    slow, fast = alternate(runners, inputs, 1.0)
    ratios = sorted(b / a for a, b in zip(slow, fast, strict=True))
    n = len(ratios)
    middle, low, high = median(ratios), ratios[n // 4], ratios[(3 * n) // 4]
    text = (f"{case.name:38} {engine:9} {count:>8} {median(slow):>10.3f} {median(fast):>9.3f} "
            f"{middle:>6.2f} {low:>6.2f}..{high:<5.2f} {apart:>8.1e}")  # fmt: skip
    wrong = []
    if low > NOISE:
        wrong.append(f"SLOWER: {case.name}, {engine}: {middle:.2f}")
    if apart > TOLERANCE[case.dtype]:
        wrong.append(f"DIFFERS: {case.name}, {engine}: {apart:.1e}")
    return text, wrong


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 150.0))
