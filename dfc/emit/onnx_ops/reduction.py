"""Reductions and scans over axes, with PyTorch's element types and what empty axes give."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from dfc.emit.onnx_builder import Builder, Call, NoTranslation, Val
from dfc.emit.onnx_ops.arithmetic import convert, work_dtype
from dfc.emit.onnx_ops.registry import translates
from dfc.emit.onnx_types import FLOATS, D, onnx_dtype
from dfc.ir.expr import Expr

_UNBACKED = re.compile(r"u[0-9]+\Z")


def axes_of(dim: Any, rank: int) -> list[int]:
    """The axes that a `dim` argument means: none given, all of them."""
    if dim is None or dim == ():
        return list(range(rank))
    dims = dim if isinstance(dim, tuple) else (dim,)
    return sorted(d % rank for d in dims) if rank else []


def reduce(b: Builder, kind: str, x: Val, axes: Sequence[int], keepdim: bool) -> Val:
    if not axes:
        return x
    return b.op(kind, x, list(axes), keepdims=int(bool(keepdim)))


def numbers(b: Builder, x: Val, call: Call) -> Val:
    """The operand in the element type in which the result is computed."""
    return convert(b, x, work_dtype(onnx_dtype(call.result)))


@translates("sum", "sum.dim_IntList")
def sum_(b: Builder, x: Val, call: Call) -> Val:
    a = call.attributes
    wide = x.dtype in (D.INT64, D.UINT64, D.UINT32)
    x = numbers(b, x, call)
    axes, keepdim = axes_of(a.get("dim"), _rank(b, call)), a.get("keepdim", False)
    return exact_sum(b, x, axes, keepdim) if wide else reduce(b, "ReduceSum", x, axes, keepdim)


def exact_sum(b: Builder, x: Val, axes: Sequence[int], keepdim: bool) -> Val:
    """ONNX Runtime adds int64 in float64, right to 2^53 only: so each half by itself."""
    if x.dtype != D.INT64 or not axes:
        return reduce(b, "ReduceSum", x, axes, keepdim)
    half = 2**32
    low = b.op("Mod", x, half)
    high = b.op("Div", b.op("Sub", x, low), half)
    top = reduce(b, "ReduceSum", high, axes, keepdim)
    return b.op("Add", b.op("Mul", top, half), reduce(b, "ReduceSum", low, axes, keepdim))


def _rank(b: Builder, call: Call) -> int:
    x = call.operands[0]
    return b.rank(x)  # type: ignore[arg-type]


@translates("mean", "mean.dim")
def mean(b: Builder, x: Val, call: Call) -> Val:
    a = call.attributes
    shape = b.type(x).shape
    x = numbers(b, x, call)
    axes = axes_of(a.get("dim"), len(shape))
    if any(shape[i] == 0 or _may_be_empty(shape[i]) for i in axes):
        # ONNX Runtime's mean of nothing is not NaN
        count: Any = 1
        for i in axes:
            count = count * shape[i]
        total = reduce(b, "ReduceSum", x, axes, a.get("keepdim", False))
        return b.op("Div", total, b.like(count, total))
    if len(shape) == 4 and sorted(axes) == [2, 3] and x.dtype == D.FLOAT:
        whole = b.op("GlobalAveragePool", x)  # ONNX Runtime has it in integers too
        return whole if a.get("keepdim", False) else b.squeeze(b.squeeze(whole, 3), 2)
    return reduce(
        b, "ReduceMean", x, axes_of(a.get("dim"), _rank(b, call)), a.get("keepdim", False)
    )


def _may_be_empty(size: Any) -> bool:
    """Sizes that only the data tell."""
    return isinstance(size, Expr) and any(_UNBACKED.match(s) for s in size.symbols)


@translates("prod", "prod.dim_int")
def prod(b: Builder, x: Val, call: Call) -> Val:
    a = call.attributes
    x = numbers(b, x, call)
    return reduce(
        b, "ReduceProd", x, axes_of(a.get("dim"), _rank(b, call)), a.get("keepdim", False)
    )


@translates("amax", "amin", "max", "min")
def amax(b: Builder, x: Val, call: Call) -> Val:
    a = call.attributes
    kind = "ReduceMax" if call.op.split(".")[1].endswith("max") else "ReduceMin"
    axes = axes_of(a.get("dim"), _rank(b, call))
    return extreme(b, kind, numbers(b, x, call), axes, a.get("keepdim", False))


def extreme(b: Builder, kind: str, x: Val, axes: Sequence[int], keepdim: bool) -> Val:
    """Largest or smallest; NaN wins, which ONNX Runtime's reduction does not promise."""
    found = reduce(b, kind, x, axes, keepdim)
    if x.dtype not in FLOATS or not axes:
        return found
    flags = b.cast(b.op("IsNaN", x), D.INT32)
    any_nan = b.cast(reduce(b, "ReduceMax", flags, axes, keepdim), D.BOOL)
    return b.op("Where", any_nan, b.like(math.nan, found), found)


