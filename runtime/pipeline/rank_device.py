"""The device of a rank that is a process: its stages compute there, on a stream of its own.

Links carry what lies in this machine's memory: what leaves a GPU is copied out when it is sent, and
what comes is copied in before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dfc.runtime.pipeline.lanes import Run
from dfc.runtime.pipeline.streams import Streams

if TYPE_CHECKING:
    from dfc.planning.actions import Action

Spans = list[tuple["Action", float, float]]


class RankDevice:
    """`cpu`, or a CUDA device with the stream that the rank computes on."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._streams = Streams([name]) if name != "cpu" else None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a rank's row, in the thread that runs it; at its end the device is done."""
        if self._streams is None:
            yield
            return
        self._streams.follow_caller()
        with self._streams.lane(0), self._streams.step():
            yield

    def paced(self, run: Run, stages: int) -> Run:
        """A run that is timed on the device, and is only a few actions before it."""
        return run if self._streams is None else self._streams.paced(run, [0] * stages)

    def timed(self, spans: Spans) -> Spans:
        """The device's own times, of a step that is over."""
        if self._streams is None:
            return spans
        return [(a, *(self._streams.times(a) or (start, end))) for a, start, end in spans]

    def settle(self) -> None:
        """Wait for what a step that was given up has left in the queue."""
        if self._streams is not None:
            self._streams.settle()

    def here(self, values: Sequence[Any]) -> list[Any]:
        """Values on this device, ordered before what its stream does next."""
        if self._streams is None:
            return list(on_host(values))
        return [x.to(self.name) if hasattr(x, "device") else x for x in values]


def on_host(values: Sequence[Any]) -> Sequence[Any]:
    """Values in this machine's memory, made whole: a device's are waited for."""
    if all(getattr(x, "is_cpu", True) for x in values):
        return values
    return [x.to("cpu") if hasattr(x, "device") else x for x in values]


def device_identity(name: str) -> str:
    """What tells a device of this machine from others, whatever a process calls it."""
    if name == "cpu":
        return name
    import torch

    return str(torch.cuda.get_device_properties(name).uuid)
