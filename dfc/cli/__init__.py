"""The `dfc` command: one file per verb, errors as text with an exit status, data on stdout.

Everything is imported inside `main`, and `dfc` itself imports no file: Ctrl-C has its status from
the first line on. A verb's module is imported when it is asked for, and is light as well; torch and
onnx are imported inside the functions that need them, so that `dfc --help` answers at once.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. The console script passes it to `sys.exit`."""
    try:
        import signal

        from dfc.ending import done, ending, raise_until_seen

        heeds = argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if heeds:  # not where whoever started this wants it to be ignored
            signal.signal(signal.SIGINT, lambda *_: raise_until_seen(KeyboardInterrupt))
        from dfc.cli.streams import make_usable

        if argv is None:
            make_usable()
        from dfc.cli.command import dispatch
        from dfc.cli.failures import guarded

        if argv is not None:
            return guarded(lambda: dispatch(argv), argv)
        given = sys.argv[1:]
        with ending():  # SIGTERM leaves no more behind than Ctrl-C does
            status = guarded(lambda: dispatch(given), given)
        if heeds:  # all is written: libraries wind down
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        done()
        return status
    except KeyboardInterrupt:
        import signal

        if argv is None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # again, before this process has ended
        print("dfc: interrupted; nothing was left half-written", file=sys.stderr, flush=True)
        if argv is None:
            _end()
        return INTERRUPTED


def _end() -> NoReturn:
    """End the process at once.

    Why:  taking all modules apart takes PyTorch up to two seconds, and threads that wait in a
          library might never end.
    """
    import atexit
    import os
    from contextlib import suppress

    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):  # it is closed, or nobody reads it
        sys.stdout.flush()
    os._exit(INTERRUPTED)
