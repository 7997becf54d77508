"""Images resized and sampled: interpolation, grid_sample, folding."""

from __future__ import annotations

from typing import Any

from dfc.emit.onnx_builder import Builder, Call, Val
from dfc.emit.onnx_ops.registry import translates
from dfc.emit.onnx_types import D

_KINDS = {
    "upsample_nearest": ("nearest", "asymmetric", "floor"),
    "_upsample_nearest_exact": ("nearest", "half_pixel", "round_prefer_ceil"),
    "upsample_linear": ("linear", "half_pixel", None),
    "upsample_bilinear": ("linear", "half_pixel", None),
    "upsample_trilinear": ("linear", "half_pixel", None),
    "upsample_bicubic": ("cubic", "half_pixel", None),
    "_upsample_bilinear": ("linear", "half_pixel", None),
    "_upsample_bicubic": ("cubic", "half_pixel", None),
}
_NAMES = [
    f"{base}{n}d{aa}{overload}"
    for base in ("upsample_nearest", "_upsample_nearest_exact", "upsample_linear",
                 "upsample_bilinear", "upsample_trilinear", "upsample_bicubic")
    for n in (1, 2, 3)
    for aa in ("",)
    for overload in ("", ".vec")
]  # fmt: skip


@translates(*_NAMES, "_upsample_bilinear2d_aa", "_upsample_bilinear2d_aa.vec",
            "_upsample_bicubic2d_aa", "_upsample_bicubic2d_aa.vec")  # fmt: skip
def upsample(b: Builder, x: Val, call: Call) -> Val:
    """Each axis becomes a product with a matrix of weights, or a gather for the nearest element.

    ONNX Runtime's Resize rounds its scales otherwise, and knows no cubic in 3-d.
    """
    a = call.attributes
    name = call.op.split(".")[1]
    antialias = name.endswith("_aa")
    base = name.removesuffix("_aa")[:-2]
    kind, _, _ = _KINDS[base]
    rank = call.result.rank
    n = rank - 2
    ins, outs = b.type(x).shape[2:], call.result.shape[2:]
    factors = a.get("scale_factors")
    scales: list[Any] = list(factors) if factors else [None] * n
    for i, key in enumerate(("scales_d", "scales_h", "scales_w")[-n:]):
        if a.get(key) is not None:
            scales[i] = a[key]
    if n == 1 and a.get("scales") is not None:
        scales = [a["scales"]]
    align = bool(a.get("align_corners"))
    for i in range(n):
        axis, size, out = i + 2, ins[i], outs[i]
        if size == out and scales[i] in (None, 1.0):
            continue
        if kind == "nearest":
            at = _nearest(b, size, out, scales[i], "exact" in base)
            x = b.op("Gather", x, at, axis=axis)
            continue
        if not isinstance(size, int) or not isinstance(out, int):
            return _resize(b, x, kind, align, antialias, call)
        matrix = _weights(b, size, out, scales[i], kind, align, antialias, x)
        perm = [j for j in range(rank) if j != axis] + [axis]
        back = [perm.index(j) for j in range(rank)]
        x = b.transpose(b.op("MatMul", b.transpose(x, perm), matrix), back)
    return x


def _nearest(b: Builder, size: Any, out: Any, scale: Any, exact: bool) -> Val:
    """floor(i * ratio), the ratio in f32 as PyTorch computes it."""
    line = b.cast(b.arange(out), D.FLOAT)
    if isinstance(scale, float):
        import numpy as np

        ratio = b.const(float(np.float32(1.0 / scale)), D.FLOAT)
    else:
        ratio = b.op("Div", b.const(size, D.FLOAT), b.const(out, D.FLOAT))
    if exact:
        line = b.op("Add", line, b.const(0.5, D.FLOAT))
    at = b.cast(b.op("Floor", b.op("Mul", line, ratio)), D.INT64)
    return b.op("Min", at, b.op("Sub", b.lift(size), 1))


