"""From files into slots of memory: a thread reads ahead of what is computed."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING

from dfc.errors import DfcError
from dfc.ir.graph import Parameter
from dfc.runtime.tiers.files import Extent, Files
from dfc.runtime.tiers.slots import Load

if TYPE_CHECKING:
    from torch import Tensor


def host_memory(size: int) -> Tensor:
    import torch

    return torch.empty(size, dtype=torch.uint8)


class Reader:
    """The carrier of a processor's weights, whose slots are in some `memory`.

    Keeps:  `bytes_read`, of all loads, to the byte.
    """

    def __init__(
        self, loads: Sequence[Load], extents: Mapping[Parameter, Extent], files: Files,
        slots: int, slot_bytes: int, memory: Callable[[int], Tensor] = host_memory,
    ) -> None:  # fmt: skip
        self.slots = [memory(slot_bytes) for _ in range(slots)]
        self.loads, self.extents, self.files = loads, extents, files
        self.bytes_read = 0
        self._full = [threading.Event() for _ in range(slots)]
        self._failed: DfcError | None = None
        self._wanted: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
        self._filling = 0  # loads that are asked for and not there
        self._copied: deque[tuple[int, float]] = deque(maxlen=max(1, len(loads)))
        self._closed = False
        self._thread = threading.Thread(target=self._read, name="dfc weights", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        self.files.check()

    def fill(self, load: int, slot: int) -> None:
        self._full[slot].clear()
        self._wanted.put((load, slot))

    def ready(self, slot: int) -> None:
        self._full[slot].wait()
        if self._failed is not None:
            raise self._failed

    def leave(self, slot: int) -> None:
        return None

    def settle(self) -> None:
        """Wait for what was asked for; what failed before may be tried again."""
        done = threading.Event()
        self._settled = done
        if self._thread.is_alive():
            self._wanted.put((-1, 0))
            done.wait()
        self._failed = None

    def copied(self) -> list[tuple[int, float]]:
        return list(self._copied)

    def _read(self) -> None:
        while (job := self._wanted.get()) is not None:
            load, slot = job
            if load < 0:
                self._settled.set()
                continue
            start = time.perf_counter()
            try:
                size = self._load(load, slot)
            except DfcError as e:
                self._failed = e
            else:
                self._copied.append((size, time.perf_counter() - start))
            self._full[slot].set()

    def _load(self, load: int, slot: int) -> int:
        size = 0
        for piece in self.loads[load]:
            into = self.slots[slot][piece.offset : piece.offset + piece.bytes]
            self.files.read(self.extents[piece.weight], into, lambda: not self._closed)
            size += piece.bytes
        self.bytes_read += size
        return size

    def close(self) -> None:
        """End the thread; within one request of the disk."""
        self._closed = True
        self._wanted.put(None)
        self._thread.join()
        self.files.close()
        self.slots = []
