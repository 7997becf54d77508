"""Where the user's own Python stands: the file and line of a class, of a function, of a failure."""

from __future__ import annotations

import ast
import inspect
import os
import sys
import textwrap
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfc.errors import DfcError, Span

_HERE = str(Path(__file__).parent) + os.sep


@dataclass(frozen=True)
class Origin:
    """The place where a class or function is defined.

    `lines` are the numbers of the lines that give something a name inside it.
    """

    file: str
    line: int
    name: str
    interactive: bool = False  # a notebook's cell, or the prompt: each run has a file of its own
    text: str | None = field(default=None, compare=False)
    lines: Mapping[str, tuple[int, str]] = field(default_factory=dict, compare=False)

    def is_rerun_of(self, other: Origin) -> bool:
        """Whether the same file, or a cell that defines the same name, was run again."""
        if self.name != other.name:
            return False
        return self.file == other.file or (self.interactive and other.interactive)

    def span(self, inside: str | None = None) -> Span:
        """The line of the definition, or of a name inside it."""
        line, text = self.lines.get(inside or "", (self.line, self.text or ""))
        start = len(text) - len(text.lstrip())
        end = len(text.rstrip())
        col = start + 1 if text.strip() else 0
        return Span(_shown(self.file), line, col, end + 1 if col else 0, text or None)

    def __str__(self) -> str:
        return _shown(self.file) + (f":{self.line}" if self.line else "")


def origin_of(thing: Any) -> Origin:
    """The origin of a class or a function, as far as Python knows it."""
    module = sys.modules.get(thing.__module__)
    interactive = thing.__module__ == "__main__" and not getattr(module, "__file__", None)
    name = thing.__qualname__
    try:
        file = inspect.getsourcefile(thing) or inspect.getfile(thing)
        source, start = inspect.getsourcelines(thing)
    except (OSError, TypeError, IndexError):  # typed at the prompt: there is no text
        code = _some_code(thing)
        file = code.co_filename if code else thing.__module__
        return Origin(file, code.co_firstlineno if code else 0, name, interactive)
    offset, lines = _inside(source, start)
    text = source[offset - start].rstrip("\n") if 0 <= offset - start < len(source) else None
    return Origin(os.path.abspath(file), offset, name, interactive, text, lines)


def _some_code(thing: Any) -> Any:
    if hasattr(thing, "__code__"):
        return thing.__code__
    return next((v.__code__ for v in vars(thing).values() if hasattr(v, "__code__")), None)


def _inside(source: list[str], start: int) -> tuple[int, dict[str, tuple[int, str]]]:
    """The line of `class` or `def` itself, and the lines of what is named in the body."""
    try:
        (definition,) = ast.parse(textwrap.dedent("".join(source))).body
    except (SyntaxError, ValueError):
        return start, {}
    found: dict[str, int] = {}
    for node in getattr(definition, "body", ()):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found[node.name] = node.lineno
        targets: list[ast.expr] = [node.target] if isinstance(node, ast.AnnAssign) else []
        targets += node.targets if isinstance(node, ast.Assign) else []
        found |= {t.id: node.lineno for t in targets if isinstance(t, ast.Name)}
    if isinstance(definition, ast.FunctionDef):
        a = definition.args
        found = {x.arg: x.lineno for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)}
    place = {k: (start + n - 1, source[n - 1].rstrip("\n")) for k, n in found.items()}
    return start + getattr(definition, "lineno", 1) - 1, place


def _shown(file: str) -> str:
    """Relative where that is shorter to read: below the current folder."""
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except ValueError:
        return file


def failure_of(error: BaseException, what: str, own: str = "", help: str | None = None) -> DfcError:
    """The user's code raised: its kind, its text, and the innermost line that is theirs."""
    place = None
    for frame in traceback.extract_tb(error.__traceback__):
        mine = bool(own) and frame.filename == own
        if mine or (place is None and not frame.filename.startswith(("<frozen", _HERE))):
            place = frame
    if isinstance(error, SyntaxError) and error.filename:
        at = Span(_shown(error.filename), error.lineno or 1, error.offset or 0, 0, error.text)
        return DfcError("K040", f"{what} is not valid Python: {error.msg}", span=at)
    span = Span(_shown(place.filename), place.lineno or 1, 0, 0, place.line) if place else None
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return DfcError("K040", f"{what} raised {reason}", span=span, help=help)
