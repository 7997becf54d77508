"""Between floats and codes of eight bits, and tables of codes that rows are looked up in."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from dfc.ir.expr import Size
from dfc.ir.op import Cost, Op, declare
from dfc.ir.types import DTYPES, DType, TensorType, total_bytes
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

if TYPE_CHECKING:
    from torch import Tensor

    from dfc.ir.graph import Graph, Value
    from dfc.ops.builder import Builder

INTEGERS = {"i8": (-128, 127), "u8": (0, 255)}
LARGEST = {"f8e4m3fn": 448.0, "f8e5m2": 57344.0}  # Source: arXiv 2209.05433
CODES = {DTYPES[n] for n in (*INTEGERS, *LARGEST)}


# How far results may be from the reference's, of the largest element, where values are rounded: a
# kernel that adds in another order gives some values the next code.
ROUNDED_RTOL = 0.05
_ROUNDED_NORM = 1.5  # times the original's own distance from the witness
_ROUNDED_OWN = 0.3  # an original farther than this proves nothing


def rounded_alike(result: Tensor, original: Tensor, witness: Tensor) -> bool:
    """Whether a result is about as near to the witness as the original is: both in norm.

    Why:  one code more in an outlier's row sends the row elsewhere, in float64 too. Such rows are
          few, and which ones is chance: the largest element says nothing then, the norm does.
    """
    scale = float(witness.double().norm())
    own = float((original.double() - witness.double()).norm())
    error = float((result.double() - witness.double()).norm())
    return isfinite(scale) and own <= _ROUNDED_OWN * scale and error <= _ROUNDED_NORM * own


def rounds_values(graph: Graph) -> bool:
    """Whether values that are computed are rounded to codes while the graph runs."""
    from dfc.ir.graph import Parameter

    return any(
        (n.op == "dfc.quantize" and not isinstance(n.inputs[0], Parameter))
        or n.attributes.get("activations") in ("int8", "f8")
        for n in graph.walk()
    )


def _scale_shape(
    shape: tuple[Size, ...], axis: int | None, group: int | None
) -> tuple[Size, ...] | None:
    """The shape of the scales of a tensor; None where axis and group do not fit it."""
    if axis is not None and group is not None:
        return None
    if axis is not None:
        return (shape[axis],) if -len(shape) <= axis < len(shape) else None
    if group is None:
        return ()
    if group < 1 or not shape or not isinstance(shape[-1], int):
        return None
    return (*shape[:-1], groups_of(shape[-1], group))


def _fitted(scale: Tensor, shape: Any, axis: int | None, group: int | None) -> Tensor:
    """Scales or zero points as they are broadcast to a tensor of a shape."""
    if group is not None:
        return spread(scale, group, shape[-1])
    if axis is None:
        return scale
    sizes = [1] * len(shape)
    sizes[axis] = -1
    return scale.reshape(sizes)


def _write_fitted(
    b: Builder, scale: Value, like: Value, axis: int | None, group: int | None
) -> Value:
    shape = like.tensor_type.shape
    if group is not None:
        k = shape[-1]
        assert isinstance(k, int)
        return write_spread(b, scale, group, k)
    if axis is None:
        return scale
    sizes: list[Size] = [1] * len(shape)
    sizes[axis] = scale.tensor_type.shape[0]
    return b("aten.view.default", scale, size=tuple(sizes))


@declare
@dataclass(frozen=True)
class Quantize(Op):
    """`saturate(round_half_even(x / scale) + zero)`, as codes of eight bits.

    With one scale for all of x, for each index of the dimension `axis`, or for each `group`
    numbers along the last dimension. `low` and `high` narrow the range of whole-number codes.

    Shapes:  x: float[*S], scale: float[], float[S[axis]] or float[*S[:-1], ceil(S[-1]/group)],
             zero: dtype of scale's shape? -> dtype[*S]
    C1:      dtype is i8, u8, f8e4m3fn or f8e5m2.
    C2:      scale has x's float dtype, and the shape that `axis` or `group` asks for.
    C3:      zero has scale's shape and the dtype of whole numbers that the codes have.
    C4:      low and high are for whole numbers: low < high, both within the dtype's range.
    Source:  ONNX QuantizeLinear-23; x is divided in its own type, never multiplied with 1/scale.
    """

    name = "quantize"
    cases = (
        "x=f32[3,8] scale=f32[]",
        "x=f32[3,8] scale=f32[] zero=u8[] dtype='u8'",
        "x=f32[3,8] scale=f32[3] axis=0 low=-127",
        "x=f32[2,3,8] scale=f32[3] zero=i8[3] axis=1",
        "x=f32[B,40] scale=f32[B,3] group=16",
        "x=f32[3,40] scale=f32[3,2] zero=u8[3,2] group=32 dtype='u8' low=1 high=200",
        "x=f32[3,8] scale=f32[3] axis=-2 dtype='f8e4m3fn'",
        "x=f32[3,8] scale=f32[] dtype='f8e5m2'",
        "x=f64[B,S] scale=f64[]",
    )
    rejects = (
        "C1 x=f32[3,8] scale=f32[] dtype='i32'",
        "C2 x=f32[3,8] scale=f64[]",
        "C2 x=i32[3,8] scale=i32[]",
        "C2 x=f32[3,8] scale=f32[8] axis=0",
        "C2 x=f32[3,8] scale=f32[3] axis=2",
        "C2 x=f32[3,8] scale=f32[3,1] axis=0 group=8",
        "C2 x=f32[3,S] scale=f32[3,1] group=8",
        "C3 x=f32[3,8] scale=f32[] zero=u8[]",
        "C3 x=f32[3,8] scale=f32[3] zero=i8[] axis=0",
        "C3 x=f32[3,8] scale=f32[] zero=f8e5m2[] dtype='f8e5m2'",
        "C4 x=f32[3,8] scale=f32[] low=-129",
        "C4 x=f32[3,8] scale=f32[] low=3 high=3",
        "C4 x=f32[3,8] scale=f32[] dtype='f8e5m2' high=100",
    )

    dtype: str = "i8"
    axis: int | None = None
    group: int | None = None
    low: int | None = None
    high: int | None = None

    @property
    def codes(self) -> DType:
        return DTYPES[self.dtype]

    def bounds(self) -> tuple[int, int]:
        low, high = INTEGERS[self.dtype]
        return low if self.low is None else self.low, high if self.high is None else self.high

    def infer(self, x: TensorType, scale: TensorType, zero: TensorType | None = None) -> TensorType:
        whole = self.dtype in INTEGERS
        self.require("C1", whole or self.dtype in LARGEST, f"dtype is {self.dtype!r}")
        fits = scale.shape == _scale_shape(x.shape, self.axis, self.group)
        fits = fits and x.dtype.is_float and scale.dtype == x.dtype
        reason = f"x is {x}, scale is {scale}, axis is {self.axis}, group is {self.group}"
        self.require("C2", fits, reason)
        fits = zero is None or (whole and zero == TensorType(self.codes, scale.shape))
        self.require("C3", fits, f"zero is {zero}")
        self.require("C4", self._is_range(), f"low is {self.low}, high is {self.high}")
        return x.with_dtype(self.codes)

    def _is_range(self) -> bool:
        if self.dtype not in INTEGERS:
            return self.low is None and self.high is None
        (low, high), (least, most) = self.bounds(), INTEGERS[self.dtype]
        return least <= low < high <= most

    def reference(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        import torch

        y = x / _fitted(scale, x.shape, self.axis, self.group)
        if self.dtype in LARGEST:
            largest = LARGEST[self.dtype]
            return y.clamp(-largest, largest).to(self.codes.to_torch())
        y = torch.round(y)
        if zero is not None:
            y = y + _fitted(zero, x.shape, self.axis, self.group).to(y.dtype)
        return y.clamp(*self.bounds()).to(self.codes.to_torch())

    def decompose(self, b: Builder, x: Value, scale: Value, zero: Value | None = None) -> Value:
        y = b("aten.div.Tensor", x, _write_fitted(b, scale, x, self.axis, self.group))
        if self.dtype in LARGEST:
            low, high = -LARGEST[self.dtype], LARGEST[self.dtype]
        else:
            y = b("aten.round.default", y)
            low, high = self.bounds()
        if zero is not None:
            points = _write_fitted(b, zero, x, self.axis, self.group)
            y = b("aten.add.Tensor", y, write_cast(b, points, x.tensor_type.dtype))
        y = b("aten.clamp.default", y, min=low, max=high)
        return b("aten._to_copy.default", y, dtype=self.codes)

    def cost(self, x: TensorType, scale: TensorType, zero: TensorType | None = None) -> Cost:
        y = self.infer(x, scale, zero)
        flops = (3 if zero is None else 4) * y.numel  # divide, round, saturate
        return Cost(flops, total_bytes(x, scale, zero), y.nbytes)


@declare
@dataclass(frozen=True)
class Dequantize(Op):
    """`(q - zero) * scale`, in scale's dtype.

    Shapes:  q: codes[*S], scale: float[], float[S[axis]] or float[*S[:-1], ceil(S[-1]/group)],
             zero: codes of scale's shape? -> float[*S]
    C1:      q is i8, u8, i32, f8e4m3fn or f8e5m2.
    C2:      scale is a float of the shape that `axis` or `group` asks for.
    C3:      zero has scale's shape and q's dtype, which is i8 or u8.
    Source:  ONNX DequantizeLinear-23; i32 is for biases.
    """

    name = "dequantize"
    unpacks = True
    cases = (
        "q=i8[3,8] scale=f32[]",
        "q=u8[3,8] scale=f32[] zero=u8[]",
        "q=i8[3,8] scale=f32[3] axis=0",
        "q=i8[2,3,8] scale=f32[3] zero=i8[3] axis=1",
        "q=i8[B,40] scale=f32[B,3] group=16",
        "q=u8[3,40] scale=f32[3,2] zero=u8[3,2] group=32",
        "q=i32[8] scale=f32[8] axis=0",
        "q=f8e4m3fn[3,8] scale=f32[3] axis=0",
        "q=f8e5m2[3,8] scale=f32[]",
        "q=i8[B,S] scale=f64[]",
    )
    rejects = (
        "C1 q=i64[3,8] scale=f32[]",
        "C2 q=i8[3,8] scale=i8[]",
        "C2 q=i8[3,8] scale=f32[8] axis=0",
        "C2 q=i8[3,8] scale=f32[3,1] axis=0 group=8",
        "C3 q=i8[3,8] scale=f32[] zero=u8[]",
        "C3 q=i8[3,8] scale=f32[3] zero=i8[] axis=0",
        "C3 q=i32[8] scale=f32[] zero=i32[]",
    )

    axis: int | None = None
    group: int | None = None

    def infer(self, q: TensorType, scale: TensorType, zero: TensorType | None = None) -> TensorType:
        known = q.dtype in CODES or q.dtype == DTYPES["i32"]
        self.require("C1", known, f"q is {q}")
        fits = scale.shape == _scale_shape(q.shape, self.axis, self.group) and scale.dtype.is_float
        reason = f"q is {q}, scale is {scale}, axis is {self.axis}, group is {self.group}"
        self.require("C2", fits, reason)
        fits = zero is None or (q.dtype.name in INTEGERS and zero == scale.with_dtype(q.dtype))
        self.require("C3", fits, f"zero is {zero}")
        return q.with_dtype(scale.dtype)

    def reference(self, q: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        y = q.to(scale.dtype)
        if zero is not None:
            y = y - _fitted(zero, q.shape, self.axis, self.group).to(scale.dtype)
        return y * _fitted(scale, q.shape, self.axis, self.group)

    def decompose(self, b: Builder, q: Value, scale: Value, zero: Value | None = None) -> Value:
        dtype = scale.tensor_type.dtype
        y = b("aten._to_copy.default", q, dtype=dtype)
        if zero is not None:
            points = _write_fitted(b, zero, q, self.axis, self.group)
            y = b("aten.sub.Tensor", y, write_cast(b, points, dtype))
        return b("aten.mul.Tensor", y, _write_fitted(b, scale, q, self.axis, self.group))

    def cost(self, q: TensorType, scale: TensorType, zero: TensorType | None = None) -> Cost:
        y = self.infer(q, scale, zero)
        return Cost((1 if zero is None else 2) * y.numel, total_bytes(q, scale, zero), y.nbytes)


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
        shape = (v,) if self.group is None else _scale_shape(table.shape, None, self.group)
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
