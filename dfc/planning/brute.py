"""Every partition of a small problem: the witness of the other solvers."""

from __future__ import annotations

from itertools import product

from dfc.planning.problem import Partition, Problem, value_of, why_not


def brute_force(problem: Problem) -> Partition | None:
    """The best partition by trying all, None when none is allowed.

    Needs:  few nodes: there are stages ** nodes to try.
    """
    best: tuple[float, tuple[int, ...]] | None = None
    for stage in product(range(problem.stages), repeat=problem.n):
        if why_not(problem, stage) is None:
            found = value_of(problem, stage)
            if best is None or found < best[0]:
                best = found, stage
    return Partition(best[1], best[0], best[0], "brute force") if best else None
