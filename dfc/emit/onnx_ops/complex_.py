"""Complex numbers as pairs of reals in a trailing axis of 2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnxscript import ir

from dfc.emit.onnx_builder import Builder, Call, NoTranslation, Val
from dfc.emit.onnx_ops.arithmetic import angle as atan2
from dfc.emit.onnx_ops.registry import translates
from dfc.emit.onnx_types import onnx_dtype


def parts(b: Builder, x: Any, dtype: ir.DataType) -> tuple[Val, Val]:
    """Real and imaginary part of a complex or real tensor, or of a number."""
    if not isinstance(x, ir.Value):
        number = complex(x)
        return b.const(number.real, dtype), b.const(number.imag, dtype)
    if not b.is_complex(x):
        real = b.cast(x, dtype)
        return real, b.const(0.0, dtype)
    return b.op("Gather", x, 0, axis=-1), b.op("Gather", x, 1, axis=-1)


def pair(b: Builder, real: Val, imaginary: Val, call: Call | None = None) -> Val:
    """Two reals as a complex, broadcast to one shape."""
    if call is not None:
        shape = call.result.shape
        real, imaginary = b.expand(real, shape), b.expand(imaginary, shape)
    return b.op("Concat", b.unsqueeze(real, -1), b.unsqueeze(imaginary, -1), axis=-1)


@translates(
    "view_as_real", "view_as_complex", "view_as_real_copy", "view_as_complex_copy", complex=True
)
def view(b: Builder, x: Val) -> Val:
    return b.op("Identity", x)


@translates("real", "imag", complex=True)
def real(b: Builder, x: Val, call: Call) -> Val:
    return b.op("Gather", x, 0 if "real" in call.op else 1, axis=-1)


@translates("complex", "polar", complex=True)
def make(b: Builder, x: Val, call: Call) -> Val:
    first, second = list(call.values)
    if "polar" in call.op:
        first, second = (
            b.op("Mul", first, b.op("Cos", second)),
            b.op("Mul", first, b.op("Sin", second)),
        )
    return pair(b, first, second, call)


def _bare(call: Call) -> ir.DataType:
    return onnx_dtype(call.result)


@translates("add.Tensor", "sub.Tensor", "add.Scalar", "sub.Scalar", "rsub.Scalar", complex=True)
def add(b: Builder, x: Any, other: Any, alpha: Any, call: Call) -> Val:
    dtype = _bare(call)
    (xr, xi), (yr, yi) = parts(b, x, dtype), parts(b, other, dtype)
    if "rsub" in call.op:
        xr, xi, yr, yi = yr, yi, xr, xi
    if alpha not in (None, 1):
        if isinstance(alpha, complex):
            raise NoTranslation("")
        yr, yi = b.op("Mul", yr, b.const(alpha, dtype)), b.op("Mul", yi, b.const(alpha, dtype))
    kind = "Add" if ".add." in call.op else "Sub"
    return pair(b, b.op(kind, xr, yr), b.op(kind, xi, yi), call)


@translates("mul.Tensor", "mul.Scalar", complex=True)
def mul(b: Builder, x: Any, other: Any, call: Call) -> Val:
    dtype = _bare(call)
    return pair(b, *product(b, parts(b, x, dtype), parts(b, other, dtype)), call)


Pair = tuple[Val, Val]


def product(b: Builder, x: Pair, y: Pair) -> Pair:
    real = b.op("Sub", b.op("Mul", x[0], y[0]), b.op("Mul", x[1], y[1]))
    return real, b.op("Add", b.op("Mul", x[0], y[1]), b.op("Mul", x[1], y[0]))


@translates("div.Tensor", "div.Scalar", "reciprocal", complex=True)
def div(b: Builder, x: Any, call: Call) -> Val:
    dtype = _bare(call)
    if "reciprocal" in call.op:
        top, bottom = parts(b, 1.0, dtype), parts(b, x, dtype)
    else:
        other = (
            call.operands[1] if len(call.operands) > 1 and call.operands[1] is not None else None
        )
        other = call.attributes["other"] if other is None else other
        top, bottom = parts(b, x, dtype), parts(b, other, dtype)
        if not (isinstance(other, ir.Value) and b.is_complex(other)) and not isinstance(
            other, complex
        ):
            return pair(b, b.op("Div", top[0], bottom[0]), b.op("Div", top[1], bottom[0]), call)
    size = b.op("Add", b.op("Mul", bottom[0], bottom[0]), b.op("Mul", bottom[1], bottom[1]))
    real, imaginary = product(b, top, (bottom[0], b.op("Neg", bottom[1])))
    return pair(b, b.op("Div", real, size), b.op("Div", imaginary, size), call)


@translates("neg", complex=True)
def neg(b: Builder, x: Val) -> Val:
    return b.op("Neg", x)


@translates("conj", "_conj", "conj_physical", "_conj_physical", complex=True)
def conj(b: Builder, x: Val) -> Val:
    return b.op("Mul", x, b.const([1.0, -1.0], x.dtype))  # type: ignore[arg-type]


@translates("abs", complex=True)
def absolute(b: Builder, x: Val) -> Val:
    """Scaled by the larger part, so that squares neither overflow nor vanish."""
    size = b.op("Abs", x)
    top = b.op("ReduceMax", size, [-1], keepdims=1)
    plain = b.op("Or", b.op("Equal", top, b.like(0.0, x)), b.op("Equal", top, b.like(math.inf, x)))
    scaled = b.op("Div", size, b.op("Where", plain, b.like(1.0, x), top))
    root = b.op("Sqrt", b.op("ReduceSum", b.op("Mul", scaled, scaled), [-1], keepdims=1))
    found = b.op("Where", plain, top, b.op("Mul", root, top))
    return b.squeeze(found, -1)


@translates("angle", complex=True)
def angle(b: Builder, x: Val) -> Val:
    real, imaginary = parts(b, x, x.dtype)  # type: ignore[arg-type]
    return atan2(b, imaginary, real)


@translates("exp", complex=True)
def exp(b: Builder, x: Val) -> Val:
    real, imaginary = parts(b, x, x.dtype)  # type: ignore[arg-type]
    size = b.op("Exp", real)
    return pair(
        b, b.op("Mul", size, b.op("Cos", imaginary)), b.op("Mul", size, b.op("Sin", imaginary))
    )


@translates("log", complex=True)
def log(b: Builder, x: Val) -> Val:
    real, imaginary = parts(b, x, x.dtype)  # type: ignore[arg-type]
    return pair(b, b.op("Log", absolute(b, x)), atan2(b, imaginary, real))


@translates("pow.Tensor_Scalar", "square", complex=True)
def power(b: Builder, x: Val, call: Call) -> Val:
    n = call.attributes.get("exponent", 2)
    if not isinstance(n, int) or not 1 <= n <= 8:
        raise NoTranslation("")
    base = found = parts(b, x, x.dtype)  # type: ignore[arg-type]
    for _ in range(int(n) - 1):
        found = product(b, found, base)
    return pair(b, *found)


@translates("sqrt", complex=True)
def sqrt(b: Builder, x: Val) -> Val:
    """The principal root: real part never negative."""
    real, imaginary = parts(b, x, x.dtype)  # type: ignore[arg-type]
    size = absolute(b, x)
    half = b.like(0.5, x)
    zero = b.like(0.0, x)
    up = b.op("Sqrt", b.op("Max", b.op("Mul", b.op("Add", size, real), half), zero))
    side = b.op("Sqrt", b.op("Max", b.op("Mul", b.op("Sub", size, real), half), zero))
    negative = b.op("Less", imaginary, zero)
    return pair(b, up, b.op("Where", negative, b.op("Neg", side), side))


@translates("eq.Tensor", "ne.Tensor", "eq.Scalar", "ne.Scalar", complex=True)
def equal(b: Builder, x: Val, other: Any, call: Call) -> Val:
    dtype = x.dtype
    (xr, xi), (yr, yi) = parts(b, x, dtype), parts(b, other, dtype)  # type: ignore[arg-type]
    found = b.op("And", b.op("Equal", xr, yr), b.op("Equal", xi, yi))
    return b.op("Not", found) if ".ne." in call.op else found


@translates("_to_copy", complex=True)
def cast(b: Builder, x: Val, call: Call) -> Val:
    wanted = onnx_dtype(call.result)
    if b.is_complex(x):
        if call.result.dtype.is_complex:
            return b.cast(x, wanted)
        return b.cast(b.op("Gather", x, 0, axis=-1), wanted)
    return pair(b, *parts(b, x, wanted), call)


@translates("sum.dim_IntList", "sum", "mean", "mean.dim", complex=True)
def total(b: Builder, x: Val, call: Call) -> Val:
    from dfc.emit.onnx_ops.reduction import axes_of, reduce

    a = call.attributes
    kind = "ReduceSum" if ".sum" in call.op else "ReduceMean"
    return reduce(b, kind, x, axes_of(a.get("dim"), b.rank(x)), a.get("keepdim", False))


@translates("where.self", complex=True)
def where(b: Builder, condition: Val, self: Any, other: Any, call: Call) -> Val:
    dtype = _bare(call)
    (xr, xi), (yr, yi) = parts(b, self, dtype), parts(b, other, dtype)
    return pair(b, b.op("Where", condition, xr, yr), b.op("Where", condition, xi, yi), call)


@translates("masked_fill.Scalar", complex=True)
def masked_fill(b: Builder, x: Val, mask: Val, value: Any) -> Val:
    number = b.const(complex(value), x.dtype)  # type: ignore[arg-type]
    return b.op("Where", b.unsqueeze(mask, -1), number, x)


@translates("matmul", "mm", "bmm", complex=True)
def matmul(b: Builder, x: Val, call: Call) -> Val:
    first, second = list(call.values)
    dtype = _bare(call)
    (xr, xi), (yr, yi) = parts(b, first, dtype), parts(b, second, dtype)
    if not b.is_complex(second):
        return pair(b, b.op("MatMul", xr, yr), b.op("MatMul", xi, yr))
    if not b.is_complex(first):
        return pair(b, b.op("MatMul", xr, yr), b.op("MatMul", xr, yi))
    real = b.op("Sub", b.op("MatMul", xr, yr), b.op("MatMul", xi, yi))
    return pair(b, real, b.op("Add", b.op("MatMul", xr, yi), b.op("MatMul", xi, yr)))


# Fourier transforms, along one axis after another


def _scale(
    b: Builder, x: Val, norm: int | str | None, count: Any, forward: bool, inverse_op: bool
) -> Val:
    """Bring a transform to the wanted normalization: DFT divides only on its way back."""
    n = b.const(count, x.dtype)  # type: ignore[arg-type]
    if inverse_op:
        x = b.op("Mul", x, n)  # take back what DFT's inverse divides by
    if norm == "none":
        return x
    if norm == "ortho":
        return b.op("Div", x, b.op("Sqrt", n))
    del forward
    return b.op("Div", x, n)


def _fft(
    b: Builder, x: Val, axes: Sequence[int], mode: str, forward: bool, sizes: Sequence[Any]
) -> Val:
    """Complex to complex along axes, `x` with a trailing 2."""
    count: Any = 1
    rank = len(sizes)
    for axis in axes:
        n = sizes[axis]
        count = count * n
        # ONNX Runtime wants the axis to be right before the parts, and the data batched
        perm = [i for i in range(rank) if i != axis] + [axis, rank]
        moved = b.transpose(x, perm)
        flat = b.op("Reshape", moved, b.sizes.vector(b, [-1, n, 2]))
        done = b.op("DFT", flat, None, 1, inverse=0 if forward else 1)
        back = b.op("Reshape", done, b.op("Shape", moved))
        inverse_perm = [perm.index(i) for i in range(rank + 1)]
        x = b.transpose(back, inverse_perm)
    return _scale(b, x, mode, count, forward, not forward) if axes else x


def _mode(normalization: int) -> str:
    return {0: "none", 1: "ortho", 2: "all"}[normalization]


def _as_pairs(b: Builder, x: Val) -> Val:
    return b.op("Concat", b.unsqueeze(x, -1), b.unsqueeze(b.op("Sub", x, x), -1), axis=-1)


@translates("_fft_c2c", complex=True)
def fft_c2c(
    b: Builder, x: Val, dim: Sequence[int], normalization: int, forward: bool, call: Call
) -> Val:
    shape = b.type(x).shape
    axes = [d % len(shape) for d in dim]
    return _fft(b, x, axes, _mode(normalization), bool(forward), shape)


@translates("_fft_r2c", complex=True)
def fft_r2c(
    b: Builder, x: Val, dim: Sequence[int], normalization: int, onesided: bool, call: Call
) -> Val:
    shape = b.type(x).shape
    axes = [d % len(shape) for d in dim]
    found = _fft(b, _as_pairs(b, x), axes, _mode(normalization), True, shape)
    if onesided:
        found = b.slice(found, axes[-1], 0, call.result.shape[axes[-1]])
    return _real_ends(b, found, axes[0], shape[axes[0]], call) if len(axes) == 1 else found


def _real_ends(b: Builder, x: Val, axis: int, size: Any, call: Call) -> Val:
    """A real signal's spectrum is real at its first and, for an even length, its middle place."""
    at = b.arange(call.result.shape[axis])
    twice = b.op("Mul", at, 2)
    ends = b.op("Or", b.op("Equal", at, 0), b.op("Equal", twice, b.lift(size)))
    rank = call.result.rank
    shape = [-1 if i == axis else 1 for i in range(rank)]
    imaginary = b.array(np.array([False, True]))
    zero = b.op("And", b.reshape(ends, [*shape, 1]), imaginary)
    return b.op("Where", zero, b.like(0.0, x), x)


@translates("_fft_c2r", complex=True)
def fft_c2r(
    b: Builder, x: Val, dim: Sequence[int], normalization: int, last_dim_size: Any, call: Call
) -> Val:
    """The missing half is the mirrored conjugate; then back, and the real part."""
    shape = list(b.type(x).shape)
    rank = len(shape)
    axes = [d % rank for d in dim]
    last = axes[-1]
    if axes[:-1]:
        x = _fft(b, x, axes[:-1], "none", False, shape)
    half = last_dim_size // 2 + 1
    x = b.slice(x, last, 0, half)
    # the imaginary parts of the first and, for an even length, the middle element do not count
    tail = b.op("Slice", x, b.vec((last_dim_size - 1) // 2), [0], [last], [-1])
    mirrored = conj(b, tail)
    whole = b.op("Concat", x, mirrored, axis=last)
    sizes = list(shape)
    sizes[last] = last_dim_size
    found = _fft(b, whole, [last], "none", False, sizes)
    count: Any = last_dim_size
    for axis in axes[:-1]:
        count = count * shape[axis]
    found = _scale(b, found, _mode(normalization), count, False, False)
    return b.op("Gather", found, 0, axis=-1)
