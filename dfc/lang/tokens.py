"""Text to tokens: lark's lexer over the terminals of grammar.lark, and where statements end."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dfc.errors import Diagnostic
from dfc.lang.source import Source

if TYPE_CHECKING:
    import lark

MAX_TOKENS = 100_000
MAX_DEPTH = 64  # of brackets and blocks
MAX_WORD = 256
MAX_TEXT = 1 << 16
MAX_ERRORS = 20

_OPEN = {"LPAR": "RPAR", "LSQB": "RSQB", "LBRACE": "RBRACE"}
_SIGNS = {"LPAR": "(", "RPAR": ")", "LSQB": "[", "RSQB": "]", "LBRACE": "{", "RBRACE": "}"}
# A line that ends with one of these goes on in the next.
_GOES_ON = {
    "COMMA", "EQUAL", "EQ", "NE", "LE", "GE", "LT", "GT", "NEAR", "PLUS", "MINUS", "TIMES",
    "OVER", "FLOOR", "REST", "VBAR", "AMPERSAND", "ONE_WAY", "BOTH_WAYS",
}  # fmt: skip
_OPERANDS = {"WORD", "TEXT", "NUMERAL"}
_WORDS_THAT_GO_ON = {"and", "or", "not"}


class Token(NamedTuple):
    """type is a terminal of grammar.lark, or COMMENT, LINE, BAD."""

    type: str
    text: str
    start: int
    end: int


@cache
def grammar() -> lark.Lark:
    """The grammar, loaded once for each process: lark's own cache would unpickle a shared file."""
    import lark

    text = (Path(__file__).parent / "grammar.lark").read_text(encoding="utf-8")
    return lark.Lark(
        text, start="document", parser="lalr", lexer="basic", strict=True, maybe_placeholders=True,
            )  # fmt: skip


@cache
def _scanner() -> re.Pattern[str]:
    """All terminals of the grammar in lark's order, the ignored ones too, as one expression.

    Why:  lark's own lexer makes an object with ten fields for each token; this is four times as
          fast, and a test compares the two.
    """
    lexer = grammar()._build_lexer(dont_ignore=True)
    return re.compile("|".join(f"(?P<{t.name}>{t.pattern.to_regexp()})" for t in lexer.terminals))


def tokenize(source: Source) -> tuple[list[Token], list[Diagnostic]]:
    """All tokens, comments and line ends among them, and what could not be read.

    An unreadable piece becomes a BAD token up to the end of its line.
    """
    tokens: list[Token] = []
    problems: list[Diagnostic] = []
    text, at = source.text, 0
    make = tuple.__new__  # a hundred thousand times: Token(...) takes twice as long
    while at < len(text) and len(problems) < MAX_ERRORS:
        for found in _scanner().finditer(text, at):
            start, end = found.span()
            if start != at:
                break
            at = end
            if found.lastgroup != "SPACE":
                tokens.append(make(Token, (found.lastgroup, found[0], start, end)))
                if len(tokens) > MAX_TOKENS:
                    message = f"the file has more than {MAX_TOKENS} words and signs"
                    problems.append(Diagnostic("P007", message, source.span(start)))
                    return tokens, problems
        if at < len(text):
            end = text.find("\n", at)
            end = len(text) if end < 0 else end
            problems.append(_unreadable(source, at))
            tokens.append(Token("BAD", text[at:end], at, end))
            at = end
    problems += _surrogates(source, tokens)
    for t in [t for t in tokens if t[3] - t[2] > MAX_WORD]:
        limit = {"WORD": MAX_WORD, "TEXT": MAX_TEXT}.get(t.type)
        if limit and len(t.text) > limit and len(problems) < MAX_ERRORS:
            what = "name" if t.type == "WORD" else "string"
            message = f"this {what} has {len(t.text)} characters; it may have {limit}"
            problems.append(Diagnostic("P007", message, source.span(t.start, t.end)))
    return tokens, problems


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _surrogates(source: Source, tokens: Sequence[Token]) -> Iterator[Diagnostic]:
    """Strings whose escapes make half a character, which no file can hold."""
    import json

    for t in tokens:
        if t.type == "TEXT" and _SURROGATE.search(t.text):
            try:
                json.loads(t.text).encode("utf-8")
            except UnicodeEncodeError:
                message = "an escape that is half a character"
                yield Diagnostic("P001", message, source.span(t.start, t.end))


def _unreadable(source: Source, start: int) -> Diagnostic:
    c = source.text[start]
    span = source.span(start, start + 1)
    if c == '"':
        line_end = source.text.find("\n", start)
        rest = source.text[start + 1 : line_end if line_end >= 0 else None]
        if '"' in rest:
            help = 'escapes are \\" \\\\ \\/ \\b \\f \\n \\r \\t \\u0041'
            return Diagnostic("P001", "a string with an escape that is none", span, help)
        return Diagnostic("P001", "the string is not closed on its line", span, 'add a `"`')
    if c == "'":
        return Diagnostic("P001", "unexpected `'`", span, 'strings stand in double quotes: `"`')
    return Diagnostic("P001", f"unexpected `{c}`", span)


