"""Weights of eight-bit floats in ONNX: DequantizeLinear from opset 19 on."""

from __future__ import annotations

from dfc.emit.onnx_builder import Builder, D, NoTranslation, Val
from dfc.emit.onnx_ops.nn import linear
from dfc.emit.onnx_ops.registry import translates
from dfc.ir.types import DTYPES
from dfc.ops.linear_f8 import ROWS
from dfc.ops.quantized import LARGEST

FIRST_OPSET = 19


@translates("dfc.linear_f8")
def linear_f8(
    b: Builder, x: Val, weight: Val, scale: Val, bias: Val | None, activations: str
) -> Val:
    """Quantize and dequantize around a float layer; rows have scales that are computed.

    Why:  ONNX Runtime dequantizes at every call, as it never folds DequantizeLinear: where a model
          is made for it alone, casts and products take its place, which it computes when it loads.
    """
    if b.root.contrib or b.root.opset < FIRST_OPSET or x.dtype != D.FLOAT:
        raise NoTranslation("")
    by = scale if scale.dtype == D.FLOAT else b.derived(scale, "wide", lambda t: t.float())
    if by is None:
        raise NoTranslation("")
    axis = 0 if b.rank(scale) else None
    wide = b.op("DequantizeLinear", weight, by, dtype=D.FLOAT, axis=axis)
    b.retype(wide, b.type(weight).with_dtype(DTYPES["f32"]))
    if activations == "float":
        return linear(b, x, wide, bias)
    codes, steps = _rounded_rows(b, x)
    y = b.op("Mul", linear(b, codes, wide, None), steps)
    return y if bias is None else b.op("Add", y, bias)


def _rounded_rows(b: Builder, x: Val) -> tuple[Val, Val]:
    """Rows as values of f8e4m3fn, and their scales [.., 1]; layers that read one value share
    them."""
    key = ("rows of float8", id(x))
    found = b.lookup(key)
    if found is None:
        one = b.const(1.0, D.FLOAT)
        peaks = b.op("ReduceMax", b.op("Abs", x), [-1], keepdims=1)
        steps = b.op("Div", peaks, b.const(LARGEST[ROWS], D.FLOAT))
        steps = b.op("Where", b.op("Equal", peaks, b.const(0.0, D.FLOAT)), one, steps)
        zero = b.const(0.0, D.FLOAT8E4M3FN)
        codes = b.op("QuantizeLinear", b.op("Div", x, steps), one, zero, dtype=D.FLOAT8E4M3FN)
        wide = b.op("DequantizeLinear", codes, one, dtype=D.FLOAT)
        found = b.shared[key] = (b.retype(wide, b.type(x)), steps)
    codes, steps = found
    return codes, steps
