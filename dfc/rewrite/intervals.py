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


Rule = Callable[[Node, Sequence[Interval]], Interval]
ANY = Interval(-math.inf, math.inf, nan=True)
BOOL = Interval(0.0, 1.0)
MOST = 2.0**46  # elements that a tensor may have
MODERATE = Interval(-1e6, 1e6)
FALSE, TRUE = Interval(0.0, 0.0), Interval(1.0, 1.0)


def interval(
    value: Value | None, memo: dict[Value, Interval] | None = None, *, moderate: bool = False
) -> Interval:
    """Bounds of a value, ANY when nothing is known. Sound under rounding in the value's dtype.

    With `moderate`, what products, convolutions, norms and lookups of activations give counts as
    at most 1e6: sound unless the model itself overflows on its way. A memo is for one mode.
    Cost:  linear in the nodes behind the value, at most MAX_DEPTH back; `memo` is shared by calls.
    """
    return _of(value, {} if memo is None else memo, MAX_DEPTH, moderate)


def _of(value: Value | None, memo: dict[Value, Interval], depth: int, moderate: bool) -> Interval:
    if value is None or depth == 0:
        return ANY
    found = memo.get(value)
    if found is None:
        found = bounded(value, _read(value, memo, depth, moderate))
        memo[value] = found
    return found


def _read(value: Value, memo: dict[Value, Interval], depth: int, moderate: bool) -> Interval:
    if isinstance(value, Parameter):
        return of_parameter(value)
    node = value.node
    if node is None or not isinstance(value.type, TensorType):
        return ANY
    if moderate and base_name(node) in _PRODUCTS:
        return MODERATE
    rule = rule_of(node)
    if rule is None:
        return ANY
    return rule(node, [_of(v, memo, depth - 1, moderate) for v in node.operands])


def base_name(node: Node) -> str:
    """`add` of `aten.add.Tensor`; nothing of other families."""
    return node.op.split(".")[1] if node.op.startswith("aten.") else ""


def rule_of(node: Node) -> Rule | None:
    """What is known of an op: bounds of its results from those of its operands."""
    return _RULES.get(base_name(node))


def bounded(value: Value, found: Interval) -> Interval:
    """What the dtype allows, and where it rounds to infinity."""
    if not isinstance(value.type, TensorType):
        return found
    dtype = value.type.dtype
    if dtype.name == "bool":
        return found if found in (TRUE, FALSE) else BOOL
    if dtype.is_float:
        # Rounding is monotone, so rounded bounds bound the rounded values, overflow included.
        return Interval(_rounded(found.low, dtype), _rounded(found.high, dtype), found.nan)
    if dtype.is_complex:
        return ANY
    return _whole(dtype, found)  # integers know no NaN


def _whole(dtype: DType, found: Interval) -> Interval:
    """Bounds within an integer type's own: beyond, a number may have wrapped around."""
    import torch

    limits = torch.iinfo(dtype.to_torch())
    if found.nan or found.low < limits.min or found.high > limits.max:
        return Interval(float(limits.min), float(limits.max))
    return found


def _dtype_name(node: Node) -> str:
    kind = node.results[0].type
    return kind.dtype.name if isinstance(kind, TensorType) else ""


def _rounded(x: float, dtype: DType) -> float:
    import torch

    return float(torch.tensor(x, dtype=torch.float64).to(dtype.to_torch()))


def of_parameter(p: Parameter, *, column: bool = False) -> Interval:
    """Bounds of a parameter's elements, or of those in its first column."""
    import torch

    if p.data is None or p.kind == "state" or not isinstance(p.type, TensorType):
        return ANY
    if not isinstance(p.type.numel, int) or not 0 < p.type.numel <= MAX_READ:
        return ANY
    data = p.data.tensor()
    if column and data.dim():
        data = data[..., 0]
    if data.is_complex():
        return ANY
    if data.dtype == torch.bool:
        return Interval(float(data.all()), float(data.any()))
    if bool(torch.isnan(data).any()) if data.is_floating_point() else False:
        return ANY
    low, high = torch.aminmax(data)
    return Interval(float(low), float(high))


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
    if isinstance(node.attributes.get("self"), (int, float)):
        branches.insert(0, _number(node, "self") or ANY)
    if isinstance(node.attributes.get("other"), (int, float)):
        branches.append(_number(node, "other") or ANY)
    return _chosen(given[0], *branches) if len(branches) == 2 else ANY


def _chosen(condition: Interval, yes: Interval, no: Interval) -> Interval:
    sure = _truth(condition)
    return yes | no if sure is None else yes if sure else no


def _masked_fill(node: Node, given: Sequence[Interval]) -> Interval:
    value = _number(node, "value") or (given[2] if len(given) > 2 else ANY)
    return _chosen(given[1], value, given[0])


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


def _div(node: Node, given: Sequence[Interval]) -> Interval:
    """By a number or by constants that are not near zero."""
    a, b = _two(node, given)
    if not (a.finite and b.finite) or node.attributes.get("rounding_mode") or b.low * b.high <= 0:
        return ANY
    ends = [x / y for x in (a.low, a.high) for y in (b.low, b.high)]
    return Interval(min(ends), max(ends)) if all(map(math.isfinite, ends)) else ANY


def _total(node: Node, given: Sequence[Interval]) -> Interval:
    """Of at most as many terms as a tensor may have elements."""
    return _cumsum(node, given) | FALSE


