"""What `where` says and sizes compute: functions of matched values, decided for all sizes or not.

A comparison of symbolic sizes holds only where it holds for every size in range. What cannot be
decided is no failure of the rule: it refuses there, and says that it could not tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dfc.ir.expr import Call, Expr, Scalar, call, symbol
from dfc.ir.graph import Graph, Parameter, Range, Value, attribute_key
from dfc.ir.types import DType, TensorType
from dfc.lang import syntax as s
from dfc.lang.wording import expression_text
from dfc.rewrite.copies import HALVES, PAIRS, repeats
from dfc.rewrite.first_column import first_column
from dfc.rewrite.intervals import ANY, FALSE, TRUE, Interval, interval
from dfc.rewrite.rule import CONSTANTS, conjunctions

Binding = Any  # Value | tuple of values | number, text, dtype or tuple of an attribute | None
Env = Mapping[str, Binding]


class Undecided(Exception):
    """A condition that cannot be decided here, and why."""


@dataclass
class Facts:
    """What conditions may look at beside the bindings. `memo` belongs to one state of the graph."""

    graph: Graph | None = None
    memo: dict[Value, Interval] = field(default_factory=dict)
    moderate: dict[Value, Interval] = field(default_factory=dict)

    @property
    def ranges(self) -> Mapping[str, Range]:
        return self.graph.ranges if self.graph is not None else {}


@dataclass(frozen=True)
class Failure:
    """The condition that failed first, and what it saw: `dim(wk, 1) is 32, dim(wq, 1) is 64`."""

    condition: s.Expr
    reason: str


def first_failure(conditions: Sequence[s.Expr], env: Env, facts: Facts) -> Failure | None:
    """The first of the conditions that does not hold, None when all hold."""
    for c in conjunctions(conditions):
        try:
            if not holds(c, env, facts):
                return Failure(c, _seen(c, env, facts))
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
    raise Undecided(f"`{_text(x)}` is {_shown(found)}, not true or false")


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
        operand = _number(evaluate(x.operand, env, facts), x.operand)
        return -operand
    if isinstance(x, s.Binary):
        if x.op in ("and", "or"):
            return holds(x, env, facts)
        return _binary(x, env, facts)
    if isinstance(x, s.Call):
        function = _FUNCTIONS[x.name.name]
        return function(x, [_argument(a, env, facts) for a in x.arguments], facts)
    raise Undecided(f"`{_text(x)}` has no value")


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
            raise Undecided(f"`{_text(x.right)}` is no list")
        return any(_equal(left, r, facts) is True for r in right)
    if x.op in ("==", "!="):
        left, right = _plain(left, right), _plain(right, left)
        same = _equal(left, right, facts)
        if same is None:
            raise Undecided(f"{_shown(left)} and {_shown(right)} may be equal or not")
        return same == (x.op == "==")
    a, b = _number(left, x.left), _number(right, x.right)
    if x.op == "~=":
        return near(_concrete(a, x.left), _concrete(b, x.right))
    if x.op in _ORDER:
        found = _ordered(x.op, a, b, facts)
        if found is None:
            raise Undecided(f"{_shown(a)} {x.op} {_shown(b)} does not hold for every size")
        return found
    try:
        return _ARITHMETIC[x.op](a, b)
    except (ZeroDivisionError, OverflowError) as e:
        raise Undecided(f"`{_text(x)}`: {e}") from None


NEAR = 2e-5  # relative


def near(a: float, b: float, tolerance: float = NEAR) -> bool:
    """What `~=` means: equal up to the digits that people write down, 0.7979 for sqrt(2 / pi)."""
    return a == b or abs(a - b) <= tolerance * max(abs(a), abs(b))


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


def _equal(a: Any, b: Any, facts: Facts) -> bool | None:
    """Equality for all sizes; None when it depends on them."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        if len(a) != len(b):
            return False
        each = [_equal(x, y, facts) for x, y in zip(a, b, strict=True)]
        return False if False in each else None if None in each else True
    if isinstance(a, Value) or isinstance(b, Value):
        return a is b
    if isinstance(a, Expr) or isinstance(b, Expr):
        if isinstance(a, (Expr, int)) and isinstance(b, (Expr, int)):
            if a == b:
                return True
            ordered = _ordered("<", a, b, facts), _ordered(">", a, b, facts)
            return False if True in ordered else None
        return False
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return a == b
    return attribute_key(a) == attribute_key(b)


