"""What the quantized ops mean, a second time: numpy, float64, one element after the other.

Written from the specifications of ONNX (QuantizeLinear, DequantizeLinear) and of ONNX Runtime's
MatMulNBits, whose kernels are a third opinion.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

FLOAT8 = {"f8e4m3fn": ml_dtypes.float8_e4m3fn, "f8e5m2": ml_dtypes.float8_e5m2}
RANGES = {"i8": (-128, 127), "u8": (0, 255)}


def nibble(packed: Any, row: int, k: int) -> int:
    return int(packed[row, k // 2]) >> (4 * (k % 2)) & 15


def weights4(packed: Any, scale: Any, zero: Any, group: int, k: int) -> tuple[Any, Any]:
    """Whole numbers, and the scale of each."""
    n = len(packed)
    whole, scales = np.zeros((n, k)), np.zeros((n, k))
    for row, at in itertools.product(range(n), range(k)):
        point = 8 if zero is None else nibble(zero, row, at // group)
        whole[row, at] = nibble(packed, row, at) - point
        scales[row, at] = scale[row, at // group]
    return whole, scales


def rounded(x: Any, group: int) -> Any:
    """Each group of each row rounded to 255 values."""
    y = np.zeros_like(x)
    for row in np.ndindex(x.shape[:-1]):
        for at in range(0, x.shape[-1], group):
            part = x[row][at : at + group]
            step = np.abs(part).max() / 127 or 1.0
            y[row][at : at + group] = np.rint(part / step) * step
    return y


def product(x: Any, weight: Any, bias: Any, group: int, activations: str) -> Any:
    if activations == "int8":
        x = rounded(x, group)
    return np.einsum("...k,nk->...n", x, weight) + (0 if bias is None else bias)


def linear_w4(
    x: Any, packed: Any, scale: Any, zero: Any = None, bias: Any = None, *, group: int,
    activations: str,
) -> Any:  # fmt: skip
    whole, scales = weights4(packed, scale, zero, group, x.shape[-1])
    return product(x, whole * scales, bias, group, activations)


def linear_w8(
    x: Any, weight: Any, scale: Any, bias: Any = None, *, group: int | None, activations: str
) -> Any:
    group = group or x.shape[-1]
    scales = scale.reshape(len(weight), -1)[:, np.arange(x.shape[-1]) // group]
    return product(x, weight * scales, bias, group, activations)


def grouped(layer: Callable[..., Any], x: Any, ends: Any, *weights: Any, **attributes: Any) -> Any:
    """A row's expert is the first whose rows end behind it; of rows behind all ends it is none."""
    y = np.zeros((len(x), weights[0].shape[1]))
    for row in range(len(x)):
        for e in [e for e, end in enumerate(ends) if row < end][:1]:
            own = [None if w is None else w[e] for w in weights]
            y[row] = layer(x[row : row + 1], *own, **attributes)[0]
    return y


def linear_f8(x: Any, weight: Any, scale: Any, bias: Any = None, *, activations: str) -> Any:
    if activations == "f8":
        steps = np.abs(x).max(-1, keepdims=True) / 448
        x = (x / steps).astype(FLOAT8["f8e4m3fn"]).astype(float) * steps
    return np.einsum("...k,nk->...n", x, weight) * scale + (0 if bias is None else bias)


def scales_of(x: Any, scale: Any, axis: int | None, group: int | None) -> Any:
    """The scale, or zero point, of each element."""
    full = np.zeros(x.shape, np.asarray(scale).dtype)
    for at in np.ndindex(x.shape):
        if group is not None:
            full[at] = scale[(*at[:-1], at[-1] // group)]
        else:
            full[at] = scale[at[axis]] if axis is not None else scale
    return full


def quantize(
    x: Any, scale: Any, zero: Any = None, *, dtype: str, axis: int | None, group: int | None,
    low: int | None, high: int | None,
) -> Any:  # fmt: skip
    y = x / scales_of(x, scale, axis, group)
    if dtype in FLOAT8:
        largest = float(ml_dtypes.finfo(FLOAT8[dtype]).max)
        return np.clip(y, -largest, largest).astype(FLOAT8[dtype])
    least, most = RANGES[dtype]
    y = np.rint(y) + (0 if zero is None else scales_of(x, zero, axis, group))
    return np.clip(y, least if low is None else low, most if high is None else high)


def dequantize(q: Any, scale: Any, zero: Any = None, *, axis: int | None, group: int | None) -> Any:
    points = 0 if zero is None else scales_of(q, zero, axis, group).astype(float)
    return (q.astype(float) - points) * scales_of(q, scale, axis, group)


def embedding_w8(indices: Any, table: Any, scale: Any, *, group: int | None, dtype: str) -> Any:
    columns = np.arange(table.shape[1]) // (group or table.shape[1])
    return (table * scale.reshape(len(table), -1)[:, columns])[indices]


def embedding_w4(
    indices: Any, packed: Any, scale: Any, zero: Any = None, *, group: int, width: int | None,
    dtype: str,
) -> Any:  # fmt: skip
    whole, scales = weights4(packed, scale, zero, group, width or 2 * packed.shape[1])
    return (whole * scales)[indices]


QUANTIZED: dict[str, Callable[..., Any]] = {
    "dfc.dequantize": dequantize,
    "dfc.embedding_w4": embedding_w4,
    "dfc.embedding_w8": embedding_w8,
    "dfc.grouped_linear_w4": partial(grouped, linear_w4),
    "dfc.grouped_linear_w8": partial(grouped, linear_w8),
    "dfc.linear_f8": linear_f8,
    "dfc.linear_w4": linear_w4,
    "dfc.linear_w8": linear_w8,
    "dfc.quantize": quantize,
}


def in_onnxruntime_quantized(op: str, a: dict[str, Any], attributes: dict[str, Any]) -> Any:
    """How ONNX Runtime is asked for the same: op, domain, inputs, attributes, outputs, type."""
    group = attributes["group"]
    if op in ("dfc.quantize", "dfc.dequantize"):
        first, kind = ("x", "QuantizeLinear") if op == "dfc.quantize" else ("q", "DequantizeLinear")
        codes = {"i8": 3, "u8": 2}.get(attributes.get("dtype", ""), 0)
        asked = {"axis": attributes["axis"], "block_size": group, "output_dtype": codes}
        if group is not None:
            asked["axis"] = a[first].ndim - 1
        if a["zero"] is not None:
            asked["output_dtype"] = 0
        given = {k: v for k, v in asked.items() if v not in (None, 0) or (k == "axis" and v == 0)}
        return kind, "", [a[first], a["scale"], a["zero"]], given, ["y"], codes or 1
    n, groups = a["scale"].shape
    bits = 4 if op == "dfc.linear_w4" else 8
    if bits == 4:
        packed = a["packed"]
    else:
        codes8 = (a["weight"].astype(int) + 128).astype(np.uint8)
        more = groups * group - codes8.shape[1]
        packed = np.pad(codes8, ((0, 0), (0, more)), constant_values=128)
    blocks = packed.reshape(n, groups, group * bits // 8)
    level = 4 if attributes["activations"] == "int8" else 1
    asked = {"K": a["x"].shape[-1], "N": n, "bits": bits, "block_size": group}
    scale = a["scale"].astype(np.float32)
    inputs = [a["x"], blocks, scale, a.get("zero"), None, a["bias"]]
    return "MatMulNBits", "com.microsoft", inputs, asked | {"accuracy_level": level}, ["y"]
