"""A graph as a partitioning problem: its nodes grouped, with times and bytes on a machine.

Views that keep all bytes belong to what they look at, and views of parameters to their reader:
that changes no partition's cost. Everything else is a group of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from dfc.errors import DfcError, did_you_mean
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.types import TensorType
from dfc.planning.cost import Sizes, Work, bytes_of, work_of
from dfc.planning.layouts import ONE, Layout, flights
from dfc.planning.machine import Device, Machine, Wire
from dfc.planning.problem import Problem, Slot, Tensor
from dfc.planning.saved_values import Saved, kept_values, saved_values
from dfc.planning.schedules import SCHEDULES

if TYPE_CHECKING:
    from dfc.planning.problem import Floats


@dataclass(frozen=True)
class Wish:
    """What is wanted of a plan besides the model and the machine."""

    microbatches: int = 1
    trains: bool = False
    optimizer: float = 3.0  # bytes of gradient and optimizer state for each byte of weights
    # Bytes a second at which weights come to each device that may have less memory than they take.
    streams: Mapping[str, float] = field(default_factory=dict)
    schedule: str = "auto"
    stages_per_device: int = 1
    turns: bool = False  # whether these are in a V, not in loops
    # Stages that keep what they take and run their forward again: "always" all, "selective" all, of
    # their cheap operators alone, "auto" as few as leave devices room; a partition then holds what
    # all of them would, with `holds_inputs` what they take as well, with `holds_kept` what cheap
    # operators start from.
    recompute: str = "never"
    holds_inputs: bool = False
    holds_kept: bool = False

    @property
    def layout(self) -> Layout:
        return Layout(self.stages_per_device, self.turns)

    @property
    def forwards(self) -> float:
        """What a node takes of each microbatch, in forwards: I and W, and R where all recompute."""
        if not self.trains:
            return 1.0
        return 4.0 if self.recompute == "always" else 3.0

    def with_layout(self, layout: Layout) -> Wish:
        return replace(self, stages_per_device=layout.chunks, turns=layout.turns)

    def in_flight(self, devices: int) -> tuple[int, ...]:
        """How many microbatches each stage keeps activations of."""
        if not self.trains:
            return (1,) * (devices * self.stages_per_device)
        return self._flights(devices, self.recompute != "never")

    def taken(self, devices: int) -> tuple[int, ...]:
        """How many microbatches each stage keeps of what it takes and may need again.

        Why:  a stage that keeps no fewer activations when it recomputes does so only if it must.
        """
        whole, again = self._flights(devices, False), self.in_flight(devices)
        if self.recompute == "never" or not (self.trains and self.holds_inputs):
            return (0,) * len(whole)
        must = self.recompute == "always"
        return tuple(a if must or a > b else 0 for a, b in zip(whole, again, strict=True))

    def keeping(self, devices: int) -> tuple[int, ...]:
        """How many microbatches each stage keeps of what cheap operators start from, beside those
        of which it keeps all."""
        whole, again = self._flights(devices, False), self.in_flight(devices)
        held = self.recompute != "never" and self.trains and self.holds_kept
        return tuple((a - b) * held for a, b in zip(whole, again, strict=True))

    def _flights(self, devices: int, again: bool) -> tuple[int, ...]:
        # Devices are chosen with a stage each, whatever the schedule has on them later.
        known = SCHEDULES.get(self.schedule)
        alone = self.layout == ONE and known is not None and known.chunks != "1"
        name = "auto" if alone else self.schedule
        return flights(name, self.layout, devices, self.microbatches, again)


def by_dtype(node: Node, device: Device) -> str | None:
    """Why a device cannot run a node, by what the target says of it: None when it can."""
    if not device.dtypes:
        return None
    used = [v.type.dtype for v in node.results if isinstance(v.type, TensorType)]
    lacking = (d for d in used if (d.is_float or d.is_complex) and d.name not in device.dtypes)
    wrong = next(lacking, None)
    return f"it does not compute in {wrong}" if wrong else None


@dataclass(frozen=True)
class Limits:
    """What a partition must respect besides memory and order.

    `pins` give nodes the name of their device, `together` are nodes that share a stage; `supports`
    says why a device cannot run a node, None when it can.
    """

    pins: Mapping[Node, str] = field(default_factory=dict)
    together: tuple[tuple[Node, ...], ...] = ()
    supports: Callable[[Node, Device], str | None] = by_dtype


@dataclass(frozen=True)
class Modelled:
    """The problem, and which nodes each of its groups holds."""

    problem: Problem
    groups: tuple[tuple[Node, ...], ...]
    works: tuple[tuple[Work, ...], ...]
    live: float  # the most bytes that are alive during one microbatch
    pins: Mapping[int, int]  # the device that a group must be on
    sizes: Sizes = field(default_factory=dict)
    saved: Mapping[Node, Saved] = field(default_factory=dict)
    # Of each saved value the group that counts it: of the first node whose backward pass reads it.
    counted: Mapping[Value, int] = field(default_factory=dict)


def modelled(
    graph: Graph,
    machine: Machine,
    sizes: Sizes,
    wish: Wish = Wish(),
    measured: Callable[[Node], float | None] = lambda node: None,
    limits: Limits = Limits(),
    measured_on: str = "",
) -> Modelled:
    """The problem of a graph on the devices of a machine, in their order.

    `measured` gives the seconds of a node that was timed, in place of the model's; they are those
    of devices of the kind `measured_on`, of all of them where it is empty.
    Raises:  DfcError N047 for a node that no device can run, or not the one that it is pinned to;
             N046 for a pin to no device, N048 for limits that contradict.
    """
    groups, group_of, root = _grouped(graph, sizes)
    works = tuple(tuple(work_of(n, sizes) for n in nodes) for nodes in groups)
    time = np.array([
        [
            _seconds(nodes, work, device, measured if measured_on in ("", device.kind) else _none,
                     wish.forwards)
            for device in machine.devices
        ]
        for nodes, work in zip(groups, works, strict=True)
    ]).reshape(len(groups), len(machine.devices))  # fmt: skip
    time = _where_supported(groups, machine, time, limits)
    weights, tied = _weights(graph, group_of, len(groups), sizes, wish)
    tensors = _tensors(graph, group_of, root, sizes)
    saved = saved_values(graph, sizes) if wish.trains else {}
    kept, counted = _activations(saved, group_of, sizes)
    some = None
    if wish.recompute in ("auto", "selective"):
        some = _kept(graph, saved, counted, group_of, sizes)
    live = live_bytes(graph, sizes)
    pins, together = _pins(limits, group_of, machine), _together(graph, limits, group_of)
    names = tuple(named(nodes[0]) for nodes in groups)
    problem = Problem(
        time,
        tensors,
        _slots(machine, wish, live, linked=False),
        weights,
        kept,
        some,
        pins,
        together,
        tied,
        names,
        wire=lambda a, b: machine.way(a, b) or Wire(),
        back=wish.trains,
    )
    return Modelled(problem, tuple(map(tuple, groups)), works, live, pins, sizes, saved, counted)


def on_row(model: Modelled, machine: Machine, row: Sequence[int], wish: Wish) -> Modelled:
    """The problem on some of the devices that it was made for, in another order.

    Needs:   `machine` has the devices at the positions `row` of the one before.
    Raises:  DfcError N048 when something is pinned to a device that is not among them.
    """
    missing = next((v for v, d in model.pins.items() if d not in row), None)
    if missing is not None:
        message = f"{model.problem.name(missing)} is pinned to a device that is left out"
        raise DfcError("N048", f"{message} of {len(row)} stages", help="allow more `max_stages`")
    pins = {v: row.index(d) for v, d in model.pins.items()}
    problem = replace(
        model.problem, time=model.problem.time[:, list(row)],
        slots=_slots(machine, wish, model.live), pins=pins, wire=machine.wire,
    )  # fmt: skip
    return replace(model, problem=problem, pins=pins)


def laid_out(model: Modelled, machine: Machine, wish: Wish) -> Modelled:
    """The problem with as many stages a device as is wished, none of which is empty."""
    problem = replace(
        model.problem, slots=_slots(machine, wish, model.live), idle=False,
        devices=wish.layout.placement(len(machine.devices)),
    )  # fmt: skip
    return replace(model, problem=problem)


def _where_supported(
    groups: Sequence[Sequence[Node]], machine: Machine, time: Floats, limits: Limits
) -> Floats:
    """Infinite times where a device cannot run a node."""
    time = time.copy()
    for g, nodes in enumerate(groups):
        reasons: list[str] = []
        for k, device in enumerate(machine.devices):
            why = next(filter(None, (limits.supports(n, device) for n in nodes)), None)
            if why is not None:
                time[g, k] = np.inf
                reasons.append(f"`{device.name}`: {why}")
        if len(reasons) == len(machine.devices):
            raise DfcError("N047", f"no device can run {named(nodes[0])}", notes=tuple(reasons))
    return time


def _pins(
    limits: Limits, group_of: Mapping[Node, int], machine: Machine
) -> dict[int, int]:  # fmt: skip
    names = [d.name for d in machine.devices]
    found: dict[int, int] = {}
    for node, name in limits.pins.items():
        if name not in names:
            help = did_you_mean(name, names) or f"there are {', '.join(names)}"
            raise DfcError("N046", f"{named(node)} is pinned to `{name}`, which is no device",
                           help=help)  # fmt: skip
        at = names.index(name)
        why = limits.supports(node, machine.devices[at])
        if why is not None:
            message = f"{named(node)} is pinned to `{name}`, which cannot run it: {why}"
            raise DfcError("N047", message)
        other = found.setdefault(group_of[node], at)
        if other != at:
            message = f"{named(node)} is pinned to `{name}`, and to `{names[other]}`"
            raise DfcError("N048", message, help="views belong to what they look at")
    return found


def _together(
    graph: Graph, limits: Limits, group_of: Mapping[Node, int]
) -> tuple[tuple[int, ...], ...]:
    """What must share a stage: what limits say, and who reads and who writes a buffer."""
    written = [
        [m.value.node, *(n for n in graph.nodes if m.target in n.operands)]
        for m in graph.mutations if m.value.node is not None
    ]  # fmt: skip
    every = (*limits.together, *written)
    groups = (tuple(sorted({group_of[n] for n in nodes})) for nodes in every)
    return tuple(group for group in groups if len(group) > 1)


def _none(node: Node) -> None:
    """The time of a node that nobody measured."""


def _seconds(
    nodes: list[Node],
    works: tuple[Work, ...],
    device: Device,
    measured: Callable[[Node], float | None],
    forwards: float,
) -> float:
    total = 0.0
    for node, work in zip(nodes, works, strict=True):
        known = measured(node)
        total += work.seconds(device) if known is None else known
    return total * forwards


def _grouped(
    graph: Graph, sizes: Sizes
) -> tuple[list[list[Node]], dict[Node, int], dict[Value, Value]]:
    """Groups of nodes, the group of each node, and the value that each view shows."""
    groups: list[list[Node]] = []
    group_of: dict[Node, int] = {}
    root: dict[Value, Value] = {}
    waiting: dict[Value, list[Node]] = {}  # views of parameters and inputs, until somebody reads
    for node in graph.nodes:
        source = _viewed(node, sizes)
        if source is not None and (source.node is None or source in waiting):
            waiting[node.results[0]] = [*waiting.get(source, ()), node]
            continue
        if source is not None and source.node in group_of:
            group_of[node] = group_of[source.node]
            groups[group_of[node]].append(node)
            root[node.results[0]] = root.get(source, source)
            continue
        group_of[node] = len(groups)
        before = [n for v in node.operands for n in waiting.get(v, ()) if n not in group_of]
        groups.append([*dict.fromkeys(before), node])
        group_of.update((n, len(groups) - 1) for n in before)
    left = [n for chain in waiting.values() for n in chain if n not in group_of]
    if left:
        group_of.update((n, len(groups)) for n in left)
        groups.append(list(dict.fromkeys(left)))
    return groups, group_of, root


def _viewed(node: Node, sizes: Sizes) -> Value | None:
    """What a view shows, if it shows all of it and waits for nothing else."""
    work = work_of(node, sizes)
    if work.flops or work.bytes or len(node.results) != 1 or not node.inputs:
        return None
    source = node.inputs[0]
    if not isinstance(source, Value) or any(v is not source for v in node.operands):
        return None
    return source if bytes_of(node.results[0], sizes) == bytes_of(source, sizes) else None


def _weights(
    graph: Graph, group_of: Mapping[Node, int], n: int, sizes: Sizes, wish: Wish
) -> tuple[np.ndarray, tuple[tuple[float, tuple[int, ...]], ...]]:
    """Bytes of each group's own parameters, and of those that several groups read."""
    own, tied = np.zeros(n), []
    by = 1.0 + (wish.optimizer if wish.trains else 0.0)
    for p in graph.parameters.values():
        readers = sorted({group_of[u] for u in p.users if u in group_of})
        size = bytes_of(p, sizes) * by
        if len(readers) == 1:
            own[readers[0]] += size
        elif readers:
            tied.append((size, tuple(readers)))
    return own, tuple(tied)


