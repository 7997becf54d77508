"""Which program trains so many microbatches: by a schedule's name, as given, or the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from dfc.errors import DfcError
from dfc.planning.actions import Kind, Program
from dfc.planning.auto import auto, fitting
from dfc.planning.layouts import Layout, layouts, lean_program
from dfc.planning.recompute import in_ways
from dfc.planning.schedules import SCHEDULES, schedule, split
from dfc.planning.simulate import Costs, Simulation, in_flight

AUTO = "auto"
Shared = int | Sequence[int] | None  # the number of ranks, or the rank of each stage


class Programs:
    """The programs of one trainer, made once for each number of microbatches.

    `schedule` is a name, "auto", or a program. `ranks` is how many share the stages, or the rank of
    each stage; without it "auto" has a rank for each stage, and schedules that leave it open have
    `chunks` stages a rank. `recompute` are the stages that recompute, and how, those of a program
    besides; None where they are the fewest with which ranks hold no more than `room` bytes of
    activations, each in the better way: fully, or selectively.
    `moves` says that "auto" may put stages on other ranks when it chooses the first program: in
    loops, or in a V.
    Raises:  DfcError N073 for stages that cannot be shared out, N001 and N002 as `schedule`.
    """

    def __init__(
        self,
        schedule: str | Program,
        stages: int,
        microbatches: int,
        chunks: int,
        recompute: Mapping[int, str] | None = MappingProxyType({}),
        room: float = float("inf"),
        ranks: Shared = None,
        moves: bool = False,
    ) -> None:
        self.schedule, self.stages, self.chunks = schedule, stages, chunks
        self.recompute, self.room = recompute, room
        self._made: dict[int, Program] = {}
        self._limits: dict[int, tuple[Program, tuple[int, ...]]] = {}
        if isinstance(schedule, Program) and schedule.stages != stages:
            raise DfcError("N073", f"the program is for {schedule.stages} stages, there are "
                           f"{stages}", status=2)  # fmt: skip
        if ranks is not None:
            self.chunks = _each(stages, ranks)
        self._layouts = _of_auto(stages, ranks) if schedule == AUTO else []
        if not moves:
            self._layouts = self._layouts[:1]
        first = self.to_measure(microbatches)
        if ranks is not None and schedule != AUTO:
            _check_ranks(first, ranks)
        self.first = in_ways(first, recompute or {})
        self.placement = first.placement
        every = {a.kind for r in range(len(first.ranks)) for a in first.actions(r)}
        self.kinds = every | set(Kind) if schedule == AUTO else every

    def of(self, microbatches: int, measured: Callable[[], Costs]) -> Program:
        """The program; `measured` is asked for what the stages cost where they are to choose by:
        in all ways to recompute, if it is the stages' that are to be chosen.

        Raises:  DfcError N062 (status 6) where not even stages that recompute have room.
        """
        if microbatches not in self._made:
            self._made[microbatches] = self._chosen(microbatches, measured)
        return self._made[microbatches]

    def _chosen(self, m: int, measured: Callable[[], Costs]) -> Program:
        if self.schedule == AUTO:
            step, layout = self._best(m, measured())
            self._settle(layout)
            return step.program
        named = self._named(self.schedule, m)
        if self.recompute is not None:
            return in_ways(named, self.recompute)
        return fitting(named, measured(), [self.room] * len(named.ranks)).program

    def _best(self, m: int, costs: Costs) -> tuple[Simulation, Layout | None]:
        """The best step of all places that stages may have."""
        ranks, found, failed = 1 + max(self.placement), [], None
        caps = [] if self.room == float("inf") else [self.room] * ranks
        for layout in self._layouts:
            try:
                best = auto(ranks, m, costs, caps, layout.placement(ranks), self.recompute)
            except DfcError as e:
                if e.code != "N062":
                    raise
                failed = failed or e
            else:
                found.append((best.simulation, layout))
        if failed is not None and not found:
            raise failed
        return min(found, key=lambda x: (x[0].makespan, max(x[0].peaks)))

    def _settle(self, layout: Layout | None) -> None:
        """Stages stay where they were once found best."""
        if layout is not None:
            self._layouts, self.placement = [layout], layout.placement(1 + max(self.placement))

    def to_measure(self, microbatches: int) -> Program:
        """A program in which each stage's actions are timed, none of which recomputes."""
        if self.schedule != AUTO:
            return self._named(self.schedule, microbatches)
        layout = self._layouts[0]
        return split(lean_program(AUTO, layout, self.stages // layout.chunks, microbatches))

    def limits(self, program: Program) -> tuple[int, ...]:
        """The most microbatches that each stage keeps at once."""
        if id(program) not in self._limits:
            self._limits[id(program)] = program, in_flight(program)
        return self._limits[id(program)][1]

    def _named(self, name: str | Program, m: int) -> Program:
        if isinstance(name, Program):
            if name.microbatches != m:
                raise DfcError("N073", f"the program is for {name.microbatches} microbatches, the "
                               f"batch has {m}", status=2)  # fmt: skip
            return name
        known = SCHEDULES.get(name)
        open_ = known is not None and known.chunks == "any"
        chunks = self.chunks if open_ else int(known.chunks) if known is not None else 1
        if self.stages % chunks:
            raise DfcError(
                "N073", f"`{name}` has {chunks} stages a rank: {self.stages} cannot be shared out",
                help=_cut_into(chunks), status=2,
            )  # fmt: skip
        found = schedule(name, self.stages // chunks, m, chunks)
        if not found.trains:
            raise DfcError("N073", f"`{name}` has no backward pass", status=2)
        return found


def _count(ranks: int | Sequence[int]) -> int:
    return ranks if isinstance(ranks, int) else 1 + max(ranks, default=-1)


def _cut_into(multiple: int) -> str:
    return (
        f"cut the model into a multiple of {multiple} stages; of a model with few nodes `balanced` "
        "and plans make fewer than asked for"
    )


def _each(stages: int, ranks: int | Sequence[int]) -> int:
    """How many stages each rank has.

    Raises:  DfcError N073 where ranks cannot have equally many.
    """
    count = _count(ranks)
    if count < 1 or stages % count:
        help = _cut_into(count) if count > 0 else "there is at least one"
        message = f"{stages} stages cannot be shared out evenly among {count} ranks"
        raise DfcError("N073", message, help=help, status=2)
    return stages // count


def _of_auto(stages: int, ranks: Shared) -> list[Layout]:
    """Where stages may be, for `auto` to choose from.

    Raises:  DfcError N073 for ranks of stages for which there is no schedule.
    """
    if ranks is None:
        return [Layout()]
    each, count = _each(stages, ranks), _count(ranks)
    every: dict[tuple[int, ...], Layout] = {}
    for layout in layouts(AUTO, each, True):
        every.setdefault(layout.placement(count), layout)
    if isinstance(ranks, int):
        return list(every.values())
    if tuple(ranks) not in every:
        told = " or ".join(str(list(placement)) for placement in every)
        raise DfcError("N073", f"no schedule has its stages on ranks {list(ranks)}",
                       help=f"{stages} stages on {count} ranks: {told}", status=2)  # fmt: skip
    return [every[tuple(ranks)]]


def _check_ranks(program: Program, ranks: int | Sequence[int]) -> None:
    """
    Raises:  DfcError N073 for a program whose stages are on other ranks.
    """
    asked = 1 + max(program.placement) if isinstance(ranks, int) else program.placement
    if asked == (ranks if isinstance(ranks, int) else tuple(ranks)):
        return
    each, name = program.stages // _count(ranks), program.name
    fit = [n for n, s in SCHEDULES.items() if s.trains and s.chunks in ("any", str(each))]
    raise DfcError(
        "N073", f"`{name}` has {program.stages} stages on ranks {list(program.placement)}, not "
        f"on {ranks if isinstance(ranks, int) else list(ranks)}",
        help=f"with {each} a rank there are {', '.join(fit)}, and auto", status=2,
    )  # fmt: skip
