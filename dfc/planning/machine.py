"""Devices and links as the planner sees them: rates in flops and bytes a second, sizes in bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from math import isnan
from typing import Any

from dfc.errors import DfcError, Diagnostic, did_you_mean

RESERVE = 0.1  # of a device's memory: allocators, fragments, the runtime itself
EFFICIENCY = 0.7  # of a peak that was not measured


@dataclass(frozen=True)
class Device:
    """One device. `peaks` are flops a second by dtype; f32's stands in for one that is missing.

    What a calibrated device also knows, by class of operator (`cost.work_of` names them): `rates`
    in flops a second, f32; `launches` in seconds, where starting one does not take `launch`; each
    head of attention adds `each_matrix`, each matrix of a batch of products `each_product`.
    `grain` is the side of a matrix with which half of the peak is reached. Up to `cache` bytes of
    an operator move with `cache_bandwidth`; a convolution's change their layout with
    `layout_bandwidth`, 0 where that is part of computing. Results too large for malloc to keep are
    mapped with `fresh_bandwidth`.
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
    price: float = 1.0  # of a second, in whatever money
    dtypes: tuple[str, ...] = ()  # what it can compute in; none: everything
    layout_bandwidth: float = 0.0
    each_matrix: float = 0.0
    each_product: float = 0.0
    fresh_bandwidth: float = float("inf")
    cores: float = 0.0  # of a processor; 0 is unknown

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

    @property
    def ahead(self) -> bool:
        """Whether operators are started while earlier ones still run, as in a GPU's queue."""
        return self.kind != "cpu"

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

    def part(self, index: int, of: int) -> Device:
        """One of several equal parts: as many of its cores, its memory and its bandwidth.

        Where there are more parts than cores, a part also waits to start operators.
        """
        waits = max(1.0, of / self.cores) if self.cores else 1.0
        return replace(
            self, name=f"{self.name}.{index}", memory=self.memory / of, price=self.price / of,
            bandwidth=self.bandwidth / of, peaks={k: v / of for k, v in self.peaks.items()},
            rates={k: v / of for k, v in self.rates.items()}, cache=self.cache / of,
            cache_bandwidth=self.cache_bandwidth / of,
            layout_bandwidth=self.layout_bandwidth / of, cores=self.cores / of,
            fresh_bandwidth=self.fresh_bandwidth / of, launch=self.launch * waits,
            each_matrix=self.each_matrix * waits, each_product=self.each_product * waits,
            launches={k: v * waits for k, v in self.launches.items()},
        )  # fmt: skip

    @property
    def figures(self) -> tuple[object, ...]:
        """All that a plan depends on: devices that are alike have equal ones."""
        facts = vars(replace(self, name="", source="")).values()
        return tuple(tuple(sorted(x.items())) if isinstance(x, Mapping) else x for x in facts)


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

    def check(self) -> None:
        """Raises:  DfcError N045 for no devices, two of a name, and every impossible number."""
        found = [*self._wrong_devices(), *self._wrong_wires()]
        if found:
            raise DfcError.of([Diagnostic("N045", message) for message in found])

    def check_links(self) -> None:
        """Raises:  DfcError N043 for a device that no other one has a way to."""
        import networkx

        ways = self._ways.to_undirected()
        ways.add_nodes_from(range(len(self.devices)))
        parts = sorted(map(sorted, networkx.connected_components(ways)))
        if len(parts) > 1:
            raise self._no_way(parts[0][0], parts[1][0])

    def no_way_back(self) -> tuple[str, str] | None:
        """Two devices of which the first has no way to the second, which has one to it."""
        for i, a in enumerate(self.devices):
            for j, b in enumerate(self.devices):
                if i != j and self.way(i, j) is None and self.way(j, i) is not None:
                    return a.name, b.name
        return None

    def _no_way(self, source: int, target: int) -> DfcError:
        a, b = self.devices[source].name, self.devices[target].name
        help = f"write `link {a} <-> {b} : pcie(bw=25GB/s, latency=10us)` in the target"
        return DfcError("N043", f"there is no link from `{a}` to `{b}`", help=help)

    def _wrong_devices(self) -> Iterator[str]:
        if not self.devices:
            yield f"`{self.name}` has no devices"
        for name, n in Counter(d.name for d in self.devices).items():
            if n > 1:
                yield f"{n} devices are called `{name}`"
        for d in self.devices:
            rates = {f"peak of {k}": v for k, v in d.peaks.items()}
            for fact, value in ({"mem": d.memory, "bw": d.bandwidth} | rates).items():
                if isnan(value) or value <= 0:
                    yield f"device `{d.name}` has an impossible `{fact}`: {value:g}"
            if not 0 < d.price < float("inf"):
                yield f"device `{d.name}` has an impossible `price`: {d.price:g}"
            if not 0 <= d.launch < float("inf"):
                yield f"device `{d.name}` has an impossible `launch`: {d.launch:g}"

    def _wrong_wires(self) -> Iterator[str]:
        for (a, b), wire in self.wires.items():
            if not (0 <= a < len(self.devices) and 0 <= b < len(self.devices)):
                yield f"there is a link from device {a} to {b} of {len(self.devices)}"
                continue
            ends = f"the link from `{self.devices[a].name}` to `{self.devices[b].name}`"
            if isnan(wire.bandwidth) or wire.bandwidth <= 0:
                yield f"{ends} has an impossible `bw`: {wire.bandwidth:g}"
            if not 0 <= wire.latency < float("inf"):
                yield f"{ends} has an impossible `latency`: {wire.latency:g}"

    def only(self, names: Sequence[str]) -> Machine:
        """The machine of these of its devices, in this order; one that is named n times is n equal
        parts of it, which hand over without a copy, or over its link to itself where it has one.

        Raises:  DfcError N046 for a name that no device has.
        """
        known = [d.name for d in self.devices]
        for name in names:
            if name not in known:
                help = did_you_mean(name, known) or f"it has {', '.join(known)}"
                raise DfcError("N046", f"`{self.name}` has no device `{name}`", help=help)
        at = [known.index(name) for name in names]
        return self.at(at)

    def at(self, positions: Sequence[int]) -> Machine:
        """The machine of the devices at these positions, in this order.

        Parts of one device have its link to itself between them: processes on loopback.
        """
        if list(positions) == list(range(len(self.devices))):
            return self
        times, seen = Counter(positions), Counter[int]()
        devices: list[Device] = []
        for i in positions:
            devices.append(
                self.devices[i].part(seen[i], times[i]) if times[i] > 1 else self.devices[i]
            )
            seen[i] += 1
        wires = {}
        for x, i in enumerate(positions):
            for y, j in enumerate(positions):
                wire = self.wires.get((i, i), Wire()) if i == j else self.way(i, j)
                if x != y and wire is not None:
                    wires[x, y] = wire
        return Machine(self.name, tuple(devices), wires)

    def wire(self, source: int, target: int) -> Wire:
        """The wire from one device to another, or the quickest relay through others.

        A relay stores and forwards: latencies and seconds a byte add up.
        Raises:  DfcError N043 when there is no way.
        """
        if source == target:
            return Wire()
        found = self.way(source, target)
        if found is None:
            raise self._no_way(source, target)
        return found

    def way(self, source: int, target: int) -> Wire | None:
        """As `wire`, None when there is no way."""
        return self.wires.get((source, target)) or self._relay(source, target)

    @cached_property
    def _ways(self) -> Any:
        import networkx

        ways = networkx.DiGraph()
        for (a, b), wire in self.wires.items():
            # A typical boundary tensor, a megabyte, decides which way is the quickest.
            ways.add_edge(a, b, seconds=wire.latency + 1e6 / wire.bandwidth)
        return ways

    @cached_property
    def _paths(self) -> dict[int, dict[int, list[int]]]:
        return {}  # the quickest ways from each device, filled as they are asked for

    def _relay(self, source: int, target: int) -> Wire | None:
        import networkx

        if source not in self._ways:
            return None
        if source not in self._paths:
            found = networkx.single_source_dijkstra_path(self._ways, source, weight="seconds")
            self._paths[source] = found
        path = self._paths[source].get(target)
        if path is None:
            return None
        hops = [self.wires[a, b] for a, b in pairwise(path)]
        slow = sum(1 / hop.bandwidth for hop in hops)
        return Wire(1 / slow if slow else float("inf"), sum(hop.latency for hop in hops))
