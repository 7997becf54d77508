"""Stages of a pipeline, each in its share of its rank's memory: planned, built, and counted.

A stage whose weights do not fit streams them once for each microbatch: its passes follow each
other, so that the first blocks of the next microbatch come while this one is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Value
from dfc.lang.units import amount_text, byte_count
from dfc.planning.cost import Sizes
from dfc.planning.engine import Runner
from dfc.planning.stages import StageGraph
from dfc.planning.streaming import Hop, Layer
from dfc.planning.tier_chain import by_times, read_bytes, share_host, sharing
from dfc.planning.tier_plan import DISK, all_there
from dfc.planning.tiers import Tiers, least_bytes, plan_tiers, shares
from dfc.planning.weight_blocks import Cut, cut
from dfc.runtime.tiers.files import extents_of
from dfc.runtime.tiers.places import Place, is_relayed, place_of
from dfc.runtime.tiers.streamed import Streamed
from dfc.runtime.tiers.within import Wanted, measured_plan, no_host_between

Memory = str | int | Sequence[str | int]  # of each rank, or one for all: "1GiB"
STREAMS = "eager"  # the engine that can
_DISK = Hop(1 / DISK, name="disk")


def rank_memories(memory: Memory, ranks: int) -> list[int]:
    """Bytes of each rank.

    Raises:  DfcError Q010 for what is no size, N053 for another number of them.
    """
    given = [memory] if isinstance(memory, (str, int)) else list(memory)
    sizes = [byte_count(m) for m in given]
    if len(sizes) not in (1, ranks):
        message = f"{len(sizes)} memories are given for {ranks} ranks"
        raise DfcError("N053", message, help="give one for all, or one for each", status=2)
    return sizes * ranks if len(sizes) == 1 else sizes


@dataclass(frozen=True)
class Ranks:
    """Where stages are: `memory` is that of each rank, the rest as a pipeline has it.

    `host` is what each host's memory holds of weights, as much as it takes where it is None: of
    ranks on it, and what is copied to the devices of the others. `hosts` are those of the ranks.
    """

    stages: Sequence[StageGraph]
    placement: Sequence[int]
    devices: Sequence[str]
    threads: Sequence[int]
    memory: Sequence[int]
    host: int | None = None
    hosts: Sequence[int] | None = None

    @property
    def owners(self) -> dict[int, int]:
        """The rank of each stage."""
        return dict(enumerate(self.placement))

    def host_of(self, stage: int) -> int:
        return self.hosts[self.placement[stage]] if self.hosts is not None else 0


def plan_stages(ranks: Ranks, sizes: Sizes, given: Mapping[Value, Any] | None) -> list[Tiers]:
    """What stays of each stage, and what it streams.

    With a microbatch that is `given`, stages that stream are timed, one after the other.
    Raises:  DfcError N064 (status 6) for a memory that is too small, with its rank and stages;
             K070 for weights that are to be streamed and in no file; K074 for a host's memory where
             no rank is on a device.
    """
    places = [place_of(ranks.devices[r]) for r in ranks.placement]
    if ranks.host is not None and not any(map(is_relayed, places)):
        raise no_host_between()
    parts = [cut(s.graph, p.calls(s.graph)) for s, p in zip(ranks.stages, places, strict=True)]
    hops = [Hop(1 / p.guess, name=p.source) for p in places]
    found = _planned(ranks, parts, places, hops, sizes)
    times = [_times(ranks, found, s, places[s].source) for s in range(len(found))]
    hops = [by_times(h, x) for h, x in zip(hops, times, strict=True)]
    found = _planned(ranks, parts, places, hops, sizes)
    if ranks.host is not None:
        found = _on_hosts(ranks, found, ranks.host)
    for part, place, plan in zip(parts, places, found, strict=True):
        extents_of(w for i in _read(plan, place) for w in part.blocks[i].weights)
    return found if given is None else _measured(ranks, parts, places, found, given)


def _times(ranks: Ranks, plans: Sequence[Tiers], stage: int, source: str) -> float:
    """How many times as long copies from there take as a stage's alone would: ranks of one host
    share its disk, and the bus to its devices, by what each microbatch brings to each.

    Why:  a rank runs one of its stages at a time; the slots of the others are full meanwhile.
    """
    mine = ranks.host_of(stage)
    here = {s: read_bytes(p, source) for s, p in enumerate(plans) if ranks.host_of(s) == mine}
    return sharing(here, ranks.owners).get(stage, 1)


def _on_hosts(ranks: Ranks, plans: Sequence[Tiers], memory: int) -> list[Tiers]:
    """The plans with what the hosts' memory does not hold read from their disks."""
    found = dict(enumerate(plans))
    for host in sorted({ranks.host_of(s) for s in found}):
        here = {s: p for s, p in found.items() if ranks.host_of(s) == host}
        found.update(share_host(here, memory, _DISK, ranks.owners))
    return [found[s] for s in range(len(plans))]


def _read(plan: Tiers, place: Place) -> list[int]:
    """The blocks whose weights are read from files in each pass."""
    if not is_relayed(place):
        return list(plan.streamed)
    return [plan.streamed[j] for j in plan.below.streamed] if plan.below is not None else []


