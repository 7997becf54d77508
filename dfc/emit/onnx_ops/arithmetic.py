"""Elementwise ops: PyTorch's type promotion, wrapping integers, NaN, and division spelled out.

ONNX Runtime's CPU computes in f32, f64, i32 and i64; other integers are computed wider and cast
back, which wraps as PyTorch does.
"""

from __future__ import annotations

import math
from typing import Any

from onnxscript import ir

from dfc.emit.onnx_builder import Builder, Call, Val
from dfc.emit.onnx_ops.registry import translates
from dfc.emit.onnx_types import FLOATS, ONNX_DTYPES, D, onnx_dtype
from dfc.ir.expr import Expr
from dfc.ir.types import DType, TensorType, dtype_of

_WORK = {
    D.INT8: D.INT32, D.UINT8: D.INT32, D.INT16: D.INT32, D.UINT16: D.INT32, D.BOOL: D.INT32,
    D.UINT32: D.INT64, D.UINT64: D.INT64, D.FLOAT16: D.FLOAT16,
}  # fmt: skip


def work_dtype(dtype: ir.DataType) -> ir.DataType:
    """The element type in which ONNX Runtime can compute it."""
    return _WORK.get(dtype, dtype)


def operand(b: Builder, x: Any, dtype: ir.DataType) -> Val:
    """A tensor, number or size in an element type."""
    if isinstance(x, ir.Value):
        return b.cast(x, dtype)
    return b.const(x, dtype)


def promoted(b: Builder, *xs: Any) -> ir.DataType:
    """The element type in which PyTorch compares or combines these."""
    import torch

    def stand_in(x: Any) -> Any:
        if isinstance(x, ir.Value):
            type = x.meta.get("type")
            if isinstance(type, TensorType):
                return torch.empty(
                    (1,) * min(type.rank, 1), dtype=type.dtype.to_torch(), device="meta"
                )
            return {D.INT64: 1, D.DOUBLE: 1.0, D.BOOL: True}[x.dtype]  # type: ignore[index]
        if isinstance(x, Expr):
            return {"int": 1, "float": 1.0, "bool": True}[x.kind]
        return x

    if len(xs) == 1:
        return xs[0].dtype  # type: ignore[no-any-return]
    found = torch.result_type(stand_in(xs[0]), stand_in(xs[1]))
    for x in xs[2:]:
        found = torch.promote_types(
            found, torch.result_type(torch.empty((), dtype=found), stand_in(x))
        )
    return ONNX_DTYPES[dtype_of(found).name]


def result_work(call: Call) -> ir.DataType:
    return work_dtype(onnx_dtype(call.result))


@translates("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Scalar", "rsub.Tensor")
def add(b: Builder, x: Any, other: Any, alpha: Any, call: Call) -> Val:
    dtype = result_work(call)
    if call.result.dtype.name == "bool":
        return b.op("Or", b.cast(x, D.BOOL), operand(b, other, D.BOOL))
    base = call.op.split(".")[1]
    if base == "rsub":
        x, other = other, x
    left = operand(b, x, dtype)
    if alpha is not None and alpha != 1:
        if isinstance(other, ir.Value):
            other = b.op("Mul", b.cast(other, dtype), b.const(alpha, dtype))
        elif not isinstance(other, Expr):
            other = alpha * other
        else:
            other = b.op("Mul", b.const(other, dtype), b.const(alpha, dtype))
    return b.op("Add" if base == "add" else "Sub", left, operand(b, other, dtype))


@translates("mul.Tensor", "mul.Scalar")
def mul(b: Builder, x: Any, other: Any, call: Call) -> Val:
    if call.result.dtype.name == "bool":
        return b.op("And", b.cast(x, D.BOOL), operand(b, other, D.BOOL))
    dtype = result_work(call)
    return b.op("Mul", operand(b, x, dtype), operand(b, other, dtype))


@translates("div.Tensor", "div.Scalar", "true_divide.Tensor")
def div(b: Builder, x: Any, other: Any, call: Call) -> Val:
    dtype = onnx_dtype(call.result)
    return b.op("Div", operand(b, x, dtype), operand(b, other, dtype))


