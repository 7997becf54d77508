"""torch's size symbols, and values that hold them, under dfc's names and types."""

from __future__ import annotations

from typing import Any

import torch

from dfc.errors import DfcError
from dfc.ir.expr import Scalar, symbol
from dfc.ir.types import BOOL, FLOAT, INT, NONE, TensorType, Type, dtype_of
from dfc.ops.symbolic import from_sympy


class Names:
    """torch's size symbols under dfc's names, the same for every run."""

    def __init__(self) -> None:
        self.known: dict[Any, Scalar] = {}
        self.ranges: dict[str, tuple[int, int | None]] = {}
        # where in memory a slice begins: torch checks it, and values of a graph have no such place
        self.places: set[str] = set()
        self._next: dict[str, int] = {}

    def add(self, sympy_symbol: Any, name: str) -> None:
        self.known[sympy_symbol] = symbol(name)

    def fresh(self, prefix: str) -> str:
        n = self._next.get(prefix, 0)
        self._next[prefix] = n + 1
        return f"{prefix}{n}"

    def scalar(self, value: Any) -> Scalar:
        """A SymInt, SymFloat, SymBool or plain number as an expression."""
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            node = value.node
            return from_sympy(node.expr if hasattr(node, "expr") else node._expr, self.known)
        assert isinstance(value, (bool, int, float)), value
        return value

    def type_of(self, value: Any) -> Type:
        if value is None:
            return NONE
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided:
                raise DfcError("T021", f"tensors of layout {value.layout} are not supported")
            shape = tuple(self.scalar(s) for s in value.shape)
            return TensorType(dtype_of(value.dtype), shape)  # type: ignore[arg-type]
        if isinstance(value, (bool, torch.SymBool)):
            return BOOL
        if isinstance(value, (int, torch.SymInt)):
            return INT
        if isinstance(value, (float, torch.SymFloat)):
            return FLOAT
        raise DfcError("T021", f"a value of type {type(value).__name__} has no place in a graph")
