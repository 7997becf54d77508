"""A plan: which stage runs where, in which order, how long it takes, and what limits it.

The partition is proposed by its bottleneck; the simulator decides what a step takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from dfc.ir.graph import Graph, Node
from dfc.planning.actions import Program
from dfc.planning.auto import auto
from dfc.planning.cost import Sizes, default_sizes
from dfc.planning.devices import Wanted, best_row, price
from dfc.planning.machine import Machine
from dfc.planning.model import Limits, Modelled, Wish, modelled
from dfc.planning.partition import Effort
from dfc.planning.problem import Loads, Partition, loads, value_of
from dfc.planning.rivals import compared
from dfc.planning.schedules import schedule
from dfc.planning.simulate import Costs, Link, Simulation, simulate
from dfc.planning.streamed_stages import check_wish, stage_tiers
from dfc.planning.streaming import Hop
from dfc.planning.tiers import Tiers

if TYPE_CHECKING:
    from dfc.runtime.pipeline.torch_pipelining import TorchPipeline

INFERENCE, EFFORT, NOTHING = Wish(), Effort(), Limits()
_HIDDEN = 1.05  # of computing: copies that take no longer do not limit
_MORE = 1.25  # how much more of a thing is tried when asked what to buy


@dataclass(frozen=True)
class Stage:
    """One stage of a plan. Seconds and bytes are for one microbatch, `memory` is the peak."""

    index: int
    device: str
    nodes: int
    starts: str  # the module path of its first node
    seconds: float
    weights: float
    memory: float
    capacity: float
    sent: float
    limit: str  # what takes longest: computing, moving, launching, sending, receiving, streaming
    streams: float = 0.0  # bytes of weights that come for it, as its device does not hold them


@dataclass(frozen=True)
class Plan:
    """Stages, their schedule, and what the simulator says of a step.

    `partition.stage` has the stage of each node of the graph, in its order. `modelled` is what was
    solved, None for a plan that was read; `tiers` are those of stages that stream weights.
    """

    name: str
    machine: Machine
    sizes: Sizes
    wish: Wish
    objective: Wanted
    stages: tuple[Stage, ...]
    partition: Partition
    bottleneck: float  # seconds between two microbatches
    latency: float  # seconds of one microbatch that finds the pipeline empty
    costs: Costs
    program: Program
    links: tuple[tuple[str, str, float, float], ...]  # from, to, bytes a step, busy share
    splits: tuple[tuple[str, float], ...]  # other splits: how many times as much they take
    advice: tuple[tuple[str, float], ...]  # how many times as fast 25 % more of a thing is
    idle: tuple[str, ...]  # devices that would make it no better
    graph: Graph = field(compare=False, repr=False)
    modelled: Modelled | None = field(default=None, compare=False, repr=False)
    tiers: Mapping[int, Tiers] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def simulation(self) -> Simulation:
        """One step, action by action, as the costs predict it."""
        return simulate(self.program, self.costs)

    @property
    def step_seconds(self) -> float:
        return float(self.simulation.makespan)

    @property
    def peak(self) -> float:
        """The bytes of the device that holds most."""
        return max(s.memory for s in self.stages)

    @property
    def cost(self) -> float:
        """What a microbatch costs: its seconds on each device, times the device's price."""
        return self.bottleneck * price(self.machine)

    @property
    def schedule(self) -> str:
        return self.program.name

    def to_torch_pipelining(self, **options: Any) -> TorchPipeline:
        """This rank's stage and schedule in `torch.distributed.pipelining`.

        `options` are `loss_fn`, `device` and `group`.
        Needs:   a plan in which each stage reads the one before it alone, and an initialised
                 process group with a rank for each stage.
        Raises:  DfcError N055 for another plan, N056 for another group.
        """
        from dfc.runtime.pipeline.torch_pipelining import torch_pipelining

        return torch_pipelining(self, **options)


