"""What the kernels of linear layers reach on one core, on each path that this CPU can run.

    taskset -c 3 python benchmarks/linear_kernels.py [--seconds 0.25] [--rows 8,16,32,128]
                                                     [--ahead 0,4096,16384] [--output FILE]

Weights of 512 outputs and K 2048 lie in the second cache, but for the line `from memory`, where
they are larger than all caches. Each number is the best of runs that take `--seconds` together,
which shows what the code can do when nothing else runs. Above it stands what the instructions could
do: the clock and sums of products in registers, where there is a C++ compiler. It takes half a
minute and is meant for a machine that is seen once.

With `--ahead` it compares, in place of all that, how far ahead one row asks for weights, and to
which cache: the kernels are compiled for each. `--threads` takes more cores, for this alone.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dfc.runtime.kernels import build, linear
from dfc.runtime.kernels.library import Library, library, state

N, K = 512, 2048
LARGE = 384 << 20  # bytes: more than the caches of a socket give to one core
PEAK = Path(__file__).parent / "_peak.cpp"
KINDS = ((4, 32), (4, 128), (8, 32), (8, 0))  # bits and group; 0: one scale for an output


def packed(bits: int, group: int, n: int, k: int) -> Tensor:
    """Codes that lie as trained ones do; those of `N` outputs are repeated."""
    random = torch.Generator().manual_seed(1)
    some, times = min(n, N), -(-n // N)
    scale = torch.full((n, k // group) if group else (n,), 0.01).half()
    if bits == 4:
        nibbles = torch.randint(0, 256, (some, k // 2), generator=random, dtype=torch.uint8)
        return linear.pack_w4(nibbles.repeat(times, 1)[:n], scale, None, k, group)
    wide = torch.randn(some, k, generator=random)
    codes = (wide / wide.abs().amax(1, keepdim=True) * 127).round().to(torch.int8)
    return linear.pack_w8(codes.repeat(times, 1)[:n], scale, group)


def seconds(
    weight: Tensor, rows: int, n: int, k: int, path: str | None, budget: float,
    threads: int = 1, kernels: Library | None = None,
) -> float:  # fmt: skip
    """Of one call, at best."""
    found = kernels or library()
    assert found is not None
    x, y = torch.randn(rows, k), torch.empty(rows, n)
    data = (
        weight.data_ptr(),
        weight.numel(),
        x.data_ptr(),
        k,
        rows,
        k,
        None,
        y.data_ptr(),
        n,
        0,  # of x as it is
        threads,
    )
    name = None if path is None else path.encode()
    call: Callable[..., int] = found.c.dfc_linear
    best, end = float("inf"), time.perf_counter() + budget
    while (start := time.perf_counter()) < end or best == float("inf"):
        if call(*data, name):
            raise RuntimeError(f"{path} does not multiply {rows} x {k} by {n}")
        best = min(best, time.perf_counter() - start)
    return best


def name_of(bits: int, group: int) -> str:
    return f"int{bits} " + (f"g{group}" if group else "per channel")


def one_row(budget: float) -> Iterator[str]:
    """GB/s of packed weights."""
    yield f"{'one row, GB/s of weights':28}" + "".join(f"{name_of(*k):>17}" for k in KINDS)
    held = [packed(*kind, N, K) for kind in KINDS]
    paths = [p for p in state().paths if p != "amx"]  # that is for many rows
    paths = paths[:-1] or paths  # portable is last, and slow
    for path in paths:
        rates = [w.numel() / seconds(w, 1, N, K, path, budget) / 1e9 for w in held]
        yield f"  {path:26}" + "".join(f"{rate:17.1f}" for rate in rates)
    rates = []
    for bits, group in KINDS:
        n = LARGE * 8 // (bits * K)
        large = packed(bits, group, n, K)
        rates.append(large.numel() / seconds(large, 1, n, K, paths[0], 2 * budget) / 1e9)
    yield f"  {paths[0] + ', from memory':26}" + "".join(f"{rate:17.1f}" for rate in rates)


def many_rows(rows: Sequence[int], budget: float) -> Iterator[str]:
    """GMAC/s."""
    yield f"{'many rows, GMAC/s':28}" + "".join(f"{name_of(*k):>17}" for k in KINDS)
    held = [packed(*kind, N, K) for kind in KINDS]
    for path in (p for p in state().paths if p != "portable"):
        for count in rows:
            work = count * N * K / 1e9
            rates = [work / seconds(w, count, N, K, path, budget) for w in held]
            yield f"  {path + f', {count} rows':26}" + "".join(f"{rate:17.1f}" for rate in rates)


def ahead(distances: Sequence[int], threads: int, budget: float) -> Iterator[str]:
    """GB/s of one row from memory, for each distance in bytes and each cache."""
    yield f"{'one row from memory, GB/s':28}" + "".join(f"{name_of(*k):>17}" for k in KINDS)
    shapes = [(b, g, LARGE * 8 // (b * K)) for b, g in KINDS]
    held = [(packed(b, g, n, K), n) for b, g, n in shapes]
    with tempfile.TemporaryDirectory() as folder:
        for distance, cache in ((d, c) for d in distances for c in ((2, 3) if d else (2,))):
            flags = (f"-DDFC_AHEAD={distance}", f"-DDFC_CACHE={cache}", "-shared")
            file = Path(folder) / f"kernels{distance}-{cache}.so"
            sources = [build.FOLDER / s for s in build.SOURCES]
            kernels = Library(build.build(file, flags, sources))
            name = f"{distance} bytes, to cache {4 - cache}" if distance else "not ahead"
            rates = [
                w.numel() / seconds(w, 1, n, K, None, budget, threads, kernels) / 1e9
                for w, n in held
            ]
            yield f"  {name:26}" + "".join(f"{rate:17.1f}" for rate in rates)


def peaks() -> Iterator[str]:
    """What instructions reach in registers, by a program of its own."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            program = build.build(Path(folder) / "peak", (), [PEAK])
        except build.BuildError as e:
            yield f"peaks are not measured: {str(e).splitlines()[0]}"
            return
        done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=True)
        yield from done.stdout.splitlines()


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.25, help="for each number")
    parser.add_argument("--rows", type=numbers, default=[8, 16, 32, 128])
    parser.add_argument("--ahead", type=numbers, help="distances in bytes; 0: none")
    parser.add_argument("--threads", type=int, default=1, help="with --ahead")
    parser.add_argument("--output", type=Path, help="also write the lines to this file")
    given = parser.parse_args()
    torch.set_num_threads(given.threads if given.ahead else 1)
    lines = []
    parts = [peaks(), one_row(given.seconds), many_rows(given.rows, given.seconds)]
    for part in [ahead(given.ahead, given.threads, given.seconds)] if given.ahead else parts:
        for line in part:
            print(line, flush=True)
            lines.append(line)
    if given.output:
        given.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
