"""Fault points: places where a test may make this process die, or the next operation fail.

    DFC_FAULT="NAME:N:ACTION[,...]" dfc compile ...

makes the N-th pass of a fault point kill the process (`kill`), terminate it (`term`), interrupt it
(`int`), wait a second (`delay`) or fail with an errno (`ENOSPC`, `EIO`, ...). An empty DFC_FAULT
only counts, in `HITS`.

Raises:  D014 (status 7): DFC_FAULT cannot be read
Source:  trust.md 9 and 11
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import cache, partial

from dfc.errors import DfcError

HITS: Counter[str] = Counter()  # how often each fault point was passed while DFC_FAULT was set


def fault_point(name: str) -> None:
    """A place where a test may make this process die, or the operation that follows fail."""
    plan = os.environ.get("DFC_FAULT")
    if plan is None:
        return
    HITS[name] += 1
    for point, number, action in _fault_plan(plan):
        if point == name and number == HITS[name]:
            _strike(action)


@cache
def _fault_plan(text: str) -> tuple[tuple[str, int, str], ...]:
    steps = []
    for step in filter(None, text.split(",")):
        match = re.fullmatch(r"([a-z_.]+):(\d{1,9}):(\w+)", step)
        if match is None or not (match[3] in _ACTIONS or match[3] in _ERRNO):
            raise DfcError(
                "D014",
                f"DFC_FAULT has `{step}`",
                help=f"write NAME:N:ACTION, the action one of {', '.join(_ACTIONS)} or an errno",
                status=7,
            )
        steps.append((match[1], int(match[2]), match[3]))
    return tuple(steps)


def _strike(action: str) -> None:
    if action in _ERRNO:
        raise OSError(_ERRNO[action], os.strerror(_ERRNO[action]))
    _ACTIONS[action]()


def _interrupt() -> None:
    raise KeyboardInterrupt


_ERRNO = {name: number for number, name in errno.errorcode.items()}
_ACTIONS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "int": _interrupt,
    "delay": partial(time.sleep, 1.0),
}
