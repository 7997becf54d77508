"""Where in the model's source a module of `to_fx` failed."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping

from torch import fx

_FILE = re.compile(r'File "(.+)", line (\d+)')


def place_of(error: BaseException) -> str | None:
    """`model.py:12`, the line whose operator raised the error; None where nobody knows.

    Source:  fx.GraphModule keeps the node of each line of its code, for its own messages.
    """
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        own = frame.f_code.co_filename.startswith("<eval_with_key>")
        if own and isinstance(module, fx.GraphModule):
            found = _place(module, line) or found
    return found


def _place(module: fx.GraphModule, line: int) -> str | None:
    numbers: Mapping[int, int] = getattr(module, "_lineno_map", None) or {}
    number = numbers.get(line - getattr(module, "_prologue_start", 0))
    nodes = list(module.graph.nodes)
    if number is None or number >= len(nodes):
        return None
    match = _FILE.search(nodes[number].meta.get("stack_trace") or "")
    return f"{match[1]}:{match[2]}" if match else None
