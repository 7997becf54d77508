"""Tables of codes that rows are looked up in: embeddings with 4-bit and 8-bit weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.ir.expr import Size
from dfc.ir.op import Cost, Op, declare
from dfc.ir.types import DTYPES, TensorType, total_bytes
from dfc.ops.codes import (
    I8,
    U8,
    centred4,
    groups_of,
    is_scale_of,
    spread,
    write_cast,
    write_spread,
    write_weight4,
)
from dfc.ops.quantized import scale_shape

if TYPE_CHECKING:
    from torch import Tensor

    from dfc.ir.graph import Value
    from dfc.ops.builder import Builder


def _rows(indices: Tensor, table: Tensor) -> Tensor:
    """table[indices], refusing negative indices as an embedding does."""
    import torch.nn.functional as F

    rows = F.embedding(indices, table.reshape(len(table), -1))
    return rows.squeeze(-1) if table.dim() == 1 else rows


def _write_rows(b: Builder, indices: Value, table: Value) -> Value:
    if table.tensor_type.rank == 2:
        return b("aten.embedding.default", table, indices)
    rows = b("aten.embedding.default", b("aten.unsqueeze.default", table, dim=1), indices)
    return b("aten.squeeze.dim", rows, dim=-1)


def _is_index(t: TensorType) -> bool:
    return t.dtype.name in ("i32", "i64")


def _is_scaled(dtype: str, scale: TensorType, shape: tuple[Size, ...] | None) -> bool:
    wanted = DTYPES.get(dtype)
    if wanted is None or scale.shape != shape:
        return False
    return is_scale_of(scale, TensorType(wanted, ()))


@declare
@dataclass(frozen=True)
class EmbeddingW8(Op):
    """Rows of a table of 8-bit codes, each times its scale or those of its groups.

    Shapes:  indices: int[*S], table: i8[V, D], scale: float[V] or float[V, G] -> dtype[*S, D];
             G = ceil(D/group)
    C1:      indices are i32 or i64.
    C2:      table is i8[V, D].
    C3:      scale is [V] without a group, else [V, G]; of the float `dtype` or a narrower one.
    Why:     table and scale lie as those of linear_w8: a tied output layer shares them.
    """

    name = "embedding_w8"
    cases = (
        "indices=i64[3] table=i8[4,8] scale=f32[4]",
        "indices=i32[B,S] table=i8[5,8] scale=f16[5]",
        "indices=i64[2,3] table=i8[4,40] scale=f32[4,3] group=16",
        "indices=i64[] table=i8[4,8] scale=f64[4] dtype='f64'",
    )
    rejects = (
        "C1 indices=f32[3] table=i8[4,8] scale=f32[4]",
        "C2 indices=i64[3] table=u8[4,8] scale=f32[4]",
        "C3 indices=i64[3] table=i8[4,8] scale=f32[8]",
        "C3 indices=i64[3] table=i8[4,8] scale=f32[4] group=8",
        "C3 indices=i64[3] table=i8[4,8] scale=f32[4] dtype='f16'",
        "C3 indices=i64[3] table=i8[4,8] scale=f32[4] dtype='i8'",
    )

    group: int | None = None
    dtype: str = "f32"

    def infer(self, indices: TensorType, table: TensorType, scale: TensorType) -> TensorType:
        self.require("C1", _is_index(indices), f"indices are {indices}")
        self.require("C2", table.dtype == I8 and table.rank == 2, f"table is {table}")
        v, d = table.shape
        shape = (v,) if self.group is None else scale_shape(table.shape, None, self.group)
        fits = _is_scaled(self.dtype, scale, shape)
        self.require("C3", fits, f"scale is {scale}, table is {table}, dtype is {self.dtype}")
        return TensorType(DTYPES[self.dtype], (*indices.shape, d))

    def reference(self, indices: Tensor, table: Tensor, scale: Tensor) -> Tensor:
        import torch

        dtype = torch.promote_types(DTYPES[self.dtype].to_torch(), scale.dtype)
        scales = _rows(indices, scale).to(dtype)
        return _rows(indices, table).to(dtype) * spread(scales, self.group, table.shape[1])

    def decompose(self, b: Builder, indices: Value, table: Value, scale: Value) -> Value:
        dtype, d = DTYPES[self.dtype], table.tensor_type.shape[1]
        assert isinstance(d, int)
        rows = write_cast(b, _write_rows(b, indices, table), dtype)
        scales = write_cast(b, _write_rows(b, indices, scale), dtype)
        return b("aten.mul.Tensor", rows, write_spread(b, scales, self.group, d))

    def cost(self, indices: TensorType, table: TensorType, scale: TensorType) -> Cost:
        y = self.infer(indices, table, scale)
        return Cost(y.numel, total_bytes(indices, table, scale), y.nbytes)


@declare
@dataclass(frozen=True)
class EmbeddingW4(Op):
    """Rows of a table of 4-bit codes, each group less its zero point and times its scale.

    Shapes:  indices: int[*S], packed: u8[V, G*group/2], scale: float[V, G], zero: u8[V, ceil(G/2)]?
             -> dtype[*S, D]; D = width, or G*group without one; G = ceil(D/group)
    C1:      indices are i32 or i64.
    C2:      packed is u8[V, G*group/2]: two codes a byte, low nibble first.
    C3:      scale is [V, G], of the float `dtype` or a narrower one.
    C4:      zero is u8[V, ceil(G/2)], packed likewise; without it each code has the offset 8.
    C5:      group is a power of two, at least 16, and width ends in the last group.
    Why:     the table lies as the weight of linear_w4: a tied output layer shares it.
    """

    name = "embedding_w4"
    cases = (
        "indices=i64[3] packed=u8[4,16] scale=f32[4,1]",
        "indices=i32[B,S] packed=u8[5,32] scale=f16[5,2] zero=u8[5,1]",
        "indices=i64[2,3] packed=u8[4,24] scale=f32[4,3] zero=u8[4,2] group=16 width=40",
        "indices=i64[] packed=u8[4,16] scale=f64[4,1] dtype='f64'",
    )
    rejects = (
        "C1 indices=f32[3] packed=u8[4,16] scale=f32[4,1]",
        "C2 indices=i64[3] packed=i8[4,16] scale=f32[4,1]",
        "C2 indices=i64[3] packed=u8[4,20] scale=f32[4,1]",
        "C3 indices=i64[3] packed=u8[4,16] scale=f32[4,2]",
        "C3 indices=i64[3] packed=u8[4,16] scale=f32[4,1] dtype='f16'",
        "C4 indices=i64[3] packed=u8[4,32] scale=f32[4,2] zero=u8[4,2]",
        "C5 indices=i64[3] packed=u8[4,12] scale=f32[4,1] group=24",
        "C5 indices=i64[3] packed=u8[4,32] scale=f32[4,2] width=32",
        "C5 indices=i64[3] packed=u8[4,32] scale=f32[4,2] width=65",
    )

    group: int = 32
    width: int | None = None
    dtype: str = "f32"

    def _columns(self, packed_bytes: int) -> int:
        return packed_bytes * 2 if self.width is None else self.width

    def infer(
        self,
        indices: TensorType,
        packed: TensorType,
        scale: TensorType,
        zero: TensorType | None = None,
    ) -> TensorType:
        power = self.group >= 16 and self.group & (self.group - 1) == 0
        self.require("C5", power, f"group is {self.group}")
        self.require("C1", _is_index(indices), f"indices are {indices}")
        whole = packed.dtype == U8 and packed.rank == 2 and isinstance(packed.shape[1], int)
        whole = whole and packed.shape[1] * 2 % self.group == 0
        self.require("C2", whole, f"packed is {packed}, group is {self.group}")
        v, columns = packed.shape
        assert isinstance(columns, int)
        d, groups = self._columns(columns), columns * 2 // self.group
        self.require("C5", groups_of(d, self.group) == groups, f"width {d} has not {groups} groups")
        fits = _is_scaled(self.dtype, scale, (v, groups))
        self.require("C3", fits, f"scale is {scale}, packed is {packed}, dtype is {self.dtype}")
        fits = zero is None or zero == TensorType(U8, (v, groups_of(groups, 2)))
        self.require("C4", fits, f"zero is {zero}")
        return TensorType(DTYPES[self.dtype], (*indices.shape, d))

    def reference(
        self, indices: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None = None
    ) -> Tensor:
        import torch

        dtype, d = DTYPES[self.dtype].to_torch(), self._columns(packed.shape[1])
        dtype = torch.promote_types(dtype, scale.dtype)
        points = None if zero is None else _rows(indices, zero)
        codes = centred4(_rows(indices, packed), points, self.group, d).to(dtype)
        return codes * spread(_rows(indices, scale).to(dtype), self.group, d)

    def decompose(
        self, b: Builder, indices: Value, packed: Value, scale: Value, zero: Value | None = None
    ) -> Value:
        columns = packed.tensor_type.shape[1]
        assert isinstance(columns, int)
        rows, scales = (_write_rows(b, indices, t) for t in (packed, scale))
        points = None if zero is None else _write_rows(b, indices, zero)
        d, dtype = self._columns(columns), DTYPES[self.dtype]
        return write_weight4(b, rows, scales, points, self.group, d, dtype)

    def cost(
        self,
        indices: TensorType,
        packed: TensorType,
        scale: TensorType,
        zero: TensorType | None = None,
    ) -> Cost:
        y = self.infer(indices, packed, scale, zero)
        return Cost(2 * y.numel, total_bytes(indices, packed, scale, zero), y.nbytes)
