"""The linear layers of a Llama-shaped decoder of 1.1 billion weights, in int4 and int8.

    python benchmarks/linear_layers.py [--layers 22] [--rounds 9] [--rows 1,128] [--bits 4,8]
                                       [--ggml FOLDER] [--output FILE]

Hidden size 2048, 22 layers, 4 heads of 64 for keys and values, 5632 inside, 32 000 words. Each
engine runs the same chain of the same random codes: queries, keys and values as one linear layer,
gate and up as one. Engines alternate in one process, each after one run that does not count; times
are medians, the spread is the distance between the quartiles. With fewer --layers (less memory)
the time of a layer is measured, and the whole is told. `GB/s` are bytes of int4 or int8 weights
with float16 scales over time, to be seen beside what the memory gives to reading and what one core
computes. `error` is the distance from float32 over its size.

Peers: ONNX Runtime (MatMulNBits, accuracy_level 4, threads that do not spin), OpenVINO where it is
installed, llama.cpp where --ggml says where its libraries are, for example from

    npm pack @node-llama-cpp/linux-x64 && tar xzf node-llama-cpp-linux-x64-*.tgz
    python benchmarks/linear_layers.py --ggml package/bins/linux-x64
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles

import _linear_engines as engines
import linear_kernels as cores
import numpy as np
import torch
from _linear_engines import Run, Weight

from dfc.runtime.kernels.library import state

HIDDEN, INSIDE, KV, WORDS, LAYERS = 2048, 5632, 4 * 64, 32_000, 22
RESULTS = Path(__file__).parent / "results" / "linear-layers.txt"
OURS = "dfc"
WIDE = {"avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"}


def layer(bits: int, seed: int) -> list[Weight]:
    sizes = ((HIDDEN + 2 * KV, HIDDEN), (HIDDEN, HIDDEN), (2 * INSIDE, HIDDEN), (HIDDEN, INSIDE))
    return [Weight(bits, n, k, seed * 8 + i) for i, (n, k) in enumerate(sizes)]


class Engine:
    """Two chains: some layers, and the words; the time of the model is told from both."""

    def __init__(self, layers: Run, words: Run) -> None:
        self.parts = (layers, words)
        self.times: tuple[list[float], list[float]] = ([], [])

    def once(self, x: np.ndarray) -> None:
        """One run to wake this engine's threads, then one that counts, as when words follow."""
        for run, times in zip(self.parts, self.times, strict=True):
            run(x)
            start = time.perf_counter()
            run(x)
            times.append(time.perf_counter() - start)

    def seconds(self, measured: int) -> list[float]:
        return [a * LAYERS / measured + b for a, b in zip(*self.times, strict=True)]


def chains(bits: int, count: int, rows: int, ggml: engines.Ggml | None) -> dict[str, Engine]:
    weights = [w for i in range(count) for w in layer(bits, i)]
    words = [Weight(bits, WORDS, HIDDEN, 7)]
    threads = torch.get_num_threads()
    both = (weights, words)
    made = {
        f"{OURS} g32": Engine(*(engines.dfc_chain(w, 32) for w in both)),
        "onnxruntime": Engine(*(engines.onnxruntime_chain(w, threads) for w in both)),
    }
    if bits == 8:
        made[f"{OURS} per channel"] = Engine(*(engines.dfc_chain(w, None) for w in both))
    if importlib.util.find_spec("openvino"):
        for size in (32, 0):
            name = f"openvino, activations {'int8' if size else 'float'}"
            made[name] = Engine(*(engines.openvino_chain(w, threads, size) for w in both))
    if ggml is not None:
        made["llama.cpp"] = Engine(*(ggml.chain(w, rows) for w in both))
    if count <= 8:
        made["torch f32"] = Engine(*(engines.torch_chain(w, torch.float32) for w in both))
        made["torch bf16"] = Engine(*(engines.torch_chain(w, torch.bfloat16) for w in both))
    return made


def errors(made: Mapping[str, Engine], bits: int, count: int, x: np.ndarray) -> dict[str, float]:
    """How far the last layer's output is from that in float32."""
    weights = [w for i in range(count) for w in layer(bits, i)]
    want = engines.torch_chain(weights, torch.float32)(x)
    size = float(np.abs(want).mean())
    return {n: float(np.abs(e.parts[0](x) - want).mean()) / size for n, e in made.items()}