def _planned(
    ranks: Ranks, parts: Sequence[Cut], places: Sequence[Place], hops: Sequence[Hop], sizes: Sizes
) -> list[Tiers]:
    whole = [
        all_there(part, place.model(), hop, sizes)
        for part, place, hop in zip(parts, places, hops, strict=True)
    ]
    found: dict[int, Tiers] = {}
    for r, memory in enumerate(ranks.memory):
        mine = [s for s, rank in enumerate(ranks.placement) if rank == r]
        _require(r, memory, {s: whole[s] for s in mine})
        for s, share in zip(mine, shares(memory, [whole[s] for s in mine]), strict=True):
            x = whole[s]
            found[s] = plan_tiers(x.layers, x.weights, share, x.hop, x.fixed)
    return [found[s] for s in range(len(whole))]


def _require(rank: int, memory: int, whole: Mapping[int, Tiers]) -> None:
    """Raises:  DfcError N064 (status 6) for a memory that does not hold a rank's stages."""
    least = {s: least_bytes(x) for s, x in whole.items()}
    total = sum(least.values())
    if total <= memory:
        return
    names = " and ".join(str(s) for s in whole)
    stages = f"stage{'s' if len(whole) > 1 else ''} {names}"
    worst = max(least, key=lambda s: least[s])
    parts = whole[worst].layers
    largest = max(parts, key=lambda x: x.bytes)
    raise DfcError(
        "N064",
        f"rank {rank} has {amount_text(memory, 'bytes')}, which do not hold {stages}, not even "
        f"streamed: {amount_text(total, 'bytes')} would do",
        help=f"the largest part that stage {worst} streams at once is "
        f"`{largest.name or 'its first'}` with {amount_text(largest.bytes, 'bytes')}; smaller "
        "microbatches or more stages take less",
        status=6,
    )


def _measured(
    ranks: Ranks, parts: Sequence[Cut], places: Sequence[Place], plans: Sequence[Tiers],
    given: Mapping[Value, Any],
) -> list[Tiers]:  # fmt: skip
    """The same plans by what blocks and copies take, as far as any stage streams."""
    found = list(plans)
    last = max((s for s, plan in enumerate(plans) if plan.streamed), default=-1)
    values = dict(given)
    for s in range(last + 1):
        stage, plan, place = ranks.stages[s], plans[s], places[s]
        inputs = [_on(values[v], place.device) for v in stage.takes]
        with _threads(ranks.threads[ranks.placement[s]]):
            if plan.streamed:
                host = plan.below.memory if plan.below is not None else None
                times = [_times(ranks, plans, s, source) for source in (place.source, _DISK.name)]
                wanted = Wanted(plan.memory, host=host)
                found[s] = measured_plan(parts[s], plan, place, wanted, inputs, *times)
            if s < last:
                made = _once(parts[s], found[s], place, inputs)
                values.update(zip(stage.gives, made, strict=True))
    return found


def _once(parts: Cut, plan: Tiers, place: Place, inputs: Sequence[Any]) -> list[Any]:
    runner = Streamed(parts, plan, place)
    try:
        return runner(inputs)
    finally:
        runner.close()


def _on(x: Any, device: str) -> Any:
    return x.to(device) if hasattr(x, "to") else x


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_engines(plans: Sequence[Tiers], engines: Sequence[str]) -> None:
    """Raises:  DfcError K073 for a stage that has to stream on an engine that cannot."""
    for s, (plan, engine) in enumerate(zip(plans, engines, strict=True)):
        if plan.streamed and engine != STREAMS:
            memory = amount_text(plan.memory, "bytes")
            raise DfcError(
                "K073", f"stage {s} does not fit in {memory}, and its engine `{engine}` cannot "
                f"stream weights: `{STREAMS}` can", help="give it that engine, or more memory: "
                f"{amount_text(replace(plan, streamed=()).held_bytes, 'bytes')}", status=2,
            )  # fmt: skip


def build_stage(graph: Graph, plan: Tiers, device: str) -> Streamed:
    """A stage's runner, by a plan that was made of the same graph."""
    place = place_of(device)
    return Streamed(cut(graph, place.calls(graph)), plan, place)


def plan_data(plan: Tiers) -> dict[str, Any]:
    """A plan as JSON has it."""
    return asdict(plan)


def plan_of(data: Mapping[str, Any]) -> Tiers:
    """What `plan_data` wrote."""
    layers = tuple(Layer(**x) for x in data["layers"])
    weights, streamed = tuple(data["weights"]), tuple(data["streamed"])
    below = plan_of(data["below"]) if data["below"] is not None else None
    return Tiers(
        layers, weights, streamed, Hop(**data["hop"]), data["memory"], data["fixed"], below
    )  # fmt: skip


class Brought:
    """What the streaming ones of some stages' runners have brought, step by step.

    By stage and hop: 0 is the one that ends at what computes, 1 the one below.
    """

    def __init__(self, runners: Mapping[int, Runner]) -> None:
        self._streamed = {
            s: r for s, r in runners.items() if isinstance(r, Streamed) and r.plan.streamed
        }
        self._before = self._now()

    def _now(self) -> dict[tuple[int, int], int]:
        return {(s, h): n for s, r in self._streamed.items() for h, n in enumerate(r.brought)}

    def since(self) -> dict[tuple[int, int], int]:
        """Bytes of each stage's weights over each hop since the last time."""
        now = self._now()
        found = {which: n - self._before[which] for which, n in now.items()}
        self._before = now
        return found

    def rows(self) -> list[list[int]]:
        """The same as JSON has it: stage, hop, bytes."""
        return [[*which, n] for which, n in sorted(self.since().items())]


def close_all(runners: Sequence[Runner]) -> None:
    """End what runners hold."""
    for runner in runners:
        if isinstance(runner, Streamed):
            runner.close()
