"""Passes as the command line writes them: `canonicalize,fuse{rules=[attention, norms]}`.

Values are read as recipes read them: numbers with units, names, lists, selectors, `tune(1, 2)`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError, Diagnostic, Span, did_you_mean
from dfc.rewrite.pass_ import Pass, pass_classes

if TYPE_CHECKING:
    from dfc.recipe.plan import PassStep, Plan

_FILE = "--passes"
_STEP = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:\{(.*)\}\s*)?", re.DOTALL)
_OPTION = re.compile(r"\s*([A-Za-z_]\w*)\s*=(.+)", re.DOTALL)
_OPEN, _CLOSE = "([{", ")]}"
MAX_TEXT = 1 << 16  # characters of a pipeline


def parse_steps(text: str) -> list[Pass]:
    """The passes of a pipeline, in order; an empty text is an empty pipeline.

    Raises:  DfcError Q001 and Q002 for names and options, Q005 for text that does not parse, Q012
             for values.
    """
    return [step.build({}) for step in parse_pipeline(text).passes()]


def parse_pipeline(text: str) -> Plan:
    """The same as a plan, whose options may be holes; every error is told.

    Raises:  DfcError as `parse_steps`; P007 and P009 for text that is too long or hides
             something.
    """
    from dfc.lang.source import Source
    from dfc.recipe.options import data_of
    from dfc.recipe.plan import Plan

    if len(text) > MAX_TEXT:
        message = f"the passes have {len(text)} characters; they may have {MAX_TEXT}"
        raise DfcError("P007", message, help="write them into a recipe: `-r FILE`")
    Source(text, _FILE).refuse_hidden()
    steps: list[PassStep] = []
    problems: list[Diagnostic] = []
    seen: dict[str, int] = {}
    for low, high in _pieces(text, 0, len(text)):
        found = _STEP.fullmatch(text, low, high)
        if found is None:
            help = "write NAME or NAME{option=value}, separated by commas"
            problems.append(_unreadable(text, low, help))
            continue
        name = found[1]
        if name not in pass_classes():
            help_ = did_you_mean(name, [*pass_classes()])
            span = _span(text, *found.span(1))
            problems.append(Diagnostic("Q001", f"unknown pass `{name}`", span, help_))
            continue
        seen[name] = seen.get(name, 0) + 1
        label = name if seen[name] == 1 else f"{name}_{seen[name]}"
        body = found.span(2) if found[2] is not None else (high, high)
        steps.append(_step(text, label, name, body, problems))
    if problems:
        raise DfcError.of(problems)
    read = [name for s in steps for name in data_of(pass_classes()[s.name], s.options)]
    return Plan("main", tuple(steps), data=tuple(dict.fromkeys(read)))


def _step(
    text: str, label: str, name: str, body: tuple[int, int], problems: list[Diagnostic]
) -> PassStep:
    from dfc.recipe.options import fields_of
    from dfc.recipe.plan import PassStep

    fields = fields_of(pass_classes()[name])
    options: dict[str, Any] = {}
    for low, high in _pieces(text, *body):
        found = _OPTION.fullmatch(text, low, high)
        if found is None:
            problems.append(_unreadable(text, low, "write option=value"))
        elif found[1] not in fields:
            known = f"it has {', '.join(fields)}" if fields else "it has no options"
            help = did_you_mean(found[1], [*fields]) or known
            message = f"pass `{name}` has no option `{found[1]}`"
            problems.append(Diagnostic("Q002", message, _span(text, *found.span(1)), help))
        else:
            option = found[1]
            read = _read(text, found.span(2), fields[option], f"{label}.{option}", name)
            if isinstance(read, list):
                problems += read
            else:
                (options[option],) = read
    return PassStep(label, name, options)


def _read(
    text: str, at: tuple[int, int], hint: Any, hole: str, name: str
) -> tuple[Any] | list[Diagnostic]:
    """A value in a tuple, or what is wrong with it."""
    from dfc.lang import syntax as s
    from dfc.lang.reader import parse_expression
    from dfc.lang.selectors import Selector
    from dfc.lang.source import Source
    from dfc.recipe.options import BadValue, convert, kind_text
    from dfc.recipe.plan import Hole

    # Python's quotes and empty tuple are what passes print; blanks keep the columns.
    value = text[slice(*at)].replace("'", '"')
    value = re.sub(r"\(\s*\)", lambda m: "[" + " " * (len(m[0]) - 2) + "]", value)
    source = Source(" " * at[0] + value, _FILE)
    try:
        x = parse_expression(source)
        if isinstance(x, s.Call) and x.name.name == "tune" and x.arguments and not x.keywords:
            values = (convert(hint, a, source, _named(a)) for a in x.arguments)
            return (Hole(hole, tuple(values)),)
        choices = pass_classes()[name].auto.get(hole.rpartition(".")[2])
        if isinstance(x, s.Word) and x.name == "auto" and choices:
            return (Hole(hole, tuple(choices)),)
        found = convert(hint, x, source, _named(x))
        if isinstance(found, Selector):  # what is wrong with it is told in the whole text
            found = replace(found, source=Source(text, _FILE))
        return (found,)
    except BadValue as e:
        option = hole.rpartition(".")[2]
        help = e.help or f"`{option}` is {kind_text(hint)}"
        place = _span(text, *e.at)
        return [Diagnostic(e.code, f"`{option}`: {e.message}", place, help)]
    except DfcError as e:
        return [
            replace(d, span=replace(d.span, text=text) if d.span else None) for d in e.diagnostics
        ]


def _named(x: Any) -> tuple[str, ...]:
    """A word where data are wanted: a pipeline declares them by naming them."""
    from dfc.lang import syntax as s

    return (x.name,) if isinstance(x, s.Word) else ()


def _pieces(text: str, low: int, high: int) -> Iterator[tuple[int, int]]:
    """The parts between commas that stand outside of brackets and quotes; blank ones are left."""
    depth, quote, start = 0, "", low
    for i in range(low, high + 1):
        c = text[i] if i < high else ","
        if quote:
            quote = "" if c == quote and text[i - 1] != "\\" else quote
        elif c in "'\"":
            quote = c
        elif c in _OPEN:
            depth += 1
        elif c in _CLOSE:
            depth -= 1
        at_end = i == high
        if at_end or (c == "," and depth <= 0 and not quote):
            if text[start:i].strip():
                yield start, i
            start = i + 1


def _unreadable(text: str, at: int, help: str) -> Diagnostic:
    at += len(text[at:]) - len(text[at:].lstrip())
    return Diagnostic("Q005", "the passes cannot be read here", _span(text, at, at + 1), help)


def _span(text: str, low: int, high: int) -> Span:
    return Span(_FILE, 1, low + 1, high + 1, text)


def option_rows(cls: type[Pass]) -> list[dict[str, str]]:
    """The options of a pass: name, type, default."""
    from dfc.lang.wording import value_text
    from dfc.recipe.options import fields_of, type_text

    hints = fields_of(cls)
    rows = []
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        default = "" if f.default is dataclasses.MISSING else value_text(f.default)
        rows.append({"name": f.name, "type": type_text(hints[f.name]), "default": default})
    return rows
