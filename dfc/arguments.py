"""What `dfc.compile`, `dfc.load` and `within` are given: a wrong kind is told before any work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from dfc.errors import DfcError

_PATH = (str, os.PathLike)
_MAPPINGS = {
    "kwargs": '{"mask": mask}',
    "data": '{"calib": batches}',
    "metrics": '{"top1": function}',
    "functions": '{"distil": function}',
    "settings": '{"fuse.limit": 3}',
}


def check_given(**given: Any) -> None:
    """Refuse arguments of `dfc.compile` and `dfc.load` that are of no use under their names.

    Raises:  DfcError Q055 (status 2).
    """
    for name, value in given.items():
        absent = value is None and name != "text"  # all others may be left out
        wanted = None if absent else _wanted(name, value)
        if wanted is not None:
            message = f"`{name}` is {wanted[0]}, got {_brief(value)}"
            raise DfcError("Q055", message, help=wanted[1], status=2)


def _wanted(name: str, value: Any) -> tuple[str, str | None] | None:
    """What it should be, and an example; None when it is that."""
    if name in _MAPPINGS:
        return None if isinstance(value, Mapping) else ("a mapping", f"as in {_MAPPINGS[name]}")
    if name in ("progress", "print_after", "say"):
        return None if callable(value) else ("a function", "as in progress=print")
    if name == "text":
        return None if isinstance(value, str) else ("the text of a graph", "read a file first")
    if name == "engine":
        return None if isinstance(value, str) else ("a name", "as in `eager`, or `auto`")
    if name == "passes":
        text = isinstance(value, str)
        return ("a sequence of passes", f'write ["{value}"]') if text else None
    if name == "model":
        return None if callable(value) or hasattr(value, "nodes") else _NO_MODEL
    if name == "recipe":
        known = isinstance(value, _PATH) or hasattr(value, "plan") or hasattr(value, "steps")
        return None if known else ("text, a path or a recipe", "as in `O2`, or `small.dfc`")
    return None if isinstance(value, _PATH) else ("a path", None)


_NO_MODEL = ("a module, a function or a graph", "load a package by `dfc.load(path)`")


def _brief(x: Any) -> str:
    return repr(x) if isinstance(x, (str, int, float, bool)) else f"a {type(x).__name__}"
