"""What a graph takes to run, before it is run: multiply-adds, and bytes of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfc.ir.expr import Size, evaluate
from dfc.ir.graph import Graph, Node
from dfc.ir.interpret import bind_inputs
from dfc.ir.types import TensorType

_SEEN = 128  # a size that nothing tells


@dataclass(frozen=True)
class Work:
    """Multiply-adds of one call, and bytes of the weights that it reads."""

    macs: int
    weight_bytes: int

    def __str__(self) -> str:
        return f"{self.macs / 1e6:.4g} M multiply-adds, {self.weight_bytes / 1e6:.4g} MB of weights"


def work_of(graph: Graph, examples: Sequence[Sequence[Any]] = ()) -> Work:
    """What a call takes, at the sizes of the first example; open sizes are 1 or 128 without one."""
    sizes = _sizes(graph, examples)
    total: Size = 0
    for node in graph.nodes:
        total = total + macs_of(node)
    found = evaluate(total, sizes)
    weights = sum(p.tensor_type.nbytes for p in graph.parameters.values() if p.use_count)
    return Work(int(found), int(weights))  # type: ignore[arg-type]


def _sizes(graph: Graph, examples: Sequence[Sequence[Any]]) -> Mapping[str, Any]:
    known = bind_inputs(graph, examples[0]) if examples else {}
    sizes: dict[str, Any] = {}
    names = {s for n in graph.nodes for r in n.results for s in r.type.symbols}
    names |= {s for v in graph.inputs for s in v.type.symbols}
    for at, name in enumerate(sorted(names | set(graph.ranges))):
        low, high = graph.ranges.get(name, (1, None))
        guess = max(low, 1 if at == 0 else _SEEN)
        sizes[name] = known.get(name, guess if high is None else min(guess, high))
    return sizes


def macs_of(node: Node) -> Size:
    """Multiply-adds of products of matrices and convolutions; other ops have none that count."""
    op = node.op.split(".")[1] if node.op.startswith("aten.") else node.op
    rule = _RULES.get(op)
    return rule(node) if rule is not None else 0


def _type(node: Node, i: int) -> TensorType:
    x = node.inputs[i]
    assert x is not None and not isinstance(x, tuple)
    return x.tensor_type


def _linear(node: Node) -> Size:
    return _type(node, 0).numel * _type(node, 1).shape[0]


def _product(node: Node, i: int = 0) -> Size:
    return node.result.tensor_type.numel * _type(node, i).shape[-1]


def _each(weight: TensorType) -> Size:
    """Elements for each index of the first dimension."""
    return weight.with_shape(weight.shape[1:]).numel


def _conv(node: Node) -> Size:
    weight = _type(node, 1)
    if node.attributes.get("transposed", False) or "transpose" in node.op:
        return _type(node, 0).numel * _each(weight)
    return node.result.tensor_type.numel * _each(weight)


def _attention(node: Node) -> Size:
    q, k, v = (_type(node, i) for i in range(3))
    return q.numel * k.shape[-2] + node.result.tensor_type.numel * v.shape[-2]


_RULES = {
    "linear": _linear,
    "dfc.linear_gelu": _linear,
    "matmul": _product, "mm": _product, "bmm": _product, "mv": _product,
    "addmm": lambda node: _product(node, 1), "baddbmm": lambda node: _product(node, 1),
    "conv1d": _conv, "conv2d": _conv, "conv3d": _conv, "convolution": _conv,
    "conv_transpose1d": _conv, "conv_transpose2d": _conv, "conv_transpose3d": _conv,
    "scaled_dot_product_attention": _attention,
    "dfc.multi_head_attention": _attention,
}  # fmt: skip
