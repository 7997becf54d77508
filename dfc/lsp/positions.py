"""Between offsets in a text and an editor's lines and columns, which count UTF-16 units.

Source:  Language Server Protocol 3.17, "Position" and `positionEncoding`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

# How many units a character takes, and where that is more than one.
_UNITS: dict[str, Callable[[int], int]] = {
    "utf-8": lambda c: 1 if c < 0x80 else 2 if c < 0x800 else 3 if c < 0x10000 else 4,
    "utf-16": lambda c: 2 if c > 0xFFFF else 1,
    "utf-32": lambda c: 1,
}


@dataclass(frozen=True)
class Place:
    """0-based line, and 0-based column in the client's units."""

    line: int
    column: int


class Positions:
    """The lines of a text whose line ends are LF; those of the editor's text are the same lines."""

    def __init__(self, text: str, lines: list[int], encoding: str = "utf-16") -> None:
        self.text, self.lines = text, lines
        self.units = _UNITS[encoding]

    def offset(self, line: int, column: int) -> int:
        """The offset of a place; one outside of the text is moved to the nearest inside."""
        if line < 0:
            return 0
        if line >= len(self.lines):
            return len(self.text)
        start, end = self.lines[line], self._end(line)
        content = self.text[start:end]
        if content.isascii():
            return start + min(max(column, 0), len(content))
        at = 0
        for i, c in enumerate(content):
            if at >= column:
                return start + i
            at += self.units(ord(c))
        return end

    def place(self, offset: int) -> Place:
        offset = min(max(offset, 0), len(self.text))
        line = bisect_right(self.lines, offset) - 1
        before = self.text[self.lines[line] : offset]
        if before.isascii():
            return Place(line, len(before))
        return Place(line, sum(self.units(ord(c)) for c in before))

    def _end(self, line: int) -> int:
        return self.lines[line + 1] - 1 if line + 1 < len(self.lines) else len(self.text)