def table(
    bits: int, rows: int, count: int, rounds: int, ggml: engines.Ggml | None
) -> Iterator[str]:
    made = chains(bits, count, rows, ggml)
    x = np.random.default_rng(1).standard_normal((rows, HIDDEN), np.float32)
    off = errors(made, bits, count, x[:1] if ggml is None else x)
    for turn in range(rounds + 1):
        for engine in list(made.values())[:: 1 if turn % 2 else -1]:
            engine.once(x)
        if turn == 0:
            for engine in made.values():
                for times in engine.times:
                    times.clear()
    weights = [w for i in range(LAYERS) for w in layer(bits, i)] + [Weight(bits, WORDS, HIDDEN, 7)]
    read = sum(w.bytes for w in weights)
    seconds = {n: e.seconds(count) for n, e in made.items()}
    peers = {n: median(s) for n, s in seconds.items() if not n.startswith(OURS)}
    best = min(peers, key=lambda n: peers[n])
    yield f"\nint{bits}, {rows} row{'s' * (rows > 1)}; {read / 1e6:.0f} MB of weights"
    yield f"  {'':32}{'rows/s':>8}{'ms':>10}{'spread':>8}{'GB/s':>7}{'error':>9}  x best peer"
    for name, times in sorted(seconds.items(), key=lambda s: median(s[1])):
        mid, (low, _, high) = median(times), quantiles(times, n=4)
        ratio = f"{peers[best] / mid:.2f}" + (" (best peer)" if name == best else "")
        yield (
            f"  {name:32}{rows / mid:8.1f}{mid * 1e3:10.2f}{(high - low) / mid:8.1%}"
            f"{read / mid / 1e9:7.1f}{off[name]:9.4f}  {ratio}"
        )


def reading(rounds: int = 9) -> tuple[float, float]:
    """GB/s of adding up half a GiB on all threads: the median and the best."""
    held = torch.from_numpy(np.ones(1 << 26, np.float64))
    seen = []
    for _ in range(rounds):
        start = time.perf_counter()
        held.sum()
        seen.append(held.nbytes / (time.perf_counter() - start) / 1e9)
    return median(seen), max(seen)


def limits() -> str:
    """What one core computes where memory does not limit it."""

    def best(bits: int, group: int, rows: int, n: int, k: int) -> float:
        return cores.seconds(cores.packed(bits, group, n, k), rows, n, k, None, 0.3)

    few = [512 * 2048 * (bits / 8 + 2 / 32) / best(bits, 32, 1, 512, 2048) for bits in (4, 8)]
    many = 128 * 768 * 768 / best(8, 0, 128, 768, 768)
    return (
        f"one core, weights in its caches: one row {few[0] / 1e9:.1f} GB/s of int4 g32 and "
        f"{few[1] / 1e9:.1f} of int8 g32; 128 rows {many / 1e9:.1f} GMAC/s of int8"
    )


def machine() -> Iterator[str]:
    found = state()
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.partition(":")[2].strip() for x in lines if "model name" in x), name)
    wide = sorted(engines.cpu_flags() & WIDE)
    yield f"{name}, {engines.threads_of_this_process()} cores, {' '.join(wide)}"
    yield f"torch {torch.__version__}, {torch.get_num_threads()} threads; kernels: {found.reason}"
    mid, best = reading()
    yield f"reading memory on all threads: {mid:.1f} GB/s, at best {best:.1f}"
    if found.built:
        yield limits()


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=numbers, default=[1, 128])
    parser.add_argument("--bits", type=numbers, default=[4, 8])
    parser.add_argument("--ggml", type=Path)
    parser.add_argument("--note", default="", help="a line for the top of the results")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where results are written")
    given = parser.parse_args(arguments)
    ggml = engines.Ggml(given.ggml, torch.get_num_threads()) if given.ggml else None
    with given.output.open("w", encoding="utf-8") as file:

        def say(line: str) -> None:
            print(line, flush=True)
            print(line, file=file, flush=True)

        for line in machine():
            say(line)
        if given.note:
            say(given.note)
        say(f"{given.layers} layers measured, {given.rounds} rounds, engines alternating")
        for bits in given.bits:
            for rows in given.rows:
                for line in table(bits, rows, given.layers, given.rounds, ggml):
                    say(line)


if __name__ == "__main__":
    main()
