"""What a user sees when something is wrong: where, what, and what to try.

The only code that renders an error; everything else in dfc may import this module.
A code is a family letter and three digits. The family decides the exit status unless
the raiser knows better:

    P parse     2      Q recipe  2      R rule    2      D data and packages  2
    T trace     3      X export  3      V verify  4      K runtime            8
    N plan      2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_STATUS = {"P": 2, "Q": 2, "R": 2, "D": 2, "T": 3, "X": 3, "V": 4, "K": 8, "N": 2}


@dataclass(frozen=True)
class Span:
    """A place in a text: 1-based line and column, and the line itself when it is known.

    Units:  col and end_col count characters; end_col is one past the last.
    """

    file: str
    line: int
    col: int = 0
    end_col: int = 0
    text: str | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.col}" if self.col else f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Diagnostic:
    """One thing that is wrong, with its place and the remedy when we know one."""

    code: str
    message: str
    span: Span | None = None
    help: str | None = None
    notes: tuple[str, ...] = field(default=())

    def render(self) -> str:
        head = f"{self.span}: " if self.span else ""
        lines = [f"{head}error[{self.code}]: {self.message}"]
        if self.span and self.span.text is not None:
            lines += _excerpt(self.span)
        lines += [f"  note: {note}" for note in self.notes]
        if self.help:
            lines.append(f"  help: {self.help}")
        return _visible("\n".join(lines))


def _visible(text: str) -> str:
    """The text without what would steer a terminal, or cannot be written at all."""
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t\u00a0" else "\ufffd" for c in text)


def _excerpt(span: Span) -> list[str]:
    """The line and a caret below it, cut to a window so that a long line stays readable."""
    text = (span.text or "").rstrip("\n").replace("\t", " ")
    number = str(span.line)
    start = max(span.col - 1, 0)
    width = max(span.end_col - span.col, 1)
    offset = max(start - 60, 0)
    window = text[offset : offset + 100]
    width = max(1, min(width, len(window) - (start - offset)))
    lines = [f" {number} | {window}"]
    if span.col:
        lines.append(" " * (len(number) + 1) + " | " + " " * (start - offset) + "^" * width)
    return lines


class DfcError(Exception):
    """An error that is the user's to read: never our bug, always with a code.

    ``str(error)`` is the rendered text; ``error.status`` is the exit status of the CLI.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        span: Span | None = None,
        help: str | None = None,
        notes: Sequence[str] = (),
        status: int | None = None,
    ) -> None:
        self.diagnostics: tuple[Diagnostic, ...] = (
            Diagnostic(code, message, span, help, tuple(notes)),
        )
        self.status = _STATUS[code[0]] if status is None else status
        super().__init__(self.render())

    @classmethod
    def of(cls, diagnostics: Sequence[Diagnostic], status: int | None = None) -> DfcError:
        """One error that reports several diagnostics at once, in order."""
        first = diagnostics[0]
        error = cls(
            first.code,
            first.message,
            span=first.span,
            help=first.help,
            notes=first.notes,
            status=status,
        )
        error.diagnostics = tuple(diagnostics)
        error.args = (error.render(),)
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as it is: pools of processes hand errors on so, and wait forever for others."""
        return _restored, (type(self), self.args, self.__dict__)

    @property
    def code(self) -> str:
        """That of the first diagnostic, as in `P002`."""
        return self.diagnostics[0].code

    @property
    def message(self) -> str:
        """What is wrong, of the first diagnostic, without place and help."""
        return self.diagnostics[0].message

    def render(self) -> str:
        """All diagnostics as text: place, code, message, the line, notes, help."""
        return "\n".join(d.render() for d in self.diagnostics)


def _restored(cls: type[DfcError], args: tuple[Any, ...], facts: Mapping[str, Any]) -> DfcError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(facts)
    return error


def did_you_mean(word: str, known: Sequence[str], count: int = 1) -> str | None:
    """A help text that names the nearest known words, or None when nothing is near."""
    import difflib

    alike = [k for k in known if k.lower() == word.lower()]  # only the case differs
    near = [*alike, *difflib.get_close_matches(word, known, n=count, cutoff=0.6)]
    near = list(dict.fromkeys(near))[:count]
    return "did you mean " + ", ".join(f"`{n}`" for n in near) + "?" if near else None