@translates("div.Tensor_mode", "div.Scalar_mode", "floor_divide", "floor_divide.Scalar")
def div_mode(b: Builder, x: Any, other: Any, call: Call) -> Val:
    mode = call.attributes.get("rounding_mode", "floor")
    if mode is None:
        return div(b, x, other, call)
    dtype = result_work(call)
    left, right = operand(b, x, dtype), operand(b, other, dtype)
    if dtype not in FLOATS:
        if mode == "trunc":
            return b.op("Div", left, right)
        rest = b.op("Mod", left, right)
        return b.op("Div", b.op("Sub", left, rest), right)
    quotient = b.op("Div", left, right)
    if mode == "trunc":
        return truncate(b, quotient)
    # as PyTorch and Python do: exact where floor(x / y) would round the wrong way
    rest = b.op("Mod", left, right, fmod=1)
    zero, one = b.like(0.0, rest), b.like(1.0, rest)
    floored = b.op("Div", b.op("Sub", left, rest), right)
    signs = b.op("Xor", b.op("Less", right, zero), b.op("Less", rest, zero))
    lower = b.op("And", signs, b.op("Not", b.op("Equal", rest, zero)))
    floored = b.op("Where", lower, b.op("Sub", floored, one), floored)
    whole = b.op("Floor", floored)
    above = b.op("Greater", b.op("Sub", floored, whole), b.like(0.5, rest))
    whole = b.op("Where", above, b.op("Add", whole, one), whole)
    whole = b.op("Where", b.op("Equal", floored, zero), b.op("Mul", quotient, zero), whole)
    return b.op("Where", b.op("Equal", right, zero), quotient, whole)


def truncate(b: Builder, x: Val) -> Val:
    """Round towards zero; the sign of zero is kept."""
    negative = b.op("Less", x, b.like(0.0, x))
    return b.op("Where", negative, b.op("Ceil", x), b.op("Floor", x))


@translates("trunc", "fix", "floor", "ceil", "round")
def rounding(b: Builder, x: Val, call: Call) -> Val:
    if x.dtype not in FLOATS:
        return x
    base = call.op.split(".")[1]
    if base in ("trunc", "fix"):
        return truncate(b, x)
    return b.op(base.capitalize(), x)


@translates("frac")
def frac(b: Builder, x: Val) -> Val:
    return b.op("Sub", x, truncate(b, x))


@translates("remainder.Tensor", "remainder.Scalar", "remainder.Scalar_Tensor")
def remainder(b: Builder, x: Any, other: Any, call: Call) -> Val:
    dtype = result_work(call)
    left, right = operand(b, x, dtype), operand(b, other, dtype)
    if dtype not in FLOATS:
        return b.op("Mod", left, right)
    rest = b.op("Mod", left, right, fmod=1)
    zero = b.like(0.0, rest)
    signs = b.op("Xor", b.op("Less", right, zero), b.op("Less", rest, zero))
    wrong = b.op("And", signs, b.op("Not", b.op("Equal", rest, zero)))
    return b.op("Where", wrong, b.op("Add", rest, right), rest)


@translates("fmod.Tensor", "fmod.Scalar")
def fmod(b: Builder, x: Any, other: Any, call: Call) -> Val:
    dtype = result_work(call)
    return b.op("Mod", operand(b, x, dtype), operand(b, other, dtype), fmod=1)


@translates(
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "pow.Scalar",
    "float_power.Tensor_Scalar",
    "float_power.Tensor_Tensor",
    "float_power.Scalar",
)
def power(b: Builder, x: Any, exponent: Any, call: Call) -> Val:
    dtype = result_work(call)
    base = operand(b, x, dtype)
    if isinstance(exponent, (int, float)) and not isinstance(exponent, bool):
        if exponent == 1:
            return base
        if exponent == 2:
            return b.op("Mul", base, base)
        if exponent == 3:
            return b.op("Mul", b.op("Mul", base, base), base)
        if dtype in FLOATS and exponent in (0.5, -0.5):
            root = b.op("Sqrt", base)
            return root if exponent > 0 else b.op("Reciprocal", root)
        if dtype in FLOATS and exponent == -1:
            return b.op("Reciprocal", base)
        if dtype in FLOATS and exponent == -2:
            return b.op("Reciprocal", b.op("Mul", base, base))
    return b.op("Pow", base, operand(b, exponent, dtype))


@translates("neg")
def neg(b: Builder, x: Val, call: Call) -> Val:
    dtype = result_work(call)
    if dtype in (D.INT32, D.INT64):
        return b.op("Sub", b.const(0, dtype), b.cast(x, dtype))
    return b.op("Neg", x)


@translates("abs")
def absolute(b: Builder, x: Val, call: Call) -> Val:
    return b.op("Abs", b.cast(x, result_work(call)))


@translates("square")
def square(b: Builder, x: Val, call: Call) -> Val:
    x = b.cast(x, result_work(call))
    return b.op("Mul", x, x)


