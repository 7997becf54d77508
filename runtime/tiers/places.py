"""Where a model runs: how weights that stay get there, and what brings the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeGuard

from dfc.emit.kernels import KernelCall
from dfc.ir.graph import Graph, Node, Parameter
from dfc.ir.weights import SafetensorsData
from dfc.planning.here import here
from dfc.planning.machine import Device
from dfc.planning.tier_plan import DISK, PCIE
from dfc.runtime.tiers.clock import Clock, CudaClock, HostClock
from dfc.runtime.tiers.slots import Carrier, Load, flat, load_bytes, numbers

if TYPE_CHECKING:
    from torch import Tensor

    from dfc.runtime.tiers.cuda import Copies
    from dfc.runtime.tiers.relay import Relaying


class Place(Protocol):
    """A device with a memory, and the tier above it that everything comes from."""

    device: str
    source: str  # the tier's name
    guess: float  # bytes a second from there, before anything is measured

    def model(self) -> Device:
        """What is computed how fast, before anything is measured."""
        ...

    def clock(self) -> Clock: ...

    def calls(self, graph: Graph) -> dict[Node, KernelCall]:
        """What runs in place of nodes, with weights of its own."""
        ...

    def hold(self, weight: Parameter) -> Tensor:
        """A weight that stays, in memory of its own."""
        ...

    def carrier(self, loads: Sequence[Load], slots: int, slot_bytes: int) -> Carrier: ...

    def finish(self) -> None:
        """Wait until what was computed is there."""
        ...


class Processor:
    """This machine's memory; weights come from files."""

    device, source, guess = "cpu", "disk", DISK

    def model(self) -> Device:
        return next(d for d in here().devices if d.kind == "cpu")

    def clock(self) -> Clock:
        return HostClock()

    def calls(self, graph: Graph) -> dict[Node, KernelCall]:
        from dfc.runtime.tiers.packing import packed_calls

        return packed_calls(graph)

    def hold(self, weight: Parameter) -> Tensor:
        """Read, and not mapped: what is mapped may be dropped by the system, and read again."""
        import torch

        from dfc.runtime.tiers.files import FileData, Files, extents_of

        if not isinstance(weight.data, (SafetensorsData, FileData)):
            return numbers(weight)
        extent = extents_of([weight])[weight]
        memory = torch.empty(extent.bytes, dtype=torch.uint8)
        files = Files([extent])
        try:
            files.read(extent, memory)
        finally:
            files.close()
        t = weight.tensor_type
        return memory.view(t.dtype.to_torch()).view([int(s) for s in t.shape])  # type: ignore[arg-type]

    def carrier(self, loads: Sequence[Load], slots: int, slot_bytes: int) -> Carrier:
        from dfc.runtime.tiers.files import Files, extents_of
        from dfc.runtime.tiers.reader import Reader

        extents = extents_of(piece.weight for load in loads for piece in load)
        files = Files(extents.values())
        return Reader(loads, extents, files, slots, slot_bytes)

    def finish(self) -> None:
        return None


class Cuda:
    """A CUDA device; weights come from pinned memory.

    What the last plan did not stream is let go of, unless all that was pinned is `kept`.
    """

    source, guess = "memory", PCIE

    def __init__(self, device: str, kept: bool = False) -> None:
        self.device, self.kept = device, kept
        self._pinned: dict[tuple[Parameter, ...], Tensor] = {}

    def model(self) -> Device:
        import torch

        index = torch.device(self.device).index or 0
        return [d for d in here().devices if d.kind == "cuda"][index]

    def clock(self) -> Clock:
        return CudaClock(self.device)

    def calls(self, graph: Graph) -> dict[Node, KernelCall]:
        return {}

    def hold(self, weight: Parameter) -> Tensor:
        return numbers(weight).to(self.device)

    def carrier(self, loads: Sequence[Load], slots: int, slot_bytes: int) -> Carrier:
        from dfc.runtime.tiers.cuda import Copies, pinned

        sources: list[Tensor] = []
        wanted: dict[tuple[Parameter, ...], Tensor] = {}
        for load in loads:
            key = tuple(piece.weight for piece in load)
            known = wanted.get(key, self._pinned.get(key))
            wanted[key] = flat(load, pinned(load_bytes(load))) if known is None else known
            sources.append(wanted[key])
        self._pinned = {**self._pinned, **wanted} if self.kept else wanted
        return Copies(sources, self.device, slots, slot_bytes)

    def memory(self, size: int) -> Tensor:
        from dfc.runtime.tiers.cuda import pinned

        return pinned(size)

    def copier(self, slots: int, slot_bytes: int, loads: int) -> Copies:
        from dfc.runtime.tiers.cuda import Copies

        return Copies([], self.device, slots, slot_bytes, loads)

    def finish(self) -> None:
        import torch

        torch.cuda.current_stream(torch.device(self.device)).synchronize()


# By the kind of device: what stands before a colon in its name.
KINDS: dict[str, Callable[[str], Place]] = {"cpu": lambda device: Processor(), "cuda": Cuda}


def place_of(device: str) -> Place:
    return KINDS[device.partition(":")[0]](device)


def is_relayed(place: Place) -> TypeGuard[Relaying]:
    """Whether weights come there from the host's memory, which a disk may be below."""
    return hasattr(place, "copier")
