"""Between floats and codes of eight bits: `quantize` and `dequantize`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfc.ir.expr import Size
from dfc.ir.op import Cost, Op, declare
from dfc.ir.types import DTYPES, DType, TensorType, total_bytes
from dfc.ops.codes import groups_of, spread, write_cast, write_spread

if TYPE_CHECKING:
    from torch import Tensor

    from dfc.ir.graph import Value
    from dfc.ops.builder import Builder

INTEGERS = {"i8": (-128, 127), "u8": (0, 255)}
LARGEST = {"f8e4m3fn": 448.0, "f8e5m2": 57344.0}  # Source: arXiv 2209.05433
CODES = {DTYPES[n] for n in (*INTEGERS, *LARGEST)}


def scale_shape(
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
        fits = scale.shape == scale_shape(x.shape, self.axis, self.group)
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
        fits = scale.shape == scale_shape(q.shape, self.axis, self.group) and scale.dtype.is_float
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
