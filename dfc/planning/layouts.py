"""How many stages a device has, and where they are: which of these there are to choose from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral

from dfc.counting import counted
from dfc.errors import DfcError
from dfc.planning.actions import Kind, Program
from dfc.planning.recompute import recomputing
from dfc.planning.schedules import MAX_ACTIONS, SCHEDULES, known_schedule, schedule, why_not
from dfc.planning.simulate import in_flight

_TRIED = (2, 4)  # stages a device, besides one


@dataclass(frozen=True)
class Layout:
    """`chunks` stages on each device: stage s on device s mod p, or back and forth in a V, where
    the last device has two that follow each other and the first has the first and the last."""

    chunks: int = 1
    turns: bool = False

    def placement(self, devices: int) -> tuple[int, ...]:
        """The device of each stage."""
        there = tuple(range(devices))
        back = there[::-1] if self.turns else there
        return tuple(d for c in range(self.chunks) for d in (back if c % 2 else there))

    @property
    def word(self) -> str:
        return "in a V" if self.turns else "in loops"


ONE = Layout()


def layouts(name: str, chunks: int | None, trains: bool) -> list[Layout]:
    """What a schedule can have, fewer stages first; `chunks` is how many are asked for.

    Raises:  DfcError N001 for an unknown schedule, N066 for one with another number of stages a
             device, N067 for one that trains, or does not, where the plan is for the other.
    """
    if chunks is not None and chunks < 1:
        raise DfcError("N066", f"a device has at least one stage, not {chunks}", status=2)
    if name == "auto":
        return _of_auto(chunks, trains)
    known = known_schedule(name)
    if known.trains != trains:
        message = f"`{name}` has a backward pass, and the plan is for inference"
        if trains:
            message = f"`{name}` has no backward pass, and the plan is for training"
        help = _names(trains) if trains else f"plan training with `--train`; else {_names(trains)}"
        raise DfcError("N067", message, help=help, status=2)
    if known.chunks != "any" and chunks not in (None, int(known.chunks)):
        message = f"`{name}` has {known.chunks} stage{'s' * (known.chunks != '1')} a device"
        others = [s.name for s in SCHEDULES.values()
                  if s.trains == trains and s.chunks in ("any", str(chunks))]  # fmt: skip
        help = f"with {chunks} there are {', '.join(others)}"
        raise DfcError("N066", f"{message}, not {chunks}", help=help, status=2)
    if chunks is None and known.chunks == "any":
        return [Layout(v) for v in (_TRIED if trains else (1,))]
    return [Layout(chunks or int(known.chunks), known.turns)]


def check_counts(nodes: int, devices: int, microbatches: int, chunks: int) -> None:
    """
    Raises:  DfcError N066 for more stages a device than there are nodes, N002 for a step that is
             longer than any that is planned.
    """
    if not isinstance(microbatches, Integral) or microbatches < 1:
        message = f"a step has at least one microbatch, not {microbatches!r}"
        raise DfcError("N002", message, status=2)
    if chunks > max(nodes, 1):
        message = (
            f"{chunks} stages a device are more than the {counted(nodes, 'node')} of the model"
        )
        raise DfcError("N066", message, status=2)
    if microbatches * devices * chunks > MAX_ACTIONS:
        on = counted(devices, "device")
        message = f"{microbatches} microbatches on {on} are more than one step has"
        help = f"plan at most {MAX_ACTIONS // (devices * chunks)}: a step repeats"
        raise DfcError("N002", message, help=help, status=2)


def _of_auto(chunks: int | None, trains: bool) -> list[Layout]:
    if not trains:
        return [Layout(chunks or 1)]
    found = []
    for v in (1, *_TRIED) if chunks is None else (chunks,):
        found.append(Layout(v))
        if any(s.turns and s.chunks == str(v) for s in SCHEDULES.values()):
            found.append(Layout(v, turns=True))
    return found


def _names(trains: bool) -> str:
    names = [s.name for s in SCHEDULES.values() if s.trains == trains]
    return f"there {'is' if len(names) == 1 else 'are'} {', '.join(names)}"


@lru_cache(maxsize=256)
def flights(
    name: str, layout: Layout, devices: int, microbatches: int, recompute: bool = False
) -> tuple[int, ...]:
    """How many microbatches each stage keeps all activations of, under a schedule, if it recomputes
    from R on; for `auto` under one that keeps few, so that there is one that fits.

    Raises:  DfcError N002 for a schedule that cannot be made for these numbers.
    """
    lean = lean_program(name, layout, devices, microbatches)
    if recompute:
        return in_flight(recomputing(lean, range(lean.stages)), Kind.R)
    return in_flight(lean)


def lean_program(name: str, layout: Layout, p: int, m: int) -> Program:
    """The program of a schedule, of `auto` one that keeps few microbatches and exists for all
    numbers of them.

    Raises:  DfcError N002 for a schedule that cannot be made for these numbers.
    """
    if name != "auto":
        return schedule(name, p, m, layout.chunks)
    if layout == ONE:
        return schedule("1f1b", p, m)
    if layout.turns:
        return schedule("zb_v", p, m)
    whole = why_not(SCHEDULES["interleaved"], p, m, layout.chunks) is None
    return schedule("interleaved" if whole else "breadth_first", p, m, layout.chunks)
