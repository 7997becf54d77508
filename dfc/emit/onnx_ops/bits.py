"""A tensor's bytes read as another element type: arithmetic on the bits, since ONNX has no view."""

from __future__ import annotations

from onnxscript import ir

from dfc.emit.onnx_builder import Builder, Call, Val
from dfc.emit.onnx_ops.registry import translates
from dfc.emit.onnx_types import D, onnx_dtype

_BITS = {
    D.INT8: 8, D.UINT8: 8, D.BOOL: 8, D.INT16: 16, D.UINT16: 16, D.FLOAT16: 16, D.BFLOAT16: 16,
    D.INT32: 32, D.UINT32: 32, D.FLOAT: 32, D.INT64: 64, D.UINT64: 64, D.DOUBLE: 64,
}  # fmt: skip
_FLOAT_FORMAT = {D.FLOAT16: (5, 10), D.BFLOAT16: (8, 7), D.FLOAT: (8, 23)}  # exponent, mantissa


@translates("view.dtype", "bitcast", "_bitcast")
def view(b: Builder, x: Val, call: Call) -> Val:
    """Bits as int64, regrouped where the width changes, then as the wanted type."""
    source, wanted = x.dtype, onnx_dtype(call.result)
    assert source is not None
    if source == wanted:
        return x
    if 64 in (_BITS.get(source), _BITS.get(wanted)) and {source, wanted} & {D.DOUBLE, D.UINT64}:
        raise b.refuse("reading 64-bit floats as bits, or bits as such")
    if source not in _BITS or wanted not in _BITS:
        raise b.refuse(f"reading {source} as {wanted}")
    if {source, wanted} <= {D.BOOL, D.UINT8, D.INT8}:
        return b.cast(x, wanted)
    before, after = _BITS[source], _BITS[wanted]
    bits = _to_bits(b, x, source)
    if before < after:
        k = after // before
        shape = [*call.result.shape, k]
        bits = b.op("Reshape", bits, b.sizes.vector(b, shape))
        places = b.array(_powers(before, k))
        bits = b.op("ReduceSum", b.op("Mul", bits, places), [-1], keepdims=0)
    elif before > after:
        k = before // after
        wide = b.unsqueeze(bits, -1)
        places = b.array(_powers(after, k))
        whole = b.op("Div", b.op("Sub", wide, b.op("Mod", wide, places)), places)
        part = b.op("Mod", whole, 2**after)
        bits = b.op("Reshape", part, b.sizes.vector(b, call.result.shape))
    return _from_bits(b, bits, wanted)


def _powers(bits: int, count: int):  # type: ignore[no-untyped-def]
    import numpy as np

    return np.array([1 << (bits * i) for i in range(count)], np.uint64).astype(np.int64)


def _to_bits(b: Builder, x: Val, dtype: ir.DataType) -> Val:
    """The bits as an unsigned number in int64 (64-bit integers keep their sign)."""
    width = _BITS[dtype]
    if dtype not in _FLOAT_FORMAT:
        whole = b.cast(x, D.INT64)
        return whole if width == 64 else b.op("Mod", whole, 2**width)
    exponent_bits, mantissa_bits = _FLOAT_FORMAT[dtype]
    bias = 2 ** (exponent_bits - 1) - 1
    value = b.cast(x, D.DOUBLE)  # every such float is a normal float64
    size = b.op("Abs", value)
    zero, one = b.const(0.0, D.DOUBLE), b.const(1.0, D.DOUBLE)
    inverse = b.op("Div", one, value)
    negative = b.op("Less", b.op("Where", b.op("Equal", value, zero), inverse, value), zero)
    sign = b.op("Where", negative, 1 << (width - 1), 0)
    # the exponent by comparing with every power of two: a logarithm could round across one
    import numpy as np

    powers = np.array([2.0**e for e in range(1 - bias, bias + 1)])
    reached = b.op("GreaterOrEqual", b.unsqueeze(size, -1), b.array(powers))
    exponent = b.op("ReduceSum", b.cast(reached, D.INT64), [-1], keepdims=0)  # 0: subnormal
    step = b.array(
        np.array(
            [2.0 ** (1 - bias - mantissa_bits)]
            + [2.0 ** (e - mantissa_bits) for e in range(1 - bias, bias + 1)]
        )
    )
    scaled = b.op("Div", size, b.op("Gather", step, exponent, axis=0))
    fraction = b.cast(scaled, D.INT64)
    implied = b.op("Where", b.op("Greater", exponent, 0), 1 << mantissa_bits, 0)
    finite = b.op("Add", b.op("Mul", exponent, 1 << mantissa_bits), b.op("Sub", fraction, implied))
    infinity = ((1 << exponent_bits) - 1) << mantissa_bits
    is_inf = b.op("Equal", size, b.const(float("inf"), D.DOUBLE))
    special = b.op("Where", is_inf, infinity, finite)
    nan = b.op("IsNaN", value)
    special = b.op("Where", nan, infinity | (1 << (mantissa_bits - 1)), special)
    return b.op("Add", special, b.op("Where", nan, 0, sign))


def _from_bits(b: Builder, bits: Val, dtype: ir.DataType) -> Val:
    width = _BITS[dtype]
    if dtype not in _FLOAT_FORMAT:
        if width == 64:
            return bits
        if dtype in (D.INT8, D.INT16, D.INT32):
            high = b.op("GreaterOrEqual", bits, 1 << (width - 1))
            bits = b.op("Where", high, b.op("Sub", bits, 1 << width), bits)
        return b.cast(bits, dtype)
    exponent_bits, mantissa_bits = _FLOAT_FORMAT[dtype]
    bias = 2 ** (exponent_bits - 1) - 1
    import numpy as np

    bits = b.op("Mod", bits, 1 << width)
    negative = b.op("GreaterOrEqual", bits, 1 << (width - 1))
    rest = b.op("Mod", bits, 1 << (width - 1))
    exponent = b.op("Div", rest, 1 << mantissa_bits)
    mantissa = b.op("Mod", rest, 1 << mantissa_bits)
    top = (1 << exponent_bits) - 1
    steps = [2.0 ** (max(e, 1) - bias - mantissa_bits) for e in range(top)] + [1.0]
    step = b.op("Gather", b.array(np.array(steps)), exponent, axis=0)
    implied = b.op("Where", b.op("Greater", exponent, 0), 1 << mantissa_bits, 0)
    size = b.op("Mul", b.cast(b.op("Add", mantissa, implied), D.DOUBLE), step)
    special = b.op(
        "Where",
        b.op("Equal", mantissa, 0),
        b.const(float("inf"), D.DOUBLE),
        b.const(float("nan"), D.DOUBLE),
    )
    size = b.op("Where", b.op("Equal", exponent, top), special, size)
    return b.cast(b.op("Where", negative, b.op("Neg", size), size), dtype)
