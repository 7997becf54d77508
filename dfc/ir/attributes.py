"""What a node is told besides its operands: an immutable mapping, compared by type and bits."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dfc.ir.expr import Expr, symbols
from dfc.ir.types import DType


class Attributes(Mapping[str, Any]):
    """An immutable mapping compared by type and bits: 1, 1.0 and True differ, as do 0.0, -0.0."""

    __slots__ = ("_hash", "_items", "_key", "_symbols")

    def __init__(self, items: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> None:
        self._items: dict[str, Any] = {k: _frozen(v) for k, v in dict(items).items()}
        self._key = tuple((k, attribute_key(v)) for k, v in self._items.items())
        self._hash = hash(self._key)
        self._symbols: frozenset[str] | None = None

    @property
    def symbols(self) -> frozenset[str]:
        """The sizes that occur in the values."""
        if self._symbols is None:
            self._symbols = frozenset().union(*map(_attribute_symbols, self._items.values()))
        return self._symbols

    def __getitem__(self, name: str) -> Any:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Attributes) and self._key == other._key

    def with_(self, **changes: Any) -> Attributes:
        return Attributes({**self._items, **changes})

    def __repr__(self) -> str:
        return repr(self._items)


NO_ATTRIBUTES = Attributes()


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def attribute_key(value: Any) -> object:
    """A hashable stand-in that is equal only for the same type and bits."""
    if isinstance(value, bool) or value is None:
        return value, "b"
    if isinstance(value, int):
        return value, "i"
    if isinstance(value, float):
        return struct.pack("<d", value), "f"
    if isinstance(value, complex):
        return struct.pack("<dd", value.real, value.imag), "c"
    if isinstance(value, tuple):
        return tuple(map(attribute_key, value))
    if isinstance(value, (str, DType)):
        return type(value).__name__, str(value)
    if isinstance(value, Expr):
        return value
    raise TypeError(f"an attribute cannot be a {type(value).__name__}")


def _attribute_symbols(value: Any) -> frozenset[str]:
    if isinstance(value, tuple):
        return frozenset().union(*map(_attribute_symbols, value))
    return symbols(value)