@translates("max.dim", "min.dim")
def max_dim(b: Builder, x: Val, dim: int, keepdim: bool, call: Call) -> list[Val]:
    rank = b.rank(x)
    if rank == 0:
        return [x, b.const(0, D.INT64)]
    kind = "Max" if ".max." in call.op else "Min"
    work = numbers(b, x, call)
    index = arg_extreme(b, "Arg" + kind, work, dim % rank, True)
    value = b.op("GatherElements", work, index, axis=dim % rank)
    if not keepdim:
        index, value = b.squeeze(index, dim % rank), b.squeeze(value, dim % rank)
    return [value, index]


def arg_extreme(b: Builder, kind: str, x: Val, axis: int, keepdim: bool) -> Val:
    """The first position of the extreme; the first NaN where there is one."""
    found = b.op(kind, x, axis=axis, keepdims=int(keepdim))
    if x.dtype not in FLOATS:
        return found
    flags = b.cast(b.op("IsNaN", x), D.INT32)
    first = b.op("ArgMax", flags, axis=axis, keepdims=int(keepdim))
    any_nan = b.cast(b.op("ReduceMax", flags, [axis], keepdims=int(keepdim)), D.BOOL)
    return b.op("Where", any_nan, first, found)


@translates("argmax", "argmin")
def argmax(b: Builder, x: Val, dim: Any, keepdim: bool, call: Call) -> Val:
    kind = "ArgMax" if "max" in call.op else "ArgMin"
    rank = b.rank(x)
    work = b.cast(x, work_dtype(x.dtype))  # type: ignore[arg-type]
    if dim is None or rank == 0:
        flat = b.reshape(work, [-1])
        found = arg_extreme(b, kind, flat, 0, False)
        return b.reshape(found, [1] * rank) if keepdim and rank else found
    return arg_extreme(b, kind, work, dim % rank, bool(keepdim))


@translates("any", "any.dim", "any.dims", "all", "all.dim", "all.dims")
def any_(b: Builder, x: Val, call: Call) -> Val:
    a = call.attributes
    flags = b.cast(b.cast(x, D.BOOL), D.INT32)
    axes = axes_of(a.get("dim"), b.rank(x))
    kind = "ReduceMax" if ".any." in call.op else "ReduceMin"
    if not all(isinstance(s, int) and s > 0 for s in b.type(x).shape):
        # the extreme of an empty axis is no number: count instead
        if kind == "ReduceMax":
            total = reduce(b, "ReduceSum", flags, axes, a.get("keepdim", False))
            return b.op("Greater", total, b.like(0, total))
        missing = b.op("Sub", b.like(1, flags), flags)
        total = reduce(b, "ReduceSum", missing, axes, a.get("keepdim", False))
        return b.op("Equal", total, b.like(0, total))
    return b.cast(reduce(b, kind, flags, axes, a.get("keepdim", False)), D.BOOL)


@translates("var.correction", "var.dim", "var", "std.correction", "std.dim", "std",
            "var_mean.correction", "std_mean.correction", "var_mean.dim", "std_mean.dim",
            "var_mean", "std_mean")  # fmt: skip
def variance(b: Builder, x: Val, call: Call) -> Any:
    a = call.attributes
    axes = axes_of(a.get("dim"), b.rank(x))
    correction = a.get("correction", 1)
    if "unbiased" in a:
        correction = 1 if a["unbiased"] else 0
    correction = 1 if correction is None else correction
    keepdim = bool(a.get("keepdim", False))
    shape = b.type(x).shape
    center = reduce(b, "ReduceMean", x, axes, True)
    gap = b.op("Sub", x, center)
    total = reduce(b, "ReduceSum", b.op("Mul", gap, gap), axes, keepdim)
    count: Any = 1
    for i in axes:
        count = count * shape[i]
    n = b.const(count, x.dtype)  # type: ignore[arg-type]
    divisor = b.op("Max", b.op("Sub", n, b.like(float(correction), x)), b.like(0.0, x))
    value = b.op("Div", total, divisor)
    if ".std" in call.op:
        value = b.op("Sqrt", value)
    if "_mean" not in call.op:
        return value
    return [value, center if keepdim or not axes else b.squeeze(center, *axes)]