def statements(source: Source, tokens: Sequence[Token]) -> tuple[list[Token], list[Diagnostic]]:
    """The tokens that the parser reads: no comments, and a _NL where a statement ends.

    Brackets must match; one that does not ends with its line, so that the rest can be read.
    """
    kept: list[Token] = []
    problems: list[Diagnostic] = []
    stack: list[Token] = []
    ahead = _ahead(tokens)

    def end_line(at: int) -> None:
        if kept and kept[-1].type != "_NL":
            kept.append(Token("_NL", "", at, at))

    for i, t in enumerate(tokens):
        if len(problems) >= MAX_ERRORS:
            break
        type_ = t.type
        if type_ == "WORD":
            kept.append(t)
            continue
        if type_ == "COMMENT":
            continue
        if type_ == "LINE":
            inside = stack and stack[-1].type != "LBRACE"
            if inside and _starts_afresh(kept[-1], ahead[i]):
                problems.append(_not_closed(source, stack))
                while stack and stack[-1].type != "LBRACE":
                    stack.pop()
                inside = False
            goes_on = kept and (
                kept[-1].type in _GOES_ON
                or (kept[-1].type == "WORD" and kept[-1].text in _WORDS_THAT_GO_ON)
            )
            if [t.type for t in kept[-2:]] == ["NUMERAL", "REST"]:
                goes_on = False  # `10 %`, where 10% is meant: the parser says so
            if not inside and not goes_on and not _continues(ahead[i]):
                end_line(t.start)
            continue
        if type_ in _OPEN:
            stack.append(t)
            if len(stack) > MAX_DEPTH:
                message = f"brackets are nested more than {MAX_DEPTH} deep"
                problems.append(Diagnostic("P004", message, source.span(t.start, t.end)))
                return kept, problems
            kept.append(t)
            if type_ == "LBRACE":
                end_line(t.end)
            continue
        if type_ in _OPEN.values():
            if not stack or _OPEN[stack[-1].type] != type_:
                problems.append(_stray(source, t, stack))
                if type_ == "RBRACE" and any(s.type == "LBRACE" for s in stack):
                    while stack.pop().type != "LBRACE":
                        pass
                else:
                    continue
            else:
                stack.pop()
            if type_ == "RBRACE":
                end_line(t.start)
        kept.append(t)
    if stack:
        problems.append(_not_closed(source, stack))
    end_line(len(source.text))
    return kept, problems


def _ahead(tokens: Sequence[Token]) -> dict[int, tuple[Token, ...]]:
    """For each line end, by its number, the next two tokens that are neither comments nor that."""
    found: dict[int, tuple[Token, ...]] = {}
    following: tuple[Token, ...] = ()
    for i in range(len(tokens) - 1, -1, -1):
        type_ = tokens[i].type
        if type_ == "LINE":
            found[i] = following
        elif type_ != "COMMENT":
            following = (tokens[i], *following[:1])
    return found


def _continues(ahead: Sequence[Token]) -> bool:
    """Whether the next line can only go on with the expression before it."""
    return bool(ahead) and (
        ahead[0].type in ("VBAR", "AMPERSAND")
        or (ahead[0].type == "WORD" and ahead[0].text in ("and", "or"))
    )


def _starts_afresh(before: Token, ahead: Sequence[Token]) -> bool:
    """Whether a line inside brackets can only be a new statement: a bracket was left open.

    Two operands never stand side by side in brackets, and no block ends there.
    """
    if not ahead:
        return False
    if ahead[0].type == "RBRACE":
        return True
    side_by_side = before.type in _OPERANDS | {"RPAR", "RSQB", "BAD"} and _begins(ahead[0])
    return side_by_side or (ahead[0].type == "WORD" and len(ahead) > 1 and _begins(ahead[1]))


def _begins(t: Token) -> bool:
    return t.type in _OPERANDS and t.text not in ("and", "or", "in")


def _stray(source: Source, t: Token, stack: Sequence[Token]) -> Diagnostic:
    if not stack:
        return Diagnostic("P002", f"`{t.text}` closes nothing", source.span(t.start, t.end))
    line = source.span(stack[-1].start).line
    wanted = _SIGNS[_OPEN[stack[-1].type]]
    message = f"`{t.text}` where `{wanted}` should close the `{stack[-1].text}` of line {line}"
    return Diagnostic("P002", message, source.span(t.start, t.end))


def _not_closed(source: Source, stack: Sequence[Token]) -> Diagnostic:
    t = stack[-1]
    wanted = _SIGNS[_OPEN[t.type]]
    return Diagnostic(
        "P002", f"`{t.text}` is not closed", source.span(t.start, t.end), f"add a `{wanted}`"
    )
