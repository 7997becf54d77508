"""Where translations are found: op name to function, once for reals and once for complex.

A translation takes the builder and the op's arguments that it names: operands as ONNX values,
attributes as they are. Its first parameter after the builder, called `x`, is the first operand.
It returns the results, or raises `NoTranslation` to let torchlib or a decomposition have a go.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """A translation and the names of the arguments that it wants."""

    function: Callable[..., Any]
    wants: tuple[str, ...]


REAL: dict[str, Entry] = {}
COMPLEX: dict[str, Entry] = {}


REFUSED: dict[str, str] = {}  # ops that no ONNX model can express, and why


def translates(*ops: str, complex: bool = False) -> Callable[[F], F]:
    """Decorator: this function translates these ops, `aten.` left out."""

    def register(function: F) -> F:
        wants = tuple(list(inspect.signature(function).parameters)[1:])
        for op in ops:
            named = op.startswith(("aten.", "torch.", "prims.", "dfc.", "transformers."))
            full = op if named else f"aten.{op}"
            if full.startswith(("aten.", "transformers.")) and full.count(".") == 1:
                full += ".default"
            table = COMPLEX if complex else REAL
            assert full not in table, f"{full} has two translations"
            table[full] = Entry(function, wants)
        return function

    return register
