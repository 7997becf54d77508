"""Pools: with windows of a size, and with results of a size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dfc.emit.onnx_builder import Builder, Call, NoTranslation, Val
from dfc.emit.onnx_ops.conv import one_an_axis
from dfc.emit.onnx_ops.registry import translates
from dfc.emit.onnx_types import D
from dfc.ir.expr import Expr


def _window(call: Call, b: Builder, n: int) -> tuple[list[int], list[int], list[int], list[int]]:
    a = call.attributes
    kernel = one_an_axis(a["kernel_size"], n)
    stride = one_an_axis(a.get("stride") or tuple(kernel), n)
    padding = one_an_axis(a.get("padding", 0), n)
    dilation = one_an_axis(a.get("dilation", 1), n)
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
        found = b.op("MaxPool", _own_padding(b, work), **options)
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


def _own_padding(b: Builder, x: Val) -> Val:
    """The same, padded with axes where it was padded just before.

    Why:  ONNX Runtime lets the pool pad in place of a Pad with zeros, and then pads with minus
          infinity; from a Pad that names its axes (opset 18) it keeps away.
    """
    pad = x.producer()
    if b.root.opset < 18 or pad is None or pad.op_type != "Pad" or len(pad.inputs) != 3:
        return x
    attributes = {a.name: a.value for a in pad.attributes.values()}
    padded: Val = b.op("Pad", *pad.inputs, list(range(b.rank(x))), **attributes)
    return padded


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
