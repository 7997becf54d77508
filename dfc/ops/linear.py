"""Linear layers that do more than ATen's: an activation in the epilogue, four-bit weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.ir.op import Cost, Op, declare
from dfc.ir.types import DTYPES, TensorType, total_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from dfc.emit.onnx_builder import Builder as OnnxBuilder
    from dfc.emit.onnx_builder import Val
    from dfc.ir.graph import Value
    from dfc.ops.builder import Builder


@declare
@dataclass(frozen=True)
class LinearGelu(Op):
    """`gelu(x @ weight.T + bias)` in one kernel.

    Shapes:  x: float[*S, K], weight: float[N, K], bias: float[N]? -> float[*S, N]
    C1:      weight is [N, K] for an x that ends in K.
    C2:      bias is [N].
    C3:      all operands have one float dtype.
    C4:      approximate is "none" or "tanh".
    Why:     weight lies as in torch.nn.Linear, because capture keeps `linear` whole.
    """

    name = "linear_gelu"
    cases = (
        "x=f32[3,8] weight=f32[16,8] bias=f32[16]",
        "x=f32[2,3,8] weight=f32[5,8] approximate='tanh'",
        "x=f64[8] weight=f64[5,8] bias=f64[5]",
        "x=f32[0,8] weight=f32[5,8] bias=f32[5]",
        "x=f32[B,2*S,8] weight=f32[16,8] bias=f32[16]",
    )
    rejects = (
        "C1 x=f32[3,8] weight=f32[16,9] bias=f32[16]",
        "C1 x=f32[2,4,8] weight=f32[2,8,16]",
        "C1 x=f32[B,S] weight=f32[16,8]",
        "C2 x=f32[3,8] weight=f32[16,8] bias=f32[8]",
        "C3 x=f32[3,8] weight=f32[16,8] bias=f16[16]",
        "C3 x=i64[3,8] weight=i64[16,8]",
        "C4 x=f32[3,8] weight=f32[16,8] approximate='fast'",
    )

    approximate: str = "none"

    def infer(
        self, x: TensorType, weight: TensorType, bias: TensorType | None = None
    ) -> TensorType:
        fits = x.rank >= 1 and weight.rank == 2 and x.shape[-1] == weight.shape[-1]
        self.require("C1", fits, f"weight {weight} does not fit x {x}")
        n = weight.shape[0]
        self.require("C2", bias is None or bias.shape == (n,), f"bias {bias} is not [{n}]")
        one = x.dtype.is_float and {t.dtype for t in (x, weight, bias) if t} == {x.dtype}
        self.require("C3", one, f"x {x}, weight {weight} and bias {bias} differ in dtype")
        known = self.approximate in ("none", "tanh")
        self.require("C4", known, f"approximate is {self.approximate!r}")
        return x.with_shape((*x.shape[:-1], n))

    def reference(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        import torch.nn.functional as F

        return F.gelu(F.linear(x, weight, bias), approximate=self.approximate)

    def decompose(self, b: Builder, x: Value, weight: Value, bias: Value | None = None) -> Value:
        y = b("aten.linear.default", x, weight, bias)
        return b("aten.gelu.default", y, approximate=self.approximate)

    def cost(self, x: TensorType, weight: TensorType, bias: TensorType | None = None) -> Cost:
        y = self.infer(x, weight, bias)
        flops = 2 * y.numel * x.shape[-1] + 5 * y.numel  # x / 2 * (1 + erf(x / sqrt 2))
        return Cost(flops, total_bytes(x, weight, bias), y.nbytes)


@declare
@dataclass(frozen=True)
class LinearW4(Op):
    """`x @ dequantize(packed, scale).T + bias` with 4-bit group-wise weights.

    Shapes:  x: float[*S, K], packed: u8[N, K/2], scale: float[N, K/group], bias: float[N]?
             -> float[*S, N]
    C1:      K is a multiple of group.
    C2:      packed is u8[N, K/2]: two 4-bit values a byte, low nibble first, offset 8.
    C3:      scale is [N, K/group], of x's float dtype.
    C4:      bias is [N], of x's dtype.
    C5:      group is a power of two, at least 16.
    Source:  ONNX Runtime contrib op MatMulNBits-1, bits=4, without zero points.
    """

    name = "linear_w4"
    cases = (
        "x=f32[3,64] packed=u8[16,32] scale=f32[16,2] group=32",
        "x=f32[2,3,32] packed=u8[5,16] scale=f32[5,2] bias=f32[5] group=16",
        "x=f64[32] packed=u8[5,16] scale=f64[5,1] group=32",
        "x=f32[B,S+1,64] packed=u8[16,32] scale=f32[16,2] bias=f32[16] group=32",
    )
    rejects = (
        "C1 x=f32[3,40] packed=u8[16,20] scale=f32[16,2] group=32",
        "C1 x=f32[3,K] packed=u8[16,32] scale=f32[16,2] group=32",
        "C2 x=f32[3,64] packed=u8[16,64] scale=f32[16,2] group=32",
        "C2 x=f32[3,64] packed=i8[16,32] scale=f32[16,2] group=32",
        "C3 x=f32[3,64] packed=u8[16,32] scale=f32[2,16] group=32",
        "C3 x=f32[3,64] packed=u8[16,32] scale=f16[16,2] group=32",
        "C4 x=f32[3,64] packed=u8[16,32] scale=f32[16,2] bias=f32[64] group=32",
        "C5 x=f32[3,24] packed=u8[16,12] scale=f32[16,1] group=24",
        "C5 x=f32[3,64] packed=u8[16,32] scale=f32[16,8] group=8",
    )

    group: int = 32

    def infer(
        self,
        x: TensorType,
        packed: TensorType,
        scale: TensorType,
        bias: TensorType | None = None,
    ) -> TensorType:
        power = self.group >= 16 and self.group & (self.group - 1) == 0
        self.require("C5", power, f"group is {self.group}")
        k = x.shape[-1] if x.shape else 1
        whole = isinstance(k, int) and k % self.group == 0
        self.require("C1", whole, f"K={k} is not a multiple of group {self.group}")
        fits = packed.dtype == DTYPES["u8"] and packed.rank == 2 and packed.shape[1] * 2 == k
        self.require("C2", fits, f"packed is {packed}, x has rows of {k}")
        n = packed.shape[0]
        fits = scale.shape == (n, k // self.group) and scale.dtype == x.dtype and x.dtype.is_float
        self.require("C3", fits, f"scale is {scale}, x is {x}")
        fits = bias is None or (bias.shape == (n,) and bias.dtype == x.dtype)
        self.require("C4", fits, f"bias is {bias}")
        return x.with_shape((*x.shape[:-1], n))

    def reference(
        self, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        import torch
        import torch.nn.functional as F

        k = torch.arange(x.shape[-1], device=packed.device)
        codes = (packed[:, k // 2] >> (4 * (k % 2)).to(torch.uint8)) & 15
        weight = (codes.to(scale.dtype) - 8) * scale[:, k // self.group]
        return F.linear(x, weight, bias)

    def decompose(
        self, b: Builder, x: Value, packed: Value, scale: Value, bias: Value | None = None
    ) -> Value:
        n, half = packed.tensor_type.shape
        groups = scale.tensor_type.shape[1]
        low = b("aten.bitwise_and.Scalar", packed, other=15)
        high = b("aten.bitwise_right_shift.Tensor_Scalar", packed, other=4)
        pairs = b("aten.stack.default", [low, high], dim=2)
        codes = b("aten.view.default", pairs, size=(n, groups, self.group))
        wide = b("aten._to_copy.default", codes, dtype=scale.tensor_type.dtype)
        centred = b("aten.sub.Scalar", wide, other=8)
        scaled = b("aten.mul.Tensor", centred, b("aten.unsqueeze.default", scale, dim=2))
        weight = b("aten.view.default", scaled, size=(n, half * 2))
        return b("aten.linear.default", x, weight, bias)

    def to_onnx(
        self, b: OnnxBuilder, x: Val, packed: Val, scale: Val, bias: Val | None = None
    ) -> Val | None:
        """MatMulNBits, which multiplies in float32; the decomposition is unpacked when loading."""
        if not b.root.contrib or b.type(x).dtype.name != "f32" or b.rank(x) < 2:
            return None
        n, groups = b.type(scale).shape
        if not isinstance(n, int):
            return None
        blocks = b.reshape(packed, [n, groups, self.group // 2])
        k = b.dim(packed, 1) * 2
        return b.contrib(  # type: ignore[no-any-return]
            "MatMulNBits", x, blocks, scale, None, None, bias,
            K=k, N=n, bits=4, block_size=self.group, accuracy_level=1,
        )  # fmt: skip

    def cost(
        self,
        x: TensorType,
        packed: TensorType,
        scale: TensorType,
        bias: TensorType | None = None,
    ) -> Cost:
        y = self.infer(x, packed, scale, bias)
        unpacking = 2 * packed.numel * 2  # a subtraction and a multiplication for each weight
        flops = 2 * y.numel * x.shape[-1] + unpacking
        return Cost(flops, total_bytes(x, packed, scale, bias), y.nbytes)
