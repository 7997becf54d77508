"""The values of an edge as one block of bytes, and back as they were, memory layout included.

A block starts with 64-bit words: sizes and memory order of each tensor, the number itself of each
scalar. Tensors follow, aligned as PyTorch aligns them, so that kernels see the same memory on
either side and results are the same to the bit.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from dfc.ir.types import NoneType, ScalarType, TensorType, Type

if TYPE_CHECKING:
    import torch

_ALIGN = 64


@lru_cache(maxsize=1024)
def layout_of(types: tuple[Type, ...], sizes: tuple[tuple[str, Any], ...]) -> Layout:
    """The layout of an edge's values; equal ones are made once."""
    return Layout(types, dict(sizes))


class Layout:
    """What the values of an edge take, for one set of sizes.

    `nbytes` is None where data decide a size: then the length has to be told first.
    """

    def __init__(self, types: Sequence[Type], sizes: Mapping[str, Any]) -> None:
        self.types = tuple(t.substitute(sizes) for t in types)
        self.words = sum(_words(t) for t in self.types)
        static = all(t.is_static for t in self.types if isinstance(t, TensorType))
        self.nbytes = self.length([_bytes(t) for t in self.types]) if static else None

    def length(self, bytes_: Sequence[int]) -> int:
        return _aligned(8 * self.words) + sum(_aligned(n) for n in bytes_)

    def pack(self, values: Sequence[Any]) -> torch.Tensor:
        """One block with all values."""
        plain = self._plain
        if plain is not None and plain.fits(values):
            return plain.pack(values)
        return self._packed(values)

    @cached_property
    def _plain(self) -> _Plain | None:
        """What is known beforehand where nothing but sizes decides how values lie."""
        tensors = [t for t in self.types if isinstance(t, TensorType)]
        if self.nbytes is None or len(tensors) < len(self.types):
            return None
        return _Plain(tensors, self.nbytes)

    def _packed(self, values: Sequence[Any]) -> torch.Tensor:
        import torch

        words: list[int] = []
        orders = []
        for t, x in zip(self.types, values, strict=True):
            order = memory_order(x) if isinstance(t, TensorType) else []
            orders.append(order)
            words += _header(t, x, order)
        total = self.nbytes or self.length([getattr(x, "nbytes", 0) for x in values])
        block = torch.empty(max(total, 8), dtype=torch.uint8)
        block[: 8 * len(words)].view(torch.int64).copy_(torch.tensor(words, dtype=torch.int64))
        at = _aligned(8 * self.words)
        for t, x, order in zip(self.types, values, orders, strict=True):
            if isinstance(t, TensorType):
                once = _once(x, order)
                _laid(block, at, x.dtype, once.shape, order).copy_(once)
                at += _aligned(x.nbytes)
        return block

    def unpack(self, block: torch.Tensor) -> list[Any]:
        """The values of a block; tensors share its memory."""
        plain = self._plain
        if plain is not None and plain.heads(block):
            return plain.views(block)
        return self._unpacked(block)

    def _unpacked(self, block: torch.Tensor) -> list[Any]:
        import torch

        words = block[: 8 * self.words].view(torch.int64).tolist()
        values: list[Any] = []
        at, word = _aligned(8 * self.words), 0
        for t in self.types:
            if isinstance(t, TensorType):
                sizes = words[word : word + t.rank]
                order = words[word + t.rank : word + 2 * t.rank]
                x = _laid(block, at, t.dtype.to_torch(), sizes, order)
                at += _aligned(x.nbytes)
                values.append(x)
            else:
                values.append(_number(t, words[word]) if isinstance(t, ScalarType) else None)
            word += _words(t)
        return values


class _Plain:
    """Tensors in row-major order, of sizes that are known: the same header each time.

    Why:  reading and writing headers takes longer than small tensors do.
    """

    def __init__(self, types: Sequence[TensorType], nbytes: int) -> None:
        import torch

        words: list[int] = []
        self._tensors: list[_Lying] = []
        at = _aligned(8 * sum(_words(t) for t in types))
        for t in types:
            shape = tuple(int(n) for n in t.shape)  # type: ignore[arg-type]
            words += [*shape, *range(t.rank)]
            dtype = t.dtype.to_torch()
            stride = torch.empty(shape, device="meta").stride()
            self._tensors.append(_Lying(dtype, shape, stride, at // dtype.itemsize))
            at += _aligned(_bytes(t))
        self._nbytes = max(nbytes, 8)
        self._header = struct.pack(f"<{len(words)}q", *words)

    def fits(self, values: Sequence[torch.Tensor]) -> bool:
        return all(
            x.stride() == lying.stride and x.shape == lying.shape and x.dtype == lying.dtype
            for x, lying in zip(values, self._tensors, strict=True)
        )

    def heads(self, block: torch.Tensor) -> bool:
        """Whether a block begins as such a one does."""
        size = len(self._header)
        return block.nbytes == self._nbytes and block.numpy()[:size].tobytes() == self._header

    def pack(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        block = torch.empty(self._nbytes, dtype=torch.uint8)
        block.numpy().data[: len(self._header)] = self._header
        for x, there in zip(values, self.views(block), strict=True):
            there.copy_(x)
        return block

    def views(self, block: torch.Tensor) -> list[torch.Tensor]:
        return [block.view(t.dtype).as_strided(t.shape, t.stride, t.at) for t in self._tensors]


@dataclass(frozen=True)
class _Lying:
    """How a tensor lies in a block, from its element `at` on."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    at: int


def memory_order(x: torch.Tensor) -> list[int]:
    """The place of each dimension in memory, outermost 0; -1 for one that repeats its elements."""
    strides = x.stride()
    repeated = [s == 0 and n > 1 for s, n in zip(strides, x.shape, strict=True)]
    dims = [d for d in range(x.dim()) if not repeated[d]]
    dims.sort(key=lambda d: -strides[d])
    order = [-1] * x.dim()
    for place, d in enumerate(dims):
        order[d] = place
    return order


def _once(x: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Repeated elements once."""
    for d, place in enumerate(order):
        if place < 0:
            x = x.narrow(d, 0, 1)
    return x


def _laid(
    block: torch.Tensor, at: int, dtype: torch.dtype, sizes: Sequence[int], order: Sequence[int]
) -> torch.Tensor:
    """A tensor inside the block, with its dimensions in their order in memory."""
    held = sorted((place, d) for d, place in enumerate(order) if place >= 0)
    strides, step = [0] * len(sizes), 1
    for _, d in reversed(held):
        strides[d] = step
        step *= max(sizes[d], 1)
    count = step if all(sizes) else 0
    flat = block[at : at + count * dtype.itemsize].view(dtype)
    return flat.as_strided(list(sizes), strides)


def _header(t: Type, x: Any, order: Sequence[int]) -> list[int]:
    if isinstance(t, TensorType):
        return [*x.shape, *order]
    if isinstance(t, NoneType):
        return []
    return [struct.unpack("<q", struct.pack("<d", x))[0] if t.name == "float" else int(x)]


def _number(t: ScalarType, word: int) -> Any:
    if t.name == "float":
        return struct.unpack("<d", struct.pack("<q", word))[0]
    return bool(word) if t.name == "bool" else word


def _words(t: Type) -> int:
    return 2 * t.rank if isinstance(t, TensorType) else int(isinstance(t, ScalarType))


def _bytes(t: Type) -> int:
    return int(t.nbytes) if isinstance(t, TensorType) else 0  # type: ignore[arg-type]


def _aligned(n: int) -> int:
    return -(-n // _ALIGN) * _ALIGN