def plan(
    graph: Graph,
    machine: Machine,
    *,
    objective: Wanted = "throughput",
    sizes: Sizes | None = None,
    wish: Wish = INFERENCE,
    schedule: str = "auto",
    effort: Effort = EFFORT,
    measured: Any = lambda node: None,
    limits: Limits = NOTHING,
    max_stages: int | None = None,
    measured_on: str = "",
    hops: Mapping[str, Hop] = MappingProxyType({}),
) -> Plan:
    """Partition a graph over devices of a machine and choose a schedule.

    Which devices are used, and in which order, is part of the choice. Devices with `hops` may be
    given more weights than they hold: these stream them, once for each microbatch.
    Needs:   no weights: shapes are enough.
    Raises:  DfcError N001, N002 for the schedule, N040.. for sizes and devices, N043 for a link
             that is missing, N060 (status 6) when it does not fit; N065 for streaming otherwise
             than by time or cost.
    """
    machine.check()
    check_wish(hops, wish, objective)
    wish = replace(wish, streams={name: float(1 / hop.per_byte) for name, hop in hops.items()})
    bound = default_sizes(graph, sizes)
    whole = modelled(graph, machine, bound, wish, measured, limits, measured_on)
    chosen = best_row(whole, machine, wish, objective, max_stages, effort)
    used = {d.name for d in chosen.machine.devices}
    idle = tuple(d.name for d in machine.devices if d.name not in used)
    machine, model, found = chosen.machine, chosen.model, chosen.partition
    load = loads(model.problem, found.stage)
    tiers = stage_tiers(graph, model, machine, found.stage, load, hops)
    load, found = _with_passes(load, found, tiers, machine, objective)
    costs = _costs(model, machine, found.stage, wish, load, tiers)
    simulation = _scheduled(costs, wish, schedule, machine)
    of_node = {n: s for nodes, s in zip(model.groups, found.stage, strict=True) for n in nodes}
    return Plan(
        graph.name, machine, bound, wish, objective,
        _stages(model, machine, found.stage, load, simulation, costs.all_edges(), tiers),
        replace(found, stage=tuple(of_node[n] for n in graph.nodes)), load.bottleneck, load.latency,
        costs, simulation.program, _links(costs, simulation, machine, wish),
        compared(model, machine, chosen.solved), _advice(model, machine, found), idle,
        graph, model, tiers,
    )  # fmt: skip


def _with_passes(
    load: Loads, found: Partition, tiers: Mapping[int, Tiers], machine: Machine, objective: Wanted
) -> tuple[Loads, Partition]:
    """Streaming stages take as long as their passes, and the partition is worth what they allow.

    Keeps:  the bound, which is without slots: no partition is better.
    """
    if not tiers:
        return load, found
    stream = load.stream.copy()
    for s, plan in tiers.items():
        stream[s] = float(plan.pass_seconds)
    load = replace(load, stream=stream)
    by = price(machine) if objective == "cost" else 1.0
    return load, replace(found, value=max(found.value, load.bottleneck * by))


def _costs(
    model: Modelled, machine: Machine, stage: Sequence[int], wish: Wish, load: Loads,
    tiers: Mapping[int, Tiers],
) -> Costs:  # fmt: skip
    problem = model.problem
    seconds = np.maximum(load.compute, load.stream)
    kept = np.zeros(problem.stages)
    held = np.zeros(problem.stages)
    for v, s in enumerate(stage):
        kept[s] += problem.activations[v]
        held[s] += problem.weights[v]
    for size, readers in problem.tied:
        for s in {stage[v] for v in readers}:
            held[s] += size
    for s, plan in tiers.items():
        held[s] = plan.held_bytes - (plan.memory - problem.slots[s].memory)
    crossing: dict[tuple[int, int], float] = {}
    for t in problem.tensors:
        for s in {stage[v] for v in t.readers} - {stage[t.producer]}:
            edge = stage[t.producer], s
            crossing[edge] = crossing.get(edge, 0.0) + t.bytes
    edges = [(a, b, round(size)) for (a, b), size in sorted(crossing.items())]
    links = {}
    for a, b, _ in edges:
        for x, y in ((a, b), (b, a)) if wish.trains else ((a, b),):
            wire = machine.wire(x, y)
            links[x, y] = Link(wire.latency, 1 / wire.bandwidth)
    third = (seconds / 3).tolist()
    forward = third if wish.trains else seconds.tolist()
    back = tuple(third) if wish.trains else ()
    return Costs(
        tuple(forward), back, back, links=links, edges=edges,
        activations=tuple(round(x) for x in kept), resident=tuple(round(x) for x in held),
    )  # fmt: skip


