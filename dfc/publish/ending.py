"""SIGTERM and SIGHUP unwind the stack, so that what is half-written is taken away.

Limits:  in the main thread alone, and where the program left the signals at their default.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Ended(BaseException):
    """Unwinds the stack after SIGTERM or SIGHUP."""


class Ending:
    cleaning = False


@contextmanager
def ending() -> Iterator[Ending]:
    """Let SIGTERM and SIGHUP unwind the stack, so that no temp stays, then end the process."""
    state = Ending()
    if threading.current_thread() is not threading.main_thread():
        yield state
        return
    caught: list[int] = []

    def unwind(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if not state.cleaning and len(caught) == 1:
            raise Ended(number)

    signals = (signal.SIGTERM, signal.SIGHUP)
    taken = [number for number in signals if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in taken:
            signal.signal(number, unwind)
        yield state
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
        if caught:
            os.kill(os.getpid(), caught[0])
