"""Weights of eight-bit floats in ONNX: DequantizeLinear from opset 19 on."""

from __future__ import annotations

from dfc.emit.onnx_builder import Builder, NoTranslation, Val
from dfc.emit.onnx_ops.nn import linear
from dfc.emit.onnx_ops.registry import translates
from dfc.emit.onnx_types import D
from dfc.ir.types import DTYPES

FIRST_OPSET = 19


@translates("dfc.linear_f8")
def linear_f8(
    b: Builder, x: Val, weight: Val, scale: Val, bias: Val | None, activations: str
) -> Val:
    """DequantizeLinear before a layer of floats; else the decomposition, which casts.

    Why:  ONNX Runtime dequantizes at every call, as it never folds DequantizeLinear, but computes
          casts when it loads: they are for models made for it alone. Where rows are rounded too, it
          would take QuantizeLinear to float8 and the layer for one of its integer kernels.
    """
    if b.root.contrib or activations == "f8" or x.dtype != D.FLOAT:
        raise NoTranslation("")
    by = scale if scale.dtype == D.FLOAT else b.derived(scale, "wide", lambda t: t.float())
    if by is None:
        raise NoTranslation("")
    axis = 0 if b.rank(scale) else None
    wide = b.op("DequantizeLinear", weight, by, dtype=D.FLOAT, axis=axis)
    return linear(b, x, b.retype(wide, b.type(weight).with_dtype(DTYPES["f32"])), bias)
