"""What conditions look at and how sizes compare: for all sizes in range, or undecided."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dfc.ir.expr import Call, Expr, Scalar, call, symbol
from dfc.ir.graph import Graph, Parameter, Range, Value, attribute_key
from dfc.ir.types import DType, TensorType
from dfc.lang import syntax as s
from dfc.lang.wording import expression_text
from dfc.rewrite.intervals import Interval

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


NEAR = 2e-5  # relative


def near(a: float, b: float, tolerance: float = NEAR) -> bool:
    """What `~=` means: equal up to the digits that people write down, 0.7979 for sqrt(2 / pi)."""
    return a == b or abs(a - b) <= tolerance * max(abs(a), abs(b))


def equal(a: Any, b: Any, facts: Facts) -> bool | None:
    """Equality for all sizes; None when it depends on them."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        if len(a) != len(b):
            return False
        each = [equal(x, y, facts) for x, y in zip(a, b, strict=True)]
        return False if False in each else None if None in each else True
    if isinstance(a, Value) or isinstance(b, Value):
        return a is b
    if isinstance(a, Expr) or isinstance(b, Expr):
        if isinstance(a, (Expr, int)) and isinstance(b, (Expr, int)):
            if a == b:
                return True
            either = ordered("<", a, b, facts), ordered(">", a, b, facts)
            return False if True in either else None
        return False
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return a == b
    return attribute_key(a) == attribute_key(b)


def ordered(op: str, a: Scalar, b: Scalar, facts: Facts) -> bool | None:
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


def settled(x: Scalar, facts: Facts) -> Scalar:
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
    args = [settled(a, facts) for a in atom.args]
    if atom.name not in ("min", "max"):
        return call(atom.name, *args)
    better = "<=" if atom.name == "min" else ">="
    for a in args:
        if all(b is a or ordered(better, a, b, facts) for b in args):
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


def plain(x: Any, beside: Any) -> Any:
    """A one-element constant compared with a number is its number."""
    if isinstance(x, Value) and isinstance(beside, (int, float)) and not isinstance(beside, bool):
        found = constant_number(x)
        return x if found is None else found
    return x


def number_of(x: Any, source: s.Expr) -> Any:
    if isinstance(x, Value):
        found = constant_number(x)
        if found is not None:
            return found
        raise Undecided(f"`{expression_text(source)}` is no number that is known at compile time")
    if isinstance(x, (int, float, Expr)):
        return x
    raise Undecided(f"`{expression_text(source)}` is {shown(x)}, not a number")


def concrete(x: Any, source: s.Expr) -> float:
    if isinstance(x, Expr):
        raise Undecided(f"`{expression_text(source)}` is {x}, which depends on the sizes")
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


def base_of(op: str) -> str:
    """`add` of `aten.add.Tensor`; other families keep theirs."""
    parts = op.split(".")
    return parts[1] if parts[0] == "aten" and len(parts) == 3 else op


def shown(x: Any) -> str:
    if isinstance(x, Value):
        kind = "!" if isinstance(x, Parameter) else "%"
        return f"{kind}{x.name}: {x.type}"
    if isinstance(x, tuple):
        return "[" + ", ".join(map(shown, x)) + "]"
    return x.name if isinstance(x, DType) else "absent" if x is None else str(x)
