"""Whether sums may overflow on the way: then their order decides, which `within` leaves open.

`3e38 + 3e38 - 3e38` is 3e38 or infinity. A product of matrices adds in an order that follows from
its sizes, so that two right ways to write it differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Value
from dfc.ir.interpret import interpret
from dfc.ir.types import TensorType
from dfc.ops.builder import Builder
from dfc.rewrite.deciding import base_of

_SUMS = frozenset(
    """linear matmul mm bmm mv addmm baddbmm dot einsum conv1d conv2d conv3d convolution sum mean
    avg_pool1d avg_pool2d cumsum""".split()  # noqa: SIM905
)


def order_decides(graph: Graph, inputs: Sequence[Any]) -> bool:
    """Whether a sum of the graph, taken of absolute values, is beyond what its type can hold.

    Needs:  finite inputs.
    """
    import torch

    bound = graph.copy()
    sums = [n for n in bound.nodes if base_of(n.op) in _SUMS and _float(n.results[0])]
    for node in sums:
        bound.set_inputs_of(node, [_sized(bound, node, x) for x in node.inputs])
    beyond = False

    def watch(node: Node, results: Sequence[Any]) -> None:
        nonlocal beyond
        if node in sums:
            limit = torch.finfo(node.result.tensor_type.dtype.to_torch()).max
            beyond = beyond or not bool((results[0].abs() <= limit).all())

    try:
        interpret(bound, list(inputs), double=True, observe=watch)
    except DfcError:
        return False
    return beyond


def _sized(graph: Graph, node: Node, x: Any) -> Any:
    """The absolute value of a float operand."""
    if isinstance(x, tuple):
        return tuple(_sized(graph, node, v) for v in x)
    if not isinstance(x, Value) or not _float(x):
        return x
    return Builder(graph, node)("aten.abs.default", x)


def _float(x: Value) -> bool:
    return isinstance(x.type, TensorType) and x.type.dtype.is_float
