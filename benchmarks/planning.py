"""How fast programs are simulated and partitions found; each beside its goal.

python benchmarks/planning.py [--large]     --large adds 4096 ranks and 4096 microbatches, and
                                            Llama-3-70B beside 8B
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

import dfc
from dfc.planning.catalogue import known_device
from dfc.planning.machine import EFFICIENCY, Machine, Wire
from dfc.planning.partition import Effort, partition
from dfc.planning.problem import INFINITE, Problem, Slot, Tensor
from dfc.planning.schedules import schedule
from dfc.planning.simulate import Costs, simulate


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


def simulation(name: str, p: int, m: int, v: int = 1) -> None:
    made_s, program = timed(lambda: schedule(name, p, m, v))
    n = p * v
    costs = Costs([2] * n, [3] * n, [1] * n)
    seconds, found = timed(lambda: simulate(program, costs))
    print(
        f"  {name:15} p={p:<5} m={m:<5} {len(program):>9} actions: made in {made_s:6.2f} s, "
        f"simulated in {seconds:6.2f} s, {len(program) / seconds / 1e6:5.2f} M actions/s "
        f"(sync bubble {found.sync_bubble})"
    )


def chain(n: int, k: int) -> Problem:
    rng = random.Random(0)
    tensors = tuple(Tensor(u, rng.uniform(1, 4), (u + 1,)) for u in range(n - 1))
    time_ = np.array([[rng.uniform(1, 9)] for _ in range(n)])
    weights = np.array([rng.uniform(0, 5) for _ in range(n)])
    slots = tuple(Slot(memory=1.25 * weights.sum() / k, receive=10.0, send=10.0) for _ in range(k))
    return Problem(time_, tensors, slots, weights, np.zeros(n))


def residual(n: int, k: int) -> Problem:
    """As a chain, and every third node is read again four nodes on."""
    plain = chain(n, k)
    tensors = tuple(
        replace(t, readers=(*t.readers, t.producer + 4))
        if t.producer % 3 == 0 and t.producer + 4 < n else t
        for t in plain.tensors
    )  # fmt: skip
    return replace(plain, tensors=tensors)


def unet(depth: int, k: int) -> Problem:
    """2 * depth nodes; node i is read by its mirror."""
    n = 2 * depth
    plain = chain(n, k)
    tensors = tuple(
        replace(t, readers=(t.producer + 1, n - 1 - t.producer)) if t.producer < depth - 1 else t
        for t in plain.tensors
    )
    roomy = tuple(replace(s, memory=INFINITE) for s in plain.slots)
    return replace(plain, tensors=tensors, slots=roomy)


def branches(count: int, each: int, k: int) -> Problem:
    rng = random.Random(1)
    n, tensors = count * each + 2, []
    for b in range(count):
        nodes = [*range(1 + b * each, 1 + (b + 1) * each), n - 1]
        tensors += [Tensor(u, 1.0, (v,)) for u, v in pairwise(nodes)]
    tensors.append(Tensor(0, 1.0, tuple(1 + b * each for b in range(count))))
    time_ = np.array([[rng.uniform(1, 9)] for _ in range(n)])
    slots = tuple(Slot(receive=10.0, send=10.0) for _ in range(k))
    return Problem(time_, tuple(tensors), slots, np.ones(n), np.zeros(n))


def solved(name: str, problem: Problem, goal: str, seconds: float = 15.0) -> None:
    took, found = timed(lambda: partition(problem, Effort(seconds=seconds, gap=0.01)))
    print(
        f"  {name:24} n={problem.n:<5} K={problem.stages:<3} {took:6.2f} s of CPU, "
        f"gap {found.gap:7.3%} by {found.method:8} (goal {goal})"
    )


SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64},
}  # fmt: skip


def llama(size: str, layers: int | None = None) -> dfc.Graph:
    """Llama-3 on the meta device, in bf16, 2048 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[size] | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(vocab_size=128256, num_key_value_heads=8, use_cache=False, **shape)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16().eval()
        ids = torch.zeros(1, 2048, dtype=torch.long)
    return dfc.trace(model, (ids,))


def h100s(count: int) -> Machine:
    """H100s of one machine, each linked with each."""
    like = known_device("h100")
    rates = {k: v * EFFICIENCY for k, v in like.peaks.items()}
    devices = tuple(replace(like, name=f"gpu{i}", peaks=rates) for i in range(count))
    near = [(i, j) for i in range(count) for j in (i - 1, i + 1) if 0 <= j < count]
    return Machine("h100s", devices, dict.fromkeys(near, Wire(450e9, 5e-6)))


def against_layers(size: str) -> None:
    """How many times as long a microbatch takes with as many layers on each device."""
    graph = llama(size)
    for stages, goal in ((8, 1.2), (16, 1.38)):
        took, found = timed(lambda k=stages: dfc.plan(graph, h100s(k), microbatches=64))
        ratio = dict(found.splits).get("equal number of layers", float("nan"))
        print(
            f"  Llama-3-{size:3} {stages:>3} stages: equal layers take {ratio:.2f} times as long "
            f"(goal {goal} for 8B); gap {found.partition.gap:.2%} by {found.partition.method}, "
            f"{took:.1f} s of CPU"
        )


def main() -> None:
    print("Simulation, one core (goal 1 M actions/s; p = m = 4096 within 60 s)")
    for name in ("1f1b", "zb1p"):
        for p, m in ((16, 64), (64, 256), (256, 512), (1024, 1024)):
            simulation(name, p, m)
    simulation("interleaved", 64, 256, 4)
    if "--large" in sys.argv:
        simulation("1f1b", 4096, 4096)
    print("Partitions")
    solved("chain", chain(5000, 32), "exact in 1 s")
    solved("residual network", residual(200, 8), "1 % in 1 s")
    solved("U-Net", unet(32, 8), "1 % in 1 s")
    solved("U-Net", unet(100, 8), "1 % in 1 s")
    solved("4 branches of 20", branches(4, 20, 8), "2 % in 15 s")
    for objective in ("latency", "memory"):
        solved(f"chain, {objective}", replace(chain(5000, 32), objective=objective), "exact in 1 s")
        solved(f"U-Net, {objective}", replace(unet(100, 8), objective=objective), "1 % in 1 s")
    print("Plans against equal layers, by the model")
    against_layers("8B")
    if "--large" in sys.argv:
        against_layers("70B")


if __name__ == "__main__":
    main()
