"""Which constants make the channels of a value, so that a scale can be folded into them.

`x / s` for each channel is free where the last thing that makes x multiplies by a constant: the
weight of a norm, or the rows of a linear layer. The walk back goes through what keeps channels
apart and is linear in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.compress.weights import forget
from dfc.ir.graph import Graph, Node, Parameter, Value

if TYPE_CHECKING:
    from torch import Tensor

# Keep channels apart, and commute with a positive factor.
_THROUGH = frozenset({
    "aten.clone.default", "aten.contiguous.default", "aten.dropout.default", "aten.relu.default",
    "aten.leaky_relu.default", "aten._to_copy.default", "aten.alias.default", "aten.abs.default",
    "aten.neg.default", "aten.mul.Scalar", "aten.div.Scalar",
})  # fmt: skip
# op -> which operands hold a number for each channel of the result: they come last in it
_NORMS = {
    "aten.layer_norm.default": (1, 2),
    "aten.rms_norm.default": (1,),
    "aten.native_layer_norm.default": (1, 2),
    "aten.group_norm.default": (),
    "dfc.skip_layer_norm": (2, 3),
    "dfc.skip_rms_norm": (2,),
}


@dataclass(frozen=True)
class Producer:
    """The constants that a value's channels are linear in: each is divided along its first or last
    dimension, whichever counts the channels."""

    node: Node
    operands: tuple[int, ...]
    dim: int  # 0: rows of a linear layer; -1: numbers of a norm

    @property
    def constants(self) -> tuple[Parameter, ...]:
        found = [self.node.inputs[i] for i in self.operands]
        return tuple(p for p in found if isinstance(p, Parameter))


def producer_of(graph: Graph, x: Value, readers: Sequence[Node]) -> Producer | str:
    """What makes a value that only these nodes read, or why a scale cannot be folded into it."""
    others = [n for n in x.users if n not in readers]
    if others:
        return f"%{x.name} is read by %{_name(others[0])} as well"
    return _walk(graph, x)


def _walk(graph: Graph, x: Value) -> Producer | str:
    """Needs:  whoever reads x wants it divided."""
    node = x.node
    if node is None:
        return f"%{x.name} is the graph's own input"
    if graph.is_output(x):
        return f"%{x.name} is an output"
    if node.op == "aten.linear.default":
        return _made(graph, Producer(node, (1, 2), 0))
    if node.op in _NORMS:
        made = _made(graph, Producer(node, _NORMS[node.op], -1))
        return made if _NORMS[node.op] else f"%{x.name} is made by {node.op}"
    if node.op == "aten.mul.Tensor":
        return _product(graph, node)
    if node.op in _THROUGH:
        source = node.inputs[0]
        assert isinstance(source, Value)
        if not source.tensor_type.dtype.is_float or not x.tensor_type.dtype.is_float:
            return f"%{x.name} is made from {source.tensor_type.dtype}"
        return _only_reader(graph, source, node)
    return f"%{x.name} is made by {node.op}, no norm or linear layer"


def _product(graph: Graph, node: Node) -> Producer | str:
    """A constant for each channel, or the first factor that can take the scale."""
    width = node.result.tensor_type.shape[-1]
    reasons = []
    for i, v in enumerate(node.inputs):
        if isinstance(v, Parameter):
            sizes = v.tensor_type.shape
            if sizes and sizes[-1] == width and all(n == 1 for n in sizes[:-1]):
                return _made(graph, Producer(node, (i,), -1))
    for v in node.inputs:
        if isinstance(v, Value) and not isinstance(v, Parameter):
            if v.tensor_type.shape[-1:] != (width,):
                continue
            found = _only_reader(graph, v, node)
            if isinstance(found, Producer):
                return found
            reasons.append(found)
    return reasons[0] if reasons else f"%{node.result.name} is a product of no channels"


def _only_reader(graph: Graph, x: Value, reader: Node) -> Producer | str:
    if x.use_count != 1:
        other = next((n for n in x.users if n is not reader), reader)
        return f"%{x.name} is read by %{_name(other)} as well"
    return _walk(graph, x)


def _made(graph: Graph, found: Producer) -> Producer | str:
    """The producer, if its constants are there to be changed."""
    node = found.node
    written = {m.target for m in graph.mutations}
    for i in found.operands:
        p = node.inputs[i] if i < len(node.inputs) else None
        if p is None:
            continue
        if not isinstance(p, Parameter):
            return f"%{getattr(p, 'name', p)} of {node.op} is computed, not a constant"
        if p.data is None:
            return f"!{p.name} has no numbers: the model has no weights"
        if p in written:
            return f"the model writes to !{p.name}"
        other = next((n for n in p.users if n is not node), None)
        if other is not None and p.tensor_type.rank > 1:
            return f"!{p.name} is read by %{_name(other)} as well, and would be stored twice"
    return found if found.constants else f"%{_name(node)} ({node.op}) has no weight"


def _name(node: Node) -> str:
    return node.results[0].name if node.results else node.op


Change = Callable[["Tensor"], "Tensor"]


def change_constant(graph: Graph, node: Node, operand: int, wish: str, change: Change) -> None:
    """Let a node read a changed copy of a constant, computed in float64 and rounded once.

    What else reads the constant keeps the old one; without anybody it is dropped.
    """
    p = node.inputs[operand]
    assert isinstance(p, Parameter) and p.data is not None
    old = p.data.tensor()
    made = graph.add_constant(f"{p.name}.{wish}", change(old.double()).to(old.dtype))
    inputs = list(node.inputs)
    inputs[operand] = made
    graph.set_inputs_of(node, inputs)
    forget(graph, p)


def divide(graph: Graph, producer: Producer, scale: Tensor, wish: str) -> None:
    """Divide what a producer makes by a number for each channel."""
    for i in producer.operands:
        p = producer.node.inputs[i] if i < len(producer.node.inputs) else None
        if p is None:
            continue
        assert isinstance(p, Parameter)
        rows = producer.dim == 0
        shape = (-1, *[1] * (p.tensor_type.rank - 1)) if rows else (-1,)
        s = scale.double().reshape(shape)
        change_constant(graph, producer.node, i, wish, lambda t, s=s: t / s)  # type: ignore[misc]