_UNARY = {
    "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "sin": "Sin", "cos": "Cos", "tan": "Tan",
    "sinh": "Sinh", "cosh": "Cosh", "tanh": "Tanh", "asin": "Asin", "acos": "Acos",
    "atan": "Atan", "asinh": "Asinh", "acosh": "Acosh", "atanh": "Atanh", "erf": "Erf",
    "sigmoid": "Sigmoid", "reciprocal": "Reciprocal", "special_expit": "Sigmoid",
    "special_erf": "Erf",
}  # fmt: skip
_F32_ONLY = frozenset(
    ["Sinh", "Cosh", "Tan", "Asin", "Acos", "Atan", "Asinh", "Acosh", "Atanh", "Erf"]
)


@translates(*_UNARY)
def unary(b: Builder, x: Val, call: Call) -> Val:
    kind = _UNARY[call.op.split(".")[1]]
    x = b.cast(x, onnx_dtype(call.result))
    if x.dtype == D.DOUBLE and kind in _F32_ONLY:
        return double(b, kind, x)
    return b.op(kind, x)


def double(b: Builder, kind: str, x: Val) -> Val:
    """What ONNX Runtime's CPU has for f32 only, in float64."""
    if kind == "Erf":
        return erf64(b, x)
    if kind == "Tan":
        return b.op("Div", b.op("Sin", x), b.op("Cos", x))
    if kind in ("Sinh", "Cosh"):
        up, down = b.op("Exp", x), b.op("Exp", b.op("Neg", x))
        both = b.op("Sub" if kind == "Sinh" else "Add", up, down)
        return b.op("Mul", both, b.like(0.5, x))
    raise b.refuse(f"ONNX Runtime computes {kind} in f32 only")


@translates("rsqrt")
def rsqrt(b: Builder, x: Val, call: Call) -> Val:
    return b.op("Reciprocal", b.op("Sqrt", b.cast(x, onnx_dtype(call.result))))


@translates("log2", "log10", "exp2", "special_exp2")
def logarithm(b: Builder, x: Val, call: Call) -> Val:
    x = b.cast(x, onnx_dtype(call.result))
    base = call.op.split(".")[1]
    if base.endswith("exp2"):
        return b.op("Pow", b.like(2.0, x), x)
    return b.op("Div", b.op("Log", x), b.like(math.log(2.0 if base == "log2" else 10.0), x))


@translates("log1p", "special_log1p")
def log1p(b: Builder, x: Val, call: Call) -> Val:
    """Accurate near zero: the error of 1 + x divides out (Kahan)."""
    x = b.cast(x, onnx_dtype(call.result))
    one = b.like(1.0, x)
    u = b.op("Add", x, one)
    gap = b.op("Sub", u, one)
    same = b.op("Equal", gap, b.like(0.0, x))
    infinite = b.op("Equal", u, b.like(math.inf, x))
    exact = b.op("Div", b.op("Mul", b.op("Log", u), x), b.op("Where", same, one, gap))
    return b.op("Where", same, x, b.op("Where", infinite, u, exact))


@translates("expm1", "special_expm1")
def expm1(b: Builder, x: Val, call: Call) -> Val:
    x = b.cast(x, onnx_dtype(call.result))
    one = b.like(1.0, x)
    u = b.op("Exp", x)
    gap = b.op("Sub", u, one)
    log = b.op("Log", u)
    same = b.op("Equal", log, b.like(0.0, x))
    exact = b.op("Div", b.op("Mul", gap, x), b.op("Where", same, one, log))
    large = b.op("Greater", b.op("Abs", x), one)
    return b.op("Where", same, x, b.op("Where", large, gap, exact))


@translates("erfc", "special_erfc")
def erfc(b: Builder, x: Val, call: Call) -> Val:
    x = b.cast(x, onnx_dtype(call.result))
    return b.op("Sub", b.like(1.0, x), b.op("Erf", x))


@translates("erfinv", "special_erfinv")
def erfinv(b: Builder, x: Val, call: Call) -> Val:
    """Winitzki's estimate, then three Newton steps on erf in float64."""
    x = b.cast(x, D.DOUBLE)

    def c(v: float) -> Val:
        return b.const(v, D.DOUBLE)

    one, a = c(1.0), 0.147
    edge = b.op("Equal", b.op("Abs", x), one)
    safe = b.op("Where", edge, c(0.0), x)
    log = b.op("Log", b.op("Sub", one, b.op("Mul", safe, safe)))
    half = b.op("Add", b.op("Mul", log, c(0.5)), c(2 / (math.pi * a)))
    root = b.op("Sqrt", b.op("Sub", b.op("Mul", half, half), b.op("Mul", log, c(1 / a))))
    y = b.op("Mul", b.op("Sign", safe), b.op("Sqrt", b.op("Sub", root, half)))
    for _ in range(3):
        error = b.op("Sub", erf64(b, y), safe)
        slope = b.op("Exp", b.op("Mul", y, y))
        y = b.op("Sub", y, b.op("Mul", b.op("Mul", error, slope), c(math.sqrt(math.pi) / 2)))
    return b.op("Where", edge, b.op("Mul", x, c(math.inf)), y)


