"""What is being done, on stderr: a spinner on a terminal, else a line after a second."""

from __future__ import annotations

import os
import sys
import threading
from types import TracebackType
from typing import Any

_PATIENCE_S = 1.0


class Progress:
    """Say each step by calling it; stdout is never touched.

    with Progress() as say:
        say("tracing")

    What the user's code prints meanwhile is no data: it goes to stderr, too, and so does what
    libraries print from C (HiGHS leaves some of its own).
    """

    def __init__(self) -> None:
        self._stdout = sys.stdout
        self._tty = sys.stderr.isatty()
        self._live: Any = None
        self._task: Any = None
        self._timer: threading.Timer | None = None
        self._kept: int | None = None

    def __enter__(self) -> Progress:
        self._stdout, sys.stdout = sys.stdout, sys.stderr
        self._kept = _turned(self._stdout)
        return self

    def __call__(self, what: str) -> None:
        if self._tty:
            self._spin(what)
            return
        self._cancel()
        self._timer = threading.Timer(_PATIENCE_S, _line, [what])
        self._timer.daemon = True
        self._timer.start()

    def log(self, text: str) -> None:
        """A text that stays, above the spinner."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def result(self, text: str) -> None:
        """A line of data, on stdout, before all is done."""
        self._stop()
        _turned_back(self._kept)
        print(text, file=self._stdout, flush=True)
        self._kept = _turned(self._stdout)

    def _stop(self) -> None:
        self._cancel()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._stop()
        _turned_back(self._kept)
        self._kept = None
        sys.stdout = self._stdout

    def _spin(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import Progress as Live
        from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

        if self._live is None:
            self._live = Live(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._live.add_task(what, total=None)
            self._live.start()
        self._live.update(self._task, description=what)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _turned(stdout: Any) -> int | None:
    """Turn the process' stdout to stderr, for what is not printed by Python; a copy of it, None
    where one of them is closed."""
    stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:
        return None
    try:
        os.dup2(2, 1)
    except OSError:
        os.close(kept)
        return None
    return kept


def _turned_back(kept: int | None) -> None:
    import ctypes

    if kept is not None:
        ctypes.CDLL(None).fflush(None)  # what C still holds was printed meanwhile
        os.dup2(kept, 1)
        os.close(kept)


def _line(what: str) -> None:
    print(f"dfc: {what} ...", file=sys.stderr, flush=True)
