"""What a recipe writes as the values that a pass's fields want."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from dfc.errors import did_you_mean
from dfc.ir.types import DTYPES, DType
from dfc.lang import syntax as s
from dfc.lang.selectors import Selector, check_selector
from dfc.lang.source import Source
from dfc.lang.units import UNITS, Amount, amount, fits
from dfc.lang.wording import expression_text
from dfc.rewrite.pass_ import Data, Pass

_WORDS = {"yes": True, "no": False, "true": True, "false": False, "True": True, "False": False}


class BadValue(Exception):
    """A value that does not fit, where it stands, and what would."""

    def __init__(self, message: str, at: s.At, help: str | None = None, code: str = "Q012") -> None:
        super().__init__(message)
        self.message, self.at, self.help, self.code = message, at, help, code


def fields_of(cls: type[Pass]) -> Mapping[str, Any]:
    """The options of a pass and their types."""
    anything: Any = cls  # mypy takes a class with __hash__ for no key
    return _fields_of(anything)


@lru_cache(256)
def _fields_of(cls: Any) -> Mapping[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def data_of(cls: type[Pass], options: Mapping[str, Any]) -> list[str]:
    """The data that a pass reads by these options: a recipe would declare them."""
    hints = fields_of(cls)
    wanted = [n for n in options if Data in (hints[n], *typing.get_args(hints[n]))]
    return [options[n] for n in wanted if isinstance(options[n], str)]


def part_field(cls: type[Pass]) -> str | None:
    """The option that restricts a pass to a part of the model; None when it has none."""
    hints = fields_of(cls)
    for word in ("on", ""):
        name = cls.phrases.get(word)
        if name is not None and "Selector" in str(hints[name]):
            return name
    return "select" if "Selector" in str(hints.get("select")) else None


# A field whose name ends so takes amounts of that dimension, in this unit.
_ENDINGS: Mapping[str, tuple[str, str]] = {
    "_bytes": ("bytes", "B"), "_ms": ("time", "ms"), "_us": ("time", "us"), "_s": ("time", "s"),
    "_seconds": ("time", "s"), "_flops": ("flops/s", "FLOPS"),
}  # fmt: skip


def convert(hint: Any, x: s.Expr, source: Source, data: Sequence[str] = (), name: str = "") -> Any:
    """The value of an option of the type `hint`; its name may say in which unit.

    Raises:  BadValue.
    """
    inside = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if isinstance(x, s.Word) and x.name in ("none", "None") and type(None) in inside:
            return None
        kept = [h for h in inside if h is not type(None)]
        for h in kept[:-1]:
            try:
                return convert(h, x, source, data, name)
            except BadValue:
                continue
        return convert(kept[-1], x, source, data, name)
    if hint is Selector:
        problems = check_selector(x, source)
        if problems:
            raise BadValue(problems[0].message, x.at, problems[0].help, problems[0].code)
        return Selector(x, source)
    if origin is tuple:
        items = x.items if isinstance(x, s.Several) else (x,)
        return tuple(convert(inside[0], i, source, data, name) for i in items)
    if origin is typing.Literal:
        if isinstance(x, (s.Word, s.Text)) and _name(x) in inside:
            return _name(x)
        shown = ", ".join(map(str, inside))
        near = did_you_mean(expression_text(x), list(map(str, inside)))
        raise BadValue(f"`{expression_text(x)}` is none of {shown}", x.at, near)
    if hint is Data:
        if isinstance(x, s.Word) and x.name in data:
            return x.name
        near = did_you_mean(expression_text(x), list(data))
        raise BadValue(
            f"no data is called `{expression_text(x)}`", x.at, near or "declare it: `data calib`"
        )
    if hint is DType:
        if isinstance(x, s.Word) and x.name in DTYPES:
            return DTYPES[x.name]
        near = did_you_mean(expression_text(x), list(DTYPES))
        raise BadValue(f"`{expression_text(x)}` is no dtype", x.at, near)
    return _plain(hint, x, source, name)


def _name(x: s.Word | s.Text) -> str:
    return x.name if isinstance(x, s.Word) else x.value


def _plain(hint: Any, x: s.Expr, source: Source, name: str) -> Any:
    if hint is bool and isinstance(x, s.Word) and x.name in _WORDS:
        return _WORDS[x.name]
    if hint is str and isinstance(x, (s.Word, s.Text)):
        return _name(x)
    if hint in (int, float) and isinstance(x, s.Number):
        found = amount(x, source)
        if not isinstance(found, Amount):
            raise BadValue(found.message, x.at, found.help, found.code)
        value = _in_unit(found, name, x)
        if hint is float:
            return float(value)
        if isinstance(value, int) or value.is_integer():
            return int(value)
        raise BadValue(f"`{expression_text(x)}` is no whole number", x.at)
    wanted = {bool: "yes or no", str: "a name or a string", int: "a whole number"}.get(
        hint, "a number" if hint is float else str(hint)
    )
    raise BadValue(f"`{expression_text(x)}` is not {wanted}", x.at)


def _in_unit(found: Amount, name: str, x: s.Number) -> float:
    """The number, in the unit that the option's name states: a plain one else."""
    if found.dimension == "number":
        return found.value
    ending = next((e for e in _ENDINGS if name.endswith(e)), None)
    dimension, unit = _ENDINGS[ending] if ending else ("number", "")
    if not fits(found.dimension, dimension):
        raise BadValue(f"{dimension} is wanted, got {found.dimension}", x.at, code="Q015")
    value = found.value / UNITS[unit][1]
    return round(value) if ending and abs(value - round(value)) < 1e-9 * abs(value) else value


def kind_text(hint: Any) -> str:
    """What an option is, in a sentence: `a number or none`, `bf16 or f16`."""
    first = typing.get_args(hint)[0] if type(None) in typing.get_args(hint) else hint
    is_words = first is bool or typing.get_origin(first) is typing.Literal
    return f"{'' if is_words else 'a '}{type_text(hint)}"


def type_text(hint: Any) -> str:
    """An option's type in words: `number`, `yes or no`, `selector`, `a, b or c`."""
    inside = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if h is type(None) else type_text(h) for h in inside)
    if origin is tuple:
        return f"list of {type_text(inside[0])}"
    if origin is typing.Literal:
        return " or ".join(map(str, inside))
    names = {bool: "yes or no", str: "name", int: "whole number", float: "number"}
    names |= {Selector: "selector", DType: "dtype", Data: "data"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
