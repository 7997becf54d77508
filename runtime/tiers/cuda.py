"""From pinned memory into slots on a CUDA device, by a stream of copies beside the computing.

Nothing waits on the host: a copy waits on the device for the event after which its slot is free,
what is computed for the event after which it is full. Each load is one flat copy.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Copies:
    """The carrier of a device's weights; `sources` are the loads in pinned memory.

    Without them it is told what to copy, and remembers the times of so many `loads`.
    """

    def __init__(
        self, sources: Sequence[Tensor], device: str, slots: int, slot_bytes: int, loads: int = 0
    ) -> None:  # fmt: skip
        import torch

        self.device = torch.device(device)
        self.sources = list(sources)
        with torch.cuda.device(self.device):
            self.slots = [
                torch.empty(slot_bytes, dtype=torch.uint8, device=self.device)
                for _ in range(slots)
            ]  # fmt: skip
            self.stream = make_stream(self.device)
        # What lay in the slots' memory before may still be read by what is queued.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        self._full = [_event() for _ in range(slots)]
        self._left = [_event() for _ in range(slots)]
        self._was_left = [False] * slots
        self._copied: deque[tuple[int, Any, Any]] = deque(maxlen=max(1, loads or len(sources)))

    def begin(self) -> None:
        return None

    def fill(self, load: int, slot: int) -> None:
        self.copy(self.sources[load], slot)

    def copy(self, source: Tensor, slot: int) -> None:
        """Queue a copy, once what was queued has left the slot."""
        import torch

        with torch.cuda.stream(self.stream):
            if self._was_left[slot]:
                self.stream.wait_event(self._left[slot])
            start, end = _event(timed=True), _event(timed=True)
            start.record(self.stream)
            self.slots[slot][: source.numel()].copy_(source, non_blocking=True)
            end.record(self.stream)
            self._full[slot].record(self.stream)
        self._copied.append((source.numel(), start, end))

    def landed(self, slot: int) -> None:
        """Wait until the last copy into a slot is over."""
        self._full[slot].synchronize()

    def ready(self, slot: int) -> None:
        self._computing().wait_event(self._full[slot])

    def leave(self, slot: int) -> None:
        self._left[slot].record(self._computing())
        self._was_left[slot] = True

    def _computing(self) -> torch.cuda.Stream:
        import torch

        return torch.cuda.current_stream(self.device)

    def settle(self) -> None:
        """Wait for the device: what was queued may read slots."""
        import torch

        torch.cuda.synchronize(self.device)

    def copied(self) -> list[tuple[int, float]]:
        import torch

        torch.cuda.synchronize(self.device)
        return [(size, a.elapsed_time(b) / 1e3) for size, a, b in self._copied]

    def close(self) -> None:
        self.settle()
        self.slots, self.sources = [], []


def pinned(size: int) -> Tensor:
    """So many bytes that a device copies from by itself, on huge pages where there are some.

    Why:     PyTorch's own pinned memory is rounded up to a power of two, and kept.
    Raises:  DfcError K072 (status 7) when the system does not let so much be pinned.
    """
    import torch

    from dfc.runtime.kernels.memory import pages

    memory = pages(size)
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    at = memory.ctypes.data
    status = int(runtime.cudaHostRegister(at, memory.nbytes, 0))
    if status:
        raise DfcError(
            "K072", f"CUDA cannot pin {size} bytes of memory (error {status})",
            help="see `ulimit -l`, and how much memory is free", status=7,
        )  # fmt: skip
    # The array goes when the last tensor on it goes, and before its memory does.
    weakref.finalize(memory, runtime.cudaHostUnregister, at).atexit = False
    return torch.from_numpy(memory)[:size]


def make_stream(device: torch.device) -> Any:
    import torch

    make: Any = torch.cuda.Stream
    return make(device)


def _event(timed: bool = False) -> Any:
    import torch

    make: Any = torch.cuda.Event
    return make(enable_timing=timed)
