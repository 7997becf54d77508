"""Linear layers with weights of eight-bit floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.ir.op import Cost, Op, declare
from dfc.ir.types import DTYPES, TensorType
from dfc.ops.codes import is_bias_of, is_matrix_of, is_scale_of, linear_cost, write_cast
from dfc.ops.quantized import LARGEST

if TYPE_CHECKING:
    from torch import Tensor

    from dfc.ir.graph import Value
    from dfc.ops.builder import Builder

ACTIVATIONS = ("float", "f8")
ROWS = "f8e4m3fn"  # what rows are rounded to: of the two, the type with more digits


def round_rows_f8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of x as f8e4m3fn, and its scale [*S, 1]: absmax / 448, and 1 for a row of zeros."""
    import torch

    peaks = x.abs().amax(-1, keepdim=True)
    scale = torch.where(peaks == 0, torch.ones_like(peaks), peaks / LARGEST[ROWS])
    codes = (x / scale).clamp(-LARGEST[ROWS], LARGEST[ROWS])
    return codes.to(DTYPES[ROWS].to_torch()), scale


@declare
@dataclass(frozen=True)
class LinearF8(Op):
    """`x @ (weight * scale).T + bias` with weights of eight-bit floats.

    With activations="f8" each row of x is rounded to f8e4m3fn first (scale absmax/448); products
    are added up in x's dtype, or f32 where that is narrower: sums of codes pass what f16 holds. The
    sum is multiplied with both scales.

    Shapes:  x: float[*S, K], weight: f8[N, K], scale: float[N] or float[], bias: float[N]?
             -> float[*S, N]
    C1:      weight is f8e4m3fn[N, K] or f8e5m2[N, K] for an x that ends in the number K.
    C2:      scale is [N], or one number; of x's float dtype or a narrower one.
    C3:      bias is [N], of x's dtype.
    C4:      activations is "float" or "f8".
    Source:  arXiv 2209.05433; torch._scaled_mm on GPUs that multiply eight-bit floats.
    """

    name = "linear_f8"
    cases = (
        "x=f32[3,64] weight=f8e4m3fn[16,64] scale=f32[16]",
        "x=f32[2,3,40] weight=f8e5m2[5,40] scale=f32[] bias=f32[5]",
        "x=f64[32] weight=f8e4m3fn[5,32] scale=f64[5]",
        "x=f32[B,S+1,64] weight=f8e4m3fn[16,64] scale=f16[16] bias=f32[16]",
        "x=f32[B,40] weight=f8e4m3fn[5,40] scale=f32[5] bias=f32[5] activations='f8'",
        "x=f32[2,3,40] weight=f8e5m2[5,40] scale=f32[] activations='f8'",
    )
    rejects = (
        "C1 x=f32[3,64] weight=f8e4m3fn[16,40] scale=f32[16]",
        "C1 x=f32[3,K] weight=f8e4m3fn[16,K] scale=f32[16]",
        "C1 x=f32[3,64] weight=i8[16,64] scale=f32[16]",
        "C2 x=f32[3,64] weight=f8e4m3fn[16,64] scale=f32[16,1]",
        "C2 x=f16[3,64] weight=f8e4m3fn[16,64] scale=f32[16]",
        "C3 x=f32[3,64] weight=f8e4m3fn[16,64] scale=f32[16] bias=f16[16]",
        "C4 x=f32[3,64] weight=f8e4m3fn[16,64] scale=f32[16] activations='int8'",
    )

    activations: str = "float"

    def infer(
        self,
        x: TensorType,
        weight: TensorType,
        scale: TensorType,
        bias: TensorType | None = None,
    ) -> TensorType:
        fits = is_matrix_of(weight, x) and weight.dtype.name in LARGEST
        self.require("C1", fits, f"weight {weight} does not fit x {x}")
        n = weight.shape[0]
        fits = scale.shape in ((n,), ()) and is_scale_of(scale, x)
        self.require("C2", fits, f"scale is {scale}, x is {x}")
        self.require("C3", is_bias_of(bias, n, x), f"bias is {bias}")
        known = self.activations in ACTIVATIONS
        self.require("C4", known, f"activations is {self.activations!r}")
        return x.with_shape((*x.shape[:-1], n))

    def reference(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        import torch
        import torch.nn.functional as F

        if self.activations == "f8":
            dtype = torch.promote_types(x.dtype, torch.float32)
            codes, rows = round_rows_f8(x.to(dtype))
            y = F.linear(codes.to(dtype), weight.to(dtype)) * rows * scale.to(dtype)
            return (y if bias is None else y + bias.to(dtype)).to(x.dtype)
        wide, by = weight.to(x.dtype), scale.to(x.dtype)
        return F.linear(x, wide * (by.unsqueeze(-1) if by.dim() else by), bias)

    def decompose(
        self, b: Builder, x: Value, weight: Value, scale: Value, bias: Value | None = None
    ) -> Value:
        own = x.tensor_type.dtype
        dtype = DTYPES["f32"] if own.bits < 32 and self.activations == "f8" else own
        wide, by = write_cast(b, weight, dtype), write_cast(b, scale, dtype)
        if self.activations == "f8":
            codes, rows = _write_rounded(b, write_cast(b, x, dtype))
            y = b("aten.linear.default", codes, wide, None)
            y = b("aten.mul.Tensor", b("aten.mul.Tensor", y, rows), by)
            y = y if bias is None else b("aten.add.Tensor", y, write_cast(b, bias, dtype))
            return write_cast(b, y, own)
        if by.tensor_type.rank:
            by = b("aten.unsqueeze.default", by, dim=-1)
        return b("aten.linear.default", x, b("aten.mul.Tensor", wide, by), bias)

    def cost(
        self,
        x: TensorType,
        weight: TensorType,
        scale: TensorType,
        bias: TensorType | None = None,
    ) -> Cost:
        return linear_cost(self.infer(x, weight, scale, bias), x, weight, scale, bias)


def _write_rounded(b: Builder, x: Value) -> tuple[Value, Value]:
    """Rows of x as values of f8e4m3fn, in x's own dtype, and their scales."""
    peak = b("aten.amax.default", b("aten.abs.default", x), dim=(-1,), keepdim=True)
    scale = b("aten.div.Scalar", peak, other=LARGEST[ROWS])
    zero = b("aten.eq.Scalar", peak, other=0)
    scale = b("aten.masked_fill.Scalar", scale, zero, value=1)
    y = b("aten.div.Tensor", x, scale)
    y = b("aten.clamp.default", y, min=-LARGEST[ROWS], max=LARGEST[ROWS])
    codes = b("aten._to_copy.default", y, dtype=DTYPES[ROWS])
    return b("aten._to_copy.default", codes, dtype=x.tensor_type.dtype), scale
