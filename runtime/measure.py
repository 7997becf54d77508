"""Measuring runners side by side: alternating, after warm-up, reported as median and spread."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from dfc.planning.engine import Runner


@dataclass(frozen=True)
class Timing:
    """How long one call takes.

    Units:  milliseconds; the spread is the distance between the quartiles.
    """

    p50_ms: float
    spread_ms: float
    runs: int


def measure(
    runners: Mapping[str, Runner],
    inputs: Sequence[Any],
    *,
    seconds: float = 1.0,
    least: int = 5,
    most: int = 200,
) -> dict[str, Timing]:
    """Time runners on the same inputs, alternating, so that noise hits all of them alike.

    `seconds` bounds the time for each runner; at least `least` runs are made.
    """
    times: dict[str, list[float]] = {name: [] for name in runners}
    for run in runners.values():
        run(inputs)
        run(inputs)
    start = time.perf_counter()
    budget = seconds * len(runners)
    while True:
        for name, run in runners.items():
            begin = time.perf_counter()
            run(inputs)
            _synchronize(inputs)
            times[name].append((time.perf_counter() - begin) * 1e3)
        done = len(next(iter(times.values())))
        if done >= most or (done >= least and time.perf_counter() - start > budget):
            break
    return {name: _timing(t) for name, t in times.items()}


def _synchronize(inputs: Sequence[Any]) -> None:
    import torch

    if any(isinstance(x, torch.Tensor) and x.is_cuda for x in inputs):
        torch.cuda.synchronize()


def _timing(times: list[float]) -> Timing:
    ordered = sorted(times)
    n = len(ordered)
    return Timing(median(ordered), ordered[(3 * n) // 4] - ordered[n // 4], n)
