"""A model in less memory than its weights take, beside all of them there, and beside mapping.

    python benchmarks/tiers.py [folder]               on this processor, weights from a disk
    python benchmarks/tiers.py --gpu [seconds]        on a GPU, weights from pinned memory

A decoder of 1.6 GB in f32 as a package, at memories of 75, 50 and 25 % of its weights; passes of
one short prompt (the disk limits them) and of a long one. Beside them: what no plan can beat (all
computing, or all bytes at the disk's own rate, both measured here), and a mapped file of which the
memory holds so much. A least-recently-used cache has nothing that is needed next: it reads
everything in every pass, when it is needed (counted in tests/test_tiers_plan.py). Nothing of the
file is kept in the system's cache.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import _decoder
import numpy as np
import torch
from _timing import ratio, say, stolen, write
from torch import Tensor

import dfc
from dfc.api import opened
from dfc.ir.interpret import bind_inputs
from dfc.planning.host import machine_text, this_machine
from dfc.planning.model import live_bytes
from dfc.planning.streaming import Hop
from dfc.planning.tiers import Tiers, slot_bytes
from dfc.planning.weight_blocks import cut, weight_bytes
from dfc.runtime.tiers.files import Extent, Files, extents_of
from dfc.runtime.tiers.places import Processor
from dfc.runtime.tiers.slots import Load
from dfc.runtime.tiers.streamed import Streamed
from dfc.runtime.tiers.within import Wanted, first_plan, within

SHAPE = {"layers": 12, "d": 1536, "kv": 512, "inner": 4096, "vocab": 32000}
PROMPTS = ((1, 8), (1, 64))
SHARES = (0.75, 0.5, 0.25)
ROUNDS = 3


def package(folder: Path) -> Path:
    """The model as a package, without ever holding more than once its weights."""
    torch.manual_seed(0)
    model = _decoder.Decoder(**SHAPE).eval()
    s = torch.export.Dim("S", min=2, max=4096)
    ids = torch.zeros(1, 16, dtype=torch.long)
    compiled = dfc.compile(
        model, (ids,), dynamic_shapes=({1: s},), engine="eager", passes=[], verify="none"
    )
    compiled.save(folder / "decoder.dfcpkg")
    return folder / "decoder.dfcpkg"


class Mapped:
    """A carrier as a mapped file is: weights come when they are read, page by page."""

    def __init__(self, loads: Sequence[Load], extents: dict[Any, Extent], size: int) -> None:
        self.loads, self.extents = loads, extents
        self.slots = [torch.empty(size, dtype=torch.uint8)]
        paths = {e.path for e in extents.values()}
        self.maps = {p: np.memmap(p, mode="r") for p in paths}
        self.files = Files(extents.values())
        self.load = 0

    def begin(self) -> None: ...

    def fill(self, load: int, slot: int) -> None:
        self.load = load

    def ready(self, slot: int) -> None:
        for piece in self.loads[self.load]:
            e = self.extents[piece.weight]
            into = self.slots[0][piece.offset : piece.offset + piece.bytes].numpy()
            into[:] = self.maps[e.path][e.offset : e.offset + e.bytes]

    def leave(self, slot: int) -> None:
        """The cache has dropped it when it is needed again."""
        for path, mapped in self.maps.items():
            mapped._mmap.madvise(4)  # MADV_DONTNEED: unmapped pages can be dropped
            for piece in self.loads[self.load]:
                e = self.extents[piece.weight]
                if e.path == path:
                    self.files._advise(self.files._open[path], e, "POSIX_FADV_DONTNEED")

    def settle(self) -> None: ...

    def copied(self) -> list[tuple[int, float]]:
        return []

    def close(self) -> None:
        self.files.close()


class MappedPlace(Processor):
    def carrier(self, loads: Sequence[Load], slots: int, size: int) -> Mapped:  # type: ignore[override]
        return Mapped(loads, extents_of(p.weight for load in loads for p in load), size)


def mapped(graph: Any, ids: Tensor) -> Streamed:
    """Everything is read in every pass."""
    parts = cut(graph)
    plan = first_plan(parts, Wanted(1 << 40), Processor(), bind_inputs(graph, [ids]))
    every = tuple(i for i, w in enumerate(plan.weights) if w)
    size = max(slot_bytes(w) for w in plan.weights)
    all_of_it = Tiers(plan.layers, plan.weights, every, Hop(1e-9, slots=1), size, plan.fixed)
    return Streamed(parts, all_of_it, MappedPlace())


def disk_rate(graph: Any) -> float:
    """Bytes a second of reading all weights once, into one buffer."""
    extents = extents_of(graph.parameters.values())
    files = Files(extents.values())
    into = torch.empty(max(e.bytes for e in extents.values()), dtype=torch.uint8)
    rates = []
    for _ in range(2):
        start = time.perf_counter()
        for e in extents.values():
            files.read(e, into[: e.bytes])
        rates.append(sum(e.bytes for e in extents.values()) / (time.perf_counter() - start))
    files.close()
    return max(rates)


def passes(runs: dict[str, Streamed], ids: Tensor) -> dict[str, list[float]]:
    """Seconds of a pass of each, two in a row and the second counted, in turn."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            run([ids])
            start = time.perf_counter()
            run([ids])
            took[name].append(time.perf_counter() - start)
    return took


