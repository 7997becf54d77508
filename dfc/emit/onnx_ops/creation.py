"""Tensors out of nothing: ranges, constants, triangles, random numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnxscript import ir

from dfc.emit.onnx_builder import Builder, Call, NoTranslation, Val
from dfc.emit.onnx_ops.arithmetic import operand
from dfc.emit.onnx_ops.registry import translates
from dfc.emit.onnx_types import FLOATS, D, np_array, onnx_dtype
from dfc.ir.expr import Expr


@translates("full", "zeros", "ones", "empty.memory_format", "full_like", "zeros_like", "ones_like",
            "empty_like", "new_full", "new_zeros", "new_ones", "new_empty", "scalar_tensor",
            "new_empty_strided", "empty_strided", "empty_permuted", "fill.Scalar",
            "zeros.names")  # fmt: skip
def full(b: Builder, call: Call) -> Val:
    """One number, everywhere: a constant where the shape is known, else spread at run time."""
    base = call.op.split(".")[1]
    value: Any = 1 if "ones" in base else 0
    if "full" in base:
        value = call.attributes["fill_value"]
    elif base == "scalar_tensor":
        value = call.attributes["s"]
    elif base == "fill":
        value = call.attributes["value"]
    dtype = onnx_dtype(call.result)
    shape: list[Any] = list(call.result.shape)
    if call.result.dtype.is_complex:
        raise NoTranslation("")
    if isinstance(value, (Expr, ir.Value)):
        number = operand(b, value, dtype)
        return b.expand(number, shape) if shape else number
    array = np_array(value, dtype)
    if not shape:
        return b.array(array, dtype)
    if all(isinstance(s, int) for s in shape) and int(np.prod(shape)) <= 16:
        return b.array(np.broadcast_to(array, shape), dtype)
    return b.op("Expand", b.array(array, dtype), b.sizes.vector(b, shape))


@translates("full", "zeros", "ones", "full_like", "zeros_like", "ones_like", "new_zeros",
            "empty.memory_format", "empty_like", complex=True)  # fmt: skip
def full_complex(b: Builder, call: Call) -> Val:
    base = call.op.split(".")[1]
    value: Any = 1 if "ones" in base else call.attributes.get("fill_value", 0)
    number = b.const(complex(value), onnx_dtype(call.result))
    return b.expand(number, [*call.result.shape, 2])


@translates("arange", "arange.start", "arange.start_step")
def arange(b: Builder, call: Call) -> Val:
    a = call.attributes
    start, end, step = a.get("start", 0), a["end"], a.get("step", 1)
    dtype = onnx_dtype(call.result)
    (n,) = call.result.shape
    if all(not isinstance(v, Expr) for v in (start, end, step)) and isinstance(n, int):
        import torch

        made = torch.arange(start, end, step, dtype=call.result.dtype.to_torch())
        if made.dtype in (torch.bfloat16,):
            return b.array(made.float().numpy().astype(dtype.numpy()), dtype)
        return b.array(made.numpy(), dtype)
    line = b.arange(n)
    if isinstance(start, int) and start == 0 and step == 1:
        return b.cast(line, dtype)
    work = D.DOUBLE if dtype in FLOATS else D.INT64
    line = b.cast(line, work)
    line = b.op("Mul", line, operand(b, step, work))
    return b.op("Add", line, operand(b, start, work))


@translates("linspace")
def linspace(b: Builder, x: Any, call: Call) -> Val:
    """From both ends to the middle, as PyTorch does, so that the last element is exact."""
    a = call.attributes
    start, end = a.get("start"), a.get("end")
    (n,) = call.result.shape
    if isinstance(start, (int, float)) and isinstance(end, (int, float)) and isinstance(n, int):
        import torch

        made = torch.linspace(start, end, n, dtype=call.result.dtype.to_torch())
        if made.dtype == torch.bfloat16:
            raise NoTranslation("")
        return b.array(made.numpy())
    if start is None or end is None:
        raise NoTranslation("")
    dtype = D.DOUBLE
    line = b.cast(b.arange(n), dtype)
    last = b.op("Max", b.cast(b.lift(n - 1), dtype), b.const(1.0, dtype))  # type: ignore[arg-type]
    low, high = operand(b, start, dtype), operand(b, end, dtype)
    step = b.op("Div", b.op("Sub", high, low), last)
    up = b.op("Add", low, b.op("Mul", step, line))
    down = b.op("Sub", high, b.op("Mul", step, b.op("Sub", b.cast(b.lift(n - 1), dtype), line)))  # type: ignore[arg-type]
    half = b.cast(b.lift(n // 2), dtype)  # type: ignore[arg-type]
    return b.op("Where", b.op("Less", line, half), up, down)


@translates("tril", "triu")
def triangle(b: Builder, x: Val, diagonal: Any, call: Call) -> Val:
    """ONNX Runtime's Trilu lacks most types, so the mask is compared and the zeros selected."""
    rows, columns = b.type(x).shape[-2:]
    r = b.unsqueeze(b.arange(rows), 1)
    c = b.arange(columns)
    limit = b.op("Add", r, b.lift(diagonal)) if diagonal != 0 else r
    keep = b.op("LessOrEqual" if "tril" in call.op else "GreaterOrEqual", c, limit)
    dtype = onnx_dtype(call.result)
    if dtype == D.BOOL:
        return b.op("And", x, keep)
    from dfc.emit.onnx_ops.arithmetic import work_dtype

    x = b.cast(x, work_dtype(dtype))
    return b.op("Where", keep, x, b.like(0, x))


