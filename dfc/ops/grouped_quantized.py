"""Linear layers of experts, with weights of four and eight bits: rows in runs, a matrix for each.

An expert's rows are those of `linear_w4` and `linear_w8` with its codes, scales and zero points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.ir.op import Cost, Op, OpRefused, declare
from dfc.ir.types import DTYPES, TensorType, total_bytes
from dfc.ops.codes import write_cast, write_rounded_rows, write_spread, write_weight4
from dfc.ops.linear_quantized import LinearW4, LinearW8

if TYPE_CHECKING:
    from torch import Tensor

    from dfc.ir.graph import Value
    from dfc.ops.builder import Builder


def by_expert(x: Tensor, ends: Tensor, n: int, product: Callable[[int, Tensor], Tensor]) -> Tensor:
    """What `product` makes of each expert's rows, which are read by nobody else; those behind the
    last are zeros. An expert without rows is not asked.
    """
    y, start = x.new_zeros((x.shape[0], n)), 0
    for expert, end in enumerate(ends.tolist()):
        if start < end:
            y[start:end] = product(expert, x[start:end])
            start = end
    return y


def _are_runs(x: TensorType, ends: TensorType, experts: object) -> bool:
    return x.rank == 2 and ends.dtype.name in ("i32", "i64") and ends.shape == (experts,)


@declare
@dataclass(frozen=True)
class GroupedLinearW4(Op):
    """`linear_w4` for each expert's rows: those from the end of the expert before to its own.

    Shapes:  x: float[S, K], ends: int[E], packed: u8[E, N, G*group/2], scale: float[E, N, G],
             zero: u8[E, N, ceil(G/2)]? -> float[S, N]; G = ceil(K/group)
    C1:      x is [S, K], and ends are i32[E] or i64[E] for a packed of E experts.
    C2:      packed, scale and zero have E experts; those of one are as linear_w4 takes them.
    Source:  torch._grouped_mm, of weights as ONNX Runtime's MatMulNBits has them.
    """

    name = "grouped_linear_w4"
    cases = (
        "x=f32[5,64] ends=i64[3] packed=u8[3,16,32] scale=f32[3,16,2] group=32",
        "x=f32[S,40] ends=i32[2] packed=u8[2,5,24] scale=f16[2,5,3] zero=u8[2,5,2] group=16",
        "x=f32[5,40] ends=i64[3] packed=u8[3,5,32] scale=f32[3,5,2] group=32 activations='int8'",
        "x=f64[5,32] ends=i64[1] packed=u8[1,5,16] scale=f64[1,5,1] group=32",
    )
    rejects = (
        "C1 x=f32[2,3,64] ends=i64[3] packed=u8[3,16,32] scale=f32[3,16,2] group=32",
        "C1 x=f32[5,64] ends=i64[2] packed=u8[3,16,32] scale=f32[3,16,2] group=32",
        "C1 x=f32[5,64] ends=f32[3] packed=u8[3,16,32] scale=f32[3,16,2] group=32",
        "C2 x=f32[5,64] ends=i64[3] packed=u8[3,16,32] scale=f32[2,16,2] group=32",
        "C2 x=f32[5,64] ends=i64[3] packed=u8[3,16,16] scale=f32[3,16,2] group=32",
        "C2 x=f32[5,64] ends=i64[3] packed=u8[3,16,32] scale=f32[3,16,2] group=24",
    )

    group: int = 32
    activations: str = "float"

    def infer(
        self,
        x: TensorType,
        ends: TensorType,
        packed: TensorType,
        scale: TensorType,
        zero: TensorType | None = None,
    ) -> TensorType:
        experts = packed.shape[0] if packed.rank == 3 else None
        self.require("C1", _are_runs(x, ends, experts), f"x is {x}, ends {ends}, packed {packed}")
        same = all(t is None or (t.rank == 3 and t.shape[0] == experts) for t in (scale, zero))
        self.require("C2", same, f"packed is {packed}, scale {scale}, zero {zero}")
        try:
            return _of_one(LinearW4(self.group, self.activations), x, packed, scale, zero)
        except OpRefused as e:
            raise OpRefused(self.name, "C2", str(e)) from e

    def reference(
        self, x: Tensor, ends: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None = None
    ) -> Tensor:
        layer = LinearW4(self.group, self.activations)

        def product(e: int, rows: Tensor) -> Tensor:
            return layer.reference(rows, packed[e], scale[e], None if zero is None else zero[e])

        return by_expert(x, ends, packed.shape[1], product)

    def decompose(
        self,
        b: Builder,
        x: Value,
        ends: Value,
        packed: Value,
        scale: Value,
        zero: Value | None = None,
    ) -> Value:
        k, dtype = x.tensor_type.shape[-1], x.tensor_type.dtype
        assert isinstance(k, int)
        weight = write_weight4(b, packed, scale, zero, self.group, k, dtype)
        if self.activations == "int8":
            x = write_rounded_rows(b, x, self.group)
        return _write_all(b, x, ends, weight)

    def cost(
        self,
        x: TensorType,
        ends: TensorType,
        packed: TensorType,
        scale: TensorType,
        zero: TensorType | None = None,
    ) -> Cost:
        y = self.infer(x, ends, packed, scale, zero)
        flops = 2 * y.numel * x.shape[-1] + 4 * packed.numel
        return Cost(flops, total_bytes(x, ends, packed, scale, zero), y.nbytes)


@declare
@dataclass(frozen=True)
class GroupedLinearW8(Op):
    """`linear_w8` for each expert's rows: those from the end of the expert before to its own.

    Shapes:  x: float[S, K], ends: int[E], weight: i8[E, N, K], scale: float[E, N] or
             float[E, N, G] -> float[S, N]; G = ceil(K/group)
    C1:      x is [S, K], and ends are i32[E] or i64[E] for a weight of E experts.
    C2:      weight and scale have E experts; those of one are as linear_w8 takes them.
    Source:  torch._grouped_mm.
    """

    name = "grouped_linear_w8"
    cases = (
        "x=f32[5,64] ends=i64[3] weight=i8[3,16,64] scale=f32[3,16]",
        "x=f32[S,40] ends=i32[2] weight=i8[2,5,40] scale=f16[2,5,3] group=16",
        "x=f32[5,40] ends=i64[3] weight=i8[3,5,40] scale=f32[3,5] activations='int8'",
        "x=f32[5,40] ends=i64[3] weight=i8[3,5,40] scale=f32[3,5,2] group=32 activations='int8'",
        "x=f64[5,32] ends=i64[1] weight=i8[1,5,32] scale=f64[1,5]",
    )
    rejects = (
        "C1 x=f32[2,3,64] ends=i64[3] weight=i8[3,16,64] scale=f32[3,16]",
        "C1 x=f32[5,64] ends=i64[2] weight=i8[3,16,64] scale=f32[3,16]",
        "C1 x=f32[5,64] ends=f32[3] weight=i8[3,16,64] scale=f32[3,16]",
        "C2 x=f32[5,64] ends=i64[3] weight=i8[3,16,64] scale=f32[2,16]",
        "C2 x=f32[5,64] ends=i64[3] weight=i8[3,16,40] scale=f32[3,16]",
        "C2 x=f32[5,64] ends=i64[3] weight=i8[3,16,64] scale=f32[3,16] activations='u8'",
    )

    group: int | None = None
    activations: str = "float"

    def infer(
        self, x: TensorType, ends: TensorType, weight: TensorType, scale: TensorType
    ) -> TensorType:
        experts = weight.shape[0] if weight.rank == 3 else None
        self.require("C1", _are_runs(x, ends, experts), f"x is {x}, ends {ends}, weight {weight}")
        same = scale.rank > 1 and scale.shape[0] == experts
        self.require("C2", same, f"weight is {weight}, scale {scale}")
        try:
            return _of_one(LinearW8(self.group, self.activations), x, weight, scale)
        except OpRefused as e:
            raise OpRefused(self.name, "C2", str(e)) from e

    def reference(self, x: Tensor, ends: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        layer = LinearW8(self.group, self.activations)

        def product(e: int, rows: Tensor) -> Tensor:
            return layer.reference(rows, weight[e], scale[e])

        return by_expert(x, ends, weight.shape[1], product)

    def decompose(self, b: Builder, x: Value, ends: Value, weight: Value, scale: Value) -> Value:
        k, dtype = x.tensor_type.shape[-1], x.tensor_type.dtype
        assert isinstance(k, int)
        codes = b("aten._to_copy.default", weight, dtype=dtype)
        wide = write_spread(b, write_cast(b, scale, dtype), self.group, k)
        if self.activations == "int8":
            x = write_rounded_rows(b, x, self.group)
        return _write_all(b, x, ends, b("aten.mul.Tensor", codes, wide))

    def cost(self, x: TensorType, ends: TensorType, weight: TensorType, scale: TensorType) -> Cost:
        y = self.infer(x, ends, weight, scale)
        flops = 2 * y.numel * x.shape[-1] + weight.numel
        return Cost(flops, total_bytes(x, ends, weight, scale), y.nbytes)


def _write_all(b: Builder, x: Value, ends: Value, weight: Value) -> Value:
    """Every expert's product with all rows, of which each row keeps its own expert's: sizes that
    depend on data have no form in a graph.
    """
    i64 = DTYPES["i64"]
    rows, experts = x.tensor_type.shape[0], weight.tensor_type.shape[0]
    row = b("aten.unsqueeze.default", b("aten.arange.default", end=rows, dtype=i64), dim=-1)
    passed = b("aten.ge.Tensor", row, b("aten._to_copy.default", ends, dtype=i64))
    own = b("aten.sum.dim_IntList", passed, dim=(-1,), dtype=i64)
    each = b("aten.unsqueeze.default", b("aten.arange.default", end=experts, dtype=i64), dim=-1)
    others = b("aten.unsqueeze.default", b("aten.ne.Tensor", each, own), dim=-1)
    turned = b("aten.transpose.int", weight, dim0=1, dim1=2)
    y = b("aten.matmul.default", b("aten.unsqueeze.default", x, dim=0), turned)
    y = b("aten.masked_fill.Scalar", y, others, value=0)
    return b("aten.sum.dim_IntList", y, dim=(0,))


def _of_one(layer: LinearW4 | LinearW8, x: TensorType, *weights: TensorType | None) -> TensorType:
    """What one expert makes of x.

    Raises:  OpRefused by the layer.
    """
    own = (None if t is None else t.with_shape(t.shape[1:]) for t in weights)
    return layer.infer(x, *own)  # type: ignore[arg-type]
