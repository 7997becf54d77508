"""Comparisons, choices between values, and operators on bits and truth."""

from __future__ import annotations

import math
from typing import Any

from onnxscript import ir

from dfc.emit.onnx_builder import Builder, Call, NoTranslation, Val
from dfc.emit.onnx_ops.arithmetic import operand, promoted, result_work, work_dtype
from dfc.emit.onnx_ops.registry import translates
from dfc.emit.onnx_types import FLOATS, D, onnx_dtype

_COMPARE = {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater",
            "ge": "GreaterOrEqual", "ne": "Equal"}  # fmt: skip


@translates(*(f"{k}.{o}" for k in _COMPARE for o in ("Tensor", "Scalar")))
def compare(b: Builder, x: Any, other: Any, call: Call) -> Val:
    base = call.op.split(".")[1]
    dtype = promoted(b, x, other)
    if dtype != D.BOOL or base not in ("eq", "ne"):
        dtype = work_dtype(dtype)
    found = b.op(_COMPARE[base], operand(b, x, dtype), operand(b, other, dtype))
    return b.op("Not", found) if base == "ne" else found


@translates("maximum", "minimum", "max.other", "min.other")
def maximum(b: Builder, x: Val, other: Any, call: Call) -> Val:
    dtype = result_work(call)
    kind = "Max" if call.op.split(".")[1].startswith("max") else "Min"
    return extremum(b, kind, operand(b, x, dtype), operand(b, other, dtype))


def extremum(b: Builder, kind: str, x: Val, y: Val) -> Val:
    """The larger or smaller; NaN wins in both."""
    return b.op(kind, x, y)


@translates("fmax", "fmin")
def fmax(b: Builder, x: Val, other: Val, call: Call) -> Val:
    dtype = result_work(call)
    x, other = b.cast(x, dtype), b.cast(other, dtype)
    found = b.op("Max" if "fmax" in call.op else "Min", x, other)
    if dtype not in FLOATS:
        return found
    found = b.op("Where", b.op("IsNaN", other), x, found)
    return b.op("Where", b.op("IsNaN", x), other, found)


@translates("clamp", "clamp.Tensor", "clip", "clip.Tensor", "clamp_min", "clamp_max",
            "clamp_min.Tensor", "clamp_max.Tensor")  # fmt: skip
def clamp(b: Builder, x: Val, call: Call) -> Val:
    """Lower bound first, so that the upper one wins where they cross; NaN stays NaN."""
    dtype = result_work(call)
    from dfc.emit.onnx_nodes import onnx_info

    given = dict(call.attributes)
    given.update(
        {k: v for k, v in zip(onnx_info(call.op), call.operands, strict=False) if v is not None}
    )
    x = b.cast(x, dtype)
    low, high = given.get("min"), given.get("max")
    if _clips(low, high, dtype):
        return b.op("Clip", x, b.const(low, dtype), b.const(high, dtype))
    if low is not None:
        x = extremum(b, "Max", x, operand(b, low, dtype))
    if high is not None:
        x = extremum(b, "Min", x, operand(b, high, dtype))
    return x


@translates("hardtanh", "relu6")
def hardtanh(b: Builder, x: Val, call: Call) -> Val:
    dtype = result_work(call)
    low = call.attributes.get("min_val", 0)
    high = call.attributes.get("max_val", 6)
    x, lowest, highest = b.cast(x, dtype), b.const(low, dtype), b.const(high, dtype)
    if _clips(low, high, dtype):
        return b.op("Clip", x, lowest, highest)
    return extremum(b, "Min", extremum(b, "Max", x, lowest), highest)


def _clips(low: Any, high: Any, dtype: ir.DataType) -> bool:
    """Whether `Clip` does it: ONNX Runtime fuses that into convolutions. NaN stays NaN."""
    numbers = isinstance(low, int | float) and isinstance(high, int | float)
    return numbers and dtype in (D.FLOAT, D.DOUBLE) and bool(low <= high)


@translates("relu")
def relu(b: Builder, x: Val, call: Call) -> Val:
    dtype = result_work(call)
    if dtype in FLOATS:
        return b.op("Relu", x)
    return b.op("Max", b.cast(x, dtype), b.const(0, dtype))


