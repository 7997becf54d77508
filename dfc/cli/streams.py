"""The standard streams as whoever started the process left them: closed, or of another encoding."""

from __future__ import annotations

import codecs
import io
import os
import sys

_PLAIN = "dfc-plain"
_SPELLED = {"µ": "u", "±": "+-", "×": "x", "→": "->", "…": "...", "·": "-", "≤": "<=", "≥": ">="}


def make_usable() -> None:
    """Open what is closed on nothing, and let no character be the end of a command.

    Why:  a file that is opened next would take the place of a stream that is closed, and what a
          library prints would land in it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # 0, 1, 2
        if getattr(sys, name) is None:
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, mode), encoding="utf-8"))
    codecs.register_error(_PLAIN, _plain)
    for stream, usual in ((sys.stdout, "strict"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == usual:
            stream.reconfigure(errors=_PLAIN)


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """What stands for characters that the encoding lacks: `5 us`, and escapes for the rest."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    at = error.start
    spelled = _SPELLED.get(error.object[at])
    if error.object[at] == "µ" and error.object[at - 1 : at + 2] != " µs":  # of a name, it is exact
        spelled = None
    return (spelled, at + 1) if spelled else codecs.backslashreplace_errors(error)


def give_up_stdout() -> None:
    """What is still to be written is not read, or cannot be: Python shall not try at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
