"""What a value is: a tensor of a dtype and a symbolic shape, a scalar, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dfc.ir.expr import Scalar, Size, evaluate, symbols

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DType:
    """An element type: its short name, torch's name and its width.

    Units:  bits per element.
    """

    name: str
    torch_name: str
    bits: int
    kind: str  # "float", "complex", "int", "uint" or "bool"

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_complex(self) -> bool:
        return self.kind == "complex"

    @property
    def has_derivative(self) -> bool:
        return self.is_float or self.is_complex

    @property
    def is_integer(self) -> bool:
        return self.kind in ("int", "uint")

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.bits // 8

    def to_torch(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.torch_name)
        return dtype

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return self.name


DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        DType("f16", "float16", 16, "float"),
        DType("bf16", "bfloat16", 16, "float"),
        DType("f32", "float32", 32, "float"),
        DType("f64", "float64", 64, "float"),
        DType("f8e4m3fn", "float8_e4m3fn", 8, "float"),
        DType("f8e5m2", "float8_e5m2", 8, "float"),
        DType("f8e4m3fnuz", "float8_e4m3fnuz", 8, "float"),
        DType("f8e5m2fnuz", "float8_e5m2fnuz", 8, "float"),
        DType("c32", "complex32", 32, "complex"),
        DType("c64", "complex64", 64, "complex"),
        DType("c128", "complex128", 128, "complex"),
        DType("i8", "int8", 8, "int"),
        DType("i16", "int16", 16, "int"),
        DType("i32", "int32", 32, "int"),
        DType("i64", "int64", 64, "int"),
        DType("u8", "uint8", 8, "uint"),
        DType("u16", "uint16", 16, "uint"),
        DType("u32", "uint32", 32, "uint"),
        DType("u64", "uint64", 64, "uint"),
        DType("bool", "bool", 8, "bool"),
    )
}
_BY_TORCH_NAME = {d.torch_name: d for d in DTYPES.values()}


def dtype_of(dtype: torch.dtype) -> DType:
    """The element type of a torch dtype.

    Raises:  KeyError for a dtype that dfc has no name for (quantized torch dtypes).
    """
    return _BY_TORCH_NAME[str(dtype).removeprefix("torch.")]


@dataclass(frozen=True)
class TensorType:
    """`f32[B, 2*S]`: a dense tensor. Layout in memory is not part of the type."""

    dtype: DType
    shape: tuple[Size, ...]

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorType:
        """The type of a concrete tensor."""
        return TensorType(dtype_of(tensor.dtype), tuple(int(s) for s in tensor.shape))

    @property
    def rank(self) -> int:
        return len(self.shape)

    @cached_property
    def is_static(self) -> bool:
        return all(isinstance(s, int) for s in self.shape)

    @property
    def numel(self) -> Size:
        """Elements, as an expression where sizes are symbolic."""
        total: Size = 1
        for size in self.shape:
            total = total * size
        return total

    @property
    def nbytes(self) -> Size:
        """Bytes of all elements, as an expression where sizes are symbolic."""
        return self.numel * self.dtype.itemsize

    @cached_property
    def symbols(self) -> frozenset[str]:
        return frozenset().union(*(symbols(s) for s in self.shape))

    def with_shape(self, shape: Sequence[Size]) -> TensorType:
        return TensorType(self.dtype, tuple(shape))

    def with_dtype(self, dtype: DType) -> TensorType:
        return TensorType(dtype, self.shape)

    def substitute(self, bindings: Mapping[str, Scalar]) -> TensorType:
        """The type with symbols replaced."""
        if self.is_static:
            return self
        shape: Any = tuple(evaluate(s, bindings) for s in self.shape)
        return TensorType(self.dtype, shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    __repr__ = __str__


@dataclass(frozen=True)
class ScalarType:
    """`int`, `float` or `bool`: a number that only running the graph tells."""

    name: str

    @property
    def symbols(self) -> frozenset[str]:
        return frozenset()

    def substitute(self, bindings: Mapping[str, Scalar]) -> ScalarType:
        return self

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__


@dataclass(frozen=True)
class NoneType:
    """`none`: an optional result that an op did not produce."""

    @property
    def symbols(self) -> frozenset[str]:
        return frozenset()

    def substitute(self, bindings: Mapping[str, Scalar]) -> NoneType:
        return self

    def __str__(self) -> str:
        return "none"

    __repr__ = __str__


INT, FLOAT, BOOL, NONE = ScalarType("int"), ScalarType("float"), ScalarType("bool"), NoneType()
Type = TensorType | ScalarType | NoneType


def total_bytes(*types: TensorType | None) -> Size:
    """Bytes of several tensors; those that are absent have none."""
    total: Size = 0
    for t in types:
        if t is not None:
            total = total + t.nbytes
    return total
