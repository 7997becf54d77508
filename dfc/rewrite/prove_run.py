"""Types of results by running ops on zeros: for proofs, which write thousands of nodes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch

from dfc.ir.graph import Attributes, Node
from dfc.ir.op import lookup
from dfc.ir.types import TensorType, Type
from dfc.ops.aten import AtenOp, complete
from dfc.ops.builder import Builder
from dfc.rewrite.prove_sample import Refused


class RunBuilder(Builder):
    """Learns result types by running the op on zeros where sizes are small numbers.

    Why:  it takes a tenth of the time of a fake tensor, and a proof writes thousands of nodes.
    """

    strict = False  # whether an op that does not run is refused, without asking its type rule

    def node(self, op: str, /, *inputs: Any, **attributes: Any) -> Node:
        info = lookup(op)
        operands = [tuple(x) if isinstance(x, list | tuple) else x for x in inputs]
        operands += [None] * (len(info.operands) - len(operands))
        if not isinstance(info, AtenOp):
            return super().node(op, *operands, **attributes)
        full = complete(info, attributes)
        types = _types_by_running(op, tuple(map(_type_of, operands)), Attributes(full))
        if isinstance(types, str):
            if self.strict:
                raise Refused(types)
            types = None
        return self.graph.add(op, operands, full, types=types, before=self.before)


def _type_of(x: Any) -> Any:
    return tuple(map(_type_of, x)) if isinstance(x, tuple) else x and x.type


@lru_cache(maxsize=8192)
def _types_by_running(
    op: str, types: tuple[Any, ...], attributes: Attributes
) -> tuple[Type, ...] | str | None:
    """The result types, or why the op fails; None when sizes are symbolic or tensors large."""

    def zeros(t: Any) -> Any:
        if isinstance(t, tuple):
            return [zeros(x) for x in t]
        return None if t is None else torch.zeros(t.shape, dtype=t.dtype.to_torch())

    flat = [t for x in types for t in (x if isinstance(x, tuple) else (x,)) if t is not None]
    if attributes.symbols or not all(isinstance(t, TensorType) and t.is_static for t in flat):
        return None
    elements = math.prod(max(element_count(t), 1) for t in flat)
    if elements > _SMALL or _has_large(attributes.values()):
        return None
    try:
        with torch.no_grad():
            results = lookup(op).run([zeros(t) for t in types], attributes)
        return tuple(TensorType.of(r) for r in results)
    except (RuntimeError, IndexError, ValueError, TypeError, AttributeError) as e:
        return f"`{op}` refuses ({', '.join(map(str, flat))}): {str(e).partition(chr(10))[0]}"


_SMALL = 50_000_000  # elements of an outer product of all operands: no op gives more


def element_count(t: TensorType) -> int:
    """Elements, of symbolic sizes those that are numbers."""
    return math.prod(d for d in t.shape if isinstance(d, int))


def _has_large(values: Iterable[Any]) -> bool:
    """Whether a number is among them that could be a huge size."""
    return any(
        _has_large(v) if isinstance(v, tuple) else isinstance(v, int) and abs(v) > 4096
        for v in values
    )
