"""The values of an edge as one block of bytes, and back as they were, memory layout included.

A block starts with 64-bit words: sizes and memory order of each tensor, the number itself of each
scalar. Tensors follow, aligned as PyTorch aligns them, so that kernels see the same memory on
either side and results are the same to the bit.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

from dfc.ir.types import NoneType, ScalarType, TensorType, Type

if TYPE_CHECKING:
    import torch

_ALIGN = 64
_PADDING = memoryview(bytes(_ALIGN))


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

    def message(self, values: Sequence[Any]) -> Message:
        """The values, for a link to send: as they lie, where that is how the other end gets them.

        Needs:   nobody writes to them until they are sent.
        """
        plain = self._plain
        if plain is not None and plain.fits(values) and not plain.lazy(values):
            return Message(plain.parts(values), plain.nbytes, values, plain)
        block = self._packed(values)
        return Message([memory_of(block)], block.nbytes, [block])

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

        words, orders = self._heads(values)
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

    def _heads(self, values: Sequence[Any]) -> tuple[list[int], list[list[int]]]:
        """The words that a block starts with, and the memory order of each value."""
        words: list[int] = []
        orders = []
        for t, x in zip(self.types, values, strict=True):
            order = memory_order(x) if isinstance(t, TensorType) else []
            orders.append(order)
            words += _header(t, x, order)
        return words, orders

    @property
    def head_bytes(self) -> int:
        """What a head takes."""
        return 8 * max(self.words, 1)

    def head(self, values: Sequence[Any]) -> Message:
        """All but the tensors' own bytes, which go another way."""
        import torch

        block = torch.tensor(self._heads(values)[0] or [0], dtype=torch.int64).view(torch.uint8)
        return Message([memory_of(block)], block.nbytes, [block])

    def placed(self, head: torch.Tensor, block_of: Callable[[int], torch.Tensor]) -> list[Any]:
        """The values of a head; tensors lie in blocks that `block_of` brings, in their order."""

        def lying(dtype: torch.dtype, sizes: Sequence[int], order: Sequence[int]) -> torch.Tensor:
            count = prod(n for n, place in zip(sizes, order, strict=True) if place >= 0)
            full = count if all(sizes) else 0
            return _laid(block_of(full * dtype.itemsize), 0, dtype, sizes, order)

        return self._values(head, lying)

    def unpack(self, block: torch.Tensor) -> list[Any]:
        """The values of a block; tensors share its memory."""
        plain = self._plain
        if plain is not None and plain.heads(block):
            return plain.views(block)
        return self._unpacked(block)

    def _unpacked(self, block: torch.Tensor) -> list[Any]:
        at = _aligned(8 * self.words)

        def lying(dtype: torch.dtype, sizes: Sequence[int], order: Sequence[int]) -> torch.Tensor:
            nonlocal at
            x = _laid(block, at, dtype, sizes, order)
            at += _aligned(x.nbytes)
            return x

        return self._values(block, lying)

    def _values(self, head: torch.Tensor, lying: Callable[..., torch.Tensor]) -> list[Any]:
        import torch

        words = head[: 8 * self.words].view(torch.int64).tolist()
        values: list[Any] = []
        word = 0
        for t in self.types:
            if isinstance(t, TensorType):
                sizes = words[word : word + t.rank]
                order = words[word + t.rank : word + 2 * t.rank]
                values.append(lying(t.dtype.to_torch(), sizes, order))
            else:
                values.append(_number(t, words[word]) if isinstance(t, ScalarType) else None)
            word += _words(t)
        return values


def memory_of(x: torch.Tensor) -> memoryview:
    """The bytes of a tensor that lies in one piece on this processor.

    Needs:   whoever uses them holds the tensor.
    Why:     after a stage has emptied the caches, every call of PyTorch or numpy is ten to forty
             microseconds: this is one.
    """
    return memoryview((ctypes.c_char * x.nbytes).from_address(x.data_ptr()))


@dataclass
class Message:
    """Values under way: the parts of a block, which lie where the values are, or the block."""

    parts: list[memoryview]
    nbytes: int
    values: Sequence[Any]  # whose memory it is
    plain: _Plain | None = None

    def block(self) -> torch.Tensor:
        found: torch.Tensor = self.plain.pack(self.values) if self.plain else self.values[0]
        return found


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
        self.nbytes = max(nbytes, 8)
        self._sizes = [_bytes(t) for t in types]
        self._lazy = any(t.dtype.is_complex or not t.rank for t in types)
        self._header = struct.pack(f"<{len(words)}q", *words)
        self._first = memoryview(self._header.ljust(_aligned(len(self._header)), b"\0"))

    def fits(self, values: Sequence[torch.Tensor]) -> bool:
        return all(
            x.stride() == lying.stride and x.shape == lying.shape and x.dtype == lying.dtype
            for x, lying in zip(values, self._tensors, strict=True)
        )

    def lazy(self, values: Sequence[torch.Tensor]) -> bool:
        """Whether the memory of any holds other numbers than it has: what is real and negated
        lies in no such order, but for a single number."""
        return self._lazy and any(x.is_conj() or x.is_neg() for x in values)

    def heads(self, block: torch.Tensor) -> bool:
        """Whether a block begins as such a one does."""
        size = len(self._header)
        return (
            block.nbytes == self.nbytes
            and ctypes.string_at(block.data_ptr(), size) == self._header
        )  # fmt: skip

    def pack(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        block = torch.empty(self.nbytes, dtype=torch.uint8)
        ctypes.memmove(block.data_ptr(), self._header, len(self._header))
        for x, there in zip(values, self.views(block), strict=True):
            there.copy_(x)
        return block

    def parts(self, values: Sequence[torch.Tensor]) -> list[memoryview]:
        """The block, byte by byte, without making it.

        Why:  a copy to memory that is in no cache takes as long as the system's own two.
        """
        found = [self._first]
        for x, size in zip(values, self._sizes, strict=True):
            if size:
                found.append(memory_of(x))
            if size % _ALIGN:
                found.append(_PADDING[: -size % _ALIGN])
        if self.nbytes == 8:  # nothing at all
            found.append(_PADDING[:8])
        return found

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


def bytes_of(x: torch.Tensor) -> torch.Tensor:
    """A tensor's elements in the order of its memory, repeated ones once, as bytes where it is."""
    import torch

    order = memory_order(x)
    dims = sorted(range(x.dim()), key=lambda d: order[d])
    return _once(x, order).permute(dims).contiguous().reshape(-1).view(torch.uint8)


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
