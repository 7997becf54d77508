"""Graph text to tokens, and what a parser asks of them: the next word, its place, an error."""

from __future__ import annotations

import json
import re
from typing import NoReturn

from dfc.errors import DfcError, Span
from dfc.lang.source import hidden_at, hidden_name

MAX_DEPTH = 64
MAX_DIGITS = 19

_TOKEN = re.compile(
    r"""
    (?P<space>[ \t\r\n]+|\#[^\n]*)
  | (?P<type>(?!return\[)[a-z][a-z0-9]*\[[^\]\n"]*\])
  | (?P<hash>sha256:[0-9a-f]{64}(?![0-9A-Za-z]))
  | (?P<value>%\.?[A-Za-z0-9_]+)
  | (?P<param>!(?:[A-Za-z0-9_.]+|"(?:[^"\\\n]|\\.)*"))
  | (?P<graph>@[A-Za-z0-9_]+)
  | (?P<string>"(?:[^"\\\n]|\\.)*")
  | (?P<number>[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)
  | (?P<name>[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_0-9]+)*)
  | (?P<punct>->|\.\.|//|[()\[\]{},:=*+\-%<>])
    """,
    re.VERBOSE,
)


class GraphTokens:
    """The tokens of a text, and which of them comes next."""

    def __init__(self, text: str, filename: str) -> None:
        self.text = text
        self.filename = filename
        self.kinds: list[str] = []
        self.words: list[str] = []
        self.starts: list[int] = []
        self.i = 0
        self.depth = 0
        at = hidden_at(text)
        if at is not None:
            message = f"{hidden_name(text[at])} is not allowed here"
            self.fail("P009", message, at, at + 1, "delete it; in a string write it as an escape")
        self._tokenize(text, self.kinds, self.words, self.starts, 0)
        for _ in range(2):  # two, so that looking at the word behind the last one is safe
            self.kinds.append("end")
            self.words.append("end of text")
            self.starts.append(len(text))

    def _tokenize(
        self, text: str, kinds: list[str], words: list[str], starts: list[int], offset: int
    ) -> None:
        at = 0
        for found in _TOKEN.finditer(text):
            start = found.start()
            if start != at:
                break
            at = found.end()
            kind = found.lastgroup
            if kind != "space":
                kinds.append(kind or "")
                words.append(found.group())
                starts.append(start + offset)
        if at != len(text):
            bad = text[at]
            hint = "a string must end on its line" if bad == '"' else None
            self.fail("P001", f"unexpected character {bad!r}", at + offset, at + offset + 1, hint)

    # errors

    def fail(
        self, code: str, message: str, start: int, end: int, help: str | None = None
    ) -> NoReturn:
        line = self.text.count("\n", 0, start) + 1
        begin = self.text.rfind("\n", 0, start) + 1
        stop = self.text.find("\n", begin)
        source = self.text[begin : stop if stop >= 0 else len(self.text)]
        col = start - begin + 1
        span = Span(self.filename, line, col, col + max(end - start, 1), source)
        raise DfcError(code, message, span=span, help=help)

    def fail_here(self, message: str, code: str = "P002", help: str | None = None) -> NoReturn:
        start = self.starts[self.i]
        end = start + (len(self.words[self.i]) if self.kinds[self.i] != "end" else 0)
        self.fail(code, message, start, end, help)

    def expected(self, what: str) -> NoReturn:
        got = self.words[self.i]
        self.fail_here(
            f"expected {what}, got `{got}`"
            if self.kinds[self.i] != "end"
            else f"expected {what}, got the end of the text"
        )

    # tokens

    def accept(self, word: str) -> bool:
        if self.words[self.i] == word and self.kinds[self.i] != "string":
            self.i += 1
            return True
        return False

    def need(self, word: str) -> None:
        if not self.accept(word):
            self.expected(f"`{word}`")

    def take(self, kind: str, what: str) -> str:
        if self.kinds[self.i] != kind:
            self.expected(what)
        self.i += 1
        return self.words[self.i - 1]

    def integer(self) -> int:
        negative = self.accept("-")
        word = self.take("number", "an integer")
        if not word.isdigit():
            self.i -= 1
            self.expected("an integer")
        if len(word) > MAX_DIGITS:
            self.i -= 1
            self.fail_here(
                f"an integer may have {MAX_DIGITS} digits, this one has {len(word)}", "P007"
            )
        return -int(word) if negative else int(word)

    def string(self) -> str:
        word = self.take("string", "a string")
        return self.unquote(word)

    def unquote(self, word: str) -> str:
        try:
            text = json.loads(word)
        except ValueError:
            self.i -= 1
            self.fail_here("a string with a bad escape", "P002")
        assert isinstance(text, str)
        return text

    def enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail_here(f"nested deeper than {MAX_DEPTH}", "P007")
