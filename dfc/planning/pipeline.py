"""A plan: which stage runs where, in which order, how long it takes, and what limits it.

The partition is proposed by its bottleneck; the simulator decides what a step takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dfc.counting import counted
from dfc.ir.graph import Graph, Node
from dfc.planning.actions import Program
from dfc.planning.candidates import Candidate, best_candidate
from dfc.planning.cost import Sizes, default_sizes
from dfc.planning.devices import Wanted, price
from dfc.planning.layouts import check_counts, layouts
from dfc.planning.machine import Device, Machine, Wire
from dfc.planning.model import Limits, Modelled, Wish, modelled
from dfc.planning.partition import Effort
from dfc.planning.problem import Loads, Partition, loads, value_of
from dfc.planning.recompute_choice import best_way
from dfc.planning.rivals import compared
from dfc.planning.simulate import Costs, Simulation, simulate
from dfc.planning.stages import no_pipeline
from dfc.planning.streamed_stages import check_wish, stage_seconds
from dfc.planning.streaming import Hop
from dfc.planning.tiers import Tiers
from dfc.planning.wording import described

if TYPE_CHECKING:
    from dfc.runtime.pipeline.torch_pipelining import TorchPipeline

INFERENCE, EFFORT, NOTHING = Wish(), Effort(), Limits()
_HIDDEN = 1.05  # of computing: copies that take no longer do not limit
_MORE = 1.25  # how much more of a thing is tried when asked what to buy


@dataclass(frozen=True)
class Stage:
    """One stage of a plan. Seconds and bytes are for one microbatch, `memory` is its device's peak,
    with all stages that the device has."""

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


@dataclass(frozen=True, repr=False)
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

    def __str__(self) -> str:
        return described(self)

    def __repr__(self) -> str:
        where = ", ".join(dict.fromkeys(s.device for s in self.stages))
        return f"<dfc plan {self.name}: {counted(len(self.stages), 'stage')} on {where}>"

    @cached_property
    def simulation(self) -> Simulation:
        """One step, action by action, as the costs predict it."""
        return simulate(self.program, self.costs)

    @property
    def step_seconds(self) -> float:
        return float(self.simulation.makespan)

    @property
    def no_pipeline(self) -> str:
        """Why these stages cannot be run as a pipeline; nothing where they can."""
        split = len(self.stages) > 1 and not self.wish.trains
        return no_pipeline(self.graph) if split else ""

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

    @property
    def devices(self) -> list[Device]:
        """The device of each stage."""
        return [self.machine.devices[rank] for rank in self.program.placement]

    @property
    def device_stages(self) -> dict[str, list[int]]:
        """The stages that each device has."""
        found: dict[str, list[int]] = {d.name: [] for d in self.machine.devices}
        for s in self.stages:
            found[s.device].append(s.index)
        return found

    def to_torch_pipelining(self, **options: Any) -> TorchPipeline:
        """This rank's stages and schedule in `torch.distributed.pipelining`.

        `options` are `loss_fn`, `device` and `group`.
        Needs:   a plan in which each stage reads the one before it alone, and an initialised
                 process group with a rank for each device.
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
    stages_per_device: int | None = None,
    effort: Effort = EFFORT,
    measured: Any = lambda node: None,
    limits: Limits = NOTHING,
    max_stages: int | None = None,
    measured_on: str = "",
    hops: Mapping[str, Hop] = MappingProxyType({}),
    host: int | None = None,
) -> Plan:
    """Partition a graph over devices of a machine and choose a schedule.

    Which devices are used, in which order, and how many stages each has is part of the choice, as
    far as the schedule and `stages_per_device` leave it open. Devices with `hops` may be given more
    weights than they hold: these stream them, once for each microbatch. A `host` with so many
    bytes reads what it does not hold from disk itself.
    Needs:   no weights: shapes are enough.
    Whether stages recompute is `wish.recompute`.
    Raises:  DfcError N001, N002, N066, N067 for the schedule, N040.. for sizes and devices, N043
             for a link that is missing, N060 (status 6) when it does not fit; N065 for streaming
             in training, or otherwise than by time or cost.
    """
    machine.check()
    check_counts(len(graph), len(machine.devices), wish.microbatches, stages_per_device or 1)
    check_wish(hops, wish, objective)
    choices = layouts(schedule, stages_per_device, wish.trains)
    streams = {name: float(1 / hop.per_byte) for name, hop in hops.items()}
    bound, wish = default_sizes(graph, sizes), replace(wish, schedule=schedule, streams=streams)
    whole = modelled(graph, machine, bound, wish, measured, limits, measured_on)

    def of(way: str) -> Candidate:
        some = replace(wish, recompute=way)
        return best_candidate(
            whole, graph, machine, some, choices, objective, max_stages, effort, hops, host
        )  # fmt: skip

    best = best_way(of, wish, objective)
    chosen, costs, simulation, tiers = best.chosen, best.costs, best.simulation, best.tiers
    used = {d.name for d in chosen.machine.devices}
    idle = tuple(d.name for d in machine.devices if d.name not in used)
    machine, model, found, load = chosen.machine, chosen.model, best.partition, best.load
    of_node = {n: s for nodes, s in zip(model.groups, found.stage, strict=True) for n in nodes}
    # weights' gradients and branches are beside each other, which the stages' sum does not know
    latency = min(load.latency, float(simulation.makespan))
    made = Plan(
        graph.name, machine, bound, best.wish, objective,
        _stages(model, machine, found.stage, load, simulation, costs.all_edges(), tiers),
        replace(found, stage=tuple(of_node[n] for n in graph.nodes)), load.bottleneck, latency,
        costs, simulation.program, _links(costs, simulation, machine, wish),
        compared(model, machine, chosen.solved), _advice(model, machine, found), idle,
        graph, model, tiers,
    )  # fmt: skip
    vars(made)["simulation"] = simulation  # of a million microbatches it takes seconds
    return made


