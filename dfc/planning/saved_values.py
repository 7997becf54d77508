"""What the backward pass of each operator reads, by rules of its name: nothing is differentiated.

Operators that no rule names are taken to keep all that they read and make. What a view shows is
kept whole, once. Masks and statistics that only a backward pass reads are counted in bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass

from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.types import TensorType
from dfc.planning.cost import Sizes, bytes_of, number, work_of
from dfc.planning.rematerialize import fewest_kept, is_cheap, shown

_NAMES = {
    "nothing": "add sub rsub neg sum mean cat stack pad constant_pad_nd to _to_copy clone "
               "contiguous repeat flip roll cumsum type_as avg_pool1d avg_pool2d "
               "adaptive_avg_pool2d dropout tril triu",
    "others": "mul linear matmul mm bmm mv addmm baddbmm dot convolution conv1d conv2d conv3d "
              "conv_transpose1d conv_transpose2d conv_transpose3d div",
    "operands": "pow square log abs sin cos gelu silu mish hardswish elu leaky_relu softplus "
                "layer_norm native_layer_norm group_norm native_group_norm batch_norm "
                "instance_norm cross_entropy_loss erf clamp",
    "results": "relu sigmoid tanh exp sqrt rsqrt softmax _softmax log_softmax _log_softmax",
    "indices": "embedding index_select gather index masked_fill where",
}  # fmt: skip
_RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}
_STATISTICS = {"layer_norm": 2, "native_layer_norm": 2, "scaled_dot_product_attention": 1}


@dataclass(frozen=True)
class Saved:
    """What one operator's backward pass reads: values, views as what they show, and bytes of its
    own."""

    values: tuple[Value, ...]
    own: float


@dataclass(frozen=True)
class Kept:
    """What a stage keeps that recomputes selectively, in bytes, what cheap operators make again,
    and these."""

    kept: float
    remade: float
    again: frozenset[Node]


def saved_values(graph: Graph, sizes: Sizes) -> dict[Node, Saved]:
    """What the backward pass of each node reads; the caller's inputs and weights are not kept."""
    differs: set[Value] = {p for p in graph.parameters.values() if p.kind == "parameter"}
    found = {}
    for node in graph.nodes:
        if not any(v in differs for v in node.operands):
            continue
        floats = [r for r in node.results if _has_derivative(r)]
        differs.update(floats)
        if floats:
            read = dict.fromkeys(map(shown, _read(node, differs)))
            values = (v for v in read if v.node is not None and not isinstance(v, Parameter))
            found[node] = Saved(tuple(values), _own(node, sizes))
    return found


def kept_selectively(
    nodes: Sequence[Node], saved: Mapping[Node, Saved], counted: Collection[Value], sizes: Sizes
) -> Kept:
    """What of the saved values of a stage is kept, in the fewest bytes, and what is made again.

    `counted` are the values that this stage keeps where it keeps all; bytes are of these.
    """
    inside = frozenset(nodes)
    wanted = [v for n in nodes if n in saved for v in saved[n].values]
    kept = kept_values(nodes, saved, sizes)
    again: set[Node] = set()
    todo = [v for v in wanted if v not in kept]
    while todo:
        value = todo.pop()
        if value.node in inside and value.node not in again and shown(value) not in kept:
            again.add(value.node)
            todo += value.node.operands
    own = {n: saved[n].own for n in inside if n in saved}
    dear = sum(x for n, x in own.items() if not is_cheap(n))
    return Kept(
        sum(bytes_of(v, sizes) for v in kept) + dear,
        sum(bytes_of(v, sizes) for v in counted if v not in kept) + sum(own.values()) - dear,
        frozenset(again),
    )


def kept_values(
    nodes: Sequence[Node], saved: Mapping[Node, Saved], sizes: Sizes
) -> frozenset[Value]:
    """The values of the fewest bytes from which cheap operators of these nodes make the others."""
    inside = frozenset(nodes)
    wanted = dict.fromkeys(v for n in nodes if n in saved for v in saved[n].values)
    inputs = {v for n in nodes for v in n.operands if v.node is None}
    return frozenset(shown(v) for v in fewest_kept([*wanted], inputs, sizes, inside))


def _read(node: Node, differs: Set[Value]) -> list[Value]:
    operands = list(node.operands)
    name = node.op.split(".")[1] if node.op.startswith("aten.") else node.op
    rule = _RULES.get(name, "all")
    if rule == "nothing" or all(shown(r) is not r for r in node.results):
        return []
    if rule == "others":  # of a product each factor whose other factor has a gradient
        others = (operands[:i] + operands[i + 1 :] for i in range(len(operands)))
        return [v for v, rest in zip(operands, others, strict=True) if differs & {*rest}]
    if rule == "indices":
        return [v for v in operands if not _has_derivative(v)]
    if rule == "operands":
        return [v for v in operands if _has_derivative(v)]
    return [*(operands if rule == "all" else ()), *node.results]


def _own(node: Node, sizes: Sizes) -> float:
    """Bytes of a mask, or of a number or two for each row."""
    name = node.op.split(".")[1] if node.op.startswith("aten.") else node.op
    made = node.results[0]
    if name == "dropout" and work_of(node, sizes).bytes:
        return bytes_of(made, sizes)
    rows = _STATISTICS.get(name, 0)
    if not rows or not isinstance(made.type, TensorType) or not made.type.shape:
        return 0.0
    return rows * bytes_of(made, sizes) / max(number(made.type.shape[-1], sizes), 1.0)


def _has_derivative(value: Value) -> bool:
    return isinstance(value.type, TensorType) and value.type.dtype.has_derivative
