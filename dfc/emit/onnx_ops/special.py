"""Special functions and what else ONNX has no op for, written in elementary functions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dfc.emit.onnx_builder import Builder, Call, NoTranslation, Val
from dfc.emit.onnx_ops.arithmetic import log1p, operand, work_dtype
from dfc.emit.onnx_ops.registry import translates
from dfc.emit.onnx_types import FLOATS, D, onnx_dtype
from dfc.ir.expr import Expr

_LANCZOS = (
    0.99999999999980993, 676.5203681218851, -1259.1392167224028, 771.32342877765313,
    -176.61502916214059, 12.507343278686905, -0.13857109526572012, 9.9843695780195716e-6,
    1.5056327351493116e-7,
)  # fmt: skip


def _double(b: Builder, x: Val) -> Val:
    return b.cast(x, D.DOUBLE)


def _c(b: Builder, v: float) -> Val:
    return b.const(v, D.DOUBLE)


def _log_gamma_right(b: Builder, x: Val) -> Val:
    """Lanczos' approximation for x >= 0.5, in float64 (g = 7, 9 terms)."""
    z = b.op("Sub", x, _c(b, 1.0))
    total = _c(b, _LANCZOS[0])
    for i, k in enumerate(_LANCZOS[1:], 1):
        total = b.op("Add", total, b.op("Div", _c(b, k), b.op("Add", z, _c(b, float(i)))))
    t = b.op("Add", z, _c(b, 7.5))
    power = b.op("Mul", b.op("Add", z, _c(b, 0.5)), b.op("Log", t))
    value = b.op("Sub", b.op("Add", power, b.op("Log", total)), t)
    return b.op("Add", value, _c(b, 0.5 * math.log(2 * math.pi)))


@translates("lgamma", "prims.lgamma.default", "special_gammaln")
def lgamma(b: Builder, x: Val, call: Call) -> Val:
    """Left of 0.5 by reflection; infinite at the poles."""
    x = _double(b, x)
    left = b.op("Less", x, _c(b, 0.5))
    inner = b.op("Where", left, b.op("Sub", _c(b, 1.0), x), x)
    infinite = b.op("Equal", b.op("Abs", x), _c(b, math.inf))
    right = _log_gamma_right(b, b.op("Where", infinite, _c(b, 1.0), inner))
    near = b.op("Sub", x, b.op("Round", x))
    sine = b.op("Abs", b.op("Sin", b.op("Mul", near, _c(b, math.pi))))
    reflected = b.op("Sub", _c(b, math.log(math.pi)), b.op("Add", b.op("Log", sine), right))
    value = b.op("Where", left, reflected, right)
    return b.op("Where", infinite, _c(b, math.inf), value)


@translates("digamma", "prims.digamma.default", "special_digamma", "special_psi")
def digamma(b: Builder, x: Val, call: Call) -> Val:
    """Shifted up by recurrence to where the asymptotic series holds; reflected on the left."""
    x = _double(b, x)
    left = b.op("Less", x, _c(b, 0.0))
    y = b.op("Where", left, b.op("Sub", _c(b, 1.0), x), x)
    total = _c(b, 0.0)
    for i in range(8):
        total = b.op("Sub", total, b.op("Reciprocal", b.op("Add", y, _c(b, float(i)))))
    y = b.op("Add", y, _c(b, 8.0))
    inverse = b.op("Reciprocal", b.op("Mul", y, y))
    series = _c(b, 0.0)
    for k in (1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132, -691 / 32760, 1 / 12)[::-1]:
        series = b.op("Mul", b.op("Add", series, _c(b, k)), inverse)
    value = b.op("Sub", b.op("Log", y), b.op("Div", _c(b, 0.5), y))
    value = b.op("Add", b.op("Sub", value, series), total)
    near = b.op("Mul", b.op("Sub", x, b.op("Round", x)), _c(b, math.pi))
    cotangent = b.op("Div", b.op("Cos", near), b.op("Sin", near))
    reflected = b.op("Sub", value, b.op("Mul", _c(b, math.pi), cotangent))
    whole = b.op("And", left, b.op("Equal", x, b.op("Floor", x)))
    reflected = b.op("Where", whole, _c(b, math.nan), reflected)
    found = b.op("Where", left, reflected, value)
    return b.op("Where", b.op("Equal", x, _c(b, 0.0)), b.op("Neg", b.op("Reciprocal", x)), found)