def erf64(b: Builder, y: Val) -> Val:
    """erf of float64 by its series below 3 and the continued fraction above: ORT's is f32 only."""

    def c(v: float) -> Val:
        return b.const(v, D.DOUBLE)

    z = b.op("Abs", y)
    t = b.op("Mul", z, z)
    # Kummer's form: erf z = 2/sqrt(pi) * exp(-z^2) * sum of 2^n z^(2n+1) / (2n+1)!!
    total = c(1.0)
    for n in range(60, 0, -1):
        total = b.op("Add", c(1.0), b.op("Mul", b.op("Mul", t, c(2.0 / (2 * n + 1))), total))
    series = b.op("Mul", b.op("Mul", z, total), b.op("Exp", b.op("Neg", t)))
    series = b.op("Mul", series, c(2 / math.sqrt(math.pi)))
    value = b.op("Where", b.op("Greater", z, c(5.0)), c(1.0), series)
    return b.op("Mul", b.op("Sign", y), value)


@translates("sign", "sgn")
def sign(b: Builder, x: Val, call: Call) -> Val:
    if call.result.dtype.name == "bool":
        return x
    dtype = result_work(call)
    x = b.cast(x, dtype)
    zero = b.const(0, dtype)
    up, down = b.op("Greater", x, zero), b.op("Less", x, zero)
    return b.op("Sub", b.cast(up, dtype), b.cast(down, dtype))


@translates("_to_copy", "to.dtype", "prims.convert_element_type.default")
def cast(b: Builder, x: Val, dtype: DType | None, call: Call) -> Val:
    return convert(b, x, onnx_dtype(call.result))


def convert(b: Builder, x: Val, wanted: ir.DataType) -> Val:
    """A cast as PyTorch does it: floats reach small integers through int64, so that they wrap."""
    small = (D.INT8, D.UINT8, D.INT16, D.UINT16, D.INT32, D.UINT32)
    if x.dtype in FLOATS and wanted in small:
        x = b.cast(x, D.INT64)
    return b.cast(x, wanted)


@translates("addcmul", "addcdiv")
def addcmul(b: Builder, x: Val, tensor1: Val, tensor2: Val, value: Any, call: Call) -> Val:
    dtype = result_work(call)
    one, two = b.cast(tensor1, dtype), b.cast(tensor2, dtype)
    if value != 1:
        one = b.op("Mul", one, b.const(value, dtype))
    inner = b.op("Mul" if "addcmul" in call.op else "Div", one, two)
    return b.op("Add", b.cast(x, dtype), inner)


@translates("lerp.Scalar", "lerp.Tensor")
def lerp(b: Builder, x: Val, end: Val, weight: Any) -> Val:
    """From the nearer end, as PyTorch does."""
    gap = b.op("Sub", end, x)
    w = operand(b, weight, x.dtype)  # type: ignore[arg-type]
    near = b.op("Add", x, b.op("Mul", w, gap))
    far = b.op("Sub", end, b.op("Mul", gap, b.op("Sub", b.like(1.0, x), w)))
    return b.op("Where", b.op("Less", b.op("Abs", w), b.like(0.5, x)), near, far)


@translates("atan2")
def atan2(b: Builder, x: Val, other: Val, call: Call) -> Val:
    dtype = onnx_dtype(call.result)
    return angle(b, b.cast(x, dtype), b.cast(other, dtype))


def angle(b: Builder, y: Val, x: Val) -> Val:
    """atan2 with signed zeros told apart on neither side: -0.0 counts as 0.0."""
    zero, pi = b.like(0.0, y), b.like(math.pi, y)
    x_zero = b.op("Equal", x, zero)
    ratio = b.op("Atan", b.op("Div", y, b.op("Where", x_zero, b.like(1.0, x), x)))
    turned = b.op("Where", b.op("Less", y, zero), b.op("Sub", ratio, pi), b.op("Add", ratio, pi))
    value = b.op("Where", b.op("Less", x, zero), turned, ratio)
    upright = b.op("Mul", b.op("Sign", y), b.like(math.pi / 2, y))
    return b.op("Where", x_zero, upright, value)
