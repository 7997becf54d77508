"""How commands end, and scripts that are interrupted: nothing half-written is left, and soon.

SIGTERM and SIGHUP unwind a command's stack, so that what is half-written is taken away: in the main
thread alone, and where the program left the signals at their default.
"""

from __future__ import annotations

import gc
import io
import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_AGAIN_S = 0.3
_WRITERS = frozenset((io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom))
_soon = False  # whether Ctrl-C ended something of dfc's, or a command is done


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
            raise_until_seen(Ended)

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


def raise_until_seen(kind: type[BaseException]) -> None:
    """Raise it in the main thread, and again where somebody swallowed it, until the process ends.

    Why:  one Ctrl-C of forty that came while PyTorch was imported was gone: modules in C forget
          errors, and what a finalizer raises is ignored.
    """

    def again(number: int, frame: FrameType | None) -> None:
        if not is_behind(sys.exception(), kind):  # else the stack unwinds
            raise kind

    sys.unraisablehook = lambda _: None  # a finalizer that is interrupted is no news
    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_S, _AGAIN_S)
    raise kind


@contextmanager
def heeding() -> Iterator[None]:
    """Let Ctrl-C end what a script calls here, where libraries would swallow it.

    Why:  Python forgets what is raised in hooks of `fork`, and a script would go on.
    Keeps: signals as they were; in the main thread alone, where they were at their default.
    """
    here = threading.current_thread() is threading.main_thread()
    default = signal.default_int_handler, signal.SIG_DFL
    if not here or (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)) != default:
        yield
        return
    came: list[int] = []
    hook = sys.unraisablehook

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise_until_seen(KeyboardInterrupt)

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if came:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_IGN)  # one that is on its way would end this
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            sys.unraisablehook = hook
    if came:
        raise KeyboardInterrupt


def is_behind(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether such a one is the error, its cause, or what was under way when it was raised."""
    seen = []
    while error is not None and error not in seen:  # `raise e from e` is its own cause
        seen.append(error)
        error = error.__cause__ or error.__context__
    return any(isinstance(e, kind) for e in seen)


def noticed(kind: object = KeyboardInterrupt) -> None:
    """What ends a call or a `with` of dfc's: a script that catches Ctrl-C is to end soon too."""
    global _soon
    _soon = _soon or kind is KeyboardInterrupt


def done() -> None:
    """The command has written all that it was to write."""
    global _soon
    _soon = True


def end_soon() -> None:
    """Let Python end soon after Ctrl-C or a command: as it ends, when scripts have had their say.

    Why:  it looks for cycles among 400 000 objects of PyTorch three times, which takes 1 to 2 s.
    Keeps: names go one by one, as ever, and what they hold with them. Objects in cycles are left to
          the system, as Python's own documentation allows; files that they write to are written.
    """
    if not _soon and getattr(sys, "last_type", None) is not KeyboardInterrupt:
        return
    for file in gc.get_objects():
        if type(file) in _WRITERS:
            with suppress(OSError, ValueError):  # it is closed, or no file of the system
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # a pipe's reader may be slow
                    file.flush()
    gc.freeze()
