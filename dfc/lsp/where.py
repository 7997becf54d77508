"""What surrounds a place in a text: the block, the statement, the brackets, the word at hand.

Works on tokens, so that it holds for a text that does not parse, as a text does while it is typed.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, field

from dfc.lang.tokens import Token
from dfc.lsp.document import Document

PHRASES = ("on", "by", "to", "from", "into", "except", "using", "at")
_PARTS = {*PHRASES, "with", "if"}
GOALS = ("minimize", "maximize", "require")
_PREFIX = re.compile(r"[A-Za-z_0-9.]*\Z")
_OPEN = {"LPAR": "RPAR", "LSQB": "RSQB"}


@dataclass
class Frame:
    """An open bracket: what is called, how many arguments are complete, and the names given."""

    bracket: str
    callee: str = ""
    arguments: int = 0
    keyword: str = ""  # the name before the `=` of the argument at hand
    given: list[str] = field(default_factory=list)


@dataclass
class Where:
    """A place.

    `block` is "top", "recipe", "target" or "rule"; `entry` the name of what the block belongs to.
    `clause` is the word that decides about the rest of the statement: its verb, `match`, `keep`.
    `part` is "" for operands, a phrase's word, "with" or "if"; `option` the name before a `=`.
    """

    block: str
    entry: str
    statement: list[Token]
    prefix: str
    start: int  # of the prefix
    in_string: bool
    clause: str = ""
    label: str = ""
    part: str = ""
    option: str = ""
    given: list[str] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)

    @property
    def frame(self) -> Frame | None:
        return self.frames[-1] if self.frames else None

    @property
    def before(self) -> Token | None:
        return self.statement[-1] if self.statement else None


def where(document: Document, offset: int) -> Where:
    """What surrounds an offset."""
    prefix, start, in_string = _word(document, offset)
    words = document.words
    end = bisect_left([t.start for t in words], start)
    before = [t for t in words[:end] if t.end <= start]
    while before and before[-1].type == "_NL" and before[-1].start >= start:
        if len(before) > 1 and before[-2].type == "LBRACE":
            break
        before.pop()
    blocks, first = _blocks(before)
    statement = [t for t in before[first:] if t.type != "_NL"]
    block, entry = _block(blocks)
    found = Where(block, entry, statement, prefix, start, in_string)
    _parts(found)
    return found


def _word(document: Document, offset: int) -> tuple[str, int, bool]:
    """The piece of a word or string before an offset, where it starts, whether it is a string."""
    text = document.text
    line = text.rfind("\n", 0, offset) + 1
    quote = _open_quote(text, line, offset)
    if quote >= 0:
        return text[quote + 1 : offset], quote, True
    found = _PREFIX.search(text, max(line, offset - 256), offset)
    assert found is not None  # it matches nothing at least
    return found.group(), found.start(), False


def _open_quote(text: str, line: int, offset: int) -> int:
    """Where the string that an offset lies in begins, or -1."""
    quote, i = -1, line
    while i < offset:
        c = text[i]
        if c == '"':
            quote = i if quote < 0 else -1
        elif c == "#" and quote < 0:
            return -1
        elif c == "\\" and quote >= 0:
            i += 1
        i += 1
    return quote


def in_comment(document: Document, offset: int) -> bool:
    text = document.text
    line = text.rfind("\n", 0, offset) + 1
    at = text.find("#", line, offset)
    while at >= 0:
        if _open_quote(text, line, at) < 0:
            return True
        at = text.find("#", at + 1, offset)
    return False


def _blocks(before: list[Token]) -> tuple[list[list[Token]], int]:
    """The heads of the blocks that are open, and where the last statement begins."""
    heads: list[list[Token]] = []
    first = 0
    for i, t in enumerate(before):
        if t.type == "LBRACE":
            heads.append([w for w in before[first:i] if w.type != "_NL"])
            first = i + 1
        elif t.type == "RBRACE":
            if heads:
                heads.pop()
            first = i + 1
        elif t.type == "_NL":
            first = i + 1
    return heads, first


def _block(heads: list[list[Token]]) -> tuple[str, str]:
    for head in reversed(heads):
        words = [t.text for t in head if t.type == "WORD"]
        if words and words[0] in ("recipe", "target", "rule"):
            return words[0], words[1] if len(words) > 1 else ""
    return ("recipe", "") if heads else ("top", "")


def _parts(w: Where) -> None:
    """Split the statement: label, clause, phrase, options, brackets."""
    words = w.statement
    i = 0
    if w.block == "recipe" and len(words) > 1 and words[1].type == "COLON":
        w.label, i = words[0].text, 2
    if i < len(words):
        w.clause = words[i].text
        i += 1
    last: Token | None = None
    for t in words[i:]:
        if t.type in _OPEN:
            named = last is not None and last.type in ("WORD", "MARK")
            w.frames.append(Frame(t.type, _callee(words, t) if named else ""))
        elif t.type in ("RPAR", "RSQB"):
            if w.frames:
                w.frames.pop()
        elif w.frames:
            _inside(w.frames[-1], t, last)
        else:
            _outside(w, t, last)
        last = t


def _callee(words: list[Token], bracket: Token) -> str:
    i = next(i for i, t in enumerate(words) if t is bracket) - 1
    if words[i].type == "MARK":
        i -= 1
    return words[i].text if i >= 0 and words[i].type == "WORD" else ""


def _inside(frame: Frame, t: Token, last: Token | None) -> None:
    if t.type == "COMMA":
        frame.arguments += 1
        frame.keyword = ""
    elif t.type == "EQUAL" and last is not None and last.type == "WORD":
        frame.keyword = last.text
        frame.given.append(last.text)


def _outside(w: Where, t: Token, last: Token | None) -> None:
    if t.type == "COMMA":
        w.option = ""
    elif t.type == "EQUAL" and last is not None and last.type == "WORD":
        w.option = last.text
        w.given.append(last.text)
    elif w.block == "recipe" and w.clause not in GOALS and t.text in _PARTS:
        operand = last is not None and last.type == "COMMA"
        w.part, w.option = (w.part, w.option) if operand else (t.text, "")