@translates("special_zeta", "prims.zeta.default", "special_zeta.other_scalar",
            "special_zeta.self_scalar")  # fmt: skip
def zeta(b: Builder, x: Any, call: Call) -> Val:
    """Hurwitz' zeta for x > 1 and q > 0, by Euler and Maclaurin: ten terms, then the tail."""
    values = iter(call.values)
    first = call.attributes.get("self")
    s = _c(b, float(first)) if first is not None else _double(b, next(values))
    other = call.attributes.get("other")
    q = _c(b, float(other)) if other is not None else _double(b, next(values))
    total = _c(b, 0.0)
    for k in range(10):
        total = b.op("Add", total, b.op("Pow", b.op("Add", q, _c(b, float(k))), b.op("Neg", s)))
    w = b.op("Add", q, _c(b, 10.0))
    power = b.op("Pow", w, b.op("Neg", s))
    tail = b.op("Div", b.op("Mul", power, w), b.op("Sub", s, _c(b, 1.0)))
    total = b.op("Add", b.op("Add", total, tail), b.op("Mul", power, _c(b, 0.5)))
    rising, factor = s, b.op("Div", power, w)
    for j, term in enumerate((1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160), 1):
        total = b.op("Add", total, b.op("Mul", b.op("Mul", rising, factor), _c(b, term)))
        more = b.op("Add", s, _c(b, 2.0 * j - 1)), b.op("Add", s, _c(b, 2.0 * j))
        rising = b.op("Mul", b.op("Mul", rising, more[0]), more[1])
        factor = b.op("Div", factor, b.op("Mul", w, w))
    return total


@translates("special_ndtri", "prims.ndtri.default", "ndtri")
def ndtri(b: Builder, x: Val, call: Call) -> Val:
    """The normal quantile, by the inverse of erf."""
    from dfc.emit.onnx_ops.arithmetic import erfinv

    wide = b.op("Sub", b.op("Mul", _double(b, x), _c(b, 2.0)), _c(b, 1.0))
    return b.op("Mul", erfinv(b, wide, call), _c(b, math.sqrt(2.0)))


@translates(
    "i0", "special_i0", "prims.bessel_i0.default", "special_i0e", "prims.bessel_i0e.default"
)
def bessel_i0(b: Builder, x: Val, call: Call) -> Val:
    """exp(-x) I0(x) as the mean of exp(x (cos t - 1)): the trapezoid rule is exact for periods."""
    size = b.op("Abs", _double(b, x))
    nodes = np.cos((np.arange(200) + 0.5) * np.pi / 200) - 1.0
    powers = b.op("Exp", b.op("Mul", b.unsqueeze(size, -1), b.array(nodes)))
    scaled = b.op("ReduceMean", powers, [-1], keepdims=0)
    if "i0e" in call.op:
        return scaled
    return b.op("Mul", scaled, b.op("Exp", size))


@translates("hypot", "prims.hypot.default")
def hypot(b: Builder, x: Val, call: Call) -> Val:
    dtype = onnx_dtype(call.result)
    first, second = (b.op("Abs", b.cast(v, dtype)) for v in call.values)
    top = b.op("Max", first, second)
    zero = b.op("Equal", top, b.like(0.0, top))
    infinite = b.op("Equal", top, b.like(math.inf, top))
    by = b.op("Where", b.op("Or", zero, infinite), b.like(1.0, top), top)
    u, v = b.op("Div", first, by), b.op("Div", second, by)
    root = b.op("Sqrt", b.op("Add", b.op("Mul", u, u), b.op("Mul", v, v)))
    return b.op("Mul", root, by)


