"""Layers: linear, activations, convolutions and pools."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dfc.emit.onnx_builder import Builder, Call, D, NoTranslation, Val, onnx_dtype
from dfc.emit.onnx_ops.registry import translates
from dfc.ir.expr import Expr


@translates("linear")
def linear(b: Builder, x: Val, weight: Val, bias: Val | None) -> Val:
    """Gemm for a batch of vectors, else MatMul and Add: ONNX Runtime folds the transpose."""
    plain = x.dtype in (D.FLOAT, D.DOUBLE)
    if b.rank(x) == 2 and b.rank(weight) == 2 and plain and bias is not None:
        return b.op("Gemm", x, weight, bias, transB=1)
    key = ("transposed", id(weight))
    turned = b.lookup(key)
    if turned is None:
        turned = b.transpose(weight, [1, 0]) if b.rank(weight) == 2 else weight
        b.shared[key] = turned
    found = b.op("MatMul", x, turned)
    return found if bias is None else b.op("Add", found, bias)


@translates("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner")
def matmul(b: Builder, x: Val, call: Call) -> Val:
    first, second = list(call.values)
    dtype = onnx_dtype(call.result)
    if dtype not in (D.FLOAT, D.DOUBLE, D.FLOAT16, D.INT32, D.INT64):
        first, second = b.cast(first, D.INT32), b.cast(second, D.INT32)
    if call.op == "aten.inner.default" and b.rank(call.operands[1]) > 1:  # type: ignore[arg-type]
        raise NoTranslation("")
    # ONNX Runtime's fusions mistake a transposed matrix times a vector: give it a column
    left = b.rank(call.operands[0]) == 1  # type: ignore[arg-type]
    right = b.rank(call.operands[1]) == 1  # type: ignore[arg-type]
    first = b.unsqueeze(first, 0) if left else first
    second = b.unsqueeze(second, 1) if right else second
    found = b.op("MatMul", first, second)
    if left and right:
        return b.reshape(found, [])
    return b.squeeze(found, -2 if left else -1) if left or right else found


@translates("transformers.grouped_mm_fallback", "_grouped_mm")
def grouped_matmul(b: Builder, x: Val, call: Call) -> Val:
    """Rows sorted by group, each group times its matrix; rows after the last group are zeros."""
    _, weight, offsets = call.operands[:3]
    assert isinstance(weight, Val) and isinstance(offsets, Val)
    groups = b.type(weight).shape[0]
    if not isinstance(groups, int) or b.rank(x) != 2 or b.rank(weight) != 3:
        raise b.refuse("a grouped product needs a fixed number of groups, and rows of vectors")
    ends = b.cast(offsets, D.INT64)
    parts = []
    start = b.array(np.zeros(1, np.int64))
    for g in range(groups):
        end = b.op("Slice", ends, [g], [g + 1], [0])
        rows = b.op("Slice", x, start, end, [0])
        parts.append(b.op("MatMul", rows, b.op("Gather", weight, g, axis=0)))
        start = end
    rest = b.op("Slice", x, start, [2**63 - 1], [0])
    zeros = b.op("Expand", b.like(0.0, x), b.op("Concat", b.op("Shape", rest, start=0, end=1),
                 b.vec(b.type(weight).shape[2]), axis=0))  # fmt: skip
    return b.op("Concat", *parts, zeros, axis=0)


@translates("addmm", "baddbmm")
def addmm(b: Builder, x: Val, beta: Any, alpha: Any, call: Call) -> Val:
    _, first, second = list(call.values)
    if x.dtype in (D.FLOAT, D.DOUBLE) and ".addmm." in call.op:
        return b.op("Gemm", first, second, x, alpha=float(alpha), beta=float(beta))
    found = b.op("MatMul", first, second)
    if alpha != 1:
        found = b.op("Mul", found, b.like(alpha, found))
    if beta == 0:
        return found
    return b.op("Add", found, x if beta == 1 else b.op("Mul", x, b.like(beta, x)))


@translates("gelu")
def gelu(b: Builder, x: Val, approximate: str) -> Val:
    if x.dtype == D.DOUBLE and approximate == "none":
        from dfc.emit.onnx_ops.arithmetic import erf64

        half = erf64(b, b.op("Mul", x, b.like(math.sqrt(0.5), x)))
        factor = b.op("Add", half, b.like(1.0, x))
        return b.op("Mul", b.op("Mul", x, b.like(0.5, x)), factor)
    return b.op("Gelu", x, approximate=approximate)


@translates("silu")
def silu(b: Builder, x: Val) -> Val:
    return b.op("Mul", x, b.op("Sigmoid", x))


@translates("softmax.int", "_softmax", "special_softmax", "log_softmax.int", "_log_softmax")
def softmax(b: Builder, x: Val, dim: int, call: Call) -> Val:
    x = b.cast(x, onnx_dtype(call.result))
    if call.result.rank == 0:
        zero = b.op("Sub", x, x)
        return zero if "log" in call.op else b.op("Exp", zero)
    return b.op("LogSoftmax" if "log_softmax" in call.op else "Softmax", x, axis=dim)


@translates("softplus")
def softplus(b: Builder, x: Val, beta: Any, threshold: Any) -> Val:
    """log(1 + exp(x)), and x itself above the threshold."""
    scaled = x if beta == 1 else b.op("Mul", x, b.like(beta, x))
    value = b.op("Softplus", scaled)
    if beta != 1:
        value = b.op("Div", value, b.like(beta, x))
    return b.op("Where", b.op("Greater", scaled, b.like(threshold, x)), x, value)


@translates("embedding")
def embedding(b: Builder, weight: Val, indices: Val) -> Val:
    return b.op("Gather", weight, indices, axis=0)


# Convolutions


def _tuple(value: Any, n: int) -> list[Any]:
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
        _tuple(a["stride"], n),
        a["padding"],
        _tuple(a["dilation"], n),
        a["groups"],
    )


@translates("convolution")
def convolution(b: Builder, x: Val, weight: Val, bias: Val | None, call: Call) -> Val:
    a = call.attributes
    n = b.rank(weight) - 2
    stride, dilation = _tuple(a["stride"], n), _tuple(a["dilation"], n)
    if a["transposed"]:
        return transposed(
            b, x, weight, bias, stride, _tuple(a["padding"], n), _tuple(a["output_padding"], n),
            dilation, a["groups"],
        )  # fmt: skip
    return convolve(b, x, weight, bias, stride, a["padding"], dilation, a["groups"])


@translates("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input")
def conv_transpose(b: Builder, x: Val, weight: Val, bias: Val | None, call: Call) -> Val:
    a = call.attributes
    n = b.rank(weight) - 2
    return transposed(
        b, x, weight, bias, _tuple(a["stride"], n), _tuple(a["padding"], n),
        _tuple(a["output_padding"], n), _tuple(a["dilation"], n), a["groups"],
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
        one = _tuple(padding, n)
        pads = one * 2
    if isinstance(groups, Expr):
        return _grouped(b, x, weight, bias, stride, pads, dilation, groups)
    unbatched = b.rank(x) == n + 1
    if unbatched:
        x = b.unsqueeze(x, 0)
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


# Pools


def _window(call: Call, b: Builder, n: int) -> tuple[list[int], list[int], list[int], list[int]]:
    a = call.attributes
    kernel = _tuple(a["kernel_size"], n)
    stride = _tuple(a.get("stride") or tuple(kernel), n)
    padding = _tuple(a.get("padding", 0), n)
    dilation = _tuple(a.get("dilation", 1), n)
    if any(isinstance(v, Expr) for v in (*kernel, *stride, *padding)):
        raise NoTranslation("the window of a pool depends on a size")
    return kernel, stride, padding, dilation


_POOL_RANK = {"1": 1, "2": 2, "3": 3}


@translates("max_pool1d", "max_pool2d", "max_pool3d", "max_pool1d_with_indices",
            "max_pool2d_with_indices", "max_pool3d_with_indices")  # fmt: skip
def max_pool(b: Builder, x: Val, call: Call) -> Any:
    """ONNX pads with minus infinity by itself; integers are pooled as float64."""
    n = next(v for k, v in _POOL_RANK.items() if f"pool{k}d" in call.op)
    kernel, stride, padding, dilation = _window(call, b, n)
    unbatched = b.rank(x) == n + 1
    ceil = int(bool(call.attributes.get("ceil_mode")))
    sizes = b.type(x).shape[-n:]
    work = x if x.dtype in (D.FLOAT, D.DOUBLE) else b.cast(x, D.FLOAT)
    if unbatched:
        work = b.unsqueeze(work, 0)
    two = len(call.results) == 2
    options: dict[str, Any] = {
        "kernel_shape": kernel, "strides": stride, "pads": padding * 2, "dilations": dilation,
        "ceil_mode": ceil,
    }  # fmt: skip
    if not two:
        found = b.op("MaxPool", work, **options)
        return b.squeeze(found, 0) if unbatched else found
    value, index = b.op("MaxPool", work, out=2, **options)
    # ONNX counts positions through batch and channels, PyTorch within one plane
    plane: Any = 1
    for s in sizes:
        plane = plane * s
    index = b.op("Mod", index, b.lift(plane))
    if unbatched:
        value, index = b.squeeze(value, 0), b.squeeze(index, 0)
    return [value, index]


@translates("avg_pool1d", "avg_pool2d", "avg_pool3d")
def avg_pool(b: Builder, x: Val, call: Call) -> Val:
    a = call.attributes
    n = next(v for k, v in _POOL_RANK.items() if f"pool{k}d" in call.op)
    kernel, stride, padding, _ = _window(call, b, n)
    unbatched = b.rank(x) == n + 1
    if unbatched:
        x = b.unsqueeze(x, 0)
    include = bool(a.get("count_include_pad", True))
    ceil = bool(a.get("ceil_mode"))
    divisor = a.get("divisor_override")
    if ceil or divisor is not None:
        found = _counted_pool(b, x, kernel, stride, padding, include, divisor, call, n)
    else:
        found = b.op(
            "AveragePool", x, kernel_shape=kernel, strides=stride, pads=padding * 2,
            count_include_pad=int(include and any(padding)),
        )  # fmt: skip
    return b.squeeze(found, 0) if unbatched else found


def _counted_pool(
    b: Builder, x: Val, kernel: list[int], stride: list[int], padding: list[int], include: bool,
    divisor: int | None, call: Call, n: int,
) -> Val:  # fmt: skip
    """Sums divided by counts of our own: ONNX Runtime counts windows beyond the edge otherwise.

    With ceil_mode the last window may reach past the padding; those places never count.
    """
    shape = call.operands[0].meta["type"].shape  # type: ignore[union-attr]
    sizes, out = shape[-n:], call.result.shape[-n:]
    extra = []
    for s, o, k, st, p in zip(sizes, out, kernel, stride, padding, strict=True):
        need = (o - 1) * st + k - (s + 2 * p)
        if isinstance(need, Expr):
            raise NoTranslation("an average pool with ceil_mode needs fixed sizes")
        extra.append(max(int(need), 0))
    ends = [p + e for p, e in zip(padding, extra, strict=True)]
    area = math.prod(kernel)
    options: dict[str, Any] = {"kernel_shape": kernel, "strides": stride}
    padded = _zero_pad(b, x, padding, ends, n)
    total = b.op("AveragePool", padded, **options)
    if divisor is not None:
        return b.op("Mul", total, b.like(area / divisor, x))
    ones = np.ones((1, 1, *(int(s) for s in sizes)), np.float64)
    if include:
        ones = np.pad(ones, [(0, 0), (0, 0), *((p, p) for p in padding)], constant_values=1.0)
        ones = np.pad(ones, [(0, 0), (0, 0), *((0, e) for e in extra)])
    else:
        ones = np.pad(ones, [(0, 0), (0, 0), *zip(padding, ends, strict=True)])
    import torch

    pool = getattr(torch.nn.functional, f"avg_pool{n}d")
    counts = pool(torch.from_numpy(ones), tuple(kernel), tuple(stride)).numpy()
    return b.op("Div", total, b.array(counts.astype(x.dtype.numpy()), x.dtype))  # type: ignore[union-attr]


def _zero_pad(b: Builder, x: Val, begin: Sequence[int], end: Sequence[int], n: int) -> Val:
    if not any(begin) and not any(end):
        return x
    return b.op("Pad", x, [0, 0, *begin, 0, 0, *end], b.like(0.0, x))


@translates("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
            "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool1d",
            "adaptive_max_pool2d", "adaptive_max_pool3d")  # fmt: skip
def adaptive_pool(b: Builder, x: Val, output_size: Any, call: Call) -> Any:
    """Window i reaches from floor(i*n/o) to ceil((i+1)*n/o): weighted for means, cut for maxima."""
    n = next(v for k, v in _POOL_RANK.items() if f"pool{k}d" in call.op)
    shape = b.type(x).shape
    sizes, outs = shape[-n:], call.result.shape[-n:]
    rank = len(shape)
    is_max = "_max_" in call.op
    axes = list(range(rank - n, rank))
    if is_max:
        return _adaptive_max(b, x, sizes, outs, axes, call)
    if all(o == 1 for o in outs):
        if n == 2 and rank == 4 and x.dtype == D.FLOAT:
            return b.op("GlobalAveragePool", x)  # ONNX Runtime has it in integers too
        return b.op("ReduceMean", x, axes, keepdims=1)
    for axis, s, o in zip(axes, sizes, outs, strict=True):
        x = _adaptive_axis(b, x, axis, s, o, rank)
    return x


def _adaptive_axis(b: Builder, x: Val, axis: int, size: Any, out: Any, rank: int) -> Val:
    """The mean over each window of one axis, as a product with a matrix of weights."""
    if size == out:
        return x
    if out == 1:
        return b.op("ReduceMean", x, [axis], keepdims=1)
    dtype = x.dtype
    if isinstance(size, int) and isinstance(out, int):
        weights = np.zeros((size, out))
        for i in range(out):
            low, high = i * size // out, -(-(i + 1) * size // out)
            weights[low:high, i] = 1.0 / (high - low)
        matrix = b.array(weights.astype(dtype.numpy()), dtype)  # type: ignore[union-attr]
    else:
        line, n, o = b.arange(out), b.lift(size), b.lift(out)
        begin = b.op("Div", b.op("Mul", line, n), o)
        top = b.op("Add", b.op("Mul", b.op("Add", line, 1), n), b.op("Sub", o, 1))
        end = b.op("Div", top, o)
        at = b.unsqueeze(b.arange(size), 1)
        inside = b.op("And", b.op("GreaterOrEqual", at, begin), b.op("Less", at, end))
        count = b.cast(b.op("Sub", end, begin), dtype)  # type: ignore[arg-type]
        matrix = b.op("Div", b.cast(inside, dtype), count)  # type: ignore[arg-type]
    perm = [i for i in range(rank) if i != axis] + [axis]
    found = b.op("MatMul", b.transpose(x, perm), matrix)
    back = [*range(axis), rank - 1, *range(axis, rank - 1)]
    return b.transpose(found, back)


def _adaptive_max(
    b: Builder, x: Val, sizes: Any, outs: Any, axes: list[int], call: Call
) -> list[Val]:
    """Value and index over each window: every combination of windows is sliced and flattened."""
    import itertools

    if not all(isinstance(s, int) for s in (*sizes, *outs)):
        raise NoTranslation("an adaptive max pool needs fixed sizes")
    if math.prod(outs) > 4096:
        raise NoTranslation("an adaptive max pool with too many windows")
    rank = b.rank(x)
    lead = list(b.type(x).shape[: rank - len(axes)])
    positions = _positions(sizes)
    values, indices = [], []
    from dfc.emit.onnx_ops.reduction import arg_extreme

    for window in itertools.product(*(range(o) for o in outs)):
        spans = [
            (i * s // o, -(-(i + 1) * s // o)) for i, s, o in zip(window, sizes, outs, strict=True)
        ]
        part = b.op("Slice", x, [lo for lo, _ in spans], [hi for _, hi in spans], axes)
        flat = b.op(
            "Reshape", part, b.sizes.vector(b, [*lead, math.prod(hi - lo for lo, hi in spans)])
        )
        here = positions[tuple(slice(lo, hi) for lo, hi in spans)].reshape(-1)
        arg = arg_extreme(b, "ArgMax", flat, len(lead), True)
        values.append(b.op("GatherElements", flat, arg, axis=len(lead)))
        indices.append(b.op("Gather", b.array(here), arg, axis=0))
    shape = b.sizes.vector(b, [*lead, *outs])
    found = []
    for parts in (values, indices):
        joined = parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=len(lead))
        found.append(b.op("Reshape", joined, shape))
    return found


def _positions(sizes: Sequence[int]) -> Any:
    return np.arange(math.prod(sizes), dtype=np.int64).reshape(tuple(sizes))


# Padding


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
