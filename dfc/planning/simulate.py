"""What a program takes: a discrete-event simulation with durations, links and memory.

Every lane (a rank's computing, or one direction of a link) runs its own list in order, so the time
of each action is the longest path to it. Integers and fractions stay exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from math import lcm
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError
from dfc.planning.actions import FULL, JOINED, Kind, Program
from dfc.planning.tasks import Tasks, tasks_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

Number = int | float | Fraction
_BY_STAGE = ("forward", "inputs", "weights", "activations", "taken", "kept", "remade", "replay",
             "remake")  # fmt: skip


@dataclass(frozen=True)
class Link:
    """One direction between two ranks: seconds of latency, seconds a byte."""

    latency: Number = 0
    per_byte: Number = 0


@dataclass(frozen=True)
class Costs:
    """What one microbatch costs at each stage.

    `forward`, `inputs` and `weights` are the durations of F, I and W, one a stage; B takes I + W,
    R `replay`, by default what F takes, and S `remake`, by default what R takes.
    `edges` are (producer, consumer, bytes); the default is a chain without bytes. `links` gives
    the link of a pair of ranks, else `link`. `activations` are kept from F until W or B, in bytes;
    a stage that recomputes keeps what it takes (`taken`) from F on, and `activations` from R on;
    one that does so selectively keeps `kept` from F on, and `remade` besides from S on.
    `resident` are the bytes that a rank holds all the time. `slots` is how many transfers of one
    edge may have arrived without having been used; 0 is without a limit.
    """

    forward: Sequence[Number]
    inputs: Sequence[Number] = ()
    weights: Sequence[Number] = ()
    link: Link = Link()
    links: Mapping[tuple[int, int], Link] = field(default_factory=dict)
    edges: Sequence[tuple[int, int, int]] | None = None
    activations: Sequence[int] = ()
    taken: Sequence[int] = ()
    kept: Sequence[int] = ()
    remade: Sequence[int] = ()
    replay: Sequence[Number] = ()
    remake: Sequence[Number] = ()
    resident: Sequence[int] = ()
    slots: int = 0

    def all_edges(self) -> Sequence[tuple[int, int, int]]:
        if self.edges is not None:
            return self.edges
        return [(s, s + 1, 0) for s in range(len(self.forward) - 1)]

    def link_of(self, source: int, target: int) -> Link:
        return self.links.get((source, target), self.link)


@dataclass(frozen=True)
class Simulation:
    """When everything happens.

    Times are in the unit of the costs; `start` and `end` have one entry for each task.
    """

    program: Program
    tasks: Tasks
    start: NDArray[Any]
    end: NDArray[Any]
    scale: int  # integers are this many parts of a unit
    peaks: tuple[int, ...]  # bytes, of each rank

    def _unit(self, x: Any) -> Number:
        if self.start.dtype.kind == "f":
            return float(x)
        value = Fraction(int(x), self.scale)
        return int(value) if value.denominator == 1 else value

    @cached_property
    def makespan(self) -> Number:
        """From the start until the last action ends."""
        return self._unit(self.end.max(initial=0))

    @cached_property
    def busy(self) -> tuple[Number, ...]:
        """How long each rank computes."""
        import numpy as np

        ranks = len(self.program.ranks)
        lanes = self.tasks.lane
        took = np.zeros(len(self.tasks.lanes), dtype=self.end.dtype)
        np.add.at(took, lanes, self.end - self.start)
        return tuple(self._unit(x) for x in took[:ranks])

    @cached_property
    def sync_bubble(self) -> Number:
        """What one step takes beyond the work of the busiest rank: what the user pays."""
        return self.makespan - max(self.busy)

    @cached_property
    def span_bubble(self) -> Number:
        """The largest idle time of a rank between its first and last action, as papers count."""
        worst: Number = 0
        for rank in range(len(self.program.ranks)):
            lane = slice(*self.tasks.lanes[rank])
            if lane.start < lane.stop:
                first, last = self.start[lane].min(), self.end[lane].max()
                worst = max(worst, self._unit(last - first) - self.busy[rank])
        return worst

    @property
    def bubble(self) -> float:
        """The synchronous bubble as a part of the step."""
        return float(self.sync_bubble / self.makespan) if self.makespan else 0.0


def simulate(program: Program, costs: Costs) -> Simulation:
    """Run a program in simulated time.

    Raises:  DfcError N020 when it deadlocks, with what each rank waits for; N021 when the costs
             are not those of the program's stages, or cannot be.
    Cost:    one step of numpy for each wave of actions, when many ranks work side by side.
    """
    _check(program, costs)
    scale = _scale(costs)
    tasks = tasks_of(program, costs, scale)
    start, end, stuck = tasks.run()
    if stuck:
        raise DfcError("N020", f"the program waits for itself: {_waits(program, tasks, stuck)}")
    return Simulation(program, tasks, start, end, scale or 1, peaks(program, costs))


def _check(program: Program, costs: Costs) -> None:
    n = program.stages
    for what in _BY_STAGE:
        given = getattr(costs, what)
        if len(given) != n and (given or what == "forward"):
            raise DfcError("N021", f"{len(given)} costs of `{what}` for {n} stages")
        wrong = next((x for x in given if not x >= 0), None)
        if wrong is not None:
            raise DfcError("N021", f"a cost of `{what}` cannot be {wrong}")
    if program.trains and not costs.inputs:
        raise DfcError("N021", "the program trains: the costs need `inputs` and `weights`")
    for u, v, _ in costs.all_edges():
        if not 0 <= u < v < n:
            raise DfcError("N021", f"there is no edge from stage {u} to stage {v} of {n}")


def _scale(costs: Costs) -> int | None:
    """What makes every time an integer, None when one is a float."""
    links = [costs.link, *costs.links.values()]
    times = [*costs.forward, *costs.inputs, *costs.weights, *costs.replay, *costs.remake]
    times += [x for link in links for x in (link.latency, link.per_byte)]
    if any(isinstance(t, float) for t in times):
        return None
    return lcm(*(Fraction(t).denominator for t in times)) if times else 1


def peaks(program: Program, costs: Costs) -> tuple[int, ...]:
    """The most bytes that each rank holds: what is resident, and activations by lane order.

    Why:  an activation is allocated and freed on one lane, so that times do not matter.
    """
    import numpy as np

    made = np.zeros((len(Kind), program.stages), dtype=np.int64)  # by an action of each kind
    made[Kind.F] = costs.activations or 0
    for s, way in program.ways.items():
        if way == FULL:
            made[Kind.R, s] = made[Kind.F, s]
            made[Kind.F, s] = costs.taken[s] if costs.taken else 0
        else:
            made[Kind.S, s] = costs.remade[s] if costs.remade else made[Kind.F, s]
            made[Kind.F, s] = costs.kept[s] if costs.kept else 0
    whole = made.sum(axis=0)
    found = []
    for rank, rows in enumerate(program.ranks):
        kind, stage = rows[:, 0] & ~JOINED, rows[:, 1]
        steps = np.zeros(2 * len(rows), dtype=np.int64)  # before and after each action
        steps[0::2] = made[kind, stage]
        if program.trains:
            steps[1::2] = np.where((kind == Kind.B) | (kind == Kind.W), -whole[stage], 0)
        else:
            steps[1::2] = -steps[0::2]
        resident = costs.resident[rank] if costs.resident else 0
        found.append(int(np.cumsum(steps).max(initial=0)) + resident)
    return tuple(found)


def in_flight(program: Program, begin: Kind = Kind.F) -> tuple[int, ...]:
    """The most microbatches that each stage keeps something of, from F until W or B; with `begin`
    R, of stages that recompute, all that it needs."""
    import numpy as np

    ends = (Kind.W, Kind.B) if program.trains else (Kind.F,)
    found: list[int] = []
    for stage, rank in enumerate(program.placement):
        rows = program.ranks[rank]
        kinds = rows[rows[:, 1] == stage, 0] & ~JOINED
        freed = np.isin(kinds, ends).astype(np.int64)
        held = np.cumsum(kinds == begin) - np.cumsum(freed) + freed  # until the action is over
        found.append(int(held.max(initial=0)))
    return tuple(found)


def _waits(program: Program, tasks: Tasks, stuck: Sequence[int]) -> str:
    told = [f"{tasks.name(a)} waits for {tasks.name(b)}" for a, b in tasks.blocked(stuck)[:4]]
    return "; ".join(told)