@translates("logaddexp", "logaddexp2")
def logaddexp(b: Builder, x: Val, other: Val, call: Call) -> Val:
    """The larger, and a logarithm of what the smaller adds: nothing overflows."""
    if "exp2" in call.op:
        raise NoTranslation("")
    dtype = onnx_dtype(call.result)
    x, other = b.cast(x, dtype), b.cast(other, dtype)
    top = b.op("Max", x, other)
    same = b.op("And", b.op("Equal", x, other), b.op("Equal", b.op("Abs", x), b.like(math.inf, x)))
    gap = b.op("Neg", b.op("Abs", b.op("Sub", x, other)))
    return b.op("Where", same, x, b.op("Add", top, log1p(b, b.op("Exp", gap), call)))


@translates("log_sigmoid", "log_sigmoid_forward")
def log_sigmoid(b: Builder, x: Val, call: Call) -> Any:
    low = b.op("Min", x, b.like(0.0, x))
    tail = log1p(b, b.op("Exp", b.op("Neg", b.op("Abs", x))), call)
    found = b.op("Sub", low, tail)
    return found if len(call.results) == 1 else [found, None]


@translates("rrelu", "rrelu_with_noise", "rrelu_with_noise_functional")
def rrelu(b: Builder, x: Val, lower: float, upper: float, training: bool) -> Val:
    if training:
        raise b.refuse("rrelu in training mode draws random numbers")
    slope = b.like((float(lower) + float(upper)) / 2, x)
    return b.op("Where", b.op("GreaterOrEqual", x, b.like(0.0, x)), x, b.op("Mul", x, slope))


@translates("nansum")
def nansum(b: Builder, x: Val, call: Call) -> Val:
    from dfc.emit.onnx_ops.reduction import axes_of, reduce

    if x.dtype in FLOATS:
        clean = b.op("Where", b.op("IsNaN", x), b.like(0.0, x), x)
    else:
        clean = b.cast(x, work_dtype(x.dtype))  # type: ignore[arg-type]
    rank = b.rank(x)
    a = call.attributes
    return reduce(b, "ReduceSum", clean, axes_of(a.get("dim"), rank), a.get("keepdim", False))


@translates("_cdist_forward", "cdist")
def cdist(b: Builder, x: Val, x2: Val, p: float) -> Val:
    """Every row against every row, by differences: a product form would cancel."""
    gap = b.op("Abs", b.op("Sub", b.unsqueeze(x, -2), b.unsqueeze(x2, -3)))
    if p == math.inf:
        return b.op("ReduceMax", gap, [-1], keepdims=0)
    if p == 0:
        count = b.cast(b.op("Greater", gap, b.like(0.0, gap)), gap.dtype)  # type: ignore[arg-type]
        return b.op("ReduceSum", count, [-1], keepdims=0)
    if p == 1:
        return b.op("ReduceSum", gap, [-1], keepdims=0)
    if p == 2:
        return b.op("Sqrt", b.op("ReduceSum", b.op("Mul", gap, gap), [-1], keepdims=0))
    total = b.op("ReduceSum", b.op("Pow", gap, b.like(float(p), gap)), [-1], keepdims=0)
    return b.op("Pow", total, b.like(1.0 / p, gap))


@translates("_pdist_forward", "pdist")
def pdist(b: Builder, x: Val, p: float) -> Val:
    n = b.type(x).shape[0]
    if not isinstance(n, int):
        raise b.refuse("the number of rows is not fixed")
    rows, columns = np.triu_indices(n, 1)
    first = b.op("Gather", x, b.array(rows), axis=0)
    second = b.op("Gather", x, b.array(columns), axis=0)
    gap = b.op("Abs", b.op("Sub", first, second))
    if p == 2:
        return b.op("Sqrt", b.op("ReduceSum", b.op("Mul", gap, gap), [-1], keepdims=0))
    total = b.op("ReduceSum", b.op("Pow", gap, b.like(float(p), gap)), [-1], keepdims=0)
    return b.op("Pow", total, b.like(1.0 / p, gap))