@translates("logsumexp", "special_logsumexp")
def logsumexp(b: Builder, x: Val, dim: Any, keepdim: bool, call: Call) -> Val:
    x = b.cast(x, onnx_dtype(call.result))
    axes = axes_of(dim, b.rank(call.operands[0]))  # type: ignore[arg-type]
    top = reduce(b, "ReduceMax", x, axes, True)
    infinite = b.op("Equal", b.op("Abs", top), b.like(math.inf, x))
    top = b.op("Where", infinite, b.like(0.0, x), top)
    total = reduce(b, "ReduceSum", b.op("Exp", b.op("Sub", x, top)), axes, True)
    value = b.op("Add", b.op("Log", total), top)
    return value if keepdim or not axes else b.squeeze(value, *axes)


@translates("linalg_vector_norm", "norm.ScalarOpt_dim", "norm.Scalar", "norm.ScalarOpt_dim_dtype",
            "norm.ScalarOpt_dtype")  # fmt: skip
def vector_norm(b: Builder, x: Val, call: Call) -> Val:
    a = call.attributes
    order = a.get("ord", a.get("p", 2))
    order = 2 if order is None else order
    x = b.cast(x, onnx_dtype(call.result))
    axes = axes_of(a.get("dim"), _rank(b, call))
    keepdim = bool(a.get("keepdim", False))
    size = b.op("Abs", x)
    if order == math.inf or order == -math.inf:
        return extreme(b, "ReduceMax" if order > 0 else "ReduceMin", size, axes, keepdim)
    if order == 0:
        count = b.cast(b.op("Not", b.op("Equal", x, b.like(0.0, x))), x.dtype)  # type: ignore[arg-type]
        return reduce(b, "ReduceSum", count, axes, keepdim)
    if order == 1:
        return reduce(b, "ReduceSum", size, axes, keepdim)
    if order == 2:
        return b.op("Sqrt", reduce(b, "ReduceSum", b.op("Mul", x, x), axes, keepdim))
    powered = b.op("Pow", size, b.like(float(order), x))
    return b.op("Pow", reduce(b, "ReduceSum", powered, axes, keepdim), b.like(1.0 / order, x))


# Scans along an axis


@translates("cumsum")
def cumsum(b: Builder, x: Val, dim: int, call: Call) -> Val:
    x = numbers(b, x, call)
    if _rank(b, call) == 0:
        return x
    return b.op("CumSum", x, dim % _rank(b, call))


def running(b: Builder, x: Val, axis: int, size: Any, steps: str) -> Val:
    """Products or extremes of everything up to each element, by doubling: log2(n) elementwise ops.

    After k steps an element covers the 2^k elements up to it. The number of steps must be known.
    """
    if not isinstance(size, int):
        raise NoTranslation("a running product or extreme needs a fixed length")
    shift = 1
    while shift < size:
        head = b.slice(x, axis, 0, shift)
        both = b.op(steps, b.slice(x, axis, shift, size), b.slice(x, axis, 0, size - shift))
        x = b.op("Concat", head, both, axis=axis)
        shift *= 2
    return x


@translates("cumprod")
def cumprod(b: Builder, x: Val, dim: int, call: Call) -> Val:
    rank = _rank(b, call)
    axis = dim % rank if rank else 0
    size = call.result.shape[axis] if rank else 1
    x = numbers(b, x, call)
    if rank == 0 or size == 0:
        return x
    if isinstance(size, int):
        return running(b, x, axis, size, "Mul")
    return scan_rows(b, x, axis, rank, call, "Mul")


def scan_rows(b: Builder, x: Val, axis: int, rank: int, call: Call, kind: str) -> Val:
    """A running op along an axis of any length: ONNX's Scan, a row at a time."""
    from onnxscript import ir

    front = b.transpose(x, [axis, *(i for i in range(rank) if i != axis)])
    first = b.op("Gather", front, 0, axis=0)
    neutral = b.op("Sub", first, first) if kind == "Add" else None
    start = neutral if neutral is not None else b.op("Expand", b.like(1, x), b.op("Shape", first))
    name = b.root.claim("running")
    inner = b.scope()
    so_far, row = b.value(), b.value()
    for v, n in ((so_far, "so_far"), (row, "row")):
        v.name = b.root.claim(f"{name}.{n}")
        assert x.dtype is not None
        v.dtype = x.dtype
    out = inner.op(kind, so_far, row)
    copied = inner.op("Identity", out)
    out.name, copied.name = b.root.claim(f"{name}.next"), b.root.claim(f"{name}.out")
    body = ir.Graph([so_far, row], [out, copied], nodes=inner.nodes, name=name)
    found = b.op("Scan", start, front, out=2, body=body, num_scan_inputs=1)[1]
    assert x.dtype is not None
    found.dtype = x.dtype
    back = [*range(1, axis + 1), 0, *range(axis + 1, rank)]
    return b.transpose(found, back)