def _activations(
    saved: Mapping[Node, Saved], group_of: Mapping[Node, int], sizes: Sizes
) -> tuple[Floats, dict[Value, int]]:
    """The bytes that each group keeps for the backward pass, and the group of each value."""
    kept, counted = np.zeros(1 + max(group_of.values(), default=-1)), {}
    for node, what in saved.items():
        kept[group_of[node]] += what.own
        for v in what.values:
            if v not in counted:
                counted[v] = group_of[node]
                kept[group_of[node]] += bytes_of(v, sizes)
    return kept, counted


def _kept(
    graph: Graph, saved: Mapping[Node, Saved], counted: Mapping[Value, int],
    group_of: Mapping[Node, int], sizes: Sizes,
) -> Floats:  # fmt: skip
    """The bytes that each group keeps for cheap operators to start from."""
    found = np.zeros(1 + max(group_of.values(), default=-1))
    for v in kept_values(list(graph.nodes), saved, sizes):
        if v.node is not None:
            found[counted.get(v, group_of[v.node])] += bytes_of(v, sizes)
    return found


def _tensors(
    graph: Graph, group_of: Mapping[Node, int], root: Mapping[Value, Value], sizes: Sizes
) -> tuple[Tensor, ...]:
    """What groups produce for other groups; a view's readers read what it shows."""
    readers: dict[Value, set[int]] = {}
    for node in graph.nodes:
        for v in node.operands:
            shown = root.get(v, v)
            made = shown.node
            if made is None or isinstance(shown, Parameter) or made not in group_of:
                continue
            if group_of[made] != group_of[node]:
                readers.setdefault(shown, set()).add(group_of[node])
    return tuple(
        Tensor(group_of[v.node], bytes_of(v, sizes), tuple(sorted(found)))
        for v, found in readers.items()
        if v.node is not None
    )


