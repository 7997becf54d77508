"""Devices that are copies in this process: they copy late, and spoil what was left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dfc.ir.graph import Graph, Parameter
from dfc.runtime.tiers.places import Processor
from dfc.runtime.tiers.slots import Load, flat, load_bytes, numbers


class Poisoning:
    """A carrier in this process: it copies at the last moment, and spoils what was left."""

    def __init__(self, loads: Sequence[Load], slots: int, slot_bytes: int) -> None:
        self.slots = [torch.zeros(slot_bytes, dtype=torch.uint8) for _ in range(slots)]
        sizes = [load_bytes(load) for load in loads]
        self.sources = [
            flat(load, torch.zeros(size, dtype=torch.uint8))
            for load, size in zip(loads, sizes, strict=True)
        ]
        self.waiting: dict[int, int] = {}
        self.log: list[tuple[str, int]] = []

    def begin(self) -> None:
        self.log.append(("begin", 0))

    def fill(self, load: int, slot: int) -> None:
        assert slot not in self.waiting  # it was read before it is filled again
        self.waiting[slot] = load
        self.log.append(("fill", load))

    def ready(self, slot: int) -> None:
        source = self.sources[self.waiting[slot]]
        self.slots[slot][: source.numel()].copy_(source)

    def leave(self, slot: int) -> None:
        self.slots[slot].fill_(255)  # not a number, in any float
        del self.waiting[slot]

    def settle(self) -> None:
        self.waiting.clear()

    def copied(self) -> list[tuple[int, float]]:
        return [(s.numel(), 1e-6) for s in self.sources]

    def close(self) -> None:
        self.slots = []


class InProcess(Processor):
    """As a device is: weights of the process are put there, and brought from there."""

    source = "memory"

    def hold(self, weight: Parameter) -> Tensor:
        return numbers(weight).clone()

    def carrier(self, loads: Sequence[Load], slots: int, slot_bytes: int) -> Poisoning:  # type: ignore[override]
        return Poisoning(loads, slots, slot_bytes)


class Copier:
    """The upper hop in this process: it copies at the last moment, and spoils what was left."""

    def __init__(self, slots: int, slot_bytes: int, seconds: float = 0.0) -> None:
        self.slots = [torch.full((slot_bytes,), 255, dtype=torch.uint8) for _ in range(slots)]
        self.full = [False] * slots
        self.pending: dict[int, Tensor] = {}
        self.seconds = seconds
        self.times: list[tuple[int, float]] = []

    def copy(self, source: Tensor, slot: int) -> None:
        assert not self.full[slot]  # it was left before it is written to
        self.full[slot] = True
        self.pending[slot] = source
        self.times.append((source.numel(), 1e-6))

    def landed(self, slot: int) -> None:
        time.sleep(self.seconds)
        source = self.pending.pop(slot)
        self.slots[slot][: source.numel()].copy_(source)

    def ready(self, slot: int) -> None:
        assert self.full[slot]
        if slot in self.pending:
            self.landed(slot)

    def leave(self, slot: int) -> None:
        self.slots[slot].fill_(255)  # not a number, in any float
        self.full[slot] = False

    def settle(self) -> None:
        self.full = [False] * len(self.full)
        self.pending.clear()

    def copied(self) -> list[tuple[int, float]]:
        return self.times

    def close(self) -> None:
        self.slots = []


class Upper(Processor):
    """As a device is, with memory of its own in this process."""

    source = "memory"

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def calls(self, graph: Graph) -> dict[Any, Any]:
        return {}

    def hold(self, weight: Any) -> Tensor:
        return numbers(weight).clone()

    def memory(self, size: int) -> Tensor:
        return torch.full((size,), 255, dtype=torch.uint8)

    def copier(self, slots: int, slot_bytes: int, loads: int) -> Copier:
        return Copier(slots, slot_bytes, self.seconds)


class Device(Upper):
    """Its carrier over one hop is that of the tests of streaming."""

    carrier = InProcess.carrier  # type: ignore[assignment]
