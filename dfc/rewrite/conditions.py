"""What `where` says and sizes compute: functions of matched values, decided for all sizes or not.

A comparison of symbolic sizes holds only where it holds for every size in range. What cannot be
decided is no failure of the rule: it refuses there, and says that it could not tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfc.ir.expr import Expr, call
from dfc.lang import syntax as s
from dfc.lang.wording import expression_text
from dfc.rewrite.deciding import (
    Env,
    Facts,
    Undecided,
    concrete,
    equal,
    near,
    number_of,
    ordered,
    plain,
    shown,
)
from dfc.rewrite.functions import FUNCTIONS
from dfc.rewrite.rule import CONSTANTS, conjunctions


@dataclass(frozen=True)
class Failure:
    """The condition that failed first, and what it saw: `dim(wk, 1) is 32, dim(wq, 1) is 64`."""

    condition: s.Expr
    reason: str


def first_failure(
    conditions: Sequence[s.Expr], env: Env, facts: Facts, explain: bool = True
) -> Failure | None:
    """The first of the conditions that does not hold, None when all hold; what it saw costs as
    much as deciding it, and is told with `explain` alone."""
    for c in conjunctions(conditions):
        try:
            if not holds(c, env, facts):
                return Failure(c, _seen(c, env, facts) if explain else "")
        except Undecided as e:
            return Failure(c, str(e))
    return None


def holds(x: s.Expr, env: Env, facts: Facts) -> bool:
    """Whether a condition holds for all sizes.

    Raises:  Undecided.
    """
    if isinstance(x, s.Binary) and x.op == "and":
        return holds(x.left, env, facts) and holds(x.right, env, facts)
    if isinstance(x, s.Binary) and x.op == "or":
        try:
            if holds(x.left, env, facts):
                return True
        except Undecided:
            if holds(x.right, env, facts):
                return True
            raise
        return holds(x.right, env, facts)
    if isinstance(x, s.Unary) and x.op == "not":
        return not holds(x.operand, env, facts)
    found = evaluate(x, env, facts)
    if isinstance(found, bool):
        return found
    raise Undecided(f"`{expression_text(x)}` is {shown(found)}, not true or false")


def evaluate(x: s.Expr, env: Env, facts: Facts) -> Any:
    """The value of a condition or of a size.

    Raises:  Undecided, also where an operand lacks what is asked for.
    """
    if isinstance(x, s.Number):
        return x.value
    if isinstance(x, s.Text):
        return x.value
    if isinstance(x, s.Word):
        if x.name in env:
            return env[x.name]
        if x.name in CONSTANTS:
            return CONSTANTS[x.name]
        if x.name in ("and", "or"):
            raise AssertionError(x)
        raise Undecided(f"`{x.name}` is absent")
    if isinstance(x, s.Several):
        return tuple(evaluate(i, env, facts) for i in x.items)
    if isinstance(x, s.Unary):
        if x.op == "not":
            return not holds(x.operand, env, facts)
        operand = number_of(evaluate(x.operand, env, facts), x.operand)
        return -operand
    if isinstance(x, s.Binary):
        if x.op in ("and", "or"):
            return holds(x, env, facts)
        return _binary(x, env, facts)
    if isinstance(x, s.Call):
        function = FUNCTIONS[x.name.name]
        return function(x, [_argument(a, env, facts) for a in x.arguments], facts)
    raise Undecided(f"`{expression_text(x)}` has no value")


def _argument(x: s.Expr, env: Env, facts: Facts) -> Any:
    if isinstance(x, s.Word) and x.name not in env and x.name not in CONSTANTS:
        return None  # absent(x) asks exactly this
    return evaluate(x, env, facts)


def _binary(x: s.Binary, env: Env, facts: Facts) -> Any:
    if x.op in ("==", "!="):
        names = _op_names(x, env, facts)
        if names is not None:
            return (names[0] == names[1]) == (x.op == "==")
    left, right = evaluate(x.left, env, facts), evaluate(x.right, env, facts)
    if x.op == "in":
        if not isinstance(right, tuple):
            raise Undecided(f"`{expression_text(x.right)}` is no list")
        return any(equal(left, r, facts) is True for r in right)
    if x.op in ("==", "!="):
        left, right = plain(left, right), plain(right, left)
        same = equal(left, right, facts)
        if same is None:
            raise Undecided(f"{shown(left)} and {shown(right)} may be equal or not")
        return same == (x.op == "==")
    a, b = number_of(left, x.left), number_of(right, x.right)
    if x.op == "~=":
        return near(concrete(a, x.left), concrete(b, x.right))
    if x.op in _ORDER:
        found = ordered(x.op, a, b, facts)
        if found is None:
            raise Undecided(f"{shown(a)} {x.op} {shown(b)} does not hold for every size")
        return found
    try:
        return _ARITHMETIC[x.op](a, b)
    except (ZeroDivisionError, OverflowError) as e:
        raise Undecided(f"`{expression_text(x)}`: {e}") from None


_ORDER = ("<", "<=", ">", ">=")


def _divide(a: Any, b: Any) -> Any:
    if isinstance(a, Expr) or isinstance(b, Expr):
        return call("floordiv", a, b) if _divides(a, b) else call("truediv", a, b)
    return a / b


def _divides(a: Any, b: Any) -> bool:
    found = call("mod", a, b) if not isinstance(b, Expr) else 1
    return found == 0


_ARITHMETIC: Mapping[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": _divide,
    "//": lambda a, b: call("floordiv", a, b),
    "%": lambda a, b: call("mod", a, b),
}


def _op_names(x: s.Binary, env: Env, facts: Facts) -> tuple[str, str] | None:
    """Both sides of `op(x) == relu`."""

    def name(side: s.Expr) -> str:
        if isinstance(side, s.Word) and side.name not in env:
            return side.name
        found = evaluate(side, env, facts)
        return found if isinstance(found, str) else ""

    sides = (x.left, x.right)
    if any(isinstance(y, s.Call) and y.name.name == "op" for y in sides):
        return name(x.left), name(x.right)
    return None


def _seen(c: s.Expr, env: Env, facts: Facts) -> str:
    """What the parts of a condition were: `dim(wk, 1) is 32, dim(wq, 1) is 64`."""
    parts: list[str] = []
    for x in _leaves(c):
        try:
            found = _argument(x, env, facts)
        except Undecided:
            continue
        text = f"{expression_text(x)} is {shown(found)}"
        if not isinstance(x, (s.Number, s.Text, s.Several)) and text not in parts:
            parts.append(text)
    return ", ".join(parts) or f"`{expression_text(c)}` does not hold"


def _leaves(c: s.Expr) -> list[s.Expr]:
    """The operands that a comparison compares, and the calls that are true or false."""
    if isinstance(c, s.Binary) and c.op in ("and", "or"):
        return [*_leaves(c.left), *_leaves(c.right)]
    if isinstance(c, s.Binary):
        return [
            x for side in (c.left, c.right) for x in ([side] if _named(side) else _leaves(side))
        ]
    if isinstance(c, s.Unary):
        return _leaves(c.operand)
    if isinstance(c, s.Call) and c.name.name in ("constant", "absent", "present", "finite"):
        return [c, *c.arguments]
    return [c]


def _named(x: s.Expr) -> bool:
    return isinstance(x, (s.Word, s.Call, s.Number))
