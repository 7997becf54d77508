"""The `dfc` command: one file per verb, errors as text with an exit status, data on stdout.

Everything is imported inside `main`, and `dfc` itself imports nothing: Ctrl-C has its status from
the first line on. A verb's module is imported when it is asked for, and is light as well; torch and
onnx are imported inside the functions that need them, so that `dfc --help` answers at once.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. The console script passes it to `sys.exit`."""
    try:
        from dfc.cli.streams import make_usable

        if argv is None:
            make_usable()
        from dfc.cli.command import dispatch
        from dfc.cli.failures import guarded

        given = [*(sys.argv[1:] if argv is None else argv)]
        return guarded(lambda: dispatch(given), given)
    except KeyboardInterrupt:
        import signal

        if argv is None:  # the last thing that this process does
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # again, while libraries wind down
        print("dfc: interrupted; nothing was left half-written", file=sys.stderr, flush=True)
        return INTERRUPTED
