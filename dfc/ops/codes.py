"""Four-bit codes in bytes, scales of groups, and activations rounded to eight bits.

What the quantized ops share: in plain torch for their meaning, written into a graph for their
decompositions. A row of K numbers has G = ceil(K / group) groups; the last may be shorter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dfc.ir.expr import Size
from dfc.ir.op import Cost
from dfc.ir.types import DTYPES, DType, TensorType, total_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dfc.ir.graph import Value
    from dfc.ops.builder import Builder

OFFSET = 8  # what four-bit codes are shifted by when there is no zero point
ACTIVATIONS = ("float", "int8")
PAIR_SUM = 128  # 255 * 128 is below 2**15
EXACT_IN_F32 = 1032  # products -127..127 * -128..127 whose sum stays below 2**24


def groups_of(k: int, group: int) -> int:
    return -(-k // group)


def is_scale_of(scale: TensorType, x: TensorType) -> bool:
    """Whether scales may be multiplied with x: of its dtype, or a narrower float."""
    narrower = scale.dtype.is_float and scale.dtype.bits < x.dtype.bits
    return x.dtype.is_float and (scale.dtype == x.dtype or narrower)


def is_matrix_of(weight: TensorType, x: TensorType) -> bool:
    """Whether weights are [N, K] for an x that ends in the number K."""
    k = x.shape[-1] if x.shape else 1
    return isinstance(k, int) and weight.rank == 2 and weight.shape[1] == k


def is_bias_of(bias: TensorType | None, n: Size, x: TensorType) -> bool:
    """Whether a bias, if there is one, is [N] of x's dtype."""
    return bias is None or (bias.shape == (n,) and bias.dtype == x.dtype)


def linear_cost(
    y: TensorType, x: TensorType, weight: TensorType, scale: TensorType, bias: TensorType | None
) -> Cost:
    """What a linear layer takes whose weight is multiplied with its scale first."""
    flops = 2 * y.numel * x.shape[-1] + weight.numel
    return Cost(flops, total_bytes(x, weight, scale, bias), y.nbytes)


# Meaning


def fit_pairs(codes: Tensor) -> bool:
    """Whether products of int8 codes [N, K] with bytes can be added two by two in 16 bits: no two
    neighbours of one sign add up to more than 128.
    """
    import torch
    import torch.nn.functional as F

    wide = F.pad(codes.to(torch.int16), (0, codes.shape[1] % 2))
    sums = [s[:, ::2] + s[:, 1::2] for s in (wide.clamp(min=0), (-wide).clamp(min=0))]
    return all(not s.numel() or int(s.max()) <= PAIR_SUM for s in sums)


def pack4(codes: Tensor) -> Tensor:
    """Codes 0..15 as bytes, the low nibble first; an odd last one is filled up with 0."""
    import torch.nn.functional as F

    codes = F.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack4(packed: Tensor) -> Tensor:
    """Two codes for each byte."""
    import torch

    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def spread(per_group: Tensor, group: int | None, k: int) -> Tensor:
    """[*S, G] as [*S, K]: one number for each element of a row; [N] as [N, 1] without a group."""
    if group is None:
        return per_group.unsqueeze(-1)
    return per_group.repeat_interleave(group, dim=-1)[..., :k]


def centred4(packed: Tensor, zero: Tensor | None, group: int, k: int) -> Tensor:
    """The first K codes of each row less their zero point, as int8 in -15..15."""
    import torch

    codes = unpack4(packed)[..., :k].to(torch.int8)
    if zero is None:
        return codes - OFFSET
    points = unpack4(zero)[..., : groups_of(k, group)].to(torch.int8)
    return codes - spread(points, group, k)


def weight4(
    packed: Tensor, scale: Tensor, zero: Tensor | None, group: int, k: int, dtype: torch.dtype
) -> Tensor:
    """Four-bit weights as floats [*S, N, K]."""
    codes = centred4(packed, zero, group, k)
    return codes.to(dtype) * spread(scale.to(dtype), group, k)


def weight8(weight: Tensor, scale: Tensor, group: int | None, dtype: torch.dtype) -> Tensor:
    """Eight-bit weights as floats [*S, N, K]."""
    return weight.to(dtype) * spread(scale.to(dtype), group, weight.shape[-1])


def round_rows(x: Tensor, group: int | None) -> tuple[Tensor, Tensor]:
    """Each row of x, or each group of it, as codes -127..127 (floats) and a scale of [*S, G].

    The scale is absmax / 127, and 1 for a row of zeros.
    """
    import torch

    k = x.shape[-1]
    width = k if group is None else group
    peaks = torch.stack([p.abs().amax(-1) for p in _cut(x, width)], dim=-1)
    scale = torch.where(peaks == 0, torch.ones_like(peaks), peaks / 127)
    return torch.round(x / spread(scale, width, k)), scale


