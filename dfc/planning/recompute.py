"""Programs in which stages keep of each microbatch what they took alone, and run their forward
again before their backward pass.

That is an action of its own, R: it waits for nothing but its rank, so that it fills the time in
which the gradient is still under way. By the way "selective" they keep what leaves cheap operators
alone to run again, in S.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, pairwise, product
from typing import TYPE_CHECKING

from dfc.errors import DfcError
from dfc.planning.actions import AGAIN, FULL, JOINED, SELECTIVE, Kind, Program
from dfc.planning.simulate import Costs, peaks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MIXED = 243  # choices of a rank: five stages that differ in their ways


def in_ways(program: Program, ways: Mapping[int, str]) -> Program:
    """The program in which these stages recompute, each in its way."""
    for way in AGAIN:
        program = recomputing(program, [s for s, w in ways.items() if w == way], way)
    return program


def recomputing(program: Program, stages: Collection[int], way: str = FULL) -> Program:
    """The program with an R (or S) right before each I or B of these stages; none where one is
    already.

    Keeps:  the order of all else, and joined actions as one: their R comes before both.
    """
    wanted = frozenset(stages) - program.recomputes
    if not wanted:
        return program
    import numpy as np

    ranks = []
    for rows in program.ranks:
        kind = rows[:, 0] & ~JOINED
        back = ((kind == Kind.I) | (kind == Kind.B)) & np.isin(rows[:, 1], sorted(wanted))
        at = np.flatnonzero(back)
        again = rows[at].copy()
        again[:, 0] = AGAIN[way]
        ranks.append(np.insert(rows, _before_joined(rows[:, 0].tolist())[at], again, axis=0))
    return Program(program.name, program.placement, program.microbatches, tuple(ranks))


def without(program: Program, stage: int) -> Program:
    """The program in which a stage does not recompute."""
    import numpy as np

    ranks = (
        rows[~np.isin(rows[:, 0] & ~JOINED, (Kind.R, Kind.S)) | (rows[:, 1] != stage)]
        for rows in program.ranks
    )
    return replace(program, ranks=tuple(ranks))


def needed(
    program: Program, costs: Costs, caps: Sequence[float], ways: Collection[str] = (FULL,)
) -> dict[int, str]:
    """The stages that must recompute for each rank to hold no more than its cap, and in which of
    these ways: those that take the least time for it, and of equal ones the fewest.

    Why:     what a rank holds follows from its own list of actions, so that ranks choose apart.
    Needs:   costs of these ways.
    Raises:  DfcError N062 (status 6) where a rank does not fit, whatever it recomputes.
    Cost:    each choice for a rank's stages, which are few.
    """
    found: dict[int, str] = {}
    replay, bare = costs.replay or costs.forward, replace(costs, resident=())
    took = {FULL: replay, SELECTIVE: costs.remake or replay}
    for rank, cap in enumerate(caps):
        choices = list(_choices([s for s, r in enumerate(program.placement) if r == rank], ways))
        choices.sort(key=lambda some: (sum(took[w][s] for s, w in some.items()), len(some)))
        alone = replace(program, ranks=(program.ranks[rank],))
        fixed = costs.resident[rank] if costs.resident else 0
        least: int | None = None
        for some in choices:
            held = fixed + peaks(in_ways(alone, some), bare)[0]
            least = held if least is None else min(held, least)
            if held <= cap:
                found.update(some)
                break
        else:
            raise DfcError(
                "N062", f"rank {rank} holds {least:.6g} bytes of {cap:.6g}, whatever recomputes",
                help="use more microbatches of fewer items", status=6,
            )  # fmt: skip
    return found


def _choices(stages: Sequence[int], ways: Collection[str]) -> Iterator[dict[int, str]]:
    """What each stage may do: keep all, or recompute; all of a rank in one way where that would be
    too many to try."""
    mixed = [ways] if (1 + len(ways)) ** len(stages) <= _MIXED else [(way,) for way in ways]
    every = chain.from_iterable(product((None, *some), repeat=len(stages)) for some in mixed)
    for choice in every:
        yield {s: way for s, way in zip(stages, choice, strict=True) if way is not None}


def _before_joined(kinds: Sequence[int]) -> NDArray[np.int64]:
    """Of each action the first of those that run as one with it."""
    import numpy as np

    first = list(range(len(kinds)))
    for i, (one, _) in enumerate(pairwise(kinds)):
        if one & JOINED:
            first[i + 1] = first[i]
    return np.array(first, dtype=np.int64)
