"""One spelling for each thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from dfc.ir.graph import Attributes, Graph, Node, Value
from dfc.ir.types import TensorType
from dfc.rewrite.pass_ import Context, Pass, Quota

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

    skip: tuple[int, ...] = ()  # nodes by number that are left out: those found to be wrong

    def run(self, graph: Graph, ctx: Context) -> int:
        quota = Quota(self.limit, self.skip)
        _canonical(graph, ctx, quota)
        return quota.done


def _canonical(graph: Graph, ctx: Context, quota: Quota) -> None:
    told: list[tuple[Value, str, Attributes]] = []
    for node in graph.nodes:
        for inner in node.graphs:
            _canonical(inner, ctx, quota)
        op, attributes, results = node.op, node.attributes, node.results
        change = _change(graph, node)
        if change is None or not quota.allows(node):
            continue
        change()
        if ctx.asked:
            told.append((results[0], op, attributes))
    if told:
        _tell(graph, ctx, told)


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


Change = Callable[[], None]


def _change(graph: Graph, node: Node) -> Change | None:
    """What makes the node canonical; None where it is."""
    if len(node.results) == 0 or not node.op.startswith("aten."):
        return None
    _, base, overload = node.op.split(".")
    first = node.inputs[0] if node.inputs else None
    if base in _SYNONYMS:
        return _rename(graph, node, f"aten.{_SYNONYMS[base]}.{overload}")
    result = node.results[0]
    if node.op in _RESHAPES and isinstance(result.type, TensorType):
        return partial(_swap, graph, node, "aten.view.default", [first], size=result.type.shape)
    if node.op == "aten.expand_as.default" and isinstance(result.type, TensorType):
        size = result.type.shape
        return partial(
            _swap, graph, node, "aten.expand.default", [first], size=size, implicit=False
        )
    if node.op in ("aten.view.default", "aten.expand.default") and -1 in node.attributes["size"]:
        assert isinstance(result.type, TensorType)
        return partial(graph.set_attributes, node, size=result.type.shape)
    if node.op in ("aten.t.default", "aten.numpy_T.default") and len(node.inputs) == 1:
        return _transposed(graph, node)
    return _positive_dims(graph, node)


def _swap(graph: Graph, node: Node, op: str, inputs: list[Any], **attributes: Any) -> None:
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


def _rename(graph: Graph, node: Node, op: str) -> Change | None:
    from dfc.errors import DfcError
    from dfc.ir.op import lookup

    try:
        names = {a.name for a in lookup(op).attributes}
    except DfcError:
        return None
    numbers = {o.name for o in node.info.operands}  # a Python number may stand for an operand
    if any(a not in names and a not in numbers for a in node.attributes):
        return None
    return lambda: _swap(graph, node, op, list(node.inputs), **node.attributes)


def _transposed(graph: Graph, node: Node) -> Change:
    source = node.inputs[0]
    assert source is not None and not isinstance(source, tuple)
    rank = source.tensor_type.rank
    if rank < 2:
        return partial(graph.replace, node, [source])
    if rank > 2:
        dims = tuple(reversed(range(rank)))
        return partial(_swap, graph, node, "aten.permute.default", [source], dims=dims)
    return partial(_swap, graph, node, "aten.transpose.int", [source], dim0=0, dim1=1)


def _positive_dims(graph: Graph, node: Node) -> Change | None:
    _, base, _ = node.op.split(".")
    first = node.inputs[0] if node.inputs else None
    listed = first if isinstance(first, tuple) else (first,)
    ranks = [v.type.rank for v in listed if v is not None and isinstance(v.type, TensorType)]
    if base not in _COUNT_FIRST or not ranks:
        return None
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
    return partial(graph.set_attributes, node, **changed) if changed else None
