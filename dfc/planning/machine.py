"""Devices and links as the planner sees them: rates in flops and bytes a second, sizes in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from dfc.errors import DfcError

RESERVE = 0.1  # of a device's memory: allocators, fragments, the runtime itself
EFFICIENCY = 0.7  # of a peak that was not measured


@dataclass(frozen=True)
class Device:
    """One device. `peaks` are flops a second by dtype; f32's stands in for one that is missing.

    What a calibrated device also knows, by class of operator (`cost.work_of` names them): `rates`
    in flops a second, f32; `launches` in seconds, where starting one takes longer or less long than
    `launch`. `grain` is the side of a matrix with which half of the peak is reached. Up to `cache`
    bytes of an operator move with `cache_bandwidth`.
    """

    name: str
    kind: str
    memory: float
    bandwidth: float
    peaks: Mapping[str, float]
    launch: float = 0.0
    source: str = ""
    rates: Mapping[str, float] = field(default_factory=dict)
    launches: Mapping[str, float] = field(default_factory=dict)
    grain: float = 0.0
    cache: float = 0.0
    cache_bandwidth: float = float("inf")

    def peak(self, dtype: str) -> float:
        """Flops a second in a dtype, of f32 for a dtype without a peak of its own.

        Raises:  DfcError N042 for a device without any peak.
        """
        found = self.peaks.get(dtype, self.peaks.get("f32", 0.0))
        if not found:
            raise DfcError("N042", f"device `{self.name}` has no peak: write peak=1Tflops/s")
        return found

    def rate(self, kind: str, dtype: str) -> float:
        """Flops a second of a class of operators: its own, scaled as the peak is, or the peak."""
        own = self.rates.get(kind)
        peak = self.peak(dtype)
        return own * peak / self.peak("f32") if own else peak

    def launching(self, kind: str) -> float:
        """Seconds to start an operator; views start nothing unless it was measured."""
        return self.launches.get(kind, 0.0 if kind == "view" else self.launch)

    def moving(self, size: float) -> float:
        """Seconds to move so many bytes: what fits the cache is quicker."""
        near = min(size, self.cache)
        return near / self.cache_bandwidth + (size - near) / self.bandwidth

    @property
    def usable(self) -> float:
        return self.memory * (1 - RESERVE)


@dataclass(frozen=True)
class Wire:
    """One direction of a link: bytes a second, and seconds until the first arrives."""

    bandwidth: float = float("inf")
    latency: float = 0.0


@dataclass(frozen=True)
class Machine:
    """Devices in the order of the pipeline, and the wires between them by (from, to)."""

    name: str
    devices: tuple[Device, ...]
    wires: Mapping[tuple[int, int], Wire] = field(default_factory=dict)

    def wire(self, source: int, target: int) -> Wire:
        """The wire from one device to another, or the quickest relay through others.

        A relay stores and forwards: latencies and seconds a byte add up.
        Raises:  DfcError N043 when there is no way.
        """
        if source == target:
            return Wire()
        found = self.wires.get((source, target)) or self._relay(source, target)
        if found is None:
            a, b = self.devices[source].name, self.devices[target].name
            help = f"write `link {a} <-> {b} : pcie(bw=25GB/s, latency=10us)` in the target"
            raise DfcError("N043", f"there is no link from `{a}` to `{b}`", help=help)
        return found

    def _relay(self, source: int, target: int) -> Wire | None:
        import networkx

        ways = networkx.DiGraph()
        for (a, b), wire in self.wires.items():
            # A typical boundary tensor, a megabyte, decides which way is the quickest.
            ways.add_edge(a, b, seconds=wire.latency + 1e6 / wire.bandwidth)
        if source not in ways or target not in ways or not networkx.has_path(ways, source, target):
            return None
        path = networkx.shortest_path(ways, source, target, weight="seconds")
        hops = [self.wires[a, b] for a, b in pairwise(path)]
        slow = sum(1 / hop.bandwidth for hop in hops)
        return Wire(1 / slow if slow else float("inf"), sum(hop.latency for hop in hops))