@translates("fft_fftfreq", "fft_rfftfreq", "hann_window", "hann_window.periodic",
            "hamming_window", "hamming_window.periodic", "blackman_window", "bartlett_window",
            "logspace", "kaiser_window", "hamming_window.periodic_alpha_beta",
            "hamming_window.periodic_alpha", "blackman_window.periodic",
            "bartlett_window.periodic")  # fmt: skip
def constant(b: Builder, call: Call) -> Val:
    """Follows from numbers alone: PyTorch computes it now."""
    from dfc.ir.op import lookup

    if any(isinstance(v, Expr) for v in call.attributes.values()):
        raise b.refuse("it depends on a size that only the run tells")
    (made,) = lookup(call.op).run([], call.attributes)
    if str(made.dtype) == "torch.bfloat16":
        raise NoTranslation("")
    return b.array(made.numpy())


@translates("embedding_bag", "embedding_bag.padding_idx", "_embedding_bag",
            "_embedding_bag_forward_only")  # fmt: skip
def embedding_bag(b: Builder, x: Val, call: Call) -> list[Val | None]:
    """Rows gathered, weighted, and added into the bag that each belongs to."""
    from dfc.emit.onnx_nodes import onnx_info

    a = call.attributes
    given = dict(zip(onnx_info(call.op), call.operands, strict=True))
    indices, offsets = given["indices"], given["offsets"]
    weights = given.get("per_sample_weights")
    assert isinstance(indices, Val) and isinstance(offsets, Val)
    if a.get("padding_idx") not in (None, -1):
        raise b.refuse("bags that leave out a padding index")
    mode = ("sum", "mean", "max")[a["mode"]]
    indices, offsets = b.cast(indices, D.INT64), b.cast(offsets, D.INT64)
    bags = call.result.shape[0]
    if a.get("include_last_offset"):
        offsets = b.slice(offsets, 0, 0, -1)
    rows = b.op("Gather", x, indices, axis=0)
    if isinstance(weights, Val):
        rows = b.op("Mul", rows, b.unsqueeze(weights, -1))
    places = b.op("Range", 0, b.squeeze(b.op("Shape", indices), 0), 1)
    reached = b.op("LessOrEqual", offsets, b.unsqueeze(places, 1))
    bag = b.op("Sub", b.op("ReduceSum", b.cast(reached, D.INT64), [1], keepdims=0), 1)
    at = b.unsqueeze(bag, 1)
    width = call.result.shape[1]
    start = -math.inf if mode == "max" else 0.0
    blank = b.expand(b.like(start, rows), [bags, width])
    total = b.op("ScatterND", blank, at, rows, reduction="max" if mode == "max" else "add")
    inside = b.op("Equal", b.unsqueeze(bag, 0), b.unsqueeze(b.arange(bags), 1))
    members = b.op("ReduceSum", b.cast(inside, D.INT64), [1], keepdims=1)
    count = b.cast(members, onnx_dtype(call.result))
    if mode == "mean":
        total = b.op("Div", total, b.op("Max", count, b.like(1.0, count)))
    if mode == "max":
        empty = b.op("Equal", count, b.like(0.0, count))
        total = b.op("Where", empty, b.like(0.0, total), total)
    return [total, None, None, None][: len(call.results)]  # what training needs is not computed


@translates("fake_quantize_per_tensor_affine", "fake_quantize_per_tensor_affine_cachemask",
            "fake_quantize_per_tensor_affine.tensor_qparams",
            "fake_quantize_per_channel_affine",
            "fake_quantize_per_channel_affine_cachemask")  # fmt: skip