def measure(graph: Any, size: tuple[int, int], rate: float) -> None:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(SHAPE["vocab"], size, generator=g)
    weights = sum(weight_bytes(p) for p in graph.parameters.values())
    live = live_bytes(graph, bind_inputs(graph, [ids]))
    whole = within(graph, Wanted(1 << 40), inputs=[ids])
    expected = whole([ids])[0]
    for share in SHARES:
        runner = within(graph, Wanted(int(weights * share + live)), inputs=[ids])
        runs = {"all there": whole, "streamed": runner, "mapped": mapped(graph, ids)}
        same = torch.equal(runner([ids])[0], expected)
        took = passes(runs, ids)
        here, mine = median(took["all there"]), median(took["streamed"])
        plan = runner.plan
        bound = max(here, plan.bytes_per_pass / rate)
        say(
            f"{size[1]} tokens, {share:.0%}: {mine:.2f} s a pass, {mine / bound:.2f} times the "
            f"bound, {ratio(took['streamed'], took['all there'])} times all there; mapped "
            f"{ratio(took['mapped'], took['streamed'])} times as long; "
            f"{plan.bytes_per_pass / 1e6:.0f} of {weights / 1e6:.0f} MB a pass, {plan.slots} slots "
            f"of {plan.slot_bytes / 1e6:.0f} MB, planned {float(plan.pass_seconds):.2f} s; "
            f"{'equal' if same else 'NOT EQUAL'} bit for bit"
        )
        runs["mapped"].close()
        runner.close()
    whole.close()


def main(folder: str | None) -> None:
    before = stolen()
    say(machine_text(this_machine()))
    scratch = Path(tempfile.mkdtemp(dir=folder))
    try:
        graph = opened(package(scratch), build=False).graph
        rate = disk_rate(graph)
        say(f"the disk, read in the order of the weights: {rate / 1e9:.2f} GB/s")
        for size in PROMPTS:
            measure(graph, size, rate)
    finally:
        shutil.rmtree(scratch)
    lost, ticks = (b - a for a, b in zip(before, stolen(), strict=True))
    say(f"the host took {lost / max(ticks, 1):.1%} of the time")
    write("benchmarks/results/tiers.txt")


if __name__ == "__main__":
    rest = sys.argv[1:]
    if rest[:1] == ["--gpu"]:
        import _tiers_gpu

        _tiers_gpu.main(float(rest[1]) if rest[1:] else 85.0)
    else:
        main(rest[0] if rest else None)
