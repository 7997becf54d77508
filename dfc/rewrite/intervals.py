"""What values a tensor may hold: bounds that a rule can rely on, such as "this mask is finite".

A fused attention gives 0 where every score of a row is -inf; the softmax it replaces gives NaN. The
two agree wherever the mask is finite, which most masks are: `where(keep, 0, -3.4e38)`. This is
the small interval analysis that sees it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dfc.ir.graph import Node, Parameter, Value
from dfc.ir.types import DType, TensorType

MAX_DEPTH = 64  # nodes back; beyond, nothing is known
MAX_READ = 1 << 26  # elements of a parameter that are looked at


@dataclass(frozen=True)
class Interval:
    """low <= x <= high for every element x, unless `nan` and x is NaN."""

    low: float
    high: float
    nan: bool = False

    @property
    def finite(self) -> bool:
        return not self.nan and math.isfinite(self.low) and math.isfinite(self.high)

    def __or__(self, other: Interval) -> Interval:
        return Interval(min(self.low, other.low), max(self.high, other.high), self.nan or other.nan)


ANY = Interval(-math.inf, math.inf, nan=True)
BOOL = Interval(0.0, 1.0)


def interval(value: Value | None, memo: dict[Value, Interval] | None = None) -> Interval:
    """Bounds of a value, ANY when nothing is known. Sound under rounding in the value's dtype.

    Cost:  linear in the nodes behind the value, at most MAX_DEPTH back; `memo` is shared by calls.
    """
    return _of(value, {} if memo is None else memo, MAX_DEPTH)


def _of(value: Value | None, memo: dict[Value, Interval], depth: int) -> Interval:
    if value is None or depth == 0:
        return ANY
    found = memo.get(value)
    if found is None:
        found = _bounded(value, _read(value, memo, depth))
        memo[value] = found
    return found


def _read(value: Value, memo: dict[Value, Interval], depth: int) -> Interval:
    if isinstance(value, Parameter):
        return _parameter(value)
    node = value.node
    if node is None or not isinstance(value.type, TensorType):
        return ANY
    name = node.op.removeprefix("aten.").partition(".")[0]
    rule = _RULES.get(name) if node.op.startswith("aten.") else None
    if rule is None:
        return ANY
    arguments = [_of(v, memo, depth - 1) for v in node.operands]
    return rule(node, arguments)


def _bounded(value: Value, found: Interval) -> Interval:
    """What the dtype allows, and where it rounds to infinity."""
    if not isinstance(value.type, TensorType):
        return found
    dtype = value.type.dtype
    if dtype.name == "bool":
        return BOOL
    if dtype.is_float:
        # Rounding is monotone, so rounded bounds bound the rounded values, overflow included.
        return Interval(_rounded(found.low, dtype), _rounded(found.high, dtype), found.nan)
    if found is ANY or not found.finite:
        return Interval(-math.inf, math.inf)  # integers know no NaN
    return found


def _rounded(x: float, dtype: DType) -> float:
    import torch

    return float(torch.tensor(x, dtype=torch.float64).to(dtype.to_torch()))


def _parameter(p: Parameter) -> Interval:
    import torch

    if p.data is None or p.kind == "state" or not isinstance(p.type, TensorType):
        return ANY
    if not isinstance(p.type.numel, int) or not 0 < p.type.numel <= MAX_READ:
        return ANY
    data = p.data.tensor()
    if data.dtype == torch.bool or data.is_complex():
        return BOOL if data.dtype == torch.bool else ANY
    if bool(torch.isnan(data).any()) if data.is_floating_point() else False:
        return ANY
    low, high = torch.aminmax(data)
    return Interval(float(low), float(high))


Rule = Callable[[Node, Sequence[Interval]], Interval]


def _join(node: Node, given: Sequence[Interval]) -> Interval:
    return _union(given)


def _union(given: Sequence[Interval]) -> Interval:
    if not given:
        return ANY
    found = given[0]
    for g in given[1:]:
        found = found | g
    return found


def _dropout(node: Node, given: Sequence[Interval]) -> Interval:
    return ANY if node.attributes.get("train", True) else given[0]


def _first(node: Node, given: Sequence[Interval]) -> Interval:
    return given[0] if given else ANY


def _number(node: Node, name: str) -> Interval | None:
    x = node.attributes.get(name)
    if isinstance(x, bool):
        return Interval(float(x), float(x))
    if isinstance(x, (int, float)):
        return ANY if x != x else Interval(float(x), float(x))
    return None


def _where(node: Node, given: Sequence[Interval]) -> Interval:
    """The condition decides, it does not mix: only the two branches count."""
    branches = list(given[1:])
    for name in ("self", "other"):
        constant = _number(node, name)
        if constant is not None:
            branches.append(constant)
    return _union(branches) if len(branches) == 2 else ANY


def _masked_fill(node: Node, given: Sequence[Interval]) -> Interval:
    value = _number(node, "value") or (given[2] if len(given) > 2 else ANY)
    return given[0] | value


def _full(node: Node, given: Sequence[Interval]) -> Interval:
    return _number(node, "fill_value") or ANY


def _constant(low: float, high: float) -> Rule:
    return lambda node, given: Interval(low, high)


def _bounded_function(low: float, high: float) -> Rule:
    """A function into [low, high] that keeps NaN."""
    return lambda node, given: Interval(low, high, nan=any(g.nan for g in given))


def _softmax(node: Node, given: Sequence[Interval]) -> Interval:
    return Interval(0.0, 1.0, nan=not given[0].finite)


def _two(node: Node, given: Sequence[Interval]) -> tuple[Interval, Interval]:
    second = given[1] if len(given) > 1 else (_number(node, "other") or ANY)
    return given[0], second


def _add(node: Node, given: Sequence[Interval]) -> Interval:
    a, b = _two(node, given)
    alpha = node.attributes.get("alpha", 1)
    if not isinstance(alpha, (int, float)):
        return ANY
    return _sum(a, _scaled(b, float(alpha)))


def _sub(node: Node, given: Sequence[Interval]) -> Interval:
    a, b = _two(node, given)
    alpha = node.attributes.get("alpha", 1)
    if not isinstance(alpha, (int, float)):
        return ANY
    return _sum(a, _scaled(b, -float(alpha)))


def _rsub(node: Node, given: Sequence[Interval]) -> Interval:
    a, b = _two(node, given)
    if node.attributes.get("alpha", 1) != 1:
        return ANY
    return _sum(b, _scaled(a, -1.0))


def _sum(a: Interval, b: Interval) -> Interval:
    if not (a.finite and b.finite):
        return ANY
    return Interval(a.low + b.low, a.high + b.high)


def _scaled(a: Interval, by: float) -> Interval:
    if not a.finite or not math.isfinite(by):
        return ANY
    slack = 1.0 if abs(by) == 1 else 1 + 2.0**-7  # the product may be rounded before the sum
    ends = sorted((a.low * by * slack, a.low * by, a.high * by, a.high * by * slack))
    return Interval(ends[0], ends[-1])


def _mul(node: Node, given: Sequence[Interval]) -> Interval:
    a, b = _two(node, given)
    if not (a.finite and b.finite):
        return ANY
    ends = [x * y for x in (a.low, a.high) for y in (b.low, b.high)]
    return Interval(min(ends), max(ends)) if all(map(math.isfinite, ends)) else ANY


def _neg(node: Node, given: Sequence[Interval]) -> Interval:
    return Interval(-given[0].high, -given[0].low, given[0].nan)


def _triangle(node: Node, given: Sequence[Interval]) -> Interval:
    return given[0] | Interval(0.0, 0.0)


def _cumsum(node: Node, given: Sequence[Interval]) -> Interval:
    """At most as many terms as a tensor may have elements."""
    return _scaled(given[0], 2.0**46) | given[0]


def _arange(node: Node, given: Sequence[Interval]) -> Interval:
    ends = [_number(node, name) for name in ("start", "end")]
    known = [e for e in ends if e is not None]
    if len(known) != sum(name in node.attributes for name in ("start", "end")):
        return ANY
    return _union([*known, Interval(0.0, 0.0)])


_VIEWS = (
    "view _unsafe_view reshape expand expand_as transpose permute t slice select narrow squeeze "
    "unsqueeze flatten unflatten clone contiguous alias detach unbind split split_with_sizes chunk "
    "repeat repeat_interleave tile roll flip movedim as_strided _to_copy to amax amin "
    "index_select gather embedding index lift_fresh_copy broadcast_to tensor_split"
)
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_VIEWS.split(), _first),
    **dict.fromkeys(("cat", "stack", "maximum", "minimum"), _join),
    "dropout": _dropout,
    "where": _where,
    "masked_fill": _masked_fill,
    "full": _full,
    "new_full": _full,
    "full_like": _full,
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _constant(0.0, 0.0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _constant(1.0, 1.0)),
    **dict.fromkeys(("sigmoid",), _bounded_function(0.0, 1.0)),
    **dict.fromkeys(("tanh", "erf"), _bounded_function(-1.0, 1.0)),
    **dict.fromkeys(("sin", "cos"), lambda n, g: Interval(-1.0, 1.0, nan=not g[0].finite)),
    "softmax": _softmax,
    "_softmax": _softmax,
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "mul": _mul,
    "neg": _neg,
    "triu": _triangle,
    "tril": _triangle,
    "arange": _arange,
    "cumsum": _cumsum,
}
