"""A text with its name: what may be read at all, and where an offset stands in it."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from functools import cached_property
from pathlib import Path

from dfc.errors import DfcError, Span

MAX_BYTES = 1 << 20  # of a recipe, rule or target file
_BLANK = r"(?:\s|#[^\n]*\n)*"
_NOT_PLAIN = re.compile(r"[^\n\t\x20-\x7e]")
_GRAPH = re.compile(rf"{_BLANK}(?:dfc\s+\w+{_BLANK})?graph\b")


def holds_graph(text: str) -> bool:
    """Whether a text is a graph, and not recipes, targets and rules."""
    return _GRAPH.match(text) is not None


class Source:
    """The text of one file.

    `lines` are the offsets where lines begin. Line ends are LF here; CRLF and CR are read as LF.
    """

    def __init__(self, text: str, file: str = "<string>") -> None:
        self.file = file
        self.original = text
        self._line = (0, "")
        self.text = text.replace("\r\n", "\n").replace("\r", "\n")

    @classmethod
    def of_bytes(cls, data: bytes, file: str) -> Source:
        """The text of a file's bytes.

        Raises:  DfcError P009 when they are not UTF-8, or begin with a byte order mark.
        """
        if data[:3] == b"\xef\xbb\xbf" or data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DfcError(
                "P009",
                "the file begins with a byte order mark",
                span=Span(file, 1, 1, 2),
                help="save it as UTF-8 without BOM",
            )
        try:
            return cls(data.decode("utf-8"), file)
        except UnicodeDecodeError as e:
            line = data.count(b"\n", 0, e.start) + 1
            col = e.start - (data.rfind(b"\n", 0, e.start) + 1) + 1
            raise DfcError(
                "P009",
                f"byte 0x{data[e.start]:02x} is not UTF-8",
                span=Span(file, line, col, col + 1),
                help="save the file as UTF-8",
            ) from None

    @classmethod
    def of_file(cls, path: Path) -> Source:
        """The text of a plain file: a pipe is waited for without end, a device has none.

        Raises:  OSError; DfcError D050, P007, P009.
        """
        if path.exists() and not path.is_file():
            raise DfcError("D050", f"`{path}` is no regular file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise DfcError("P007", f"`{path}` is larger than {MAX_BYTES} bytes")
        return cls.of_bytes(data, str(path))

    @cached_property
    def lines(self) -> list[int]:
        found = [0]
        position = self.text.find("\n")
        while position >= 0:
            found.append(position + 1)
            position = self.text.find("\n", position + 1)
        return found

    def span(self, start: int, end: int | None = None) -> Span:
        """The place of the characters from start to end; cut to the first line."""
        start = min(start, len(self.text))
        number = bisect_right(self.lines, start)
        begin = self.lines[number - 1]
        stop = self.lines[number] - 1 if number < len(self.lines) else len(self.text)
        last = min(max(end or 0, start + 1), max(stop, start + 1))
        if self._line[0] != number:
            self._line = (number, self.text[begin:stop])  # many errors may share a long line
        return Span(self.file, number, start - begin + 1, last - begin + 1, self._line[1])

    def refuse_hidden(self) -> None:
        """Refuse what a reader cannot see: control, bidirectional and zero-width characters.

        Raises:  DfcError P009 with the place; P007 when the text is too long.
        Source:  CVE-2021-42574 (text that reads otherwise than it runs).
        """
        if (
            len(self.text) > MAX_BYTES
            or len(self.text.encode("utf-8", "surrogatepass")) > MAX_BYTES
        ):
            size = len(self.text)
            raise DfcError(
                "P007", f"{self.file} has {size} characters; a file may have {MAX_BYTES}"
            )
        at = hidden_at(self.text)
        if at is not None:
            raise DfcError(
                "P009",
                f"{hidden_name(self.text[at])} is not allowed here",
                span=self.span(at, at + 1),
                help="delete it; in a string write it as an escape",
            )


def hidden_at(text: str) -> int | None:
    """Where the first character stands that a reader cannot see."""
    found = _NOT_PLAIN.search(text)
    for i in range(found.start() if found else len(text), len(text)):
        c = text[i]
        if not (c in "\n\t" or c.isprintable() or c == "\u00a0"):
            return i
    return None


def hidden_name(c: str) -> str:
    """A character that cannot be shown, in words."""
    return f"{unicodedata.name(c, 'a control character').lower()} (U+{ord(c):04X})"