def _ordered(op: str, a: Scalar, b: Scalar, facts: Facts) -> bool | None:
    if not isinstance(a, Expr) and not isinstance(b, Expr):
        return {"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}[op]
    if op in (">", ">="):
        op, a, b = {">": "<", ">=": "<="}[op], b, a
    low, high = _bounds(b - a, facts)  # type: ignore[operator]
    limit = 1 if op == "<" else 0
    if low is not None and low >= limit:
        return True
    if high is not None and high < limit:
        return False
    return None


def _settled(x: Scalar, facts: Facts) -> Scalar:
    """A size with each `min` and `max` decided that the ranges decide: with S at most 32,
    `64 - max(0, 64 - S)` is S."""
    if not isinstance(x, Expr) or all(isinstance(a, str) for m, _ in x.terms for a, _ in m):
        return x
    total: Any = 0
    for monomial, c in x.terms:
        product: Any = c
        for atom, power in monomial:
            factor: Any = symbol(atom) if isinstance(atom, str) else _decided(atom, facts)
            for _ in range(power):
                product = product * factor
        total = total + product
    return total  # type: ignore[no-any-return]


def _decided(atom: Call, facts: Facts) -> Scalar:
    args = [_settled(a, facts) for a in atom.args]
    if atom.name not in ("min", "max"):
        return call(atom.name, *args)
    better = "<=" if atom.name == "min" else ">="
    for a in args:
        if all(b is a or _ordered(better, a, b, facts) for b in args):
            return a
    return call(atom.name, *args)


def _bounds(x: Scalar, facts: Facts) -> tuple[float | None, float | None]:
    """The least and the greatest value of a size over the ranges of its symbols."""
    if not isinstance(x, Expr):
        return x, x
    low: float | None = 0
    high: float | None = 0
    for monomial, c in x.terms:
        least, most = 1.0, 1.0
        for atom, power in monomial:
            if not isinstance(atom, str):
                return None, None
            a, b = facts.ranges.get(atom, (0, None))
            least *= float(max(a or 0, 0)) ** power
            most *= math.inf if b is None else float(b) ** power
        ends = (c * least, c * most) if c > 0 else (c * most, c * least)
        low = None if low is None or math.isnan(ends[0]) else low + ends[0]
        high = None if high is None or math.isnan(ends[1]) else high + ends[1]
    return (
        None if low is None or math.isinf(low) else low,
        None if high is None or math.isinf(high) else high,
    )


def _plain(x: Any, beside: Any) -> Any:
    """A one-element constant compared with a number is its number."""
    if isinstance(x, Value) and isinstance(beside, (int, float)) and not isinstance(beside, bool):
        found = constant_number(x)
        return x if found is None else found
    return x


def _number(x: Any, source: s.Expr) -> Any:
    if isinstance(x, Value):
        found = constant_number(x)
        if found is not None:
            return found
        raise Undecided(f"`{_text(source)}` is no number that is known at compile time")
    if isinstance(x, (int, float, Expr)):
        return x
    raise Undecided(f"`{_text(source)}` is {_shown(x)}, not a number")


def _concrete(x: Any, source: s.Expr) -> float:
    if isinstance(x, Expr):
        raise Undecided(f"`{_text(source)}` is {x}, which depends on the sizes")
    return float(x)


def constant_number(x: Any) -> int | float | None:
    """The number of a constant with one element, or of an attribute; None otherwise."""
    if isinstance(x, bool):
        return None
    if isinstance(x, (int, float)):
        return x
    if not isinstance(x, Parameter) or x.data is None or x.kind == "state":
        return None
    if not isinstance(x.type, TensorType) or x.type.numel != 1 or x.type.dtype.name == "bool":
        return None
    found = x.data.tensor()
    return None if found.is_complex() else found.item()


# Functions


def _tensor(x: Any, source: s.Call) -> TensorType:
    if isinstance(x, Value) and isinstance(x.type, TensorType):
        return x.type
    raise Undecided(f"`{_text(source)}`: {_shown(x)} is no tensor")


def _dim(source: s.Call, given: Sequence[Any], facts: Facts) -> Any:
    shape = given[0] if isinstance(given[0], tuple) else _tensor(given[0], source).shape
    if not isinstance(given[1], int) or not -len(shape) <= given[1] < len(shape):
        raise Undecided(f"`{_text(source)}`: there is no dimension {_shown(given[1])}")
    return shape[given[1]]


def _value(source: s.Call, given: Sequence[Any], facts: Facts) -> Any:
    found = constant_number(given[0])
    if found is None:
        raise Undecided(f"`{_text(source)}`: {_shown(given[0])} is no constant number")
    return found


def _constant(source: s.Call, given: Sequence[Any], facts: Facts) -> bool:
    x = given[0]
    if isinstance(x, tuple):
        return all(_constant(source, [i], facts) for i in x)
    if not isinstance(x, Value):
        return True  # a number; an operand that is absent is known to be
    mutated = {m.target for m in facts.graph.mutations} if facts.graph is not None else set()
    return isinstance(x, Parameter) and x not in mutated


def _users(source: s.Call, given: Sequence[Any], facts: Facts) -> int:
    if not isinstance(given[0], Value):
        raise Undecided(f"`{_text(source)}`: {_shown(given[0])} is no value")
    return len(given[0].users)


def _op(source: s.Call, given: Sequence[Any], facts: Facts) -> str:
    x = given[0]
    return base_of(x.node.op) if isinstance(x, Value) and x.node else ""


def base_of(op: str) -> str:
    """`add` of `aten.add.Tensor`; other families keep theirs."""
    parts = op.split(".")
    return parts[1] if parts[0] == "aten" and len(parts) == 3 else op


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


def _len(source: s.Call, given: Sequence[Any], facts: Facts) -> int:
    if not isinstance(given[0], tuple):
        raise Undecided(f"`{_text(source)}`: {_shown(given[0])} is no list")
    return len(given[0])


def _item(source: s.Call, given: Sequence[Any], facts: Facts) -> Any:
    many, i = given
    if not isinstance(many, tuple) or not isinstance(i, int) or not -len(many) <= i < len(many):
        raise Undecided(f"`{_text(source)}`: {_shown(many)} has no item {_shown(i)}")
    return many[i]


def _numeric(function: str) -> Callable[..., Any]:
    def apply(source: s.Call, given: Sequence[Any], facts: Facts) -> Any:
        numbers = [_number(g, a) for g, a in zip(given, source.arguments, strict=True)]
        if function in ("min", "max"):
            return call(function, *numbers) if len(numbers) > 1 else numbers[0]
        x = _concrete(numbers[0], source.arguments[0])
        if function == "abs":
            return abs(numbers[0])
        if function == "float":
            return x
        if x < 0 or (function == "rsqrt" and x == 0):
            raise Undecided(f"`{_text(source)}` of {x}")
        return math.sqrt(x) if function == "sqrt" else 1 / math.sqrt(x)

    return apply


def _broadcasts(source: s.Call, given: Sequence[Any], facts: Facts) -> bool:
    """Whether the first has a shape that broadcasts to that of the second."""
    a = given[0] if isinstance(given[0], tuple) else _tensor(given[0], source).shape
    b = given[1] if isinstance(given[1], tuple) else _tensor(given[1], source).shape
    if len(a) > len(b):
        return False
    a, b = (tuple(_settled(x, facts) for x in shape) for shape in (a, b))
    return all(x == 1 or x == y for x, y in zip(reversed(a), reversed(b), strict=False))


def _broadcast(source: s.Call, given: Sequence[Any], facts: Facts) -> tuple[Any, ...]:
    """The shape that both broadcast to."""
    a = given[0] if isinstance(given[0], tuple) else _tensor(given[0], source).shape
    b = given[1] if isinstance(given[1], tuple) else _tensor(given[1], source).shape
    n = max(len(a), len(b))
    a, b = (1,) * (n - len(a)) + a, (1,) * (n - len(b)) + b
    for x, y in zip(a, b, strict=True):
        if x != 1 and y != 1 and x != y:
            raise Undecided(f"{_shown(a)} and {_shown(b)} do not broadcast")
    return tuple(y if x == 1 else x for x, y in zip(a, b, strict=True))


def _floating(source: s.Call, given: Sequence[Any], facts: Facts) -> bool:
    return _tensor(given[0], source).dtype.is_float


def _static(source: s.Call, given: Sequence[Any], facts: Facts) -> bool:
    return _tensor(given[0], source).is_static


def _finite(source: s.Call, given: Sequence[Any], facts: Facts) -> bool:
    if isinstance(given[0], (int, float)):
        return math.isfinite(given[0])
    found = interval(given[0], facts.memo)
    if not found.finite:
        raise Undecided(f"nothing says that every element of {_shown(given[0])} is finite")
    return True


def _leading(source: s.Call, given: Sequence[Any], facts: Facts) -> Any:
    """A shape without its last n dimensions."""
    shape = given[0] if isinstance(given[0], tuple) else _tensor(given[0], source).shape
    if not isinstance(given[1], int) or not 0 <= given[1] <= len(shape):
        raise Undecided(f"`{_text(source)}`: the rank is {len(shape)}")
    return shape[: len(shape) - given[1]]


def _open_rows(source: s.Call, given: Sequence[Any], facts: Facts) -> bool:
    """Whether every row of a mask has an element that lets through: one that is true (or false,
    when the second argument says so), or, in a mask of numbers, one that is finite."""
    x, wanted = given[0], given[1] if len(given) > 1 else True
    if not _tensor(x, source).rank:
        raise Undecided(f"`{_text(source)}`: {_shown(x)} has no rows")
    if not _opens(x, bool(wanted), facts):
        raise Undecided(f"nothing says that every row of {_shown(x)} is open somewhere")
    return True


def _moderate(source: s.Call, given: Sequence[Any], facts: Facts) -> bool:
    """Whether a value is finite and not large unless an activation before it overflows."""
    found = interval(given[0], facts.moderate, moderate=True)
    if found.nan or max(-found.low, found.high) > 1e18:  # of two such, the product is finite
        raise Undecided(f"nothing says that {_shown(given[0])} is moderate")
    return True


def _attends(source: s.Call, given: Sequence[Any], facts: Facts) -> bool:
    """Whether every row sees something once all these masks are added to the scores.

    Either the sum is finite, or it is so in column 0 and nowhere +inf. What products of
    activations give counts as moderate; absent masks add nothing.
    """
    masks = [x for x in given if x is not None]
    for x in masks:
        _tensor(x, source)
    whole = _sum_of([interval(x, facts.moderate, moderate=True) for x in masks])
    if whole.finite:
        return True
    column = _sum_of([first_column(x, facts.moderate, moderate=True) for x in masks])
    if column.finite and all(_below_infinity(x, facts) for x in masks):
        return True
    shown = ", ".join(map(_shown, masks))
    raise Undecided(f"nothing says that every row sees something through {shown}")


def _sum_of(bounds: Sequence[Interval]) -> Interval:
    total = FALSE
    for b in bounds:
        if not b.finite:
            return ANY
        total = Interval(total.low + b.low, total.high + b.high)
    limit = 3.4028235e38 * (1 + 1e-7)  # what rounds to the largest float32
    return total if max(-total.low, total.high) <= limit else ANY


def _below_infinity(x: Value, facts: Facts) -> bool:
    found = interval(x, facts.moderate, moderate=True)
    return not found.nan and found.high < math.inf


def _product(source: s.Call, given: Sequence[Any], facts: Facts) -> tuple[Any, ...]:
    """The shape of the matrix product of two stacks of matrices of one size."""
    a, b = (_tensor(x, source).shape for x in given)
    if len(a) < 2 or len(a) != len(b):
        raise Undecided(f"`{_text(source)}`: {_shown(a)} and {_shown(b)} are no stacks of matrices")
    return (*a[:-1], b[-1])


def _opens(x: Value, wanted: bool, facts: Facts) -> bool:
    column = first_column(x, facts.memo)
    if x.tensor_type.dtype.is_float:
        whole = interval(x, facts.memo)
        return column.finite and not whole.nan and whole.high < math.inf
    if column == (TRUE if wanted else FALSE):
        return True
    if not isinstance(x, Parameter) or x.data is None or x.kind == "state":
        return False
    data = x.data.tensor()
    return bool(((data != 0) == wanted).any(-1).all())


def _repeats(how: str) -> Callable[..., Any]:
    """Whether the last dimension holds everything twice: in two halves, or side by side."""

    def apply(source: s.Call, given: Sequence[Any], facts: Facts) -> bool:
        _tensor(given[0], source)
        if not repeats(given[0], how):
            raise Undecided(f"nothing says that {_shown(given[0])} holds everything twice")
        return True

    return apply


def _normal(source: s.Call, given: Sequence[Any], facts: Facts) -> bool:
    """A number that is finite and not zero: dividing by it and multiplying with it are inverse."""
    found = constant_number(given[0])
    return found is not None and found != 0 and math.isfinite(found)


_FUNCTIONS: Mapping[str, Callable[[s.Call, Sequence[Any], Facts], Any]] = {
    "dim": _dim,
    "rank": lambda src, given, facts: _tensor(given[0], src).rank,
    "shape": lambda src, given, facts: _tensor(given[0], src).shape,
    "dtype": lambda src, given, facts: _tensor(given[0], src).dtype,
    "numel": lambda src, given, facts: _tensor(given[0], src).numel,
    "floating": _floating,
    "static": _static,
    "value": _value,
    "constant": _constant,
    "users": _users,
    "op": _op,
    "len": _len,
    "item": _item,
    "absent": lambda src, given, facts: given[0] is None,
    "present": lambda src, given, facts: given[0] is not None,
    "shared": lambda src, given, facts: True,
    "same": lambda src, given, facts: given[0] is given[1],
    "finite": _finite,
    "default": lambda src, given, facts: given[1] if given[0] is None else given[0],
    "leading": _leading,
    "open_rows": _open_rows,
    "attends": _attends,
    "moderate": _moderate,
    "product": _product,
    "normal": _normal,
    "halves": _repeats(HALVES),
    "pairs": _repeats(PAIRS),
    "broadcasts": _broadcasts,
    "broadcast": _broadcast,
    **{name: _numeric(name) for name in ("min", "max", "sqrt", "rsqrt", "abs", "float")},
}


# In words


def _seen(c: s.Expr, env: Env, facts: Facts) -> str:
    """What the parts of a condition were: `dim(wk, 1) is 32, dim(wq, 1) is 64`."""
    parts: list[str] = []
    for x in _leaves(c):
        try:
            found = _argument(x, env, facts)
        except Undecided:
            continue
        text = f"{_text(x)} is {_shown(found)}"
        if not isinstance(x, (s.Number, s.Text, s.Several)) and text not in parts:
            parts.append(text)
    return ", ".join(parts) or f"`{_text(c)}` does not hold"


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


def _shown(x: Any) -> str:
    if isinstance(x, Value):
        kind = "!" if isinstance(x, Parameter) else "%"
        return f"{kind}{x.name}: {x.type}"
    if isinstance(x, tuple):
        return "[" + ", ".join(map(_shown, x)) + "]"
    return x.name if isinstance(x, DType) else "absent" if x is None else str(x)


def _text(x: s.Expr) -> str:
    return expression_text(x)