@translates("tril_indices", "triu_indices")
def triangle_indices(b: Builder, call: Call) -> Val:
    import torch

    a = call.attributes
    if any(isinstance(v, Expr) for v in (a["row"], a["col"], a["offset"])):
        raise NoTranslation("")
    make = torch.tril_indices if "tril" in call.op else torch.triu_indices
    return b.array(make(a["row"], a["col"], a["offset"]).numpy())


@translates("eye", "eye.m")
def eye(b: Builder, call: Call) -> Val:
    n, m = call.result.shape
    same = b.op("Equal", b.unsqueeze(b.arange(n), 1), b.arange(m))
    return b.cast(same, onnx_dtype(call.result))


@translates("rand", "rand_like", "randn", "randn_like", "bernoulli", "bernoulli.p",
            "uniform", "normal_functional", "randint", "randint.low", "randint_like",
            "randint_like.low_dtype")  # fmt: skip
def random(b: Builder, x: Any, call: Call) -> Val:
    """ONNX has generators of its own: the distribution is kept, the stream is not."""
    base = call.op.split(".")[1]
    a = call.attributes
    dtype = onnx_dtype(call.result)
    work = dtype if dtype in (D.FLOAT, D.DOUBLE) else D.FLOAT
    like = (
        b.expand(b.const(0.0, work), call.result.shape) if call.result.shape else b.const(0.0, work)
    )
    if base.startswith("randn") or base == "normal_functional":
        return b.op(
            "RandomNormalLike", like, mean=float(a.get("mean", 0.0)), scale=float(a.get("std", 1.0))
        )
    low, high = a.get("from", a.get("low", 0)), a.get("to", a.get("high", 1))
    drawn = b.op("RandomUniformLike", like, low=0.0, high=1.0)
    if base == "bernoulli":
        p = a.get("p")
        limit = b.const(float(p), work) if p is not None else b.cast(x, work)
        return b.cast(b.op("Less", drawn, limit), dtype)
    scale, offset = operand(b, high - low, work), operand(b, low, work)
    drawn = b.op("Add", b.op("Mul", drawn, scale), offset)
    return b.op("Floor", drawn) if base.startswith("randint") else drawn
