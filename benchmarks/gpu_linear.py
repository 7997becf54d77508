"""Quantized linear layers of a Llama-shaped decoder of 1.1 billion weights on a CUDA device.

    python benchmarks/gpu_linear.py [--seconds 50] [--rows 1,8,32,128,512] [--layers 22]

All linear layers of the model run one after the other, as one CUDA graph, so that the weights of a
layer are not in the device's cache when its turn comes again: 2.2 GB of them in bf16. Ways to
multiply take turns; times are medians with quartiles, ratios are to cuBLAS on bf16 weights, which
is the peer, and GB/s are bytes of weights and scales as each way stores them. `error` is the
distance from f64 over its size, of one layer. tinygemm is PyTorch's kernel for int4.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dfc.ops.codes import weight4
from dfc.runtime.kernels.cuda import kind, linear

HIDDEN, INSIDE, KV, WORDS = 2048, 5632, 4 * 64, 32_000
SIZES = ((HIDDEN + 2 * KV, HIDDEN), (HIDDEN, HIDDEN), (2 * INSIDE, HIDDEN), (HIDDEN, INSIDE))
GROUP = 32
PEER = "bf16 cuBLAS"
Call = Callable[[Tensor], Tensor]


class Way(NamedTuple):
    """One layer in one form: its product, and the bytes that this reads."""

    run: Call
    nbytes: int


def dense(n: int, k: int) -> Way:
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5
    return Way(lambda x: F.linear(x, weight), weight.nbytes)


def _codes(n: int, k: int) -> tuple[Tensor, Tensor]:
    packed = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
    scale = torch.full((n, k // GROUP), 1 / (4.6 * k**0.5), device="cuda", dtype=torch.bfloat16)
    return packed, scale


def int4(n: int, k: int) -> Way:
    packed, scale = _codes(n, k)
    return Way(
        lambda x: linear(x, packed, scale, None, None, 4, GROUP, 0), packed.nbytes + scale.nbytes
    )


def tinygemm(n: int, k: int) -> Way:
    packed, scale = _codes(n, k)
    turned = (packed << 4) | (packed >> 4)  # the high nibble first
    tiles = torch.ops.aten._convert_weight_to_int4pack(turned, 8)
    both = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous()
    product = torch.ops.aten._weight_int4pack_mm
    return Way(lambda x: product(x, tiles, GROUP, both), tiles.nbytes + both.nbytes)


def int8(n: int, k: int, rounded: bool = False) -> Way:
    codes = torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8)
    scale = torch.full((n,), 1 / (73 * k**0.5), device="cuda", dtype=torch.bfloat16)
    return Way(lambda x: linear(x, codes, scale, None, None, 8, 0, int(rounded)), codes.nbytes)


def float8(n: int, k: int, rounded: bool = True) -> Way:
    codes = (torch.randn(n, k, device="cuda") * 100).to(torch.float8_e4m3fn)
    scale = torch.full((n,), 1 / (100 * k**0.5), device="cuda", dtype=torch.bfloat16)
    return Way(lambda x: linear(x, codes, scale, None, None, 8, 0, int(rounded)), codes.nbytes)


WAYS: dict[str, Callable[[int, int], Way]] = {
    PEER: dense,
    "tinygemm int4 g32": tinygemm,
    "dfc int4 g32": int4,
    "dfc int8": int8,
    "dfc int8 dynamic": lambda n, k: int8(n, k, True),
    "dfc fp8": lambda n, k: float8(n, k, False),
    "dfc fp8 dynamic": float8,
}


class Chain:
    """All layers of a model in one form, recorded for some rows."""

    def __init__(self, make: Callable[[int, int], Way], layers: int) -> None:
        sizes = [*SIZES * layers, (WORDS, HIDDEN)]
        self.parts = [(make(n, k), k) for n, k in sizes]
        self.nbytes = sum(p.nbytes for p, _ in self.parts)

    def record(self, rows: int) -> torch.cuda.CUDAGraph:
        x = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
        inner = torch.randn(rows, INSIDE, device="cuda", dtype=torch.bfloat16)

        def run() -> None:
            for part, k in self.parts:
                part.run(x if k == HIDDEN else inner)

        for part, k in self.parts[-5:]:  # one of each size: kernels are compiled
            part.run(x if k == HIDDEN else inner)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph


def measured(graphs: dict[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, in turn."""
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds + 2):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 2:
                found[name].append(begin.elapsed_time(end))
    return found


def table(rows: int, times: dict[str, list[float]], sizes: dict[str, int]) -> list[str]:
    lines = [f"{rows} rows"]
    for name, took in times.items():
        low, _, high = quantiles(took, n=4)
        ratio = median(a / b for a, b in zip(took, times[PEER], strict=True))
        speed = sizes[name] / median(took) / 1e6
        lines.append(
            f"  {name:<20}{median(took):8.3f} ms {low:8.3f} ..{high:8.3f}   "
            f"{ratio:6.3f} of bf16 {speed:7.0f} GB/s"
        )
    return lines


def errors() -> str:
    """Of int4, against f64: the same codes in both kernels."""
    torch.manual_seed(0)
    packed, scale = _codes(2560, HIDDEN)
    x = torch.randn(8, HIDDEN, device="cuda", dtype=torch.bfloat16)
    want = F.linear(x.double(), weight4(packed, scale, None, GROUP, HIDDEN, torch.float64))
    got = linear(x, packed, scale, None, None, 4, GROUP, 0)
    return f"{float((got.double() - want).norm() / want.norm()):.1e}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=50, help="begin nothing after these")
    parser.add_argument("--rows", default="1,8,32,128,512")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return
    start = time.perf_counter()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {kind('cuda').reason}")
    torch.manual_seed(0)
    chains = {name: Chain(make, options.layers) for name, make in WAYS.items()}
    print(f"error of int4 {errors()}; made in {time.perf_counter() - start:.0f} s", flush=True)
    for rows in map(int, options.rows.split(",")):
        if time.perf_counter() - start > options.seconds:
            print(f"{rows} rows: left out, no time was left")
            continue
        graphs = {name: chain.record(rows) for name, chain in chains.items()}
        times = measured(graphs, options.rounds)
        print("\n".join(table(rows, times, {n: c.nbytes for n, c in chains.items()})), flush=True)
    print(f"({time.perf_counter() - start:.0f} s in all)")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
