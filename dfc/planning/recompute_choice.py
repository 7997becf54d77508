"""Whether the stages of a plan recompute: the best of the ways that are asked for, and what each
stage that does saves and costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.errors import DfcError, Diagnostic, did_you_mean
from dfc.lang.units import amount_text
from dfc.planning.actions import Program
from dfc.planning.recompute import without
from dfc.planning.simulate import Costs, peaks, simulate

if TYPE_CHECKING:
    from dfc.planning.candidates import Candidate
    from dfc.planning.devices import Wanted
    from dfc.planning.model import Wish

WAYS = ("never", "auto", "selective", "always")
_WORTH = 1.01  # how much better a plan must be that recomputes, where one fits that does not


@dataclass(frozen=True)
class Replayed:
    """A stage that recomputes, fully or selectively: the bytes that its device's peak is less, and
    what it adds to a step's seconds."""

    stage: int
    way: str
    saves: int
    costs: float


def replays(program: Program, costs: Costs) -> list[Replayed]:
    """What each stage that recomputes saves and costs, the others left as they are."""
    if not program.recomputes:
        return []
    step, held, found = simulate(program, costs).makespan, peaks(program, costs), []
    for stage, way in sorted(program.ways.items()):
        other, rank = simulate(without(program, stage), costs), program.placement[stage]
        saves, took = other.peaks[rank] - held[rank], float(step - other.makespan)
        found.append(Replayed(stage, way, saves, took))
    return found


def best_way(of: Callable[[str], Candidate], wish: Wish, aim: Wanted) -> Candidate:
    """The best plan with stages that recompute as is wished.

    Raises:  DfcError N069 for a way that there is not, or for inference; N060 and N062 (status 6)
             when nothing fits, with what recomputing would do.
    """
    way = wish.recompute
    if way not in WAYS:
        help = did_you_mean(way, WAYS) or f"there are {', '.join(WAYS)}"
        raise DfcError("N069", f"`{way}` is no way to recompute", help=help, status=2)
    if way != "never" and not wish.trains:
        help = "plan training: `--train`, or train=True"
        raise DfcError("N069", "nothing is kept for a backward pass", help=help, status=2)
    if way in ("always", "selective"):
        return of(way)
    try:
        plain = of("never")
    except DfcError as e:
        if e.status != 6 or not wish.trains:
            raise
        return _instead(of, way, e)
    if way == "never":
        return plain
    try:
        again = of("auto")
    except DfcError as e:
        if e.status != 6:
            raise
        return plain
    return again if again.value(aim) * _WORTH < plain.value(aim) else plain


def _instead(of: Callable[[str], Candidate], way: str, refused: DfcError) -> Candidate:
    """A plan that recomputes, where none fits that does not.

    Raises:  the refusal, with what recomputing would do where it is not wished.
    """
    try:
        found = of("auto")
    except DfcError as e:
        if e.status != 6:
            raise
        raise refused from e
    if way == "auto":
        return found
    count = len(found.simulation.program.recomputes)
    took = amount_text(float(found.simulation.makespan), "time")
    told = f"stages that recompute (`--recompute auto`): {count} of them, a step of {took}"
    raise _with_help(refused, told) from refused


def _with_help(refused: DfcError, told: str) -> DfcError:
    first: Diagnostic = refused.diagnostics[0]
    known = f"{first.help}; or with " if first.help else "it would fit with "
    return DfcError(
        refused.code, refused.message, help=f"{known}{told}", notes=first.notes, status=6
    )
