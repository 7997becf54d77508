"""The standard streams as whoever started the process left them: closed, or of another encoding."""

from __future__ import annotations

import io
import os
import sys


def make_usable() -> None:
    """Open what is closed on nothing, and let no character be the end of a command.

    Why:  a file that is opened next would take the place of a stream that is closed, and what a
          library prints would land in it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # 0, 1, 2
        if getattr(sys, name) is None:
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, mode), encoding="utf-8"))
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and out.errors == "strict":
        out.reconfigure(errors="backslashreplace")  # as Python does for stderr


def give_up_stdout() -> None:
    """What is still to be written is not read, or cannot be: Python shall not try at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
