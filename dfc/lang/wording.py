"""Expressions as text, in the one form that the formatter and messages share."""

from __future__ import annotations

import json
import re
from typing import Any

from dfc.lang import syntax as s

# How tightly an operator binds; what binds less stands in brackets.
_LEVEL = {
    "or": 1, "and": 2, "|": 3, "&": 4, "not": 5, "==": 6, "!=": 6, "<=": 6, ">=": 6, "<": 6,
    ">": 6, "~=": 6, "in": 6, "+": 7, "-": 7, "*": 8, "/": 8, "//": 8, "%": 8,
}  # fmt: skip
_UNARY = 9
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SPECIAL = {"none", "None", "auto", "yes", "no", "true", "false", "True", "False"}  # not as text


def expression_text(x: s.Expr, level: int = 0) -> str:
    """An expression that reads back to an equal one."""
    if isinstance(x, s.Word):
        return x.name.rpartition("$")[2]
    if isinstance(x, s.Number):
        return number_text(x)
    if isinstance(x, s.Text):
        return json.dumps(x.value)
    if isinstance(x, s.Tail):
        return f"...{x.name.rpartition('$')[2]}"
    if isinstance(x, s.Several):
        return "[" + ", ".join(map(expression_text, x.items)) + "]"
    if isinstance(x, s.Call):
        given = [expression_text(a) for a in x.arguments]
        given += [f"{k.name.name}={expression_text(k.value)}" for k in x.keywords]
        return f"{x.name.name}{x.mark}({', '.join(given)})"
    if isinstance(x, s.Unary):
        own = _LEVEL["not"] if x.op == "not" else _UNARY
        text = f"{x.op}{' ' if x.op == 'not' else ''}{expression_text(x.operand, own)}"
        return f"({text})" if own < level else text
    assert isinstance(x, s.Binary)
    own = _LEVEL[x.op]
    alone = own == 6  # comparisons do not chain
    left = expression_text(x.left, own + alone)
    text = f"{left} {x.op} {expression_text(x.right, own + 1)}"
    return f"({text})" if own < level else text


def number_text(x: s.Number) -> str:
    value = int(x.value) if isinstance(x.value, bool) else x.value
    return f"{value!r}{x.unit}"


def value_text(x: Any) -> str:
    """An option's value as recipe text."""
    if isinstance(x, bool):
        return "yes" if x else "no"
    if x is None:
        return "none"
    if isinstance(x, str):
        return x if _WORD.fullmatch(x) and x not in _SPECIAL else json.dumps(x)
    if isinstance(x, (tuple, list)):
        return "[" + ", ".join(map(value_text, x)) + "]"
    return expression_text(x) if isinstance(x, s.Expr) else str(x)