@translates("cummax", "cummin")
def cummax(b: Builder, x: Val, dim: int, call: Call) -> list[Val]:
    """Extremes so far and where they were found: the last of equals, NaN from the first NaN on.

    Doubling over pairs of value and index.
    """
    rank = b.rank(x)
    if rank == 0:
        return [x, b.const(0, D.INT64)]
    axis = dim % rank
    size = b.type(x).shape[axis]
    work = b.cast(x, work_dtype(x.dtype))  # type: ignore[arg-type]
    if not isinstance(size, int):
        return _extreme_so_far(b, work, axis, rank, size, "cummax" in call.op)
    at = b.reshape(b.arange(size), [-1 if i == axis else 1 for i in range(rank)])
    at = b.op("Expand", at, b.op("Shape", x))
    better = "GreaterOrEqual" if "cummax" in call.op else "LessOrEqual"
    shift = 1
    while shift < size:
        old_v, old_i = b.slice(work, axis, 0, size - shift), b.slice(at, axis, 0, size - shift)
        new_v, new_i = b.slice(work, axis, shift, size), b.slice(at, axis, shift, size)
        take = b.op(better, new_v, old_v)
        if work.dtype in FLOATS:
            take = b.op(
                "Or", b.op("IsNaN", new_v), b.op("And", take, b.op("Not", b.op("IsNaN", old_v)))
            )
        v, i = b.op("Where", take, new_v, old_v), b.op("Where", take, new_i, old_i)
        work = b.op("Concat", b.slice(work, axis, 0, shift), v, axis=axis)
        at = b.op("Concat", b.slice(at, axis, 0, shift), i, axis=axis)
        shift *= 2
    return [work, at]


def _extreme_so_far(
    b: Builder, x: Val, axis: int, rank: int, size: Any, largest: bool
) -> list[Val]:
    """For a length that only the run tells: every element against all up to it, n x n."""
    perm = [i for i in range(rank) if i != axis] + [axis]
    rows = b.unsqueeze(b.transpose(x, perm), -2)  # *, 1, n
    line = b.arange(size)
    seen = b.op("LessOrEqual", line, b.unsqueeze(line, 1))  # row i sees columns up to i
    kind = "ReduceMax" if largest else "ReduceMin"
    hit: Val
    if x.dtype in FLOATS:
        nan = b.op("And", seen, b.op("IsNaN", rows))
        has = b.cast(b.op("ReduceMax", b.cast(nan, D.INT32), [-1], keepdims=1), D.BOOL)
        worst = b.like(-math.inf if largest else math.inf, x)
        clean = b.op("Where", b.op("And", seen, b.op("Not", b.op("IsNaN", rows))), rows, worst)
        top = b.op(kind, clean, [-1], keepdims=1)
        plain = b.op("And", seen, b.op("Equal", rows, top))
        hit = b.op("Or", b.op("And", has, nan), b.op("And", b.op("Not", has), plain))
        top = b.op("Where", has, b.like(math.nan, x), top)
    else:
        first = b.op("Gather", rows, [0], axis=-1)
        top = b.op(kind, b.op("Where", seen, rows, first), [-1], keepdims=1)
        hit = b.op("And", seen, b.op("Equal", rows, top))
    index = b.op("ReduceMax", b.op("Where", hit, line, -1), [-1], keepdims=0)
    back = [perm.index(i) for i in range(rank)]
    return [b.transpose(b.squeeze(top, -1), back), b.transpose(index, back)]


@translates("logcumsumexp")
def logcumsumexp(b: Builder, x: Val, dim: int, call: Call) -> Val:
    rank = b.rank(x)
    if rank == 0:
        return x
    axis = dim % rank
    top = b.op("ReduceMax", x, [axis], keepdims=1)
    total = b.op("CumSum", b.op("Exp", b.op("Sub", x, top)), axis)
    return b.op("Add", b.op("Log", total), top)
