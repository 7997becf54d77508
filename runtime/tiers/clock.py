"""Times of blocks of a graph as they run: what is between two stamps is known when it is over."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol


class Clock(Protocol):
    """Two stamps for each block: before it waits for its weights, and when they are there."""

    def stamp(self) -> None: ...

    def seconds(self) -> list[float]:
        """Between each stamp and the next; forgets them."""
        ...


class HostClock:
    """A processor's."""

    def __init__(self) -> None:
        self._stamps: list[float] = []

    def stamp(self) -> None:
        self._stamps.append(time.perf_counter())

    def seconds(self) -> list[float]:
        found = [b - a for a, b in zip(self._stamps, self._stamps[1:], strict=False)]
        self._stamps.clear()
        return found


class CudaClock:
    """The device's own: stamps are events of its stream."""

    def __init__(self, device: str) -> None:
        import torch

        self.device = torch.device(device)
        self._stamps: list[Any] = []

    def stamp(self) -> None:
        import torch

        make: Any = torch.cuda.Event
        event = make(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self._stamps.append(event)

    def seconds(self) -> list[float]:
        import torch

        torch.cuda.synchronize(self.device)
        pairs = zip(self._stamps, self._stamps[1:], strict=False)
        found = [a.elapsed_time(b) / 1e3 for a, b in pairs]
        self._stamps.clear()
        return found


def block_seconds(between: Sequence[float], blocks: int) -> tuple[list[float], float]:
    """Of one pass with 2 stamps a block and one at each end: what each block computes, what it
    waited for. What comes before the first block is part of it.

    Needs:   2 * blocks + 1 times.
    """
    computed = list(between[2::2])
    computed[0] += between[0]
    return computed, sum(between[1::2])
