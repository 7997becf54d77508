"""What a plan is chosen from: partitions with one or several stages a device, and their schedules.

The partition is proposed by its bottleneck; the simulator decides which candidate is best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dfc.counting import counted
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.planning.actions import FULL, SELECTIVE
from dfc.planning.auto import auto, fitting
from dfc.planning.devices import Chosen, Wanted, best_row, price
from dfc.planning.fitting import refusal
from dfc.planning.ideals import lower_bound
from dfc.planning.layouts import ONE, Layout
from dfc.planning.machine import Machine
from dfc.planning.model import Modelled, Wish, laid_out
from dfc.planning.partition import Effort, partition
from dfc.planning.problem import Loads, Partition, loads
from dfc.planning.recompute import in_ways
from dfc.planning.rivals import no_worse
from dfc.planning.saved_values import kept_selectively
from dfc.planning.schedules import schedule
from dfc.planning.simulate import Costs, Link, Simulation, simulate
from dfc.planning.streamed_stages import stage_seconds, stage_tiers
from dfc.planning.streaming import Hop
from dfc.planning.tiers import Tiers

_WORTH = 1.01  # how much better several stages a device must be: more messages take the hosts' time
_CANNOT = ("N002", "N043", "N060", "N062", "N063", "N068")  # what one candidate may lack


@dataclass(frozen=True)
class Candidate:
    """A partition of a row of devices, what it costs, and a step of it.

    `partition` is the chosen one, worth what streaming stages allow; `tiers` are theirs.
    """

    chosen: Chosen
    wish: Wish
    partition: Partition
    load: Loads
    tiers: Mapping[int, Tiers]
    costs: Costs
    simulation: Simulation

    def value(self, aim: Wanted) -> float:
        """What is compared: the step, or what else is made small."""
        if aim == "latency":
            return self.load.latency
        if aim == "memory":
            return float(max(self.simulation.peaks))
        return float(self.simulation.makespan)


def best_candidate(
    model: Modelled, graph: Graph, machine: Machine, wish: Wish, choices: Sequence[Layout],
    aim: Wanted, most: int | None, effort: Effort, hops: Mapping[str, Hop],
    host: int | None = None,
) -> Candidate:  # fmt: skip
    """The best of the layouts; of several that are about as good, the one with fewer stages.

    Devices and their order are those that are best with one stage each.
    Raises:  DfcError of the first layout, when none can be.
    """
    if most is not None and most < 1:
        raise DfcError("N066", f"a plan has at least one stage, not {most}", status=2)
    fewest = min(layout.chunks for layout in choices)
    if most is not None and most < fewest:
        message = f"{fewest} stages a device are more than the {most} that there may be"
        raise DfcError("N066", message, status=2)
    devices = most // fewest if most else None
    row = best_row(model, machine, wish.with_layout(ONE), aim, devices, effort)
    best: Candidate | None = None
    failed: DfcError | None = None
    for layout in _promising(choices, row, most, aim):
        if best is not None and _cannot_win(best, row, aim):
            break
        quick = effort if best is None else replace(effort, seconds=0.0)
        shaped = wish.with_layout(layout)

        def partitioned(shaped: Wish, layout: Layout = layout, quick: Effort = quick) -> Chosen:
            if layout != ONE:
                return _looped(row, shaped, quick)
            if not (shaped.holds_inputs or shaped.holds_kept):
                return row
            return best_row(model, machine, shaped, aim, devices, quick)

        try:
            tried = _with_room(partitioned, graph, shaped, hops, host, aim)
        except DfcError as e:
            if e.code not in _CANNOT:
                raise
            failed = failed or e
            continue
        if best is None or tried.value(aim) * _WORTH < best.value(aim):
            best = tried
    if best is None:
        assert failed is not None
        raise failed
    return best


def _promising(
    choices: Sequence[Layout], row: Chosen, most: int | None, aim: Wanted
) -> Iterator[Layout]:
    """Where one stage a device is a choice, several are one for the time of a step alone, of
    several devices, and of stages of more than one node."""
    count, nodes = len(row.machine.devices), row.model.problem.n
    yield choices[0]
    for layout in choices[1:]:
        stages = layout.chunks * count
        if aim == "throughput" and count > 1 and stages <= min(nodes, most or nodes):
            yield layout


def _cannot_win(best: Candidate, row: Chosen, aim: Wanted) -> bool:
    """Whether no order of any stages on these devices could be worth it: each of them is busy for
    its part of the work."""
    least = lower_bound(row.model.problem) * best.wish.microbatches
    return aim == "throughput" and best.value(aim) <= least * _WORTH


def _with_room(
    partitioned: Callable[[Wish], Chosen], graph: Graph, wish: Wish, hops: Mapping[str, Hop],
    host: int | None, aim: Wanted,
) -> Candidate:  # fmt: skip
    """The candidate of a partition that leaves out what recomputing stages keep from the forward
    pass on, as long as it fits; else, and where memory is what counts, of one that holds it too.

    Why:  the first is free to cut anywhere, and not all stages need recompute.
    Raises:  DfcError N060 and N062 (status 6) where neither fits.
    """
    found: list[Candidate] = []
    failed: DfcError | None = None
    inputs = [replace(wish, holds_inputs=True)] if wish.recompute in ("always", "auto") else []
    kept = [replace(wish, holds_kept=True)] if wish.recompute in ("selective", "auto") else []
    for some in (wish, *inputs, *kept):
        try:
            found.append(_candidate(partitioned(some), graph, some, hops, host, aim))
        except DfcError as e:
            if e.code not in ("N060", "N062") or (some is wish and e.code == "N060"):
                raise
            failed = failed or e
        if found and some is wish and aim != "memory":
            break
    if not found:
        assert failed is not None
        raise failed
    return min(found, key=lambda c: c.value(aim))


def _candidate(
    chosen: Chosen, graph: Graph, wish: Wish, hops: Mapping[str, Hop], host: int | None, aim: Wanted
) -> Candidate:
    model, machine, found = chosen.model, chosen.machine, chosen.partition
    load = loads(model.problem, found.stage)
    tiers = stage_tiers(graph, model, machine, found.stage, load, hops, host)
    load, found = _with_passes(load, found, tiers, model, machine, aim)
    counted = wish.recompute == "always"  # the second forward, in the nodes' time
    forwards = wish.forwards
    if wish.trains and aim == "memory" and wish.recompute == "auto":  # what leaves the most room
        wish = replace(wish, recompute="selective" if wish.holds_kept else "always")
    costs = _costs(model, machine, found.stage, wish, forwards, load, tiers)
    rooms = [0.0] * len(machine.devices)
    for d, slot in zip(model.problem.device_of, model.problem.slots, strict=True):
        rooms[d] = slot.memory
    step = _scheduled(costs, wish, rooms)
    if not counted:
        load, found = _with_replays(load, found, step.program.ways, costs, machine, aim)
    return Candidate(chosen, wish, found, load, tiers, costs, step)


def _looped(row: Chosen, wish: Wish, effort: Effort) -> Chosen:
    """The same devices with several stages each.

    Raises:  DfcError N060 (status 6) when they do not fit, N068 for a model of too few parts.
    """
    model, machine = laid_out(row.model, row.machine, wish), row.machine
    problem = model.problem
    if problem.n < problem.stages:
        each = f"{wish.stages_per_device} on each of {counted(len(machine.devices), 'device')}"
        message = f"the model has {counted(problem.n, 'part')} for {problem.stages} stages, {each}"
        raise DfcError("N068", message, help="fewer devices, or fewer stages a device", status=2)
    try:
        solved = no_worse(model, machine, partition(problem, effort))
    except DfcError as e:
        if e.status != 6:
            raise
        raise refusal(model, machine, wish) from e
    by = row.partition.value / row.solved.value if row.solved.value else 1.0  # a price, or 1
    told = replace(solved, value=solved.value * by, bound=solved.bound * by)
    return Chosen(machine, model, told, solved)


def _with_passes(
    load: Loads, found: Partition, tiers: Mapping[int, Tiers], model: Modelled, machine: Machine,
    objective: Wanted,
) -> tuple[Loads, Partition]:  # fmt: skip
    """Streaming stages take as long as their passes, one after the other where a device has
    several, and the partition is worth what they allow.

    Keeps:  the bound, which is without slots: no partition is better.
    """
    if not tiers:
        return load, found
    at = np.array(model.problem.device_of)
    took = np.bincount(at, weights=stage_seconds(load, tiers))
    streams = np.isin(np.arange(len(took)), at[list(tiers)])
    stream = np.where(streams, took, load.stream)
    load = replace(load, stream=stream)
    by = price(machine) if objective == "cost" else 1.0
    return load, replace(found, value=max(found.value, load.bottleneck * by))


def _with_replays(
    load: Loads, found: Partition, ways: Mapping[int, str], costs: Costs, machine: Machine,
    aim: Wanted,
) -> tuple[Loads, Partition]:  # fmt: skip
    """Stages that recompute take their forward's time once more, or that of its cheap operators.

    Keeps:   the bound, which is without it.
    """
    if not ways:
        return load, found
    compute = load.compute.copy()
    for s, way in ways.items():
        compute[s] += float((costs.forward if way == FULL else costs.remake)[s])
    load = replace(load, compute=compute)
    if aim == "memory":
        return load, found
    value = load.latency if aim == "latency" else load.bottleneck
    by = price(machine) if aim == "cost" else 1.0
    return load, replace(found, value=max(found.value, value * by))


def _costs(
    model: Modelled, machine: Machine, stage: Sequence[int], wish: Wish, forwards: float,
    load: Loads, tiers: Mapping[int, Tiers],
) -> Costs:  # fmt: skip
    """What F, I and W of each stage take on its device, what it keeps and sends."""
    problem, at = model.problem, model.problem.device_of
    seconds = stage_seconds(load, tiers)
    kept = np.zeros(problem.stages)
    held = np.zeros(len(machine.devices))
    for v, s in enumerate(stage):
        kept[s] += problem.activations[v]
        held[at[s]] += problem.weights[v]
    for size, readers in problem.tied:
        for d in {at[stage[v]] for v in readers}:
            held[d] += size
    for s in tiers:
        held[at[s]] = problem.slots[s].memory
    for s, plan in tiers.items():
        held[at[s]] -= plan.memory - plan.held_bytes
    crossing: dict[tuple[int, int], float] = {}
    for t in problem.tensors:
        for s in {stage[v] for v in t.readers} - {stage[t.producer]}:
            edge = stage[t.producer], s
            crossing[edge] = crossing.get(edge, 0.0) + t.bytes
    edges = [(a, b, round(size)) for (a, b), size in sorted(crossing.items())]
    links = {}
    for a, b in {(at[u], at[v]) for u, v, _ in edges if at[u] != at[v]}:
        for x, y in ((a, b), (b, a)) if wish.trains else ((a, b),):
            wire = machine.wire(x, y)
            links[x, y] = Link(wire.latency, 1 / wire.bandwidth)
    forward = (seconds / forwards).tolist()
    back = tuple(forward) if wish.trains else ()
    again = wish.trains and wish.recompute in ("auto", "selective")
    more = _selective(model, machine, stage, forward) if again else {}
    return Costs(
        tuple(forward), back, back, links=links, edges=edges,
        activations=tuple(round(x) for x in kept), resident=tuple(round(x) for x in held),
        taken=tuple(sum(size for _, t, size in edges if t == s) for s in range(problem.stages)),
        **more,
    )  # fmt: skip


def _selective(
    model: Modelled, machine: Machine, stage: Sequence[int], forward: Sequence[float]
) -> dict[str, Any]:
    """What each stage keeps, makes again, and takes for it, if it recomputes selectively."""
    problem = model.problem
    kept, remade, remake = [], [], []
    for s, slot in enumerate(problem.slots):
        mine = [v for v, x in enumerate(stage) if x == s]
        nodes = [n for v in mine for n in model.groups[v]]
        counted = [value for value, v in model.counted.items() if stage[v] == s]
        found = kept_selectively(nodes, model.saved, counted, model.sizes)
        device, again, whole = machine.devices[problem.device_of[s]], 0.0, 0.0
        for v in mine:
            took = [work.seconds(device) for work in model.works[v]]
            part = sum(t for n, t in zip(model.groups[v], took, strict=True) if n in found.again)
            time = float(problem.time[v][slot.kind])
            again += time * part / sum(took) if part else 0.0
            whole += time
        kept.append(round(found.kept))
        remade.append(round(found.remade))
        remake.append(forward[s] * again / whole if whole else 0.0)
    return {"kept": tuple(kept), "remade": tuple(remade), "remake": tuple(remake)}


def _scheduled(costs: Costs, wish: Wish, rooms: Sequence[float]) -> Simulation:
    """The schedule that was asked for, or the one with the shortest step that fits."""
    m, ranks = wish.microbatches, len(rooms)
    all_in = {"always": FULL, "selective": SELECTIVE}.get(wish.recompute)
    again = dict.fromkeys(range(len(costs.forward)), all_in) if all_in else {}
    some = None if wish.recompute == "auto" else again
    if wish.schedule == "auto" and wish.trains:
        return auto(ranks, m, costs, rooms, wish.layout.placement(ranks), some).simulation
    name = "forward" if wish.schedule == "auto" else wish.schedule
    program = schedule(name, ranks, m, wish.stages_per_device)
    if some is None:
        return fitting(program, costs, rooms)
    step = simulate(in_ways(program, some), costs)
    if some:  # the partition knows what a stage computes again, not what it took
        check_room(step, rooms)
    return step


def check_room(step: Simulation, rooms: Sequence[float]) -> None:
    """
    Raises:  DfcError N062 (status 6) for a rank that holds more than there is.
    """
    for rank, (need, room) in enumerate(zip(step.peaks, rooms, strict=True)):
        if need > room * (1 + 1e-12):
            raise DfcError(
                "N062", f"rank {rank} would hold {need:.6g} bytes of {room:.6g}",
                help="smaller microbatches, or more devices", status=6,
            )  # fmt: skip
