"""Convolutions, also transposed ones, and batch norm."""

from __future__ import annotations

from typing import Any

import numpy as np

from dfc.emit.onnx_builder import Builder, Call, NoTranslation, Val
from dfc.emit.onnx_ops.filled import fill_channels
from dfc.emit.onnx_ops.registry import translates
from dfc.ir.expr import Expr


def one_an_axis(value: Any, n: int) -> list[Any]:
    values = list(value) if isinstance(value, tuple) else [value]
    return values * n if len(values) == 1 and n != 1 else values


@translates("conv1d", "conv2d", "conv3d", "conv1d.padding", "conv2d.padding", "conv3d.padding")
def conv(b: Builder, x: Val, weight: Val, bias: Val | None, call: Call) -> Val:
    a = call.attributes
    n = b.rank(weight) - 2
    return convolve(
        b,
        x,
        weight,
        bias,
        one_an_axis(a["stride"], n),
        a["padding"],
        one_an_axis(a["dilation"], n),
        a["groups"],
    )


@translates("convolution")
def convolution(b: Builder, x: Val, weight: Val, bias: Val | None, call: Call) -> Val:
    a = call.attributes
    n = b.rank(weight) - 2
    stride, dilation = one_an_axis(a["stride"], n), one_an_axis(a["dilation"], n)
    if a["transposed"]:
        return transposed(
            b, x, weight, bias, stride,
            one_an_axis(a["padding"], n), one_an_axis(a["output_padding"], n),
            dilation, a["groups"],
        )  # fmt: skip
    return convolve(b, x, weight, bias, stride, a["padding"], dilation, a["groups"])


@translates("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input")
def conv_transpose(b: Builder, x: Val, weight: Val, bias: Val | None, call: Call) -> Val:
    a = call.attributes
    n = b.rank(weight) - 2
    return transposed(
        b, x, weight, bias, one_an_axis(a["stride"], n), one_an_axis(a["padding"], n),
        one_an_axis(a["output_padding"], n), one_an_axis(a["dilation"], n), a["groups"],
    )  # fmt: skip


def convolve(
    b: Builder, x: Val, weight: Val, bias: Val | None, stride: list[int], padding: Any,
    dilation: list[int], groups: int,
) -> Val:  # fmt: skip
    n = b.rank(weight) - 2
    kernel: list[Any] = list(b.type(weight).shape[2:])
    if padding == "valid":
        pads = [0] * (2 * n)
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [*(t // 2 for t in total), *(t - t // 2 for t in total)]
    else:
        one = one_an_axis(padding, n)
        pads = one * 2
    if isinstance(groups, Expr):
        return _grouped(b, x, weight, bias, stride, pads, dilation, groups)
    unbatched = b.rank(x) == n + 1
    if unbatched:
        x = b.unsqueeze(x, 0)
    x, weight = fill_channels(b, x, weight, groups)
    found = b.op(
        "Conv", x, weight, bias, strides=stride, pads=pads, dilations=dilation, group=groups
    )
    return b.squeeze(found, 0) if unbatched else found


def _grouped(
    b: Builder, x: Val, weight: Val, bias: Val | None, stride: list[int], pads: list[int],
    dilation: list[int], groups: Expr,
) -> Val:  # fmt: skip
    """As many groups as a size says (a kernel for each sample): patches times kernels, batched."""
    from dfc.emit.onnx_ops.resampling import windows

    if b.rank(weight) != 4 or b.rank(x) != 4 or b.type(x).shape[0] != 1:
        raise b.refuse("ONNX wants the number of groups of a convolution as a constant")
    sizes: list[Any] = [*b.type(x).shape[2:], *b.type(weight).shape]
    h, w, out, inner, kh, kw = sizes
    if any(pads):
        x = b.op("Pad", x, [0, 0, *pads[:2], 0, 0, *pads[2:]], b.like(0.0, x))
    oh = (h + pads[0] + pads[2] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    ow = (w + pads[1] + pads[3] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    rows = windows(b, oh, stride[0], kh, dilation[0])
    columns = windows(b, ow, stride[1], kw, dilation[1])
    found = b.op("Gather", b.op("Gather", x, rows, axis=2), columns, axis=4)  # 1 c kh oh kw ow
    found = b.transpose(found, [0, 1, 2, 4, 3, 5])
    taps = inner * kh * kw
    patches = b.op("Reshape", found, b.sizes.vector(b, [groups, taps, oh * ow]))
    kernels = b.op("Reshape", weight, b.sizes.vector(b, [groups, out // groups, taps]))
    made = b.op("MatMul", kernels, patches)
    made = b.op("Reshape", made, b.sizes.vector(b, [1, out, oh, ow]))
    return made if bias is None else b.op("Add", made, b.reshape(bias, [-1, 1, 1]))


def transposed(
    b: Builder, x: Val, weight: Val, bias: Val | None, stride: list[int], padding: list[int],
    output_padding: list[int], dilation: list[int], groups: int,
) -> Val:  # fmt: skip
    n = b.rank(weight) - 2
    unbatched = b.rank(x) == n + 1
    if unbatched:
        x = b.unsqueeze(x, 0)
    found = b.op(
        "ConvTranspose", x, weight, bias, strides=stride, pads=padding * 2,
        output_padding=output_padding, dilations=dilation, group=groups,
    )  # fmt: skip
    return b.squeeze(found, 0) if unbatched else found


@translates("batch_norm", "_native_batch_norm_legit_no_training",
            "_native_batch_norm_legit.no_stats", "cudnn_batch_norm")  # fmt: skip
def batch_norm(b: Builder, x: Val, weight: Val | None, bias: Val | None, call: Call) -> Any:
    a = call.attributes
    operands = call.operands
    if a.get("training") or "no_stats" in call.op or operands[3] is None:
        raise NoTranslation("")
    mean, variance = operands[3], operands[4]
    assert not isinstance(mean, tuple) and mean is not None
    dtype = mean.dtype
    (channels,) = b.type(mean).shape
    assert dtype is not None and isinstance(channels, int)
    one = b.array(np.ones(channels).astype(dtype.numpy()), dtype)
    zero = b.array(np.zeros(channels).astype(dtype.numpy()), dtype)
    found = b.op(
        "BatchNormalization", x, weight if weight is not None else one,
        bias if bias is not None else zero, mean, variance, epsilon=float(a["eps"]),
    )  # fmt: skip
    if len(call.results) == 1:
        return found
    empty = b.array(np.zeros(0, np.float32))
    return [found, empty, empty, empty][: len(call.results)]
