"""The actions of a pipeline: one static list for each rank, made by a schedule, simulated, checked
and run unchanged.

Text, one line a rank: `0: F(0,0) F(0,1) B(0,0) F(2,3)&B(1,1)`, each kind(stage,microbatch); `&`
joins two actions that run as one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from dfc.errors import DfcError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Rows = NDArray[np.int32]  # [n, 3]: kind, stage, microbatch


class Kind(IntEnum):
    """What is computed for one microbatch of one stage."""

    F = 0  # forward
    I = 1  # backward for the input  # noqa: E741 - the papers' letter
    W = 2  # backward for the weights
    B = 3  # both at once
    R = 4  # forward again, before the backward pass of a stage that keeps its inputs alone
    S = 5  # the same of cheap operators, in a stage that keeps what the others made


FULL, SELECTIVE = "full", "selective"  # how a stage recomputes: by R, or by S
AGAIN = {FULL: Kind.R, SELECTIVE: Kind.S}
JOINED = 8  # added to the kind of an action that runs as one with the next


class Action(NamedTuple):
    """One action; `joined` says that it runs as one with the next."""

    kind: Kind
    stage: int
    microbatch: int
    joined: bool = False

    def __str__(self) -> str:
        return f"{self.kind.name}({self.stage},{self.microbatch})"


@dataclass(frozen=True, eq=False)
class Program:
    """What every rank does, in order.

    `placement[s]` is the rank of stage s; `ranks[r]` are the rows of rank r, int32[n, 3] with
    columns kind (plus JOINED), stage, microbatch.
    """

    name: str
    placement: tuple[int, ...]
    microbatches: int
    ranks: tuple[Rows, ...]

    @property
    def stages(self) -> int:
        return len(self.placement)

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.ranks)

    def __eq__(self, other: object) -> bool:
        import numpy as np

        return (
            isinstance(other, Program)
            and (self.placement, self.microbatches) == (other.placement, other.microbatches)
            and len(self.ranks) == len(other.ranks)
            and all(np.array_equal(a, b) for a, b in zip(self.ranks, other.ranks, strict=True))
        )

    def actions(self, rank: int) -> Iterator[Action]:
        for kind, stage, microbatch in self.ranks[rank].tolist():
            yield Action(Kind(kind & ~JOINED), stage, microbatch, bool(kind & JOINED))

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        return any(bool((rows[:, 0] & ~JOINED).any()) for rows in self.ranks)

    @property
    def recomputes(self) -> frozenset[int]:
        """The stages that run their forward again before their backward pass."""
        return frozenset(self.ways)

    @property
    def ways(self) -> dict[int, str]:
        """How each stage recomputes that does."""
        found = {}
        for rows in self.ranks:
            for way, kind in AGAIN.items():
                found.update(dict.fromkeys(rows[(rows[:, 0] & ~JOINED) == kind, 1].tolist(), way))
        return found

    def __str__(self) -> str:
        lines = []
        for rank in range(len(self.ranks)):
            text = "".join(f"{a}{'&' if a.joined else ' '}" for a in self.actions(rank))
            lines.append(f"{rank}: {text}".rstrip())
        return "\n".join(lines) + "\n"


_ACTION = re.compile(r"([FIWBRS])\((\d+),(\d+)\)(&?)\s*")


def parse_program(text: str, name: str = "custom", file: str = "<string>") -> Program:
    """A program from its text.

    Raises:  DfcError N010 with the line of what cannot be read, N011 for a stage on two ranks.
    """
    ranks: list[list[tuple[int, int, int]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            ranks.append(_rows_of(line, len(ranks), f"{file}:{number}"))
    return of_rows(name, ranks, _placement(ranks))


def _rows_of(line: str, rank: int, where: str) -> list[tuple[int, int, int]]:
    head, colon, rest = line.partition(":")
    if not colon or head.strip() != str(rank):
        help = "write `0: F(0,0) B(0,0)`, a line for each rank in order"
        raise DfcError("N010", f"{where}: expected the actions of rank {rank}", help=help)
    rows: list[tuple[int, int, int]] = []
    rest, at = rest.strip(), 0
    while at < len(rest):
        found = _ACTION.match(rest, at)
        if found is None:
            help = "an action is F, I, W, B, R or S with (stage,microbatch)"
            raise DfcError("N010", f"{where}: cannot read `{rest[at : at + 20]}`", help=help)
        kind = Kind[found[1]] + (JOINED if found[4] else 0)
        rows.append((kind, int(found[2]), int(found[3])))
        at = found.end()
    if rows and rows[-1][0] & JOINED:
        raise DfcError("N010", f"{where}: nothing follows the last `&`")
    return rows


def _placement(ranks: Sequence[Sequence[tuple[int, int, int]]]) -> tuple[int, ...]:
    where: dict[int, int] = {}
    for rank, rows in enumerate(ranks):
        for _, stage, _ in rows:
            if where.setdefault(stage, rank) != rank:
                raise DfcError("N011", f"stage {stage} is on rank {where[stage]} and rank {rank}")
    missing = [s for s in range(max(where, default=-1) + 1) if s not in where]
    if missing:
        raise DfcError("N011", f"no rank has stage {missing[0]}")
    return tuple(where[s] for s in sorted(where))


def of_rows(name: str, ranks: Sequence[Any], placement: Sequence[int]) -> Program:
    """A program of lists of (kind, stage, microbatch)."""
    import numpy as np

    arrays = tuple(np.array(rows, dtype=np.int32).reshape(-1, 3) for rows in ranks)
    m = 1 + max((int(a[:, 2].max()) for a in arrays if len(a)), default=-1)
    return Program(name, tuple(placement), m, arrays)
