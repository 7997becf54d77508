"""Recipes, targets and rules in one layout: indentation, spaces, blank lines; comments stay.

Lines are broken where the writer broke them, but for blocks, which stand on lines of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dfc.errors import DfcError
from dfc.lang.graph_comments import with_comments
from dfc.lang.graph_parser import parse_graph
from dfc.lang.reader import Reading, many_objects, read_document, read_tokens
from dfc.lang.source import Source, holds_graph
from dfc.lang.tokens import Token

_STEP = 2  # of indentation
_CLAUSE = 8  # where what a rule's clause says begins
_CLAUSES = {"match", "where", "rewrite", "within", "applies", "refuses", "exact", "priority"}
_ENTRIES = {"recipe", "target", "rule"}
_OPENS = {"LPAR", "LSQB", "LBRACE"}


def formatted(source: Source) -> str:
    """The text of a file in its layout, whatever it holds.

    Raises:  DfcError P.
    """
    if holds_graph(source.text):
        return with_comments(source.text, str(parse_graph(source.text, source.file)))
    return format_text(source.text, source.file)


def format_text(text: str, file: str = "<string>") -> str:
    """The same text in the one layout.

    Ensures:  the words are the same, in their order, and so are the comments.
    Raises:   DfcError P for a text that does not parse.
    """
    with many_objects():
        return _format_text(text, file)


def _format_text(text: str, file: str) -> str:
    reading = read_document(Source(text, file))
    if reading.problems:
        raise DfcError.of(reading.problems)
    made = _text(_Layout(reading).lines())
    tokens, kept, problems = read_tokens(Source(made, file))
    if any(d.code == "P007" for d in problems):
        message = f"{file} would be too long with each block on lines of its own"
        raise DfcError("P007", message, help="split the file")
    same = _words(tokens, kept) == _words(reading.tokens, reading.kept)
    assert same and not problems, f"formatting would change {file}"
    return made


def _words(tokens: Sequence[Token], kept: Sequence[Token]) -> tuple[object, ...]:
    """What a text says: its words and comments, and where statements end for the parser."""
    words = [(t.type, t.text.rstrip()) for t in tokens if t.type != "LINE"]
    return (words, [t.type for t in kept])


@dataclass
class _Line:
    """A line of the result; `text` is empty for a comment that stands alone."""

    indent: int
    text: str = ""
    comment: str = ""
    blank: bool = False  # whether an empty line stands before it
    entry: bool = False  # whether an entry with a block begins here
    top: bool = False

    @property
    def code(self) -> str:
        return " " * self.indent + self.text


@dataclass
class _Layout:
    """Walks over the tokens; `lines` gives the lines of the result."""

    reading: Reading
    done: list[_Line] = field(default_factory=list)
    line: _Line | None = None  # the line at hand
    last: Token | None = None  # the token before, on the line at hand
    blocks: list[str] = field(default_factory=list)  # the word that each open block began with
    brackets: list[int] = field(default_factory=list)  # indentation of the lines that opened them
    first: str = ""  # the first word of the statement at hand
    breaks: int = 0  # line ends since the last token
    opened: bool = False  # the token before was a {

    def __post_init__(self) -> None:
        self.ends = {t.start for t in self.reading.kept if t.type == "_NL"}

    def lines(self) -> list[_Line]:
        for t in self.reading.tokens:
            if t.type == "LINE":
                self._line_end(t)
            elif t.type == "COMMENT":
                self._comment(t)
            else:
                self._word(t)
        self._flush()
        return self.done

    def _line_end(self, t: Token) -> None:
        self._flush()
        self.breaks += 1
        if self.first and t.start in self.ends and not self.brackets:
            self.first = ""

    def _comment(self, t: Token) -> None:
        if self.line is None:
            self._begin(self._indent())
            assert self.line is not None
        self.line.comment = t.text.rstrip()
        self.opened = False

    def _word(self, t: Token) -> None:
        if self.opened:
            self._flush()
            self.opened = False
        if t.type == "RBRACE":
            self._flush()
            self.blocks.pop()
            self.first = "}"
        if self.line is None:
            indent = self.brackets[-1] if t.type in ("RPAR", "RSQB") else self._indent(t)
            self._begin(indent)
            assert self.line is not None
            if t.type == "RBRACE":
                self.line.blank = False
        starts = not self.first
        if starts:
            self.first = t.text
            self.line.entry = not self.blocks and t.text in _ENTRIES
        self.line.text += self._gap(t) + t.text
        self._open_or_close(t)
        if starts and self._in_rule() and t.text in _CLAUSES and t.type == "WORD":
            self.line.text = self.line.text.ljust(_CLAUSE - 1)
        self.last = t

    def _open_or_close(self, t: Token) -> None:
        if t.type == "LBRACE":
            self.blocks.append(self.first)
            self.first, self.opened = "", True
        elif t.type in _OPENS:
            assert self.line is not None
            self.brackets.append(self.line.indent)
        elif t.type in ("RPAR", "RSQB"):
            self.brackets.pop()

    def _begin(self, indent: int) -> None:
        inside = self.first not in ("", "}") or self.brackets
        begins = not self.done or self._opens(self.done[-1])
        blank = self.breaks > 1 and not inside and not begins
        self.line = _Line(indent, blank=blank, top=not self.blocks)
        self.last = None
        self.breaks = 0

    def _opens(self, line: _Line) -> bool:
        return line.text.endswith("{")

    def _flush(self) -> None:
        if self.line is not None:
            self.line.text = self.line.text.rstrip()
            self.done.append(self.line)
        self.line, self.last = None, None

    def _in_rule(self) -> bool:
        return bool(self.blocks) and self.blocks[-1] == "rule"

    def _indent(self, t: Token | None = None) -> int:
        """Where the line at hand begins."""
        if self.brackets:
            return self.brackets[-1] + _STEP
        own = _STEP * len(self.blocks)
        goes_on = self.first not in ("", "}")
        return own + (_CLAUSE if self._in_rule() else 2 * _STEP) * goes_on

    def _gap(self, t: Token) -> str:
        """What stands between a token and the one before it on its line."""
        before = self.last
        if before is None or before.type in ("LPAR", "LSQB") or t.type in ("RPAR", "RSQB", "COMMA"):
            return ""
        if t.type == "COLON":
            return " " if self.first in ("device", "link") else ""
        if t.type == "EQUAL" or before.type == "EQUAL":
            return " " if self._defines() else ""
        if t.type == "MARK" or before.type == "MARK":
            return ""
        if before.text == "..." or before.start in self.reading.tight:
            return ""
        return " "

    def _defines(self) -> bool:
        """Whether a `=` here gives a name to something: those in brackets and `with` do not."""
        wanted = {"match", "rewrite"} if self._in_rule() else {"pattern"} - set(self.blocks)
        return self.first in wanted and not self.brackets


def _text(lines: Sequence[_Line]) -> str:
    _separate(lines)
    out: list[str] = []
    for group in _groups(lines):
        column = max((len(x.code) for x in group if x.comment and x.text), default=0) + 2
        for x in group:
            if x.blank:
                out.append("")
            if x.text and x.comment:
                out.append(f"{x.code.ljust(column)}{x.comment}")
            else:
                out.append(x.code + x.comment)
    return "\n".join(out) + "\n" * bool(out)


def _separate(lines: Sequence[_Line]) -> None:
    """An empty line before each entry with a block, above its comments, and behind it."""
    for i, line in enumerate(lines):
        if i and line.top and lines[i - 1].top and lines[i - 1].text == "}":
            line.blank = True
        if not line.entry:
            continue
        while i and not lines[i].blank and lines[i - 1].comment and not lines[i - 1].text:
            i -= 1
        lines[i].blank = i > 0


def _groups(lines: Sequence[_Line]) -> Iterator[list[_Line]]:
    """Neighbouring lines whose comments stand below each other."""
    group: list[_Line] = []
    for line in lines:
        alone = not (line.comment and line.text) or line.text.endswith("{")
        if group and (alone or line.blank):
            yield group
            group = []
        if alone:
            yield [line]
        else:
            group.append(line)
    if group:
        yield group
