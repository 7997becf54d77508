"""Control flow: ops that hold nested graphs. Their meaning is the nested graph, interpreted.

torch.cond        predicate, then *operands           graphs: then, else
torch.while_loop  *carried, *additional               graphs: condition, body   attribute carried
torch.scan        *init, *xs, *additional             graphs: combine           attributes init, xs
torch.map         *xs, *additional                    graphs: body              attribute xs

torch.scalar      a size expression as a value, for the operands of the above
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfc.ir.expr import Expr
from dfc.ir.graph import Node
from dfc.ir.op import Attribute, Operand, OpInfo, register_namespace
from dfc.ir.types import BOOL, FLOAT, INT, TensorType, Type


@dataclass(frozen=True)
class ControlFlowOp:
    """An op whose results come from running nested graphs."""

    name: str
    attributes: tuple[Attribute, ...] = ()
    operands: tuple[Operand, ...] = (Operand("operands", variadic=True),)

    def is_pure(self, attributes: Mapping[str, Any]) -> bool:
        return False  # a nested graph may draw random numbers or assert: ask `node.graphs`

    def has_effect(self, attributes: Mapping[str, Any]) -> bool:
        return False

    def infer(self, node: Node) -> tuple[Type, ...]:
        inner = node.graphs[-1 if self.name != "torch.cond" else 0]
        types = tuple(v.type for v in inner.outputs)
        if self.name == "torch.map":
            return tuple(_stacked(t, _length(node, 0)) for t in types)
        if self.name == "torch.scan":
            init = node.attributes["init"]
            length = _length(node, init)
            return (*types[:init], *(_stacked(t, length) for t in types[init:]))
        return types

    def run(
        self, operands: Sequence[Any], attributes: Mapping[str, Any], device: str = "cpu"
    ) -> tuple[Any, ...]:
        raise AssertionError("control flow is run by the interpreter, which sees nested graphs")


def _length(node: Node, index: int) -> Any:
    return list(node.operands)[index].tensor_type.shape[0]


def _stacked(t: Type, length: Any) -> Type:
    assert isinstance(t, TensorType)
    return t.with_shape((length, *t.shape))


@dataclass(frozen=True)
class ScalarOp:
    """`torch.scalar(value=B + 1)`: a number that follows from sizes, as a value."""

    name: str = "torch.scalar"
    attributes: tuple[Attribute, ...] = (Attribute("value"),)
    operands: tuple[Operand, ...] = ()

    def is_pure(self, attributes: Mapping[str, Any]) -> bool:
        return True

    def has_effect(self, attributes: Mapping[str, Any]) -> bool:
        return False

    def infer(self, node: Node) -> tuple[Type, ...]:
        value = node.attributes["value"]
        kind = value.kind if isinstance(value, Expr) else type(value).__name__
        return ({"int": INT, "float": FLOAT, "bool": BOOL}[kind],)

    def run(
        self, operands: Sequence[Any], attributes: Mapping[str, Any], device: str = "cpu"
    ) -> tuple[Any, ...]:
        return (attributes["value"],)


_OPS: dict[str, OpInfo] = {
    op.name: op
    for op in (
        ScalarOp(),
        ControlFlowOp("torch.cond"),
        ControlFlowOp("torch.while_loop", (Attribute("carried"),)),
        ControlFlowOp("torch.scan", (Attribute("init"), Attribute("xs"), Attribute("reverse"))),
        ControlFlowOp("torch.map", (Attribute("xs"),)),
    )
}


def _resolve(name: str) -> OpInfo | None:
    return _OPS.get(name)


register_namespace("torch", _resolve, lambda: sorted(_OPS))
