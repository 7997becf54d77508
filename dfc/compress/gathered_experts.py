"""Experts whose weights are gathered for each row, written as experts of rows in runs.

`bmm(W[ids], x)` copies a matrix for every row. With the rows sorted by expert it is one product of
rows in runs, which can be stored as codes like any other's:

    order = argsort(ids); y = grouped_mm(x[order], W, ends)[argsort(order)]

Source:  transformers' experts of the implementation `batched_mm`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.types import DTYPES
from dfc.ops.builder import Builder

_GROUPED = "transformers.grouped_mm_fallback.default"


@dataclass(frozen=True)
class _Gathered:
    """A product of rows with gathered matrices: rows [S, K], ids [S], weight [E, N, K], or
    [E, K, N] where it lies turned; `end` gives [S, N]."""

    end: Node
    inner: tuple[Node, ...]  # what nobody needs any more, from the last to the first
    x: Value
    ids: Value
    weight: Parameter
    turned: bool


def group_gathered(graph: Graph, allowed: Callable[[Node], bool]) -> int:
    """Write every product of gathered experts that is allowed in runs; how many.

    Keeps:  results, up to the order in which a product's numbers are added, and their names.
    """
    found = [f for n in graph.nodes if (f := _gathered(n)) is not None and allowed(n)]
    if not found or not _is_known():
        return 0
    sorted_: dict[Value, tuple[Value, Value, Value]] = {}
    for f in found:
        b = Builder(graph, f.end)
        if f.ids not in sorted_:
            sorted_[f.ids] = _sorted(Builder(graph, f.inner[0]), f.ids, f.weight)
        order, back, ends = sorted_[f.ids]
        w = f.weight if f.turned else b("aten.transpose.int", f.weight, dim0=1, dim1=2)
        y = b(_GROUPED, b("aten.index.Tensor", f.x, [order]), w, ends)
        made, name = b("aten.index.Tensor", y, [back]), f.end.results[0].name
        graph.replace(f.end, [made])
        graph.rename(made, name)
        for node in f.inner:
            if not any(r.use_count for r in node.results):
                graph.erase(node)
    return len(found)


def _is_known() -> bool:
    """Whether there is an operator for rows in runs."""
    try:
        import transformers.integrations.moe  # noqa: F401 - makes the operator known
    except ImportError:
        return False
    return True


def _gathered(end: Node) -> _Gathered | None:
    """The product that a squeeze ends, if its matrices are gathered by the rows' experts."""
    product = _made_by(end, 0) if end.op == "aten.squeeze.dim" else None
    if product is None or product.op != "aten.bmm.default" or product.result.use_count > 1:
        return None
    for at, turned in ((0, False), (1, True)):  # W[ids] @ x, or x @ W[ids]
        index, column = _made_by(product, at), _made_by(product, 1 - at)
        dim = 1 if turned else 2
        if index is None or column is None or not (_adds(column, dim) and _drops(end, dim)):
            continue
        weight, ids = index.inputs[0], index.inputs[1] if len(index.inputs) > 1 else None
        one = isinstance(ids, tuple) and len(ids) == 1 and ids[0] is not None
        if index.op != "aten.index.Tensor" or not isinstance(weight, Parameter) or not one:
            continue
        assert isinstance(ids, tuple) and ids[0] is not None
        x, chosen = column.inputs[0], ids[0]
        assert isinstance(x, Value)
        rows = weight.tensor_type.rank == 3 and chosen.tensor_type.rank == 1
        if rows and chosen.tensor_type.dtype.name in ("i32", "i64"):
            return _Gathered(end, (product, column, index), x, chosen, weight, turned)
    return None


def _made_by(node: Node, at: int) -> Node | None:
    x = node.inputs[at]
    return x.node if isinstance(x, Value) else None


def _adds(node: Node, dim: int) -> bool:
    return node.op == "aten.unsqueeze.default" and node.attributes["dim"] % 3 == dim


def _drops(node: Node, dim: int) -> bool:
    return int(node.attributes["dim"]) % 3 == dim


def _sorted(b: Builder, ids: Value, weight: Parameter) -> tuple[Value, Value, Value]:
    """The order of rows by expert, the way back, and where each expert's rows end."""
    experts, i64 = weight.tensor_type.shape[0], DTYPES["i64"]
    ids = b("aten.remainder.Scalar", ids, other=experts)  # -1 is the last
    order = b.node("aten.sort.default", ids).results[1]
    back = b.node("aten.sort.default", order).results[1]
    each = b("aten.unsqueeze.default", b("aten.arange.default", end=experts, dtype=i64), dim=-1)
    passed = b("aten.le.Tensor", b("aten.unsqueeze.default", ids, dim=0), each)
    ends = b("aten.sum.dim_IntList", passed, dim=(-1,), dtype=i64)
    return order, back, b("aten._to_copy.default", ends, dtype=DTYPES["i32"])
