"""Over two hops: a thread reads files into slots of the host, another hands them on to a device.

What the host's memory holds goes to the device from there; the rest is read into its slots, each
free again as soon as its copy to the device is over. Both hops go on beside each other, and beside
the computing.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from queue import SimpleQueue
from typing import TYPE_CHECKING, Protocol

from dfc.errors import DfcError
from dfc.planning.tiers import Tiers
from dfc.runtime.tiers.cycle import Cycle
from dfc.runtime.tiers.files import Files, extents_of
from dfc.runtime.tiers.places import Place
from dfc.runtime.tiers.reader import Reader
from dfc.runtime.tiers.slots import Load, flat, load_bytes

if TYPE_CHECKING:
    from torch import Tensor


class Copier(Protocol):
    """The upper hop: from the host's memory into slots of a device; see `Carrier`."""

    @property
    def slots(self) -> Sequence[Tensor]: ...

    def copy(self, source: Tensor, slot: int) -> None:
        """Start to copy, once what was queued has left the slot."""
        ...

    def landed(self, slot: int) -> None:
        """Wait until the last copy into a slot is over: its source may be written to."""
        ...

    def ready(self, slot: int) -> None: ...

    def leave(self, slot: int) -> None: ...

    def settle(self) -> None: ...

    def copied(self) -> list[tuple[int, float]]: ...

    def close(self) -> None: ...


class Relaying(Place, Protocol):
    """A device that is copied to from the host's memory."""

    def memory(self, size: int) -> Tensor:
        """So many bytes of the host that the device copies from."""
        ...

    def copier(self, slots: int, slot_bytes: int, loads: int) -> Copier: ...


def relay(place: Relaying, loads: Sequence[Load], plan: Tiers) -> Relay:
    """The carrier of a plan whose lower tier streams as well.

    Raises:  DfcError K070 for weights that are to be read and in no file, K071 for their files.
    """
    below = plan.below
    assert below is not None
    read = [loads[j] for j in below.streamed]
    extents = extents_of(piece.weight for load in read for piece in load)
    files = Files(extents.values())
    reader = Reader(read, extents, files, below.slots, below.slot_bytes, place.memory)
    with ExitStack() as failing:
        failing.callback(reader.close)
        held = {
            j: flat(load, place.memory(load_bytes(load)))
            for j, load in enumerate(loads)
            if j not in below.streamed
        }
        copier = place.copier(plan.slots, plan.slot_bytes, len(loads))
        failing.pop_all()
    return Relay(copier, reader, held, below.streamed)


class Relay:
    """The carrier: `held` are loads that the host's memory has, `read` the numbers of the others.

    Keeps:  loads are brought in the order in which they are asked for, which is cyclic.
    """

    def __init__(
        self, copier: Copier, reader: Reader, held: dict[int, Tensor], read: Sequence[int]
    ) -> None:  # fmt: skip
        self.copier, self.reader, self.held = copier, reader, held
        self.lower = Cycle(reader, reader.loads)
        self._number = {load: j for j, load in enumerate(read)}
        self._read_bytes = {
            load: sum(piece.bytes for piece in pieces)
            for load, pieces in zip(read, reader.loads, strict=True)
        }
        self._wanted: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
        self._queued = [threading.Event() for _ in copier.slots]
        self._sizes = [0] * len(copier.slots)  # what each slot's load was read with
        self.taken_from_below = 0  # bytes that were read and are computed with
        self._settled = threading.Event()
        self._failed: DfcError | None = None
        self._thread = threading.Thread(target=self._feed, name="dfc weights", daemon=True)
        self._thread.start()

    @property
    def slots(self) -> Sequence[Tensor]:
        return self.copier.slots

    @property
    def host_bytes(self) -> int:
        """What lies in the host's memory: loads, and slots."""
        return sum(x.numel() for x in [*self.held.values(), *self.reader.slots])

    def begin(self) -> None:
        self.reader.begin()

    def fill(self, load: int, slot: int) -> None:
        self._queued[slot].clear()
        self._sizes[slot] = self._read_bytes.get(load, 0)
        self._wanted.put((load, slot))

    def ready(self, slot: int) -> None:
        self._queued[slot].wait()
        if self._failed is not None:
            raise self._failed
        self.copier.ready(slot)
        self.taken_from_below += self._sizes[slot]

    def leave(self, slot: int) -> None:
        self.copier.leave(slot)

    def settle(self) -> None:
        """Wait for what was asked for; what is read next is the first load again."""
        self._settled.clear()
        self._wanted.put((-1, 0))
        self._settled.wait()
        self.copier.settle()
        if self._failed is not None or not self.lower.between_passes:
            self._failed = None
            self.lower.restart()

    def copied(self) -> list[tuple[int, float]]:
        return self.copier.copied()

    def _feed(self) -> None:
        while (job := self._wanted.get()) is not None:
            load, slot = job
            if load < 0:
                self._settled.set()
                continue
            if self._failed is None:
                try:
                    self._bring(load, slot)
                except DfcError as e:
                    self._failed = e
            self._queued[slot].set()

    def _bring(self, load: int, slot: int) -> None:
        if load in self.held:
            self.copier.copy(self.held[load], slot)
            return
        j = self._number[load]
        self.lower.take(j)
        source = self.reader.slots[self.lower.taken % self.lower.count]
        self.copier.copy(source[: load_bytes(self.reader.loads[j])], slot)
        self.copier.landed(slot)
        self.lower.leave()

    def close(self) -> None:
        """End both threads."""
        self._wanted.put(None)
        self._thread.join()
        self.lower.forget()
        self.reader.close()
        self.copier.close()
        self.held.clear()
