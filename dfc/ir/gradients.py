"""Whether derivatives flow through a value: where a stop of the gradient has to stay in a graph."""

from __future__ import annotations

from dfc.ir.graph import Parameter, Value
from dfc.ir.types import TensorType


def carries_gradient(value: Value) -> bool:
    """Whether a float parameter of the model reaches the value through floats alone.

    Cost:    one walk backwards; for the few values whose gradient the model stops.
    """
    seen: set[Value] = set()
    todo = [value]
    while todo:
        v = todo.pop()
        if v in seen or not isinstance(v.type, TensorType) or not v.type.dtype.is_float:
            continue
        seen.add(v)
        if isinstance(v, Parameter):
            if v.kind == "parameter":
                return True
        elif v.node is not None and v.node.op != "aten.detach.default":
            todo += v.node.operands
    return False
