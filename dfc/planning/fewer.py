"""Whether fewer devices are as fast: stages that share small processors often gain nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dfc.errors import DfcError
from dfc.planning.pipeline import Plan

_AS_FAST = 1.05  # of the step with all devices
_LARGE = 2000  # nodes, beyond which only one device is tried
_CANNOT = ("N046", "N060", "N063")  # a pin on a part, and what does not fit


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
        try:
            other = make(whole, count)
        except DfcError as e:
            if e.code not in _CANNOT:
                raise
            continue
        if other.step_seconds <= _AS_FAST * found.step_seconds:
            return other
    return None


def fewer_text(found: Plan, other: Plan) -> str:
    """The same in a sentence."""
    names = " and ".join(other.device_stages)
    ratio = other.step_seconds / found.step_seconds
    takes = f"a step takes {ratio:.2f} times as long"
    if len(other.stages) == 1 and other.machine.devices[0].kind == "cpu":
        verdict = "is best" if ratio < 1.005 else "would do"
        return f"one process with all threads of {names} {verdict}: {takes}, and nothing is sent"
    return f"{names} alone would do: {takes}"
