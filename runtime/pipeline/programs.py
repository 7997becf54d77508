"""Which program trains so many microbatches: by a schedule's name, as given, or the best."""

from __future__ import annotations

from collections.abc import Callable, Collection

from dfc.errors import DfcError
from dfc.planning.actions import Kind, Program
from dfc.planning.auto import auto
from dfc.planning.recompute import needed, recomputing
from dfc.planning.schedules import SCHEDULES, schedule
from dfc.planning.simulate import Costs, in_flight

AUTO = "auto"


class Programs:
    """The programs of one trainer, made once for each number of microbatches.

    `schedule` is a name, "auto", or a program; `chunks` counts the stages of a rank for schedules
    that leave it open. `recompute` are the stages that recompute, those of a program besides; None
    where they are the fewest with which ranks hold no more than `room` bytes of activations.
    Raises:  DfcError N073 for stages that cannot be shared out, N001 and N002 as `schedule`.
    """

    def __init__(
        self,
        schedule: str | Program,
        stages: int,
        microbatches: int,
        chunks: int,
        recompute: Collection[int] | None = (),
        room: float = float("inf"),
    ) -> None:
        self.schedule, self.stages, self.chunks = schedule, stages, chunks
        self.recompute, self.room = recompute, room
        self._made: dict[int, Program] = {}
        self._limits: dict[int, tuple[Program, tuple[int, ...]]] = {}
        if isinstance(schedule, Program) and schedule.stages != stages:
            raise DfcError("N073", f"the program is for {schedule.stages} stages, there are "
                           f"{stages}", status=2)  # fmt: skip
        first = self._named("zb1p" if schedule == AUTO else schedule, microbatches)
        self.first = recomputing(first, recompute or ())
        self.placement = first.placement
        every = {a.kind for r in range(len(first.ranks)) for a in first.actions(r)}
        self.kinds = every | set(Kind) if schedule == AUTO else every

    def of(self, microbatches: int, measured: Callable[[], Costs]) -> Program:
        """The program; `measured` is asked for what the stages cost, where they are to choose by.

        Raises:  DfcError N062 (status 6) where not even stages that recompute have room.
        """
        if microbatches not in self._made:
            chosen = self.schedule == AUTO or self.recompute is None
            self._made[microbatches] = self._chosen(microbatches, measured() if chosen else None)
        return self._made[microbatches]

    def _chosen(self, m: int, costs: Costs | None) -> Program:
        if costs is None or self.schedule != AUTO:
            named = self._named(self.schedule, m)
            some = self.recompute
            if some is None:
                assert costs is not None
                some = needed(named, costs, [self.room] * len(named.ranks))
            return recomputing(named, some)
        caps = [] if self.room == float("inf") else [self.room] * self.stages
        return auto(self.stages, m, costs, caps, recompute=self.recompute).program

    def to_measure(self, microbatches: int) -> Program:
        """A program in which each stage's actions are timed, none of which recomputes."""
        named = "zb1p" if self.schedule == AUTO else self.schedule
        return self._named(named, microbatches)

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
                help=f"cut the model into a multiple of {chunks}", status=2,
            )  # fmt: skip
        found = schedule(name, self.stages // chunks, m, chunks)
        if not found.trains:
            raise DfcError("N073", f"`{name}` has no backward pass", status=2)
        return found
