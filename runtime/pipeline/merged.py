"""Ranks that one thread drives: their lists of actions merged into one.

Threads of one process take turns in the interpreter. Where starting an action costs more than
waiting for it, as on a device that computes while the host goes on, ranks that are threads only
take turns; one thread that starts the actions of all of them, each on its rank's own stream, has
nobody to wait for.

Why it ends:  all lists are parts of one order, that of a simulated step, in which everything comes
after what it needs; whoever has the first action of it that is not done can do it.
"""

from __future__ import annotations

from collections.abc import Sequence

from dfc.planning.actions import JOINED, Program
from dfc.planning.simulate import Costs, simulate


def merged(
    program: Program, edges: Sequence[tuple[int, int, int]], drivers: Sequence[int]
) -> list[list[tuple[int, int]]]:
    """For each driver what it does, in order: the rank and the place in the rank's list.

    `drivers[r]` is who drives rank r, counted from 0 without gaps; `edges` are the program's.
    """
    orders: list[list[tuple[int, int]]] = [[] for _ in range(1 + max(drivers))]
    if len(orders) == len(drivers):
        for rank, driver in enumerate(drivers):
            orders[driver] = [(rank, i) for i in range(len(program.ranks[rank]))]
        return orders
    for _, rank, i in sorted(_starts(program, edges)):
        orders[drivers[rank]].append((rank, i))
    return orders


def _starts(
    program: Program, edges: Sequence[tuple[int, int, int]]
) -> list[tuple[float, int, int]]:
    """When each action begins where all take as long, with its rank and place; joined ones begin
    together, in their order."""
    ones = [1] * program.stages
    back = ones if program.trains else ()
    step = simulate(program, Costs(ones, back, back, edges=edges))
    found = []
    for rank, rows in enumerate(program.ranks):
        task = step.tasks.lanes[rank][0]
        for i, kind in enumerate(rows[:, 0].tolist()):
            found.append((float(step.start[task]), rank, i))
            task += not kind & JOINED
    return found
