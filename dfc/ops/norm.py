"""Normalisations that ATen has only in pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.ir.op import Cost, Op, declare
from dfc.ir.types import TensorType, total_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from dfc.ir.graph import Value
    from dfc.ops.builder import Builder


@declare
@dataclass(frozen=True)
class SkipLayerNorm(Op):
    """Add a residual, then layer norm over the last dimension; gives the norm and the sum.

    The sum is `x + skip + bias`, added in this order; the norm is scaled by gamma, shifted by beta.

    Shapes:  x: float[*S, H], skip: float[*S, H], gamma: float[H], beta: float[H]?, bias: float[H]?
             -> float[*S, H], float[*S, H]
    C1:      skip has the type of x: nothing is broadcast.
    C2:      gamma is [H].
    C3:      beta and bias are [H].
    C4:      gamma, beta and bias have x's float dtype.
    Source:  ONNX Runtime contrib op SkipLayerNormalization-1.
    """

    name = "skip_layer_norm"
    cases = (
        "x=f32[2,3,8] skip=f32[2,3,8] gamma=f32[8] beta=f32[8] bias=f32[8] eps=1e-12",
        "x=f32[4,8] skip=f32[4,8] gamma=f32[8] beta=f32[8]",
        "x=f32[2,3,7] skip=f32[2,3,7] gamma=f32[7] bias=f32[7]",
        "x=f64[5,16] skip=f64[5,16] gamma=f64[16]",
        "x=f32[B,S,8] skip=f32[B,S,8] gamma=f32[8] beta=f32[8]",
    )
    rejects = (
        "C1 x=f32[2,3,8] skip=f32[3,8] gamma=f32[8]",
        "C1 x=f32[2,3,8] skip=f16[2,3,8] gamma=f32[8]",
        "C1 x=f32[B,S,8] skip=f32[S,B,8] gamma=f32[8]",
        "C2 x=f32[2,3,8] skip=f32[2,3,8] gamma=f32[3]",
        "C3 x=f32[2,3,8] skip=f32[2,3,8] gamma=f32[8] beta=f32[1]",
        "C3 x=f32[2,3,8] skip=f32[2,3,8] gamma=f32[8] bias=f32[3,8]",
        "C4 x=f16[2,3,8] skip=f16[2,3,8] gamma=f32[8]",
        "C4 x=i32[2,3,8] skip=i32[2,3,8] gamma=i32[8]",
    )

    eps: float = 1e-5

    def infer(
        self,
        x: TensorType,
        skip: TensorType,
        gamma: TensorType,
        beta: TensorType | None = None,
        bias: TensorType | None = None,
    ) -> tuple[TensorType, TensorType]:
        self.require("C1", skip == x, f"skip is {skip}, x is {x}")
        h = x.shape[-1:]
        self.require("C2", x.rank >= 1 and gamma.shape == h, f"gamma is {gamma}, x is {x}")
        fits = all(t is None or t.shape == h for t in (beta, bias))
        self.require("C3", fits, f"beta is {beta}, bias is {bias}, x is {x}")
        one = x.dtype.is_float and {t.dtype for t in (x, gamma, beta, bias) if t} == {x.dtype}
        self.require("C4", one, f"x {x}, gamma {gamma}, beta {beta}, bias {bias} differ in dtype")
        return x, x

    def reference(
        self,
        x: Tensor,
        skip: Tensor,
        gamma: Tensor,
        beta: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        import torch.nn.functional as F

        total = x + skip if bias is None else x + skip + bias
        return F.layer_norm(total, gamma.shape, gamma, beta, self.eps), total

    def decompose(
        self,
        b: Builder,
        x: Value,
        skip: Value,
        gamma: Value,
        beta: Value | None = None,
        bias: Value | None = None,
    ) -> tuple[Value, Value]:
        total = b("aten.add.Tensor", x, skip)
        if bias is not None:
            total = b("aten.add.Tensor", total, bias)
        shape = gamma.tensor_type.shape
        normal = b(
            "aten.layer_norm.default", total, gamma, beta, normalized_shape=shape, eps=self.eps
        )
        return normal, total

    def cost(
        self,
        x: TensorType,
        skip: TensorType,
        gamma: TensorType,
        beta: TensorType | None = None,
        bias: TensorType | None = None,
    ) -> Cost:
        each = 7 + (beta is not None) + (bias is not None)  # add, mean, centre, square, sum, scale
        return Cost(each * x.numel, total_bytes(x, skip, gamma, beta, bias), 2 * x.nbytes)


@declare
@dataclass(frozen=True)
class SkipRmsNorm(Op):
    """Add a residual, then RMS norm over the last dimension; gives the norm and the sum.

    Shapes:  x: float[*S, H], skip: float[*S, H], gamma: float[H] -> float[*S, H], float[*S, H]
    C1:      skip has the type of x: nothing is broadcast.
    C2:      gamma is [H].
    C3:      gamma has x's float dtype.
    Source:  ONNX Runtime contrib op SkipSimplifiedLayerNormalization-1.
    """

    name = "skip_rms_norm"
    cases = (
        "x=f32[2,3,8] skip=f32[2,3,8] gamma=f32[8]",
        "x=f32[4,7] skip=f32[4,7] gamma=f32[7] eps=1e-5",
        "x=f64[5,16] skip=f64[5,16] gamma=f64[16]",
        "x=f32[B,S,8] skip=f32[B,S,8] gamma=f32[8]",
    )
    rejects = (
        "C1 x=f32[2,3,8] skip=f32[3,8] gamma=f32[8]",
        "C1 x=f32[2,3,8] skip=f16[2,3,8] gamma=f32[8]",
        "C2 x=f32[2,3,8] skip=f32[2,3,8] gamma=f32[3]",
        "C2 x=f32[] skip=f32[] gamma=f32[]",
        "C3 x=f16[2,3,8] skip=f16[2,3,8] gamma=f32[8]",
        "C3 x=i32[2,3,8] skip=i32[2,3,8] gamma=i32[8]",
    )

    eps: float = 1e-6

    def infer(
        self, x: TensorType, skip: TensorType, gamma: TensorType
    ) -> tuple[TensorType, TensorType]:
        self.require("C1", skip == x, f"skip is {skip}, x is {x}")
        fits = x.rank >= 1 and gamma.shape == x.shape[-1:]
        self.require("C2", fits, f"gamma is {gamma}, x is {x}")
        one = x.dtype.is_float and gamma.dtype == x.dtype
        self.require("C3", one, f"gamma is {gamma}, x is {x}")
        return x, x

    def reference(self, x: Tensor, skip: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        import torch.nn.functional as F

        total = x + skip
        return F.rms_norm(total, gamma.shape, gamma, self.eps), total

    def decompose(self, b: Builder, x: Value, skip: Value, gamma: Value) -> tuple[Value, Value]:
        total = b("aten.add.Tensor", x, skip)
        shape = gamma.tensor_type.shape
        normal = b("aten.rms_norm.default", total, gamma, normalized_shape=shape, eps=self.eps)
        return normal, total

    def cost(self, x: TensorType, skip: TensorType, gamma: TensorType) -> Cost:
        flops = 5 * x.numel  # add, square, sum, divide by the root, scale
        return Cost(flops, total_bytes(x, skip, gamma), 2 * x.nbytes)