def _cut(x: Tensor, width: int) -> tuple[Tensor, ...]:
    import torch

    return torch.split(x, width, dim=-1)


def dot_rows(x: Tensor, weight: Tensor, scale: Tensor, group: int | None) -> Tensor:
    """`x @ (weight * scale).T` with x rounded to int8: whole numbers are summed without error.

    16-bit floats are computed with as float32: sums of codes pass what f16 holds.
    Needs:  weight of whole numbers -128..127 and [N, K]; scale [N, G], or [N] without a group.
    """
    import torch

    wide = torch.promote_types(x.dtype, torch.float32)
    codes, x_scale = round_rows(x.to(wide), group)
    width = x.shape[-1] if group is None else group
    exact = torch.float32 if width <= EXACT_IN_F32 else torch.float64
    w_scale = scale.to(wide).reshape(weight.shape[0], -1)
    total = codes.new_zeros((*x.shape[:-1], weight.shape[0]))
    pairs = zip(_cut(codes, width), _cut(weight, width), strict=True)
    for g, (a, b) in enumerate(pairs):
        dots = (a.to(exact) @ b.to(exact).T).to(wide)
        total = total + dots * x_scale[..., g : g + 1] * w_scale[:, g]
    return total.to(x.dtype)


# Decomposition


def write_spread(b: Builder, per_group: Value, group: int | None, k: int) -> Value:
    if group is None:
        return b("aten.unsqueeze.default", per_group, dim=-1)
    wide = b("aten.repeat_interleave.self_int", per_group, repeats=group, dim=-1)
    return write_first(b, wide, k)


def write_first(b: Builder, x: Value, k: int) -> Value:
    """The first K columns."""
    if x.tensor_type.shape[-1] == k:
        return x
    return b("aten.slice.Tensor", x, dim=-1, start=0, end=k)


def write_unpack4(b: Builder, packed: Value) -> Value:
    *rows, half = packed.tensor_type.shape
    low = b("aten.bitwise_and.Scalar", packed, other=15)
    high = b("aten.bitwise_right_shift.Tensor_Scalar", packed, other=4)
    pairs = b("aten.stack.default", [low, high], dim=len(rows) + 1)
    return b("aten.view.default", pairs, size=(*rows, half * 2))


def write_weight4(
    b: Builder, packed: Value, scale: Value, zero: Value | None, group: int, k: int, dtype: DType
) -> Value:
    """The first K columns of four-bit weights as floats."""
    codes = b("aten._to_copy.default", write_first(b, write_unpack4(b, packed), k), dtype=dtype)
    if zero is None:
        centred = b("aten.sub.Scalar", codes, other=OFFSET)
    else:
        points = write_first(b, write_unpack4(b, zero), groups_of(k, group))
        wide = b("aten._to_copy.default", write_spread(b, points, group, k), dtype=dtype)
        centred = b("aten.sub.Tensor", codes, wide)
    return b("aten.mul.Tensor", centred, write_spread(b, write_cast(b, scale, dtype), group, k))


def write_cast(b: Builder, x: Value, dtype: DType) -> Value:
    return x if x.tensor_type.dtype == dtype else b("aten._to_copy.default", x, dtype=dtype)


def write_rounded_rows(b: Builder, x: Value, group: int | None) -> Value:
    """x as it is after rounding each row, or each group of it, to int8."""
    k = x.tensor_type.shape[-1]
    assert isinstance(k, int)
    width = k if group is None else group
    parts = [
        b("aten.slice.Tensor", x, dim=-1, start=at, end=min(at + width, k))
        for at in range(0, k, width)
    ]
    rounded = [_write_rounded(b, p) for p in (parts if len(parts) > 1 else [x])]
    return rounded[0] if len(rounded) == 1 else b("aten.cat.default", rounded, dim=-1)


def _write_rounded(b: Builder, x: Value) -> Value:
    peak = b("aten.amax.default", b("aten.abs.default", x), dim=(-1,), keepdim=True)
    scale = b("aten.div.Scalar", peak, other=127)
    zero = b("aten.eq.Scalar", peak, other=0)
    scale = b("aten.masked_fill.Scalar", scale, zero, value=1)
    return b("aten.mul.Tensor", b("aten.round.default", b("aten.div.Tensor", x, scale)), scale)


U8, I8 = DTYPES["u8"], DTYPES["i8"]
