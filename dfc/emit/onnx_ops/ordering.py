"""Sorting, ranks, uniqueness."""

from __future__ import annotations

import math
from typing import Any

from dfc.emit.onnx_builder import Builder, Call, NoTranslation, Val
from dfc.emit.onnx_ops.arithmetic import work_dtype
from dfc.emit.onnx_ops.registry import translates
from dfc.emit.onnx_types import FLOATS, D


def sorted_with_index(
    b: Builder, x: Val, axis: int, size: Any, descending: bool
) -> tuple[Val, Val]:
    """A stable sort: ONNX Runtime's TopK gives equal elements in the order of their positions.

    NaN comes last ascending and first descending, as in PyTorch: a first stable sort by value with
    NaN replaced by infinity, then NaN separated from infinity by a second key.
    """
    key = b.cast(x, work_dtype(x.dtype))  # type: ignore[arg-type]
    k = b.vec(size)
    largest = int(descending)
    if key.dtype not in FLOATS:
        value, index = b.op("TopK", key, k, axis=axis, largest=largest, sorted=1, out=2)
        return value, index
    if key.dtype == D.FLOAT16:
        key = b.cast(key, D.FLOAT)
    nan = b.op("IsNaN", key)
    clean = b.op("Where", nan, b.like(math.inf, key), key)
    _, first = b.op("TopK", clean, k, axis=axis, largest=largest, sorted=1, out=2)
    flags = b.cast(b.op("GatherElements", b.cast(nan, D.INT32), first, axis=axis), D.FLOAT)
    _, second = b.op("TopK", flags, k, axis=axis, largest=largest, sorted=1, out=2)
    index = b.op("GatherElements", first, second, axis=axis)
    return b.op("GatherElements", x, index, axis=axis), index


@translates("sort", "sort.stable", "argsort", "argsort.stable", "msort")
def sort(b: Builder, x: Val, call: Call) -> Any:
    a = call.attributes
    rank = b.rank(x)
    if rank == 0:
        zero = b.const(0, D.INT64)
        return zero if "argsort" in call.op else [x, zero]
    axis = a.get("dim", 0 if "msort" in call.op else -1) % rank
    value, index = sorted_with_index(
        b, x, axis, b.type(x).shape[axis], bool(a.get("descending", False))
    )
    if "argsort" in call.op:
        return index
    return value if "msort" in call.op else [value, index]


@translates("topk")
def topk(b: Builder, x: Val, k: Any, dim: int, largest: bool, call: Call) -> list[Val]:
    rank = b.rank(x)
    if rank == 0:
        return [x, b.const(0, D.INT64)]
    axis = dim % rank
    if x.dtype not in FLOATS:
        work = b.cast(x, work_dtype(x.dtype))  # type: ignore[arg-type]
        return b.op("TopK", work, b.vec(k), axis=axis, largest=int(largest), sorted=1, out=2)
    # NaN counts as the largest number
    work = b.cast(x, D.FLOAT) if x.dtype == D.FLOAT16 else x
    clean = b.op("Where", b.op("IsNaN", work), b.like(math.inf, work), work)
    _, index = b.op("TopK", clean, b.vec(k), axis=axis, largest=int(largest), sorted=1, out=2)
    return [b.op("GatherElements", x, index, axis=axis), index]


@translates("kthvalue", "median", "median.dim", "nanmedian", "mode")
def kthvalue(b: Builder, x: Val, call: Call) -> Any:
    base = call.op.split(".")[1]
    if base in ("nanmedian", "mode"):
        raise NoTranslation("")
    a = call.attributes
    whole = call.op == "aten.median.default"
    if whole:
        x = b.reshape(x, [-1])
        size: Any = b.type(call.operands[0]).numel  # type: ignore[arg-type]
        axis = 0
    else:
        if b.rank(x) == 0:
            return [x, b.const(0, D.INT64)]
        axis = a["dim"] % b.rank(x)
        size = b.type(x).shape[axis]
    k = a["k"] - 1 if base == "kthvalue" else (size - 1) // 2
    value, index = sorted_with_index(b, x, axis, size, False)
    at = b.op("Gather", value, b.lift(k), axis=axis)
    where = b.op("Gather", index, b.lift(k), axis=axis)
    if base == "median" and x.dtype in FLOATS:
        # a NaN anywhere wins, at its first place
        flags = b.cast(b.op("IsNaN", x), D.INT32)
        has = b.cast(b.op("ReduceMax", flags, [axis], keepdims=0), D.BOOL)
        first = b.op("ArgMax", flags, axis=axis, keepdims=0)
        at = b.op("Where", has, b.like(math.nan, at), at)
        where = b.op("Where", has, first, where)
    if whole:
        return at
    if a.get("keepdim"):
        at, where = b.unsqueeze(at, axis), b.unsqueeze(where, axis)
    return [at, where]


@translates("_unique2", "unique_consecutive", "unique_dim")
def unique(b: Builder, x: Val, call: Call) -> list[Val | None]:
    a = call.attributes
    base = call.op.split(".")[1]
    if base == "unique_consecutive":
        return _consecutive(b, x, call)
    axis = a["dim"] % b.rank(x) if base == "unique_dim" else None
    work = b.cast(x, work_dtype(x.dtype))  # type: ignore[arg-type]
    value, _, inverse, counts = b.op("Unique", work, axis=axis, sorted=1, out=4)
    for v in (inverse, counts):
        v.dtype = D.INT64
    if axis is None:
        inverse = b.op("Reshape", inverse, b.op("Shape", x))
    empty = b.op("Reshape", b.op("Slice", counts, [0], [0], [0]), [0], allowzero=1)
    return [
        value,
        inverse if a.get("return_inverse") or base == "unique_dim" else empty,
        counts if a.get("return_counts") else empty,
    ]


def _consecutive(b: Builder, x: Val, call: Call) -> list[Val | None]:
    """Runs of equal elements: each start is an element unlike the one before."""
    a = call.attributes
    if a.get("dim") is not None and b.rank(x) != 1:
        raise NoTranslation("")
    flat = b.reshape(x, [-1])
    differ = b.op("Not", b.op("Equal", b.slice(flat, 0, 1, 2**63 - 1), b.slice(flat, 0, 0, -1)))
    first = b.op("Expand", b.const(True, D.BOOL), b.op("Min", b.op("Shape", flat), [1]))
    starts = b.op("Concat", first, differ, axis=0)
    value = b.op("Compress", flat, starts, axis=0)
    group = b.op("Sub", b.op("CumSum", b.cast(starts, D.INT64), 0), 1)
    inverse = b.op("Reshape", group, b.op("Shape", x))
    zeros = b.op("Expand", b.const(0, D.INT64), b.op("Shape", value))
    ones = b.op("Expand", b.const(1, D.INT64), b.op("Shape", flat))
    counts = b.op("ScatterElements", zeros, group, ones, axis=0, reduction="add")
    empty = b.op("Slice", counts, [0], [0], [0])
    return [
        value, inverse if a.get("return_inverse") else empty,
        counts if a.get("return_counts") else empty,
    ]  # fmt: skip
