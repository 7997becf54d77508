"""What is being done, on stderr: a spinner on a terminal, else a line after a second."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any

_PATIENCE_S = 1.0


class Progress:
    """Say each step by calling it; stdout is never touched.

    with Progress() as say:
        say("tracing")
    """

    def __init__(self) -> None:
        self._tty = sys.stderr.isatty()
        self._status: Any = None
        self._timer: threading.Timer | None = None
        self._start = time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __call__(self, what: str) -> None:
        if self._tty:
            self._spin(what)
            return
        self._cancel()
        self._timer = threading.Timer(_PATIENCE_S, self._line, [what])
        self._timer.daemon = True
        self._timer.start()

    def log(self, text: str) -> None:
        """A text that stays, above the spinner."""
        if self._status is not None:
            self._status.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._cancel()
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _spin(self, what: str) -> None:
        from rich.console import Console

        if self._status is None:
            self._status = Console(stderr=True).status(what)
            self._status.start()
        self._status.update(f"{what} [dim]{time.perf_counter() - self._start:.0f} s so far[/dim]")

    def _line(self, what: str) -> None:
        print(f"dfc: {what} ...", file=sys.stderr, flush=True)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
