"""Programs in which stages keep of each microbatch what they took alone, and run their forward
again before their backward pass.

That is an action of its own, R: it waits for nothing but its rank, so that it fills the time in
which the gradient is still under way.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

from dfc.errors import DfcError
from dfc.planning.actions import JOINED, Kind, Program
from dfc.planning.simulate import Costs, peaks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def recomputing(program: Program, stages: Collection[int]) -> Program:
    """The program with an R right before each I or B of these stages; none where one is already.

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
        again[:, 0] = Kind.R
        ranks.append(np.insert(rows, _before_joined(rows[:, 0].tolist())[at], again, axis=0))
    return Program(program.name, program.placement, program.microbatches, tuple(ranks))


def without(program: Program, stage: int) -> Program:
    """The program in which a stage does not recompute."""
    ranks = (
        rows[((rows[:, 0] & ~JOINED) != Kind.R) | (rows[:, 1] != stage)] for rows in program.ranks
    )
    return replace(program, ranks=tuple(ranks))


def needed(program: Program, costs: Costs, caps: Sequence[float]) -> frozenset[int]:
    """The stages that must recompute for each rank to hold no more than its cap: of those that do,
    the ones that take the least time for it, and of equal ones the fewest.

    Why:     what a rank holds follows from its own list of actions, so that ranks choose apart.
    Raises:  DfcError N062 (status 6) where a rank does not fit, whatever it recomputes.
    Cost:    each subset of a rank's stages, which are few.
    """
    found: set[int] = set()
    replay, bare = costs.replay or costs.forward, replace(costs, resident=())
    for rank, cap in enumerate(caps):
        stages = [s for s, r in enumerate(program.placement) if r == rank]
        choices = [c for n in range(len(stages) + 1) for c in combinations(stages, n)]
        choices.sort(key=lambda some: (sum(replay[s] for s in some), len(some)))
        alone = replace(program, ranks=(program.ranks[rank],))
        fixed = costs.resident[rank] if costs.resident else 0
        least: int | None = None
        for some in choices:
            held = fixed + peaks(recomputing(alone, some), bare)[0]
            least = held if least is None else min(held, least)
            if held <= cap:
                found.update(some)
                break
        else:
            raise DfcError(
                "N062", f"rank {rank} holds {least:.6g} bytes of {cap:.6g}, whatever recomputes",
                help="use more microbatches of fewer items", status=6,
            )  # fmt: skip
    return frozenset(found)


def _before_joined(kinds: Sequence[int]) -> NDArray[np.int64]:
    """Of each action the first of those that run as one with it."""
    import numpy as np

    first = list(range(len(kinds)))
    for i, (one, _) in enumerate(pairwise(kinds)):
        if one & JOINED:
            first[i + 1] = first[i]
    return np.array(first, dtype=np.int64)
