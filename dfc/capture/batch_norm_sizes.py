"""Sizes that batch norm in training needs: of one value a channel there is no variance."""

from __future__ import annotations

from math import prod

from dfc.ir.expr import Expr, Scalar, call, evaluate, symbols
from dfc.ir.graph import Graph, Value

_TRAINED = "aten._native_batch_norm_legit"  # with buffers, functional; without: `no_stats`


def need_several_values(graph: Graph) -> None:
    """Leave sizes alone with which each channel has several values, as PyTorch insists on.

    Why:  what torch.export says of it looks like its assumption that no size is 1, which probes
          settle; the variance of one value is no number, and would be written to the buffers.
    """
    for node in graph.walk():
        x = node.inputs[0] if node.inputs else None
        if not node.op.startswith(_TRAINED) or not node.attributes.get("training"):
            continue
        assert isinstance(x, Value)
        count = prod(s for i, s in enumerate(x.tensor_type.shape) if i != 1)
        ranges = {name: graph.ranges.get(name, (2, None)) for name in symbols(count)}
        least = evaluate(count, {name: max(low, 1) for name, (low, _) in ranges.items()})
        assert isinstance(least, int)
        if least > 1 or not isinstance(count, Expr):
            continue
        name = count.symbol
        if name is None:
            _require(graph, call("lt", 1, count))
        else:
            graph.ranges[name] = (2, graph.ranges[name][1])
            graph.notes.append(f"`{name}` is at least 2: batch norm in training has no variance of "
                               "one value")  # fmt: skip


def _require(graph: Graph, condition: Scalar) -> None:
    if condition not in graph.requires:
        graph.requires = (*graph.requires, condition)