def _clamp(node: Node, given: Sequence[Interval]) -> Interval:
    """Between two numbers, NaN apart."""
    low, high = _number(node, "min"), _number(node, "max")
    if len(given) > 1 or ANY in (low, high):
        return ANY
    bottom = -math.inf if low is None else low.low
    top = math.inf if high is None else high.high
    ends = [min(max(x, bottom), top) for x in (given[0].low, given[0].high)]
    return Interval(ends[0], ends[1], given[0].nan)


def _padded(node: Node, given: Sequence[Interval]) -> Interval:
    return given[0] | (_number(node, "value") or FALSE)


def _nan_to_num(node: Node, given: Sequence[Interval]) -> Interval:
    """Finite, whatever it was; what stands in for NaN and infinities is a number or the largest."""
    kind = node.results[0].type
    if not isinstance(kind, TensorType) or not kind.dtype.is_float:
        return ANY
    import torch

    largest = torch.finfo(kind.dtype.to_torch()).max
    return Interval(-largest, largest)


def _neg(node: Node, given: Sequence[Interval]) -> Interval:
    return Interval(-given[0].high, -given[0].low, given[0].nan)


def _triangle(node: Node, given: Sequence[Interval]) -> Interval:
    return given[0] | Interval(0.0, 0.0)


def _cumsum(node: Node, given: Sequence[Interval]) -> Interval:
    """At most as many terms as a tensor may have elements."""
    return _scaled(given[0], MOST) | given[0]


def _arange(node: Node, given: Sequence[Interval]) -> Interval:
    start = _number(node, "start") or (None if "start" in node.attributes else FALSE)
    end, step = _number(node, "end"), node.attributes.get("step", 1)
    if start is None or not isinstance(step, (int, float)):
        return ANY
    if end is None:  # of open size
        return Interval(start.low, start.high + MOST * step) if step > 0 else ANY
    return start | end


# Comparisons and logic: true, false, or either


def _comparison(sure: Callable[[Interval, Interval], bool | None]) -> Rule:
    """`sure` tells whether it holds for all, for none (False), or cannot tell."""

    def apply(node: Node, given: Sequence[Interval]) -> Interval:
        a, b = _two(node, given)
        found = None if a.nan or b.nan else sure(a, b)
        return BOOL if found is None else TRUE if found else FALSE

    return apply


def _apart(a: Interval, b: Interval) -> bool:
    """Whether all of a is less than all of b, in whatever dtype the two are compared."""
    return b.low - a.high > 0.1 * max(abs(a.high), abs(b.low))


def _less(a: Interval, b: Interval) -> bool | None:
    return True if _apart(a, b) else False if b.high <= a.low else None


def _less_equal(a: Interval, b: Interval) -> bool | None:
    return True if a.high <= b.low else False if _apart(b, a) else None


def _equal(a: Interval, b: Interval) -> bool | None:
    if a.low == a.high == b.low == b.high and abs(a.low) <= 2.0**24:
        return True
    return False if _apart(a, b) or _apart(b, a) else None


def _opposite(x: bool | None) -> bool | None:
    return None if x is None else not x


def _truth(x: Interval) -> bool | None:
    if x.nan:
        return None
    return False if x == FALSE else True if x.low > 0 or x.high < 0 else None


def _logic(decide: Callable[[bool | None, bool | None], bool | None]) -> Rule:
    """A function of truth values; bitwise ops are one on booleans only."""

    def apply(node: Node, given: Sequence[Interval]) -> Interval:
        if _dtype_name(node) != "bool":
            return ANY
        found = decide(_truth(given[0]), _truth(given[1]) if len(given) > 1 else None)
        return BOOL if found is None else TRUE if found else FALSE

    return apply


def _and(a: bool | None, b: bool | None) -> bool | None:
    return False if False in (a, b) else None if None in (a, b) else True


def _or(a: bool | None, b: bool | None) -> bool | None:
    return True if True in (a, b) else None if None in (a, b) else False


_PRODUCTS = frozenset(
    """matmul bmm mm addmm baddbmm linear einsum convolution conv1d conv2d layer_norm rms_norm
    group_norm linalg_vector_norm scaled_dot_product_attention""".split()  # noqa: SIM905
)
_VIEWS = (
    "view _unsafe_view reshape expand expand_as transpose permute t slice select narrow squeeze "
    "unsqueeze flatten unflatten clone contiguous alias detach unbind split split_with_sizes chunk "
    "repeat repeat_interleave tile roll flip movedim as_strided _to_copy to amax amin "
    "index_select gather embedding index lift_fresh_copy broadcast_to tensor_split"
)
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_VIEWS.split(), _first),
    **dict.fromkeys(
        ("cat", "stack", "maximum", "minimum", "slice_scatter", "select_scatter"), _join
    ),
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
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), _clamp),
    **dict.fromkeys(("constant_pad_nd", "pad"), _padded),
    "nan_to_num": _nan_to_num,
    "div": _div,
    "sum": _total,
    "triu": _triangle,
    "tril": _triangle,
    "arange": _arange,
    "cumsum": _cumsum,
    "lt": _comparison(_less),
    "le": _comparison(_less_equal),
    "gt": _comparison(lambda a, b: _less(b, a)),
    "ge": _comparison(lambda a, b: _less_equal(b, a)),
    "eq": _comparison(_equal),
    "ne": _comparison(lambda a, b: _opposite(_equal(a, b))),
    **dict.fromkeys(("logical_and", "bitwise_and"), _logic(_and)),
    **dict.fromkeys(("logical_or", "bitwise_or"), _logic(_or)),
    **dict.fromkeys(("logical_not", "bitwise_not"), _logic(lambda a, b: _opposite(a))),
}