def _stages(
    model: Modelled, machine: Machine, stage: Sequence[int], load: Loads, simulation: Simulation,
    edges: Sequence[tuple[int, int, int]], tiers: Mapping[int, Tiers],
) -> tuple[Stage, ...]:  # fmt: skip
    found, seconds = [], stage_seconds(load, tiers)
    for s, rank in enumerate(simulation.program.placement):
        device = machine.devices[rank]
        mine = [v for v, x in enumerate(stage) if x == s]
        nodes = [n for v in mine for n in model.groups[v]]
        live = device.usable - model.problem.slots[s].memory
        sent = float(sum(size for a, _, size in edges if a == s))
        found.append(Stage(
            s, device.name, len(nodes), _modules(nodes),
            float(seconds[s]),
            model.problem.weights_of(mine),
            simulation.peaks[rank] + live, device.memory, sent,
            _limit(model, device, mine, s, load, tiers),
            float(tiers[s].bytes_per_pass) if s in tiers else 0.0,
        ))  # fmt: skip
    return tuple(found)


def _modules(nodes: Sequence[Any]) -> str:
    """The first module, which people find their way by."""
    return next((n.loc.module for n in nodes if n.loc and n.loc.module), "")


def _limit(
    model: Modelled, device: Device, mine: Sequence[int], slot: int, load: Loads,
    tiers: Mapping[int, Tiers],
) -> str:  # fmt: skip
    spent = {"computing": 0.0, "moving": 0.0, "launching": 0.0}
    for v in mine:
        for work in model.works[v]:
            if work.bytes:
                computing, moving = work.computing(device), work.moving(device)
                took, start = max(computing, moving), work.launching(device)
                if not device.ahead or took >= start:
                    spent["computing" if computing >= moving else "moving"] += took
                if not device.ahead or took < start:
                    spent["launching"] += start
    at = model.problem.device_of[slot]
    into = [x for (_, b), x in load.links.items() if b == at]
    out = [x for (a, _), x in load.links.items() if a == at]
    links = {
        "receiving": max(float(load.receive[slot]), *into, 0.0),
        "sending": max(float(load.send[slot]), *out, 0.0),
        "streaming": float(tiers[slot].pass_seconds) / _HIDDEN if slot in tiers else 0.0,
    }  # fmt: skip
    kinds = spent if load.compute[slot] >= max(links.values()) else links
    return max(kinds, key=lambda k: kinds[k])


def _links(
    costs: Costs, simulation: Simulation, machine: Machine, wish: Wish
) -> tuple[tuple[str, str, float, float], ...]:
    found: dict[tuple[int, int], float] = {}
    rank = simulation.program.placement
    for u, v, size in costs.all_edges():
        a, b = rank[u], rank[v]
        for pair in () if a == b else ((a, b), (b, a)) if wish.trains else ((a, b),):
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
    now, load = value_of(problem, found.stage), loads(problem, found.stage)
    told = []
    for i, device in enumerate(machine.devices):
        time = problem.time.copy()
        time[:, i] /= _MORE
        better = value_of(replace(problem, time=time), found.stage)
        told.append((f"a device like `{device.name}` that is 25 % faster", better))
    for a, b in dict.fromkeys([*pairwise(problem.device_of), *load.links]):
        slots = list(problem.slots)
        for s, pair in enumerate(pairwise(problem.device_of)):
            if pair == (a, b):
                slots[s] = replace(slots[s], send=slots[s].send * _MORE)
                slots[s + 1] = replace(slots[s + 1], receive=slots[s + 1].receive * _MORE)
        faster = replace(problem.with_stages(slots), wire=_with_more(machine, (a, b)))
        better = value_of(faster, found.stage)
        name = f"`{machine.devices[a].name}` to `{machine.devices[b].name}`"
        told.append((f"a link from {name} that is 25 % faster", better))
    gains = [(what, now / b) for what, b in told if b > 0]
    return tuple(sorted((g for g in gains if g[1] > 1.005), key=lambda g: -g[1]))


def _with_more(machine: Machine, pair: tuple[int, int]) -> Callable[[int, int], Wire]:
    """The machine's wires, one of them with 25 % more bandwidth."""

    def wire(a: int, b: int) -> Wire:
        found = machine.wire(a, b)
        return replace(found, bandwidth=found.bandwidth * _MORE) if (a, b) == pair else found

    return wire


def stage_of(found: Plan) -> dict[Node, int]:
    """The stage of each node of the graph that was planned."""
    return dict(zip(found.graph.nodes, found.partition.stage, strict=True))
