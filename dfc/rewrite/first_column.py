"""Whether a mask lets every row see its first column, as every causal mask does.

The same analysis as `intervals`, of the elements in column 0 of the last dimension alone: with
`column <= row` over `arange`, or a slice of a triangle, column 0 is open although the mask is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dfc.ir.graph import Node, Parameter, Value
from dfc.ir.types import TensorType
from dfc.rewrite.intervals import (
    ANY,
    FALSE,
    MAX_DEPTH,
    Interval,
    base_name,
    bounded,
    interval,
    of_parameter,
    rule_of,
)

Memo = dict[Value, Interval]


@dataclass(frozen=True)
class _Column:
    """The key under which a memo of whole values keeps a first column."""

    value: Value


def first_column(
    value: Value, memo: Memo | None = None, depth: int = MAX_DEPTH, *, moderate: bool = False
) -> Interval:
    """Bounds of `value[..., 0]`: those of the whole value where nothing better is known.

    `moderate` and `memo` are as for `interval`, and belong together.

    Cost:  linear in the nodes behind the value, at most MAX_DEPTH back.
    """
    whole = {} if memo is None else memo
    if isinstance(value, Parameter):
        return of_parameter(value, column=True)
    if value.node is None or depth == 0 or not isinstance(value.type, TensorType):
        return ANY
    if _last(value) == 1:
        return interval(value, whole, moderate=moderate)

    key = _Column(value)
    known = whole.get(key)  # type: ignore[call-overload]
    if known is not None:
        return known  # type: ignore[no-any-return]

    def column(v: Value) -> Interval:
        return first_column(v, whole, depth - 1, moderate=moderate)

    found = _of(value.node, column)
    known = interval(value, whole, moderate=moderate) if found is None else bounded(value, found)
    whole[key] = known  # type: ignore[index]
    return known


def _of(node: Node, column: Callable[[Value], Interval]) -> Interval | None:
    name = base_name(node)
    operands = list(node.operands)
    if name == "arange":
        start = node.attributes.get("start", 0)
        return Interval(float(start), float(start)) if isinstance(start, (int, float)) else None
    if name == "triu":
        return _upper(node, operands[0], column)
    rule = rule_of(node)
    if rule is None or not operands or not _keeps_columns(name, node, operands):
        return None
    return rule(node, [column(v) for v in operands])


def _upper(node: Node, x: Value, column: Callable[[Value], Interval]) -> Interval:
    """Above the diagonal lies nothing of column 0."""
    diagonal = node.attributes.get("diagonal", 0)
    if isinstance(diagonal, int) and diagonal >= 1:
        return FALSE
    return column(x) | FALSE


_ELEMENTWISE = frozenset(
    """add sub rsub mul neg where masked_fill eq ne lt le gt ge logical_and logical_or logical_not
    bitwise_and bitwise_or bitwise_not _to_copy to clone contiguous alias detach maximum minimum
    dropout sigmoid tanh sin cos erf""".split()  # noqa: SIM905
)


def _keeps_columns(name: str, node: Node, operands: list[Value]) -> bool:
    """Whether column 0 of the result comes from column 0 of the operands alone."""
    if name in _ELEMENTWISE:
        return True
    x = operands[0]
    rank = x.tensor_type.rank
    if not rank:
        return False
    at = node.attributes
    if name == "tril":
        return isinstance(at.get("diagonal", 0), int) and at.get("diagonal", 0) >= 0
    if name in ("slice", "select", "squeeze", "narrow"):
        dims = at.get("dim")
        last = dims is None or rank - 1 in {d % rank for d in _tuple(dims)}
        return not last or (name == "slice" and at.get("start") in (None, 0))
    if name == "unsqueeze":
        return bool(at["dim"] % (rank + 1) != rank)
    if name in ("expand", "broadcast_to", "view", "_unsafe_view", "reshape"):
        return _last(x) == _last(node.results[0])
    if name == "transpose":
        return rank - 1 not in {at["dim0"] % rank, at["dim1"] % rank}
    if name == "permute":
        return bool(at["dims"][-1] % rank == rank - 1)
    return name == "cat"  # column 0 of the first that is not empty: of one of them


def _tuple(x: object) -> tuple[int, ...]:
    return x if isinstance(x, tuple) else (x,)


def _last(value: Value) -> object:
    shape = value.tensor_type.shape
    return shape[-1] if shape else 1