def _weights(
    b: Builder, size: int, out: int, scale: Any, kind: str, align: bool, antialias: bool, x: Val
) -> Val:
    """The matrix, measured: PyTorch's own kernel applied to each unit vector."""
    import torch

    assert x.dtype is not None
    unit = torch.eye(size, dtype=torch.float64).reshape(size, 1, 1, size)
    wide = unit.expand(size, 1, 2, size).contiguous()
    mode = "bilinear" if kind == "linear" else "bicubic"
    op = torch.ops.aten
    if antialias:
        function = op._upsample_bilinear2d_aa if kind == "linear" else op._upsample_bicubic2d_aa
        made = function(wide, [2, out], align, None, scale)
    else:
        function = op.upsample_bilinear2d if mode == "bilinear" else op.upsample_bicubic2d
        made = function(wide, [2, out], align, None, scale)
    matrix = made[:, 0, 0, :].numpy()
    return b.array(matrix.astype(x.dtype.numpy()), x.dtype)


def _resize(b: Builder, x: Val, kind: str, align: bool, antialias: bool, call: Call) -> Val:
    """For sizes that only the run tells."""
    shape = b.type(x).shape
    sizes = b.sizes.vector(b, [shape[0], shape[1], *call.result.shape[2:]])
    return b.op(
        "Resize", x, None, None, sizes, mode=kind,
        coordinate_transformation_mode="align_corners" if align else "pytorch_half_pixel",
        cubic_coeff_a=-0.75 if kind == "cubic" else None,
        antialias=int(antialias) if antialias else None,
    )  # fmt: skip


@translates("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sample(b: Builder, x: Val, grid: Val, call: Call) -> Val:
    a = call.attributes
    modes = {0: "linear", 1: "nearest", 2: "cubic"}
    paddings = {0: "zeros", 1: "border", 2: "reflection"}
    return b.op(
        "GridSample", x, grid, mode=modes[a["interpolation_mode"]],
        padding_mode=paddings[a["padding_mode"]], align_corners=int(a["align_corners"]),
    )  # fmt: skip


@translates("im2col")
def im2col(b: Builder, x: Val, call: Call) -> Val:
    """Patches as columns: a convolution with unit kernels would multiply; this gathers."""
    a = call.attributes
    (kh, kw), (dh, dw) = a["kernel_size"], a["dilation"]
    (ph, pw), (sh, sw) = a["padding"], a["stride"]
    shape = b.type(x).shape
    unbatched = len(shape) == 3
    if unbatched:
        x = b.unsqueeze(x, 0)
        shape = (1, *shape)
    n, c, h, w = shape
    if ph or pw:
        x = b.op("Pad", x, [0, 0, ph, pw, 0, 0, ph, pw], b.like(0, x))
    oh = (h + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    ow = (w + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    rows = windows(b, oh, sh, kh, dh)
    columns = windows(b, ow, sw, kw, dw)
    found = b.op("Gather", b.op("Gather", x, rows, axis=2), columns, axis=4)  # n c kh oh kw ow
    found = b.transpose(found, [0, 1, 2, 4, 3, 5])
    found = b.op("Reshape", found, b.sizes.vector(b, [n, c * kh * kw, oh * ow]))
    return b.squeeze(found, 0) if unbatched else found


def windows(b: Builder, count: Any, step: int, size: int, dilation: int) -> Val:
    start = b.op("Mul", b.arange(count), step)
    offset = b.op("Mul", b.unsqueeze(b.arange(size), 1), dilation)
    return b.op("Add", offset, start)


@translates("col2im")
def col2im(b: Builder, x: Val, call: Call) -> Val:
    a = call.attributes
    return b.op(
        "Col2Im", x, b.sizes.vector(b, a["output_size"]), list(a["kernel_size"]),
        dilations=list(a["dilation"]), pads=[*a["padding"], *a["padding"]],
        strides=list(a["stride"]),
    )  # fmt: skip
