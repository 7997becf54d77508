"""Linear layers that do more than ATen's: an activation in the epilogue."""

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
    precision = "half"
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
