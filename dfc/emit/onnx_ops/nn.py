"""Layers: linear ones, activations and embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from dfc.emit.onnx_builder import Builder, Call, NoTranslation, Val
from dfc.emit.onnx_ops.registry import translates
from dfc.emit.onnx_types import D, onnx_dtype


@translates("linear")
def linear(b: Builder, x: Val, weight: Val, bias: Val | None) -> Val:
    """Gemm for a batch of vectors, else MatMul and Add: ONNX Runtime folds the transpose."""
    plain = x.dtype in (D.FLOAT, D.DOUBLE)
    if b.rank(x) == 2 and b.rank(weight) == 2 and plain and bias is not None:
        return b.op("Gemm", x, weight, bias, transB=1)
    key = ("transposed", id(weight))
    turned = b.lookup(key)
    if turned is None:
        turned = b.transpose(weight, [1, 0]) if b.rank(weight) == 2 else weight
        b.shared[key] = turned
    found = b.op("MatMul", x, turned)
    return found if bias is None else b.op("Add", found, bias)


@translates("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner")
def matmul(b: Builder, x: Val, call: Call) -> Val:
    first, second = list(call.values)
    dtype = onnx_dtype(call.result)
    if dtype not in (D.FLOAT, D.DOUBLE, D.FLOAT16, D.INT32, D.INT64):
        first, second = b.cast(first, D.INT32), b.cast(second, D.INT32)
    if call.op == "aten.inner.default" and b.rank(call.operands[1]) > 1:  # type: ignore[arg-type]
        raise NoTranslation("")
    # ONNX Runtime's fusions mistake a transposed matrix times a vector: give it a column
    left = b.rank(call.operands[0]) == 1  # type: ignore[arg-type]
    right = b.rank(call.operands[1]) == 1  # type: ignore[arg-type]
    first = b.unsqueeze(first, 0) if left else first
    second = b.unsqueeze(second, 1) if right else second
    found = b.op("MatMul", first, second)
    if left and right:
        return b.reshape(found, [])
    return b.squeeze(found, -2 if left else -1) if left or right else found


@translates("transformers.grouped_mm_fallback", "_grouped_mm")
def grouped_matmul(b: Builder, x: Val, call: Call) -> Val:
    """Rows sorted by group, each group times its matrix; rows after the last group are zeros."""
    _, weight, offsets = call.operands[:3]
    assert isinstance(weight, Val) and isinstance(offsets, Val)
    groups = b.type(weight).shape[0]
    if not isinstance(groups, int) or b.rank(x) != 2 or b.rank(weight) != 3:
        raise b.refuse("a grouped product needs a fixed number of groups, and rows of vectors")
    columns = b.type(weight).shape[2]
    return by_group(
        b, x, offsets, groups, columns,
        lambda g, own: b.op("MatMul", own(x), b.op("Gather", weight, g, axis=0)),
    )  # fmt: skip


def by_group(
    b: Builder, x: Val, ends: Val, groups: int, columns: Any,
    product: Callable[[int, Callable[[Val], Val]], Val],
) -> Val:  # fmt: skip
    """What `product` makes of each group, by its number and what takes its rows of a value; rows
    after the last group are zeros.
    """
    parts = []
    ends, start = b.cast(ends, D.INT64), b.array(np.zeros(1, np.int64))
    for g in range(groups):
        end = b.op("Slice", ends, [g], [g + 1], [0])
        parts.append(product(g, partial(_rows_between, b, start, end)))
        start = end
    rest = _rows_between(b, start, b.array(np.array([2**63 - 1])), x)
    zeros = b.op("Expand", b.like(0.0, x), b.op("Concat", b.op("Shape", rest, start=0, end=1),
                 b.vec(columns), axis=0))  # fmt: skip
    return b.op("Concat", *parts, zeros, axis=0)


def _rows_between(b: Builder, start: Val, end: Val, x: Val) -> Val:
    return b.op("Slice", x, start, end, [0])


@translates("addmm", "baddbmm")
def addmm(b: Builder, x: Val, beta: Any, alpha: Any, call: Call) -> Val:
    _, first, second = list(call.values)
    if x.dtype in (D.FLOAT, D.DOUBLE) and ".addmm." in call.op:
        return b.op("Gemm", first, second, x, alpha=float(alpha), beta=float(beta))
    found = b.op("MatMul", first, second)
    if alpha != 1:
        found = b.op("Mul", found, b.like(alpha, found))
    if beta == 0:
        return found
    return b.op("Add", found, x if beta == 1 else b.op("Mul", x, b.like(beta, x)))


@translates("gelu")
def gelu(b: Builder, x: Val, approximate: str) -> Val:
    if x.dtype == D.DOUBLE and approximate == "none":
        from dfc.emit.onnx_ops.arithmetic import erf64

        half = erf64(b, b.op("Mul", x, b.like(math.sqrt(0.5), x)))
        factor = b.op("Add", half, b.like(1.0, x))
        return b.op("Mul", b.op("Mul", x, b.like(0.5, x)), factor)
    return b.op("Gelu", x, approximate=approximate)


@translates("silu")
def silu(b: Builder, x: Val) -> Val:
    return b.op("Mul", x, b.op("Sigmoid", x))


@translates("softmax.int", "_softmax", "special_softmax", "log_softmax.int", "_log_softmax")
def softmax(b: Builder, x: Val, dim: int, call: Call) -> Val:
    x = b.cast(x, onnx_dtype(call.result))
    if call.result.rank == 0:
        zero = b.op("Sub", x, x)
        return zero if "log" in call.op else b.op("Exp", zero)
    return b.op("LogSoftmax" if "log_softmax" in call.op else "Softmax", x, axis=dim)


@translates("softplus")
def softplus(b: Builder, x: Val, beta: Any, threshold: Any) -> Val:
    """log(1 + exp(x)), and x itself above the threshold."""
    scaled = x if beta == 1 else b.op("Mul", x, b.like(beta, x))
    value = b.op("Softplus", scaled)
    if beta != 1:
        value = b.op("Div", value, b.like(beta, x))
    return b.op("Where", b.op("Greater", scaled, b.like(threshold, x)), x, value)


@translates("embedding")
def embedding(b: Builder, weight: Val, indices: Val) -> Val:
    return b.op("Gather", weight, indices, axis=0)
