"""Runs timed in turn, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROUNDS = 9
_said: list[str] = []


def say(line: str) -> None:
    print(line, flush=True)
    _said.append(line)


def write(path: str) -> None:
    """Everything said so far."""
    Path(path).write_text("\n".join(_said) + "\n", encoding="utf-8")


def alternating(runs: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each, in turn, after one warm round."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            took[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in took.items()}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> str:
    """How many times as long, in the median; in brackets the lowest and the highest of a round."""
    each = [s / f for s, f in zip(slow, fast, strict=True)]
    return f"{median(slow) / median(fast):.2f} ({min(each):.2f} to {max(each):.2f})"


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for PyTorch meanwhile."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stolen() -> tuple[int, int]:
    """Ticks that the host took from this machine, and all ticks, since it started."""
    ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return ticks[7], sum(ticks)
