"""Linear layers with weights of four and eight bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.ir.op import Cost, Op, declare
from dfc.ir.types import TensorType, total_bytes
from dfc.ops.codes import (
    ACTIVATIONS,
    I8,
    U8,
    centred4,
    dot_rows,
    groups_of,
    is_bias_of,
    is_matrix_of,
    is_scale_of,
    linear_cost,
    weight4,
    weight8,
    write_cast,
    write_rounded_rows,
    write_spread,
    write_weight4,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dfc.ir.graph import Value
    from dfc.ops.builder import Builder


@declare
@dataclass(frozen=True)
class LinearW4(Op):
    """`x @ dequantize(packed, scale, zero).T + bias` with 4-bit group-wise weights.

    With activations="int8" each group of each row of x is rounded to int8 first (scale absmax/127),
    the dot products are those of whole numbers, and only their sum over groups is one of floats.

    Shapes:  x: float[*S, K], packed: u8[N, G*group/2], scale: float[N, G], zero: u8[N, ceil(G/2)]?,
             bias: float[N]? -> float[*S, N]; G = ceil(K/group)
    C1:      packed is u8[N, G*group/2] for a number K: two codes a byte, low nibble first. Where
             group does not divide K the last group is filled up with codes that are not read.
    C2:      scale is [N, G], of x's float dtype or a narrower one.
    C3:      zero is u8[N, ceil(G/2)], packed likewise; without it each code has the offset 8.
    C4:      bias is [N], of x's dtype.
    C5:      group is a power of two, at least 16.
    C6:      activations is "float" or "int8".
    Source:  ONNX Runtime contrib op MatMulNBits-1, bits=4; accuracy_level=4 for int8 activations.
    """

    name = "linear_w4"
    cases = (
        "x=f32[3,64] packed=u8[16,32] scale=f32[16,2] group=32",
        "x=f32[2,3,32] packed=u8[5,16] scale=f32[5,2] bias=f32[5] group=16",
        "x=f64[32] packed=u8[5,16] scale=f64[5,1] group=32",
        "x=f32[B,S+1,64] packed=u8[16,32] scale=f32[16,2] bias=f32[16] group=32",
        "x=f32[3,96] packed=u8[16,48] scale=f16[16,3] zero=u8[16,2] bias=f32[16] group=32",
        "x=f32[3,40] packed=u8[5,24] scale=f32[5,3] zero=u8[5,2] group=16",
        "x=f32[B,40] packed=u8[5,32] scale=f32[5,2] group=32 activations='int8'",
        "x=f32[2,3,64] packed=u8[5,32] scale=f32[5,2] zero=u8[5,1] bias=f32[5] group=32 "
        "activations='int8'",
    )
    rejects = (
        "C1 x=f32[3,40] packed=u8[16,20] scale=f32[16,2] group=32",
        "C1 x=f32[3,K] packed=u8[16,32] scale=f32[16,2] group=32",
        "C1 x=f32[3,64] packed=u8[16,64] scale=f32[16,2] group=32",
        "C1 x=f32[3,64] packed=i8[16,32] scale=f32[16,2] group=32",
        "C2 x=f32[3,64] packed=u8[16,32] scale=f32[2,16] group=32",
        "C2 x=f16[3,64] packed=u8[16,32] scale=f32[16,2] group=32",
        "C3 x=f32[3,64] packed=u8[16,32] scale=f32[16,2] zero=u8[16,2] group=32",
        "C3 x=f32[3,64] packed=u8[16,32] scale=f32[16,2] zero=f32[16,1] group=32",
        "C4 x=f32[3,64] packed=u8[16,32] scale=f32[16,2] bias=f32[64] group=32",
        "C5 x=f32[3,24] packed=u8[16,12] scale=f32[16,1] group=24",
        "C5 x=f32[3,64] packed=u8[16,32] scale=f32[16,8] group=8",
        "C6 x=f32[3,64] packed=u8[16,32] scale=f32[16,2] group=32 activations='int4'",
    )

    group: int = 32
    activations: str = "float"

    def infer(
        self,
        x: TensorType,
        packed: TensorType,
        scale: TensorType,
        zero: TensorType | None = None,
        bias: TensorType | None = None,
    ) -> TensorType:
        power = self.group >= 16 and self.group & (self.group - 1) == 0
        self.require("C5", power, f"group is {self.group}")
        k = x.shape[-1] if x.shape else 1
        fits = isinstance(k, int) and packed.dtype == U8 and packed.rank == 2
        groups = groups_of(k, self.group) if isinstance(k, int) else 0
        fits = fits and packed.shape[1] * 2 == groups * self.group
        self.require("C1", fits, f"packed is {packed}, x has rows of {k}, group is {self.group}")
        n = packed.shape[0]
        fits = scale.shape == (n, groups) and is_scale_of(scale, x)
        self.require("C2", fits, f"scale is {scale}, x is {x}")
        fits = zero is None or (zero.dtype == U8 and zero.shape == (n, groups_of(groups, 2)))
        self.require("C3", fits, f"zero is {zero}")
        self.require("C4", is_bias_of(bias, n, x), f"bias is {bias}")
        known = self.activations in ACTIVATIONS
        self.require("C6", known, f"activations is {self.activations!r}")
        return x.with_shape((*x.shape[:-1], n))

    def reference(
        self,
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        import torch.nn.functional as F

        k = x.shape[-1]
        if self.activations == "int8":
            y = dot_rows(x, centred4(packed, zero, self.group, k), scale, self.group)
            return y if bias is None else y + bias
        return F.linear(x, weight4(packed, scale, zero, self.group, k, x.dtype), bias)

    def decompose(
        self,
        b: Builder,
        x: Value,
        packed: Value,
        scale: Value,
        zero: Value | None = None,
        bias: Value | None = None,
    ) -> Value:
        k, dtype = x.tensor_type.shape[-1], x.tensor_type.dtype
        assert isinstance(k, int)
        weight = write_weight4(b, packed, scale, zero, self.group, k, dtype)
        if self.activations == "int8":
            x = write_rounded_rows(b, x, self.group)
        return b("aten.linear.default", x, weight, bias)

    def cost(
        self,
        x: TensorType,
        packed: TensorType,
        scale: TensorType,
        zero: TensorType | None = None,
        bias: TensorType | None = None,
    ) -> Cost:
        y = self.infer(x, packed, scale, zero, bias)
        unpacking = 2 * packed.numel * 2  # a subtraction and a multiplication for each weight
        flops = 2 * y.numel * x.shape[-1] + unpacking
        return Cost(flops, total_bytes(x, packed, scale, zero, bias), y.nbytes)


@declare
@dataclass(frozen=True)
class LinearW8(Op):
    """`x @ (weight * scale).T + bias` with 8-bit weights, a scale for each row or group of it.

    With activations="int8" each row of x, or each group of it, is rounded to int8 first (scale
    absmax/127), and the dot products are those of whole numbers.

    Shapes:  x: float[*S, K], weight: i8[N, K], scale: float[N] or float[N, G], bias: float[N]?
             -> float[*S, N]; G = ceil(K/group)
    C1:      weight is i8[N, K] for an x that ends in the number K.
    C2:      scale is [N] without a group, else [N, G]; of x's float dtype or a narrower one.
    C3:      bias is [N], of x's dtype.
    C4:      group is None, or a power of two, at least 16.
    C5:      activations is "float" or "int8".
    Source:  ONNX Runtime contrib op MatMulNBits-1, bits=8; accuracy_level=4 for int8 activations.
    """

    name = "linear_w8"
    cases = (
        "x=f32[3,64] weight=i8[16,64] scale=f32[16]",
        "x=f32[2,3,40] weight=i8[5,40] scale=f32[5] bias=f32[5]",
        "x=f64[32] weight=i8[5,32] scale=f64[5]",
        "x=f32[B,S+1,64] weight=i8[16,64] scale=f32[16,2] bias=f32[16] group=32",
        "x=f32[3,40] weight=i8[5,40] scale=f16[5,3] group=16",
        "x=f32[B,40] weight=i8[5,40] scale=f32[5] bias=f32[5] activations='int8'",
        "x=f32[2,3,40] weight=i8[5,40] scale=f32[5,2] group=32 activations='int8'",
    )
    rejects = (
        "C1 x=f32[3,64] weight=i8[16,40] scale=f32[16]",
        "C1 x=f32[3,K] weight=i8[16,K] scale=f32[16]",
        "C1 x=f32[3,64] weight=u8[16,64] scale=f32[16]",
        "C2 x=f32[3,64] weight=i8[16,64] scale=f32[16,2]",
        "C2 x=f32[3,64] weight=i8[16,64] scale=f32[16] group=32",
        "C2 x=f16[3,64] weight=i8[16,64] scale=f32[16]",
        "C3 x=f32[3,64] weight=i8[16,64] scale=f32[16] bias=f16[16]",
        "C4 x=f32[3,64] weight=i8[16,64] scale=f32[16,8] group=8",
        "C5 x=f32[3,64] weight=i8[16,64] scale=f32[16] activations='u8'",
    )

    group: int | None = None
    activations: str = "float"

    def infer(
        self,
        x: TensorType,
        weight: TensorType,
        scale: TensorType,
        bias: TensorType | None = None,
    ) -> TensorType:
        g = self.group
        power = g is None or (g >= 16 and g & (g - 1) == 0)
        self.require("C4", power, f"group is {g}")
        fits = is_matrix_of(weight, x) and weight.dtype == I8
        self.require("C1", fits, f"weight {weight} does not fit x {x}")
        n, k = weight.shape
        assert isinstance(k, int)
        shape = (n,) if g is None else (n, groups_of(k, g))
        fits = scale.shape == shape and is_scale_of(scale, x)
        self.require("C2", fits, f"scale is {scale}, x is {x}, group is {g}")
        self.require("C3", is_bias_of(bias, n, x), f"bias is {bias}")
        known = self.activations in ACTIVATIONS
        self.require("C5", known, f"activations is {self.activations!r}")
        return x.with_shape((*x.shape[:-1], n))

    def reference(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        import torch.nn.functional as F

        if self.activations == "int8":
            y = dot_rows(x, weight, scale, self.group)
            return y if bias is None else y + bias
        return F.linear(x, weight8(weight, scale, self.group, x.dtype), bias)

    def decompose(
        self, b: Builder, x: Value, weight: Value, scale: Value, bias: Value | None = None
    ) -> Value:
        k, dtype = x.tensor_type.shape[-1], x.tensor_type.dtype
        assert isinstance(k, int)
        codes = b("aten._to_copy.default", weight, dtype=dtype)
        wide = write_spread(b, write_cast(b, scale, dtype), self.group, k)
        if self.activations == "int8":
            x = write_rounded_rows(b, x, self.group)
        return b("aten.linear.default", x, b("aten.mul.Tensor", codes, wide), bias)

    def cost(
        self,
        x: TensorType,
        weight: TensorType,
        scale: TensorType,
        bias: TensorType | None = None,
    ) -> Cost:
        return linear_cost(self.infer(x, weight, scale, bias), x, weight, scale, bias)
