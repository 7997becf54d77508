"""Passes as the command line writes them: `canonicalize,cse{limit=3}`."""

from __future__ import annotations

import ast
import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from dfc.errors import DfcError, Span
from dfc.rewrite.pass_ import Pass, find_pass, pass_classes

_STEP = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*(?:\{([^{}]*)\}\s*)?(,|$)")
_OPTION = re.compile(
    r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*=\s*((?:[^,()\[\]]|\([^()]*\)|\[[^\[\]]*\])+?)\s*(,|$)"
)


def parse_steps(text: str) -> list[Pass]:
    """The passes of a pipeline, in order; an empty text is an empty pipeline.

    Raises:  DfcError Q001 and Q002 for names and options, Q005 for text that does not parse.
    """
    found: list[Pass] = []
    at = 0
    while text[at:].strip():
        step = _STEP.match(text, at)
        if step is None:
            raise _unreadable(text, at, "write NAME or NAME{option=value}, separated by commas")
        name, options = step[1], step[2] or ""
        values = dict(_options(text, options, step.start(2)))
        found.append(find_pass(name, _fitted(name, values)))
        at = step.end()
    return found


def _options(text: str, options: str, offset: int) -> Iterator[tuple[str, Any]]:
    at = 0
    while options[at:].strip():
        option = _OPTION.match(options, at)
        if option is None:
            raise _unreadable(text, offset + at, "write option=value")
        yield option[1], _value(option[2])
        at = option.end()


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _fitted(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options in the types that the pass declares: one name stands for a tuple of it."""
    cls = pass_classes().get(name)
    hints = typing.get_type_hints(cls) if cls else {}
    found = dict(values)
    for option, value in values.items():
        hint = hints.get(option)
        if typing.get_origin(hint) is tuple and not isinstance(value, tuple):
            found[option] = (value,)
        elif hint is float and type(value) is int:
            found[option] = float(value)
    return found


def _unreadable(text: str, at: int, help: str) -> DfcError:
    at += len(text[at:]) - len(text[at:].lstrip())
    span = Span("--passes", 1, at + 1, at + 2, text)
    return DfcError("Q005", "the passes cannot be read here", span=span, help=help)


def resolved(p: Pass) -> str:
    """A pass with every option spelled out."""
    fields = dataclasses.fields(p)  # type: ignore[arg-type]
    shown = ", ".join(f"{f.name}={getattr(p, f.name)}" for f in fields)
    return p.name + (f"{{{shown}}}" if shown else "")


def option_rows(cls: type[Pass]) -> list[dict[str, str]]:
    """The options of a pass: name, type, default."""
    from dfc.recipe.options import fields_of, type_text
    from dfc.recipe.plan import value_text

    hints = fields_of(cls)
    rows = []
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        default = "" if f.default is dataclasses.MISSING else value_text(f.default)
        rows.append({"name": f.name, "type": type_text(hints[f.name]), "default": default})
    return rows