def fake_quantize(b: Builder, x: Val, call: Call) -> list[Val]:
    """Scale, round to even, clamp, and back."""
    from dfc.emit.onnx_nodes import onnx_info

    given = {**call.attributes, **{
        k: v for k, v in zip(onnx_info(call.op), call.operands, strict=True) if v is not None
    }}  # fmt: skip
    assert x.dtype is not None
    scale, zero = operand(b, given["scale"], x.dtype), operand(b, given["zero_point"], x.dtype)
    if "per_channel" in call.op:
        axis, rank = given["axis"], b.rank(x)
        shape = [-1 if i == axis else 1 for i in range(rank)]
        scale, zero = b.reshape(scale, shape), b.reshape(zero, shape)
    inverse = b.op("Div", b.like(1.0, x), scale)
    q = b.op("Add", b.op("Round", b.op("Mul", x, inverse)), zero)
    low, high = b.like(float(given["quant_min"]), x), b.like(float(given["quant_max"]), x)
    inside = b.op("And", b.op("GreaterOrEqual", q, low), b.op("LessOrEqual", q, high))
    clamped = b.op("Min", b.op("Max", q, low), high)
    value = b.op("Mul", b.op("Sub", clamped, zero), scale)
    return [value, inside][: len(call.results)]


@translates("histc", "histogram.bins_tensor", "histogram.bin_ct")
def histogram(b: Builder, x: Val, call: Call) -> list[Val]:
    """How many elements lie in each bin; the last bin has its right edge."""
    a = call.attributes
    edges = call.operands[1] if call.op.endswith("bins_tensor") else None
    if (
        not isinstance(edges, Val)
        or a.get("density")
        or any(v is not None for v in call.operands[2:])
    ):
        raise NoTranslation("a histogram needs its edges as a tensor")
    flat = b.unsqueeze(b.reshape(x, [-1]), 0)
    low = b.unsqueeze(b.slice(edges, 0, 0, -1), 1)
    high = b.unsqueeze(b.slice(edges, 0, 1, 2**63 - 1), 1)
    bins = b.op("Sub", b.op("Shape", edges), 2)
    last = b.op("Equal", b.op("Range", 0, b.squeeze(b.op("Add", bins, 1), 0), 1), bins)
    below = b.op("Less", flat, high)
    at_end = b.op("And", b.unsqueeze(last, 1), b.op("Equal", flat, high))
    inside = b.op("And", b.op("GreaterOrEqual", flat, low), b.op("Or", below, at_end))
    count = b.op("ReduceSum", b.cast(inside, D.INT64), [1], keepdims=0)
    return [count, b.op("Identity", edges)]


@translates("_is_all_true", "_is_any_true")
def is_all_true(b: Builder, x: Val, call: Call) -> Val:
    kind = "ReduceMin" if "all" in call.op else "ReduceMax"
    return b.cast(b.op(kind, b.cast(x, D.INT32), keepdims=0), D.BOOL)


@translates("index_reduce")
def index_reduce(b: Builder, x: Val, dim: int, index: Val, source: Val, reduce: str,
                 include_self: bool, call: Call) -> Val:  # fmt: skip
    from dataclasses import replace

    from dfc.emit.onnx_ops.indexing import scatter

    axis = dim % b.rank(x)
    shape = [-1 if i == axis else 1 for i in range(b.rank(x))]
    line = b.reshape(b.cast(index, D.INT64), shape)
    spread = b.op("Expand", line, b.op("Shape", source))
    spread.meta["type"] = b.type(source)
    inner = replace(
        call, op="aten.scatter_reduce.two", operands=(x, spread, source),
        attributes={"dim": dim, "reduce": reduce, "include_self": include_self},
    )  # fmt: skip
    return scatter(b, x, dim, spread, inner)
