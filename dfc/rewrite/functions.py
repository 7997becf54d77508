"""The functions that conditions and sizes call: `dim(x, 0)`, `constant(w)`, `broadcasts(a, b)`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dfc.ir.expr import call
from dfc.ir.graph import Parameter, Value
from dfc.ir.types import TensorType
from dfc.lang import syntax as s
from dfc.lang.wording import expression_text
from dfc.rewrite.copies import HALVES, PAIRS, repeats
from dfc.rewrite.deciding import (
    Facts,
    Undecided,
    base_of,
    concrete,
    constant_number,
    number_of,
    settled,
    shown,
)
from dfc.rewrite.first_column import first_column
from dfc.rewrite.intervals import ANY, FALSE, TRUE, Interval, interval


def _tensor(x: Any, source: s.Call) -> TensorType:
    if isinstance(x, Value) and isinstance(x.type, TensorType):
        return x.type
    raise Undecided(f"`{expression_text(source)}`: {shown(x)} is no tensor")


def _dim(source: s.Call, given: Sequence[Any], facts: Facts) -> Any:
    shape = given[0] if isinstance(given[0], tuple) else _tensor(given[0], source).shape
    if not isinstance(given[1], int) or not -len(shape) <= given[1] < len(shape):
        raise Undecided(f"`{expression_text(source)}`: there is no dimension {shown(given[1])}")
    return shape[given[1]]


def _value(source: s.Call, given: Sequence[Any], facts: Facts) -> Any:
    found = constant_number(given[0])
    if found is None:
        raise Undecided(f"`{expression_text(source)}`: {shown(given[0])} is no constant number")
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
        raise Undecided(f"`{expression_text(source)}`: {shown(given[0])} is no value")
    return len(given[0].users)


def _op(source: s.Call, given: Sequence[Any], facts: Facts) -> str:
    x = given[0]
    return base_of(x.node.op) if isinstance(x, Value) and x.node else ""


def _len(source: s.Call, given: Sequence[Any], facts: Facts) -> int:
    if not isinstance(given[0], tuple):
        raise Undecided(f"`{expression_text(source)}`: {shown(given[0])} is no list")
    return len(given[0])


def _item(source: s.Call, given: Sequence[Any], facts: Facts) -> Any:
    many, i = given
    if not isinstance(many, tuple) or not isinstance(i, int) or not -len(many) <= i < len(many):
        raise Undecided(f"`{expression_text(source)}`: {shown(many)} has no item {shown(i)}")
    return many[i]


def _numeric(function: str) -> Callable[..., Any]:
    def apply(source: s.Call, given: Sequence[Any], facts: Facts) -> Any:
        numbers = [number_of(g, a) for g, a in zip(given, source.arguments, strict=True)]
        if function in ("min", "max"):
            return call(function, *numbers) if len(numbers) > 1 else numbers[0]
        x = concrete(numbers[0], source.arguments[0])
        if function == "abs":
            return abs(numbers[0])
        if function == "float":
            return x
        if x < 0 or (function == "rsqrt" and x == 0):
            raise Undecided(f"`{expression_text(source)}` of {x}")
        return math.sqrt(x) if function == "sqrt" else 1 / math.sqrt(x)

    return apply


def _broadcasts(source: s.Call, given: Sequence[Any], facts: Facts) -> bool:
    """Whether the first has a shape that broadcasts to that of the second."""
    a = given[0] if isinstance(given[0], tuple) else _tensor(given[0], source).shape
    b = given[1] if isinstance(given[1], tuple) else _tensor(given[1], source).shape
    if len(a) > len(b):
        return False
    a, b = (tuple(settled(x, facts) for x in shape) for shape in (a, b))
    return all(x == 1 or x == y for x, y in zip(reversed(a), reversed(b), strict=False))


def _broadcast(source: s.Call, given: Sequence[Any], facts: Facts) -> tuple[Any, ...]:
    """The shape that both broadcast to."""
    a = given[0] if isinstance(given[0], tuple) else _tensor(given[0], source).shape
    b = given[1] if isinstance(given[1], tuple) else _tensor(given[1], source).shape
    n = max(len(a), len(b))
    a, b = (1,) * (n - len(a)) + a, (1,) * (n - len(b)) + b
    for x, y in zip(a, b, strict=True):
        if x != 1 and y != 1 and x != y:
            raise Undecided(f"{shown(a)} and {shown(b)} do not broadcast")
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
        raise Undecided(f"nothing says that every element of {shown(given[0])} is finite")
    return True


def _leading(source: s.Call, given: Sequence[Any], facts: Facts) -> Any:
    """A shape without its last n dimensions."""
    shape = given[0] if isinstance(given[0], tuple) else _tensor(given[0], source).shape
    if not isinstance(given[1], int) or not 0 <= given[1] <= len(shape):
        raise Undecided(f"`{expression_text(source)}`: the rank is {len(shape)}")
    return shape[: len(shape) - given[1]]


def _open_rows(source: s.Call, given: Sequence[Any], facts: Facts) -> bool:
    """Whether every row of a mask has an element that lets through: one that is true (or false,
    when the second argument says so), or, in a mask of numbers, one that is finite."""
    x, wanted = given[0], given[1] if len(given) > 1 else True
    if not _tensor(x, source).rank:
        raise Undecided(f"`{expression_text(source)}`: {shown(x)} has no rows")
    if not _opens(x, bool(wanted), facts):
        raise Undecided(f"nothing says that every row of {shown(x)} is open somewhere")
    return True


def _moderate(source: s.Call, given: Sequence[Any], facts: Facts) -> bool:
    """Whether a value is finite and not large unless an activation before it overflows."""
    found = interval(given[0], facts.moderate, moderate=True)
    if found.nan or max(-found.low, found.high) > 1e18:  # of two such, the product is finite
        raise Undecided(f"nothing says that {shown(given[0])} is moderate")
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
    names = ", ".join(map(shown, masks))
    raise Undecided(f"nothing says that every row sees something through {names}")


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
        each = f"{shown(a)} and {shown(b)}"
        raise Undecided(f"`{expression_text(source)}`: {each} are no stacks of matrices")
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
            raise Undecided(f"nothing says that {shown(given[0])} holds everything twice")
        return True

    return apply


def _normal(source: s.Call, given: Sequence[Any], facts: Facts) -> bool:
    """A number that is finite and not zero: dividing by it and multiplying with it are inverse."""
    found = constant_number(given[0])
    return found is not None and found != 0 and math.isfinite(found)


FUNCTIONS: Mapping[str, Callable[[s.Call, Sequence[Any], Facts], Any]] = {
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
