"""One spelling for each thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dfc.ir.graph import Attributes, Graph, Node, Value
from dfc.ir.types import TensorType
from dfc.rewrite.pass_ import Context, Pass

# Ops that only regroup elements: written as `view` to the size that their type states.
_RESHAPES = frozenset(
    """aten.flatten.using_ints aten.unflatten.int aten.view_as.default aten.reshape_as.default
    aten.reshape.default aten._unsafe_view.default aten._reshape_alias.default""".split()  # noqa: SIM905
)
# Another name for the same op: same operands, same attributes.
_SYNONYMS = {
    "absolute": "abs", "arccos": "acos", "arcsin": "asin", "arctan": "atan", "clip": "clamp",
    "concat": "cat", "concatenate": "cat", "divide": "div", "greater": "gt",
    "greater_equal": "ge", "less": "lt", "less_equal": "le", "moveaxis": "movedim",
    "multiply": "mul", "negative": "neg", "not_equal": "ne", "subtract": "sub",
    "swapaxes": "transpose", "swapdims": "transpose", "true_divide": "div",
    "__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor",
    "special_expit": "sigmoid", "fix": "trunc",
}  # fmt: skip
# Attributes that name a dimension of the first operand, and the ops for which they do: others count
# the dimensions of their result or of a broadcast, or give -1 a meaning of its own.
_DIMS = ("dim", "dim0", "dim1", "start_dim", "end_dim")
_COUNT_FIRST = frozenset(
    """all amax amin any argmax argmin argsort cat chunk cummax cummin cumprod cumsum flip gather
    glu index_add index_copy index_fill index_select kthvalue log_softmax logcumsumexp logsumexp max
    mean median min mode nansum narrow norm linalg_vector_norm permute prod scatter scatter_add
    scatter_reduce select select_scatter slice slice_scatter softmax sort split split_with_sizes
    squeeze stack std std_mean sum topk transpose unbind unsqueeze var var_mean _log_softmax
    _softmax""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Write each op in one way: no synonyms, no negative dimensions, sizes spelt out.

    Needs:    a valid graph.
    Ensures:  `view` and `expand` state every size; dimension attributes are not negative.
    Keeps:    every value, type and name.
    Cost:     one walk.
    """

    name = "canonicalize"
    limit: int | None = None  # rewrite at most this many nodes; bisects a miscompile

    def run(self, graph: Graph, ctx: Context) -> int:
        changes = 0
        told: list[tuple[Value, str, Attributes]] = []
        for node in graph.nodes:
            for inner in node.graphs:
                left = None if self.limit is None else self.limit - changes
                changes += Canonicalize(left).run(inner, ctx)
            if changes == self.limit:
                break
            op, attributes, results = node.op, node.attributes, node.results
            changed = _rewrite(graph, node)
            changes += changed
            if changed and ctx.asked:
                told.append((results[0], op, attributes))
        if told:
            _tell(graph, ctx, told)
        return changes


def _tell(graph: Graph, ctx: Context, told: list[tuple[Value, str, Attributes]]) -> None:
    """What became of nodes: `_swap` gives their names to the new ones."""
    now = {r.name: n for n in graph.nodes for r in n.results}
    for value, op, attributes in told:
        made = now.get(value.name)
        if made is None:
            ctx.decided(value, "dropped", f"`{op}` changes nothing here")
        elif made.op != op:
            ctx.decided(made, "rewritten", f"`{op}` is written as `{made.op}`")
        else:
            parts = [f"{k}={v}" for k, v in made.attributes.items() if attributes.get(k) != v]
            ctx.decided(made, "rewritten", f"in full: {', '.join(parts)}")


def _rewrite(graph: Graph, node: Node) -> int:
    if len(node.results) == 0 or not node.op.startswith("aten."):
        return 0
    _, base, overload = node.op.split(".")
    first = node.inputs[0] if node.inputs else None
    if base in _SYNONYMS:
        return _rename(graph, node, f"aten.{_SYNONYMS[base]}.{overload}")
    result = node.results[0]
    if node.op in _RESHAPES and isinstance(result.type, TensorType):
        return _swap(graph, node, "aten.view.default", [first], {"size": result.type.shape})
    if node.op == "aten.expand_as.default" and isinstance(result.type, TensorType):
        attributes = {"size": result.type.shape, "implicit": False}
        return _swap(graph, node, "aten.expand.default", [first], attributes)
    if node.op in ("aten.view.default", "aten.expand.default") and -1 in node.attributes["size"]:
        assert isinstance(result.type, TensorType)
        graph.set_attributes(node, size=result.type.shape)
        return 1
    if node.op in ("aten.t.default", "aten.numpy_T.default") and len(node.inputs) == 1:
        return _transposed(graph, node)
    return _positive_dims(graph, node)


def _swap(graph: Graph, node: Node, op: str, inputs: list[Any], attributes: dict[str, Any]) -> int:
    """Put another op in a node's place; the value keeps its name, type, stage and place."""
    results = node.results
    made = graph.add(
        op,
        inputs,
        attributes,
        types=[r.type for r in results],
        before=node,
        stage=node.stage,
        loc=node.loc,
        binds=node.binds,
    )
    names = [r.name for r in results]
    graph.replace(node, made)
    for r, name in zip(made.results, names, strict=True):
        graph.rename(r, name)
    return 1


def _rename(graph: Graph, node: Node, op: str) -> int:
    from dfc.errors import DfcError
    from dfc.ir.op import lookup

    try:
        names = {a.name for a in lookup(op).attributes}
    except DfcError:
        return 0
    numbers = {o.name for o in node.info.operands}  # a Python number may stand for an operand
    if any(a not in names and a not in numbers for a in node.attributes):
        return 0
    return _swap(graph, node, op, list(node.inputs), dict(node.attributes))


def _transposed(graph: Graph, node: Node) -> int:
    source = node.inputs[0]
    assert source is not None and not isinstance(source, tuple)
    rank = source.tensor_type.rank
    if rank < 2:
        graph.replace(node, [source])
        return 1
    if rank > 2:
        dims = tuple(reversed(range(rank)))
        return _swap(graph, node, "aten.permute.default", [source], {"dims": dims})
    return _swap(graph, node, "aten.transpose.int", [source], {"dim0": 0, "dim1": 1})


def _positive_dims(graph: Graph, node: Node) -> int:
    _, base, _ = node.op.split(".")
    first = node.inputs[0] if node.inputs else None
    listed = first if isinstance(first, tuple) else (first,)
    ranks = [v.type.rank for v in listed if v is not None and isinstance(v.type, TensorType)]
    if base not in _COUNT_FIRST or not ranks:
        return 0
    rank = max(ranks)  # `cat` skips operands of shape [0]
    if base in ("unsqueeze", "stack"):
        rank += 1
    changed: dict[str, Any] = {}
    for name in _DIMS:
        dim = node.attributes.get(name)
        if isinstance(dim, int) and dim < 0 and rank:
            changed[name] = dim % rank
    key = "dims" if "dims" in node.attributes else "dim"
    dims = node.attributes.get(key)
    if isinstance(dims, tuple) and rank and any(isinstance(d, int) and d < 0 for d in dims):
        changed[key] = tuple(d % rank for d in dims)
    if changed:
        graph.set_attributes(node, **changed)
        return 1
    return 0
