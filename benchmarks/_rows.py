"""Cases measured one by one, each as a block of lines in a file that tells which are done.

A block begins with the case's name and a semicolon or colon; the first of a file says what
measured. The file is written whenever a block is there, so that a run that is stopped leaves what
it had.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_NAME = re.compile(r"[^;:\n]+")


class Rows:
    """The blocks of a file, by name; without a file nothing is kept."""

    def __init__(self, path: Path | None, head: str) -> None:
        text = path.read_text(encoding="utf-8") if path and path.exists() else ""
        self.path = path
        self.head, *blocks = re.split(r"\n\n+", text.strip()) if text else [head]
        self.blocks = {_name(block): block for block in blocks}

    def has(self, case: str, way: str) -> bool:
        """Whether a case was measured in this way: it has a line in its table."""
        line = rf"^  {re.escape(way)} +[\d.]+ ms"
        return re.search(line, self.blocks.get(case, ""), re.M) is not None

    def put(self, block: str) -> None:
        """Add a case's block, or replace it, in the file as well: but not times by a reason why
        there are none.
        """
        name = _name(block)
        if " ms" in self.blocks.get(name, "") and " ms" not in block:
            return
        self.blocks[name] = block
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".new")
        text = "\n\n".join([self.head, *self.blocks.values()]) + "\n"
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, self.path)


def _name(block: str) -> str:
    found = _NAME.match(block)
    return found.group().strip() if found else ""
