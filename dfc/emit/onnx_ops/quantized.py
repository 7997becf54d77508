"""Quantized ops in ONNX: QuantizeLinear and DequantizeLinear, MatMulNBits, MatMulInteger."""

from __future__ import annotations

import numpy as np

from dfc.emit.onnx_builder import ONNX_DTYPES, Builder, D, NoTranslation, Val
from dfc.emit.onnx_ops.registry import translates
from dfc.ops.codes import groups_of

_BLOCKS = (16, 32, 64, 128, 256)  # block sizes that MatMulNBits takes


@translates("dfc.quantize")
def quantize(
    b: Builder, x: Val, scale: Val, zero: Val | None, dtype: str, axis: int | None,
    group: int | None, low: int | None, high: int | None,
) -> Val:  # fmt: skip
    target = ONNX_DTYPES[dtype]
    attributes = _placed(b, x, scale, axis, group)
    zero = zero or _no_zero(b, scale, target)
    y = b.op("QuantizeLinear", x, scale, zero, dtype=target, **attributes)
    if low is None and high is None:
        return y
    bounds = [None if v is None else b.const(v, target) for v in (low, high)]
    return b.op("Clip", y, *bounds, dtype=target)


@translates("dfc.dequantize")
def dequantize(
    b: Builder, q: Val, scale: Val, zero: Val | None, axis: int | None, group: int | None
) -> Val:
    attributes = _placed(b, q, scale, axis, group)
    return b.op("DequantizeLinear", q, scale, zero, dtype=scale.dtype, **attributes)


def _no_zero(b: Builder, scale: Val, dtype: D) -> Val:
    """Zeros of scale's shape: they tell the element type of the codes."""
    shape = b.type(scale).shape
    if all(isinstance(s, int) for s in shape):
        return b.const(np.zeros(shape), dtype)
    if dtype not in (D.INT8, D.UINT8):
        raise NoTranslation("")  # Expand takes no float8
    return b.expand(b.const(0, dtype), shape)


def _placed(
    b: Builder, x: Val, scale: Val, axis: int | None, group: int | None
) -> dict[str, int | None]:
    """Where the scales belong, as attributes of QuantizeLinear and DequantizeLinear."""
    wide = b.root.opset >= 19  # half-precision scales, codes of float8
    if scale.dtype != D.FLOAT and not (wide and scale.dtype == D.FLOAT16):
        raise NoTranslation("")
    if group is not None:
        if b.root.opset < 21:
            raise NoTranslation("")
        return {"axis": b.rank(x) - 1, "block_size": group}
    if axis is None:
        return {}
    return {"axis": axis % b.rank(x)}


@translates("dfc.linear_w4")
def linear_w4(
    b: Builder, x: Val, packed: Val, scale: Val, zero: Val | None, bias: Val | None, group: int,
    activations: str,
) -> Val:  # fmt: skip
    """MatMulNBits; the decomposition is unpacked when loading."""
    if activations == "int8" and packed.const_value is None:
        raise NoTranslation("")  # the kernel multiplies floats unless it could pack the weights
    n, groups = b.type(scale).shape
    blocks = b.reshape(packed, [n, groups, group // 2])
    return _matmul_nbits(b, x, blocks, scale, zero, bias, 4, group, activations)


def _matmul_nbits(
    b: Builder, x: Val, blocks: Val, scale: Val, zero: Val | None, bias: Val | None, bits: int,
    group: int, activations: str,
) -> Val:  # fmt: skip
    n, k = b.dim(scale, 0), b.dim(x, -1)
    if not b.root.contrib or x.dtype != D.FLOAT or b.rank(x) < 2 or group not in _BLOCKS:
        raise NoTranslation("")
    if not isinstance(n, int) or not isinstance(k, int):
        raise NoTranslation("")
    found: Val = b.contrib(
        "MatMulNBits", x, blocks, b.cast(scale, D.FLOAT), zero, None, bias,
        K=k, N=n, bits=bits, block_size=group,
        accuracy_level=4 if activations == "int8" else 1,
    )  # fmt: skip
    return found


@translates("dfc.linear_w8")
def linear_w8(
    b: Builder, x: Val, weight: Val, scale: Val, bias: Val | None, group: int | None,
    activations: str,
) -> Val:  # fmt: skip
    """MatMulNBits for groups; the decomposition for the rest."""
    if group is None or (activations == "int8" and weight.const_value is None):
        raise NoTranslation("")
    n, groups = b.type(scale).shape
    k = b.dim(weight, 1)
    codes = b.cast(b.op("Add", b.cast(weight, D.INT32), b.const(128, D.INT32)), D.UINT8)
    if isinstance(k, int) and groups_of(k, group) * group > k:
        more = groups_of(k, group) * group - k
        codes = b.op("Pad", codes, [0, 0, 0, more], b.const(128, D.UINT8))
    blocks = b.reshape(codes, [n, groups, group])
    return _matmul_nbits(b, x, blocks, scale, None, bias, 8, group, activations)