def _slots(
    machine: Machine, wish: Wish, live: float, linked: bool = True
) -> tuple[Slot, ...]:  # fmt: skip
    """The stages of each device. What is alive during one microbatch is taken from the memory.

    Raises:  DfcError N043 for neighbours without a link, if they must be `linked`.
    """
    wire = machine.wire if linked else lambda a, b: machine.way(a, b) or Wire()
    count = len(machine.devices)
    at, flights, taken = wish.layout.placement(count), wish.in_flight(count), wish.taken(count)
    keeping = wish.keeping(count)
    found = []
    for s, d in enumerate(at):
        device = machine.devices[d]
        into = wire(at[s - 1], d) if s else Wire()
        out = wire(d, at[s + 1]) if s + 1 < len(at) else Wire()
        if wish.trains and s:
            wire(d, at[s - 1])  # gradients go back
        room = device.usable - live
        stream = wish.streams.get(device.name, 0.0) if room > 0 else 0.0
        found.append(
            Slot(d, room, into.bandwidth, out.bandwidth, flights[s], taken[s], keeping[s],
                 into.latency, stream)
        )  # fmt: skip
    return tuple(found)


def live_bytes(graph: Graph, sizes: Sizes) -> float:
    """The most bytes of activations that are alive at once, in the graph's order."""
    last: dict[Value, int] = {}
    nodes = list(graph.nodes)
    for i, node in enumerate(nodes):
        for v in node.operands:
            last[v] = i
    dies: dict[int, float] = {}
    most = now = 0.0
    for i, node in enumerate(nodes):
        if work_of(node, sizes).bytes:
            for r in node.results:
                size = bytes_of(r, sizes)
                now += size
                dies[last.get(r, i)] = dies.get(last.get(r, i), 0.0) + size
        most = max(most, now)
        now -= dies.pop(i, 0.0)
    return most


def named(node: Node) -> str:
    """A node as messages name it: by its value, and where it is in the model."""
    value = f"%{node.results[0].name}" if node.results else node.op
    return f"{value} ({node.loc.module})" if node.loc and node.loc.module else value
