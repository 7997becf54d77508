"""What is being done, on stderr: a spinner on a terminal, else a line after a second."""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import Any

_PATIENCE_S = 1.0


class Progress:
    """Say each step by calling it; stdout is never touched.

    with Progress() as say:
        say("tracing")

    What the user's code prints meanwhile is no data: it goes to stderr, too.
    """

    def __init__(self) -> None:
        self._stdout = sys.stdout
        self._tty = sys.stderr.isatty()
        self._live: Any = None
        self._task: Any = None
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Progress:
        self._stdout, sys.stdout = sys.stdout, sys.stderr
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
        print(text, file=self._stdout, flush=True)

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


def _line(what: str) -> None:
    print(f"dfc: {what} ...", file=sys.stderr, flush=True)
