"""Calls that do not see Ctrl-C, such as those that wait in PyTorch's store or in gloo.

Python acts on a signal in its main thread alone, and only between instructions: a call that waits
there would be killed by torchrun half a minute later. So another thread makes the call.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
_LOOK_S = 0.25  # a signal that comes as Python begins to wait is not seen before it ends


def ready(what: select.poll, until: float) -> bool:
    """Whether a file is ready before that moment of the monotonic clock; Ctrl-C is seen."""
    return _seen(lambda seconds: what.poll(seconds * 1e3), until)


def is_set(event: threading.Event, until: float) -> bool:
    """Whether an event is set before that moment of the monotonic clock; Ctrl-C is seen."""
    return _seen(event.wait, until)


def _seen(wait: Callable[[float], object], until: float) -> bool:
    while (left := until - time.monotonic()) > 0:
        if wait(min(left, _LOOK_S)):
            return True
    return False


class Waiting:
    """A thread that waits in place of the main one; other threads wait for themselves."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None]] | None = None

    def __call__(self, call: Callable[[], T]) -> T:
        """What the call returns or raises."""
        if threading.current_thread() is not threading.main_thread():
            return call()
        if self._calls is None:
            self._calls = SimpleQueue()
            serve = (self._calls,)
            threading.Thread(target=_serve, args=serve, name="dfc-waiting", daemon=True).start()
        done: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

        def run() -> None:
            try:
                done.put((call(), None))
            except Exception as e:  # noqa: BLE001 - it is raised where the call is asked for
                done.put((None, e))

        self._calls.put(run)
        while True:
            try:
                with suppress(Empty):
                    found, error = done.get(timeout=_LOOK_S)
                    break
            except BaseException:
                self._calls = None  # that thread may wait for long
                raise
        if error is not None:
            raise error
        return found  # type: ignore[no-any-return]


def _serve(calls: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        calls.get()()