@translates("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def where(b: Builder, condition: Val, self: Any, other: Any, call: Call) -> Val:
    dtype = onnx_dtype(call.result)
    dtype = work_dtype(dtype)
    return b.op(
        "Where", b.cast(condition, D.BOOL), operand(b, self, dtype), operand(b, other, dtype)
    )


@translates("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(b: Builder, x: Val, mask: Val, value: Any, call: Call) -> Val:
    return where(b, mask, value, x, call)


_BITWISE = {"bitwise_and": "And", "bitwise_or": "Or", "bitwise_xor": "Xor",
            "__and__": "And", "__or__": "Or", "__xor__": "Xor"}  # fmt: skip


@translates(*(f"{k}.{o}" for k in _BITWISE for o in ("Tensor", "Scalar")))
def bitwise(b: Builder, x: Any, other: Any, call: Call) -> Val:
    dtype = onnx_dtype(call.result)
    kind = _BITWISE[call.op.split(".")[1]]
    prefix = "" if dtype == D.BOOL else "Bitwise"
    return b.op(prefix + kind, operand(b, x, dtype), operand(b, other, dtype))


@translates("bitwise_not")
def bitwise_not(b: Builder, x: Val) -> Val:
    return b.op("Not" if x.dtype == D.BOOL else "BitwiseNot", x)


@translates("logical_and", "logical_or", "logical_xor", "logical_not")
def logical(b: Builder, x: Val, call: Call) -> Val:
    kind = call.op.split(".")[1].removeprefix("logical_").capitalize()
    args = [b.cast(v, D.BOOL) for v in call.values]
    return b.op(kind, *args)


@translates("bitwise_left_shift.Tensor", "bitwise_left_shift.Tensor_Scalar", "__lshift__.Scalar",
            "__lshift__.Tensor", "bitwise_right_shift.Tensor",
            "bitwise_right_shift.Tensor_Scalar", "__rshift__.Scalar",
            "__rshift__.Tensor")  # fmt: skip
def shift(b: Builder, x: Any, other: Any, call: Call) -> Val:
    """Shifts of signed integers by products and floor divisions: ONNX shifts unsigned ones only.

    A shift by the width or more gives 0, and -1 for a negative number shifted right.
    """
    bits = call.result.dtype.bits
    if call.result.dtype.is_float:
        raise NoTranslation("")
    if call.result.dtype.kind == "uint" and isinstance(other, int) and 0 <= other < bits:
        return _unsigned_shift(b, x, other, call)
    x, by = operand(b, x, D.INT64), operand(b, other, D.INT64)
    left = "left" in call.op or "lshift" in call.op
    limit = min(bits, 63)
    far = b.op("Or", b.op("Less", by, 0), b.op("GreaterOrEqual", by, limit))
    power = b.op("Pow", 2, b.op("Where", far, 0, by))
    if left:
        return b.op("Where", far, 0, b.op("Mul", x, power))
    rest = b.op("Mod", x, power)
    moved = b.op("Div", b.op("Sub", x, rest), power)
    return b.op("Where", far, b.op("Where", b.op("Less", x, 0), -1, 0), moved)


def _unsigned_shift(b: Builder, x: Any, by: int, call: Call) -> Val:
    left = "left" in call.op or "lshift" in call.op
    return shifted(b, x, by, "LEFT" if left else "RIGHT")


def shifted(b: Builder, x: Val, by: int, direction: str) -> Val:
    """An unsigned tensor shifted by fewer bits than it has.

    Why:  OpenVINO multiplies and divides by the power of two instead, rounds what is no whole
          number, and saturates: nothing of that happens where the bits that go are 0.
    """
    assert x.dtype is not None
    every = 2**x.dtype.bitwidth - 1
    kept = every >> by if direction == "LEFT" else every ^ (2**by - 1)
    masked = b.op("BitwiseAnd", x, b.const(kept, x.dtype))
    return b.op("BitShift", masked, b.const(by, x.dtype), direction=direction, dtype=x.dtype)


@translates(
    "isnan", "isinf", "isfinite", "isposinf", "isneginf", "signbit", "prims.signbit.default"
)
def classify(b: Builder, x: Val, call: Call) -> Val:
    base = call.op.split(".")[1]
    if x.dtype not in FLOATS:
        if base == "signbit":
            return b.op("Less", b.cast(x, D.INT64), 0)
        return b.expand(b.const(base == "isfinite", D.BOOL), b.type(x).shape)
    if base == "isnan":
        return b.op("IsNaN", x)
    if base == "isposinf":
        return b.op("Equal", x, b.like(math.inf, x))
    if base == "isneginf":
        return b.op("Equal", x, b.like(-math.inf, x))
    infinite = b.op("Equal", b.op("Abs", x), b.like(math.inf, x))
    if base == "isinf":
        return infinite
    if base == "signbit":
        inverse = b.op("Reciprocal", x)
        zero = b.like(0.0, x)
        is_zero = b.op("Equal", x, zero)
        negative_zero = b.op("And", is_zero, b.op("Less", inverse, zero))
        return b.op("Or", negative_zero, b.op("Less", x, zero))
    return b.op("Not", b.op("Or", infinite, b.op("IsNaN", x)))
