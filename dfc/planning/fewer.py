"""Whether fewer devices are as fast: stages that share small processors often gain nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dfc.errors import DfcError
from dfc.planning.pipeline import Plan

_AS_FAST = 1.05  # of the step with all devices
_LARGE = 2000  # nodes, beyond which only one device is tried
_CANNOT = ("N046", "N048", "N060", "N063")  # pins on parts and on what is left out, no room


def fewer_devices(
    found: Plan, names: Sequence[str], make: Callable[[list[str], int], Plan]
) -> Plan | None:
    """The plan with the fewest devices whose step is at most a twentieth longer, if there is one.

    `names` are the devices that were asked for; one that was named several times, in parts, is
    tried whole. `make` plans on so many of some devices, of all where none is named.
    """
    if found.objective != "throughput":
        return None
    whole = list(dict.fromkeys(names))
    most = len(found.machine.devices) - 1 if len(found.graph) <= _LARGE else 1
    for count in range(1, min(most, len(whole) or most) + 1):
        if _least(found, names, count) > _AS_FAST * found.step_seconds:
            continue
        try:
            other = make(whole, count)
        except DfcError as e:
            if e.code not in _CANNOT:
                raise
            continue
        if other.step_seconds <= _AS_FAST * found.step_seconds:
            return other
    return None


def _least(found: Plan, names: Sequence[str], count: int) -> float:
    """What a step takes at least on so many of a plan's devices: one of them is busy for its part
    of the work. 0 where it may be on others, or on whole devices of which these are parts."""
    if found.modelled is None or found.idle or len(set(names)) < len(names):
        return 0.0
    work = float(found.modelled.problem.time.min(axis=1).sum())
    return work / count * found.wish.microbatches * (1 - 1e-9)


def fewer_text(found: Plan, other: Plan) -> str:
    """The same in a sentence."""
    names = " and ".join(other.device_stages)
    ratio = other.step_seconds / found.step_seconds
    takes = f"a step takes {ratio:.2f} times as long"
    if len(other.stages) == 1 and other.machine.devices[0].kind == "cpu":
        verdict = "is best" if ratio < 1.005 else "would do"
        return f"one process with all threads of {names} {verdict}: {takes}, and nothing is sent"
    return f"{names} alone would do: {takes}"