def _scheduled(costs: Costs, wish: Wish, name: str, machine: Machine) -> Simulation:
    """The schedule that was asked for, or the one with the shortest step that fits."""
    m, ranks = wish.microbatches, len(machine.devices)
    if not wish.trains:
        wanted = "forward" if name == "auto" else name
        return simulate(schedule(wanted, ranks, m), costs)
    if name != "auto":
        return simulate(schedule(name, ranks, m), costs)
    return auto(ranks, m, costs, [d.usable for d in machine.devices]).simulation


def _stages(
    model: Modelled, machine: Machine, stage: Sequence[int], load: Loads, simulation: Simulation,
    edges: Sequence[tuple[int, int, int]], tiers: Mapping[int, Tiers],
) -> tuple[Stage, ...]:  # fmt: skip
    found = []
    for s, device in enumerate(machine.devices):
        mine = [v for v, x in enumerate(stage) if x == s]
        nodes = [n for v in mine for n in model.groups[v]]
        live = device.usable - model.problem.slots[s].memory
        sent = float(sum(size for a, _, size in edges if a == s))
        found.append(Stage(
            s, device.name, len(nodes), _modules(nodes),
            float(max(load.compute[s], load.stream[s])),
            float(sum(model.problem.weights[v] for v in mine)),
            simulation.peaks[s] + live, device.memory, sent,
            _limit(model, machine, mine, s, load),
            float(tiers[s].bytes_per_pass) if s in tiers else 0.0,
        ))  # fmt: skip
    return tuple(found)


def _modules(nodes: Sequence[Any]) -> str:
    """The first module, which people find their way by."""
    return next((n.loc.module for n in nodes if n.loc and n.loc.module), "")


def _limit(model: Modelled, machine: Machine, mine: Sequence[int], slot: int, load: Loads) -> str:
    device = machine.devices[slot]
    spent = {"computing": 0.0, "moving": 0.0, "launching": 0.0}
    for v in mine:
        for work in model.works[v]:
            if work.bytes:
                computing, moving = work.computing(device), work.moving(device)
                spent["computing" if computing >= moving else "moving"] += max(computing, moving)
                spent["launching"] += work.launching(device)
    links = {
        "receiving": float(load.receive[slot]), "sending": float(load.send[slot]),
        "streaming": float(load.stream[slot]) / _HIDDEN,
    }  # fmt: skip
    kinds = spent if load.compute[slot] >= max(links.values()) else links
    return max(kinds, key=lambda k: kinds[k])


def _links(
    costs: Costs, simulation: Simulation, machine: Machine, wish: Wish
) -> tuple[tuple[str, str, float, float], ...]:
    found: dict[tuple[int, int], float] = {}
    for a, b, size in costs.all_edges():
        for pair in ((a, b), (b, a)) if wish.trains else ((a, b),):
            found[pair] = found.get(pair, 0.0) + size * wish.microbatches
    span = float(simulation.makespan) or 1.0
    names = [d.name for d in machine.devices]
    return tuple(
        (names[a], names[b], size, size * float(costs.link_of(a, b).per_byte) / span)
        for (a, b), size in sorted(found.items())
    )


def _advice(model: Modelled, machine: Machine, found: Partition) -> tuple[tuple[str, float], ...]:
    """What the time becomes with 25 % more of one thing, best first; cuts stay."""
    problem = replace(
        model.problem, objective="latency" if model.problem.objective == "latency" else "throughput"
    )
    now = value_of(problem, found.stage)
    told = []
    for i, device in enumerate(machine.devices):
        time = problem.time.copy()
        time[:, i] /= _MORE
        better = value_of(replace(problem, time=time), found.stage)
        told.append((f"a device like `{device.name}` that is 25 % faster", better))
        slots = list(problem.slots)
        if np.isfinite(slots[i].send):
            slots[i] = replace(slots[i], send=slots[i].send * _MORE)
            slots[i + 1] = replace(slots[i + 1], receive=slots[i + 1].receive * _MORE)
            better = value_of(problem.with_stages(slots), found.stage)
            name = f"`{device.name}` to `{machine.devices[i + 1].name}`"
            told.append((f"a link from {name} that is 25 % faster", better))
    gains = [(what, now / b) for what, b in told if b > 0]
    return tuple(sorted((g for g in gains if g[1] > 1.005), key=lambda g: -g[1]))


def stage_of(found: Plan) -> dict[Node, int]:
    """The stage of each node of the graph that was planned."""
    return dict(zip(found.graph.nodes, found.partition.stage, strict=True))
