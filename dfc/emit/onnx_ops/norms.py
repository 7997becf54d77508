"""Layer, RMS, group and instance norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dfc.emit.onnx_builder import Builder, Call, NoTranslation, Val
from dfc.emit.onnx_ops.registry import translates
from dfc.emit.onnx_types import D


@translates("layer_norm", "native_layer_norm")
def layer_norm(
    b: Builder, x: Val, normalized_shape: Sequence[Any], weight: Val | None, bias: Val | None,
    eps: float, call: Call,
) -> Any:  # fmt: skip
    if x.dtype == D.DOUBLE and len(call.results) == 1:
        return _double_layer_norm(b, x, len(normalized_shape), weight, bias, float(eps))
    if x.dtype == D.DOUBLE or not all(isinstance(s, int) for s in normalized_shape):
        raise NoTranslation("")
    if weight is None:
        ones = np.ones(tuple(normalized_shape), np.float32)
        weight = b.array(ones.astype(x.dtype.numpy()), x.dtype)  # type: ignore[union-attr]
    axis = -len(normalized_shape)
    if call.op == "aten.layer_norm.default":
        return b.op("LayerNormalization", x, weight, bias, axis=axis, epsilon=float(eps))
    return b.op("LayerNormalization", x, weight, bias, axis=axis, epsilon=float(eps), out=3)


def _double_layer_norm(
    b: Builder, x: Val, dims: int, weight: Val | None, bias: Val | None, eps: float
) -> Val:
    """Spelled out, and with no Pow: the op, or what ONNX Runtime fuses, computes in float32."""
    axes = list(range(-dims, 0))
    gap = b.op("Sub", x, b.op("ReduceMean", x, axes, keepdims=1))
    variance = b.op("ReduceMean", b.op("Mul", gap, gap), axes, keepdims=1)
    found = b.op("Div", gap, b.op("Sqrt", b.op("Add", variance, b.like(eps, variance))))
    found = found if weight is None else b.op("Mul", found, weight)
    return found if bias is None else b.op("Add", found, bias)


@translates("rms_norm", "_fused_rms_norm")
def rms_norm(
    b: Builder, x: Val, normalized_shape: Sequence[Any], weight: Val | None, eps: Any, call: Call
) -> Any:
    """One op from opset 23 on; before, spelled as ONNX Runtime's fusion wants it.

    An eps of None is the epsilon of the type that PyTorch computes in: float32 for half precision.
    """
    import torch

    if len(call.results) > 1:
        raise NoTranslation("")
    kind = D.FLOAT if x.dtype == D.FLOAT16 else x.dtype
    if eps is None:
        eps = torch.finfo(torch.float64 if kind == D.DOUBLE else torch.float32).eps
    fixed = all(isinstance(s, int) for s in normalized_shape)
    if b.root.opset >= 23 and x.dtype in (D.FLOAT, D.FLOAT16) and fixed:
        if weight is None:
            ones = np.ones([int(s) for s in normalized_shape], x.dtype.numpy())
            weight = b.array(ones, x.dtype)
        if weight.dtype == x.dtype:
            axis = -len(normalized_shape)
            return b.op("RMSNormalization", x, weight, axis=axis, epsilon=float(eps))
    wide = b.cast(x, kind)  # type: ignore[arg-type]
    axes = list(range(-len(normalized_shape), 0))
    # float64 is not to be fused: the fused op computes in float32
    double = kind == D.DOUBLE
    square = b.op("Mul", wide, wide) if double else b.op("Pow", wide, b.like(2.0, wide))
    mean = b.op("ReduceMean", square, axes, keepdims=1)
    root = b.op("Sqrt", b.op("Add", mean, b.like(float(eps), mean)))
    found = b.op("Div", wide, root)
    if weight is not None:
        found = b.op("Mul", found, b.cast(weight, found.dtype))  # type: ignore[arg-type]
    return b.cast(found, x.dtype)  # type: ignore[arg-type]


@translates("group_norm", "instance_norm")
def group_norm(
    b: Builder, x: Val, weight: Val | None, bias: Val | None, eps: float, call: Call
) -> Val:
    """By hand: GroupNormalization's meaning changed between opsets."""
    shape = b.type(x).shape
    if call.op.startswith("aten.instance_norm"):
        if not call.attributes["use_input_stats"]:
            raise NoTranslation("")
        groups = shape[1]
    else:
        groups = call.attributes["num_groups"]
    if call.op.startswith("aten.instance_norm") and not isinstance(groups, int):
        raise NoTranslation("")
    grouped = b.op(
        "Reshape",
        x,
        b.sizes.vector(b, [shape[0], groups, -1]) if shape[0] != 0 else [0, groups, -1],
    )
    mean = b.op("ReduceMean", grouped, [2], keepdims=1)
    gap = b.op("Sub", grouped, mean)
    variance = b.op("ReduceMean", b.op("Mul", gap, gap), [2], keepdims=1)
    scaled = b.op("Div", gap, b.op("Sqrt", b.op("Add", variance, b.like(float(eps), variance))))
    found = b.op("Reshape", scaled, b.op("Shape", x))
    ones = [1] * (len(shape) - 2)
    if weight is not None:
        found = b.op("Mul", found, b.reshape(weight, [-1, *ones]))
    if bias is not None:
        found = b.op("Add", found, b.reshape(bias, [-1, *ones]))
    return found
