"""One text of an editor, read as far as it can be, each view of it made when it is asked for."""

from __future__ import annotations

from bisect import bisect_left
from functools import cached_property
from typing import TypeVar

from dfc.errors import DfcError
from dfc.lang import syntax as s
from dfc.lang.reader import Reading, read_document
from dfc.lang.source import MAX_BYTES, Source, holds_graph
from dfc.lang.tokens import Token, statements, tokenize

_E = TypeVar("_E", bound=s.Node)
MAX_GRAPH = 8 << 20  # characters of graph text that are looked at while somebody types


class Document:
    """A text and its file, which need not exist."""

    def __init__(self, text: str, file: str = "<untitled>") -> None:
        self.source = Source(text, file)

    @property
    def text(self) -> str:
        return self.source.text

    @property
    def file(self) -> str:
        return self.source.file

    @cached_property
    def is_graph(self) -> bool:
        """Graph text has a grammar of its own."""
        return holds_graph(self.text)

    @cached_property
    def too_long(self) -> bool:
        return len(self.text) > (MAX_GRAPH if self.is_graph else MAX_BYTES)

    @cached_property
    def reading(self) -> Reading:
        if self.is_graph or self.too_long:
            return Reading(s.Document((0, 0), ()), (), self.source, ())
        return read_document(self.source)

    @cached_property
    def words(self) -> list[Token]:
        """The tokens, statement ends among them; of a text that cannot be read, as far as it is."""
        if self.is_graph or self.too_long:
            return []
        try:
            self.source.refuse_hidden()
        except DfcError:
            return []
        return statements(self.source, tokenize(self.source)[0])[0]

    @cached_property
    def _starts(self) -> list[int]:
        return [t.start for t in self.words]

    def token_at(self, offset: int) -> Token | None:
        """The word or string that an offset lies in, or at the end of."""
        i = bisect_left(self._starts, offset + 1)
        for t in reversed(self.words[max(i - 3, 0) : i]):
            if t.type in ("WORD", "TEXT", "NUMERAL") and t.start <= offset <= t.end:
                return t
        return None

    def entries(self, kind: type[_E]) -> list[_E]:
        return [e for e in self.reading.document.entries if isinstance(e, kind)]
