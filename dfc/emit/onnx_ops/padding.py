"""Padding, and channels that become pixels."""

from __future__ import annotations

from typing import Any

from dfc.emit.onnx_builder import Builder, Call, NoTranslation, Val
from dfc.emit.onnx_ops.registry import translates
from dfc.emit.onnx_types import D


@translates("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
            "replication_pad1d", "replication_pad2d", "replication_pad3d")  # fmt: skip
def pad(b: Builder, x: Val, call: Call) -> Val:
    """PyTorch lists pads from the last axis, begin and end together; negative ones cut."""
    a = call.attributes
    amounts = list(a.get("pad", a.get("padding", ())))
    base = call.op.split(".")[1]
    mode = a.get("mode", "constant")
    if base.startswith("reflection"):
        mode = "reflect"
    elif base.startswith("replication"):
        mode = "replicate"
    kinds = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    rank = b.rank(x)
    begin: list[Any] = [0] * rank
    end: list[Any] = [0] * rank
    for i in range(len(amounts) // 2):
        begin[rank - 1 - i], end[rank - 1 - i] = amounts[2 * i], amounts[2 * i + 1]
    from dfc.emit.onnx_ops.arithmetic import work_dtype

    dtype = x.dtype
    work = dtype if mode != "constant" or dtype in (D.BOOL, D.INT8, D.UINT8) else work_dtype(dtype)  # type: ignore[arg-type]
    x = b.cast(x, work)  # type: ignore[arg-type]
    if kinds[mode] == "wrap":
        return _wrap_pad(b, x, begin, end)
    value = None
    if mode == "constant":
        value = a.get("value")
        value = b.like(0 if value is None else value, x)
    return b.op("Pad", x, b.sizes.vector(b, [*begin, *end]), value, mode=kinds[mode])


def _wrap_pad(b: Builder, x: Val, begin: list[Any], end: list[Any]) -> Val:
    """Circular padding by joining slices: ONNX Runtime's `wrap` mode is young."""
    for axis, (low, high) in enumerate(zip(begin, end, strict=True)):
        parts = [x]
        if (isinstance(low, int) and low < 0) or (isinstance(high, int) and high < 0):
            raise NoTranslation("circular padding that cuts")
        if low != 0:
            parts.insert(0, b.op("Slice", x, b.vec(-low), [2**63 - 1], [axis]))
        if high != 0:
            parts.append(b.slice(x, axis, 0, high))
        if len(parts) > 1:
            x = b.op("Concat", *parts, axis=axis)
    return x


@translates("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def pixel_shuffle(b: Builder, x: Val, call: Call) -> Val:
    shape = list(b.type(x).shape)
    if "channel" in call.op:
        groups = call.attributes["groups"]
        split = b.op(
            "Reshape", x, b.sizes.vector(b, [shape[0], groups, shape[1] // groups, *shape[2:]])
        )
        turned = b.transpose(split, [0, 2, 1, *range(3, len(shape) + 1)])
        return b.op("Reshape", turned, b.sizes.vector(b, shape))
    lead, (c, h, w) = shape[:-3], shape[-3:]
    n = len(lead)
    if "unshuffle" in call.op:
        r = call.attributes["downscale_factor"]
        split = b.op("Reshape", x, b.sizes.vector(b, [*lead, c, h // r, r, w // r, r]))
        turned = b.transpose(split, [*range(n), n, n + 2, n + 4, n + 1, n + 3])
    else:
        r = call.attributes["upscale_factor"]
        split = b.op("Reshape", x, b.sizes.vector(b, [*lead, c // (r * r), r, r, h, w]))
        turned = b.transpose(split, [*range(n), n, n + 3, n + 1, n + 4, n + 2])
    return b.op("Reshape", turned, b.sizes.vector(b, call.result.shape))
