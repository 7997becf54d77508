"""Remove what gives back its operand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dfc.ir.expr import Expr
from dfc.ir.gradients import carries_gradient
from dfc.ir.graph import Graph, Node, Value
from dfc.ir.types import TensorType
from dfc.rewrite.pass_ import KEPT, Context, Pass, Quota

_END = 2**63 - 1


@dataclass(frozen=True)
class RemoveNoops(Pass):
    """Remove casts, views, slices, copies and dropouts that change nothing; merge views of views.

    Needs:    a valid graph, canonical for best effect.
    Ensures:  no node of the listed kinds gives back its operand unchanged.
    Keeps:    additions of zero to floats (`-0.0 + 0` is `0.0`), and everything random; squeezes of
              sizes that may be 1.
    Cost:     one walk.
    """

    name = "remove_noops"
    limit: int | None = None  # make at most this many changes; bisects a miscompile

    skip: tuple[int, ...] = ()  # changes by number that are left out: those found to be wrong

    def run(self, graph: Graph, ctx: Context) -> int:
        quota = Quota(self.limit, self.skip)
        _remove(graph, ctx, quota)
        return quota.done


def _remove(graph: Graph, ctx: Context, quota: Quota) -> None:
    for node in graph.nodes:
        for inner in node.graphs:
            _remove(inner, ctx, quota)
        if len(node.results) != 1 or not node.op.startswith("aten."):
            continue
        source = node.inputs[0] if node.inputs else None
        if isinstance(source, tuple):
            source = source[0] if len(source) == 1 else None
        if source is None or not isinstance(source.type, TensorType):
            continue
        origin = _origin(node, source)
        if origin is not None and quota.allows(node):
            _read(graph, node, origin)
            ctx.decided(node, "rewritten", f"reads %{origin.name}, past %{source.name}")
            source = origin
        test = _TESTS.get(node.op)
        if test is None:
            continue
        if test(node, source):
            if quota.allows(node):
                ctx.decided(node, "removed", "changes nothing", source)
                graph.replace(node, [source])
        elif ctx.asked and _looks_idle(node):
            ctx.decided(node, KEPT, _why_not(node, source, test))


def _looks_idle(node: Node) -> bool:
    """Whether a node might be thought to change nothing: not so when it adds 3."""
    other = node.attributes.get("other", 1 if node.op.startswith(_MULTIPLY) else 0)
    return bool(other == (1 if node.op.startswith(_MULTIPLY) else 0))


_MULTIPLY = ("aten.mul.", "aten.div.")


def _why_not(node: Node, source: Value, test: Callable[[Node, Value], bool]) -> str:
    """What a node does that its operand does not have yet."""
    if test is _same_type or (test is _no_ones and not _same_type(node, source)):
        return f"it makes {node.result.type} of {source.type}"
    return _REASONS[test]


def _always(node: Node, x: Value) -> bool:
    return True


def _without_gradient(node: Node, x: Value) -> bool:
    return not carries_gradient(x)


# Views in which several elements may share memory.
_OVERLAPPING = ("aten.unfold.", "aten.as_strided.", "aten.expand.")


def _apart(node: Node, x: Value) -> bool:
    """Whether no two elements of a copied value share memory.

    PyTorch's `*_scatter` kernels write through such overlaps, so the copy is kept.
    """
    while x.node is not None and x.node.inputs:
        if x.node.op.startswith(_OVERLAPPING):
            return False
        if x.node.op not in _VIEWS or not isinstance(x.node.inputs[0], Value):
            return True
        x = x.node.inputs[0]
    return True


def _same_type(node: Node, x: Value) -> bool:
    return node.result.type == x.type


def _no_ones(node: Node, x: Value) -> bool:
    """A squeeze that has nothing to squeeze, whatever the dynamic sizes turn out to be."""
    if not _same_type(node, x):
        return False
    shape = x.tensor_type.shape
    dims = node.attributes.get("dim", tuple(range(len(shape))))
    ranges = node.graph.ranges if node.graph else {}
    for d in dims if isinstance(dims, tuple) else (dims,):
        size = shape[d] if shape else 0
        if isinstance(size, Expr) and ranges.get(size.symbol or "", (0, None))[0] < 2:
            return False
    return True


def _no_training(node: Node, x: Value) -> bool:
    return not node.attributes["train"] or node.attributes["p"] == 0


def _whole_slice(node: Node, x: Value) -> bool:
    a = node.attributes
    if a["start"] not in (None, 0) or a["step"] != 1:
        return False
    size = x.tensor_type.shape[a["dim"]]
    return a["end"] is None or a["end"] == size or a["end"] == _END


def _identity_order(node: Node, x: Value) -> bool:
    return tuple(node.attributes["dims"]) == tuple(range(x.tensor_type.rank))


def _same_dims(node: Node, x: Value) -> bool:
    return bool(node.attributes["dim0"] == node.attributes["dim1"])


def _integer_zero(node: Node, x: Value) -> bool:
    other = node.attributes.get("other")
    return (
        x.tensor_type.dtype.is_integer
        and isinstance(other, int)
        and not isinstance(other, bool)
        and other == 0
        and _same_type(node, x)
    )


def _one(node: Node, x: Value) -> bool:
    other = node.attributes.get("other")
    return (
        isinstance(other, (int, float))
        and not isinstance(other, bool)
        and other == 1
        and not x.tensor_type.dtype.is_complex  # inf * (1 + 0i) is NaN in part
        and _same_type(node, x)
        and node.attributes.get("rounding_mode") is None
    )


def _no_padding(node: Node, x: Value) -> bool:
    return all(p == 0 for p in node.attributes["pad"])


def _once(node: Node, x: Value) -> bool:
    return _same_type(node, x) and all(r == 1 for r in node.attributes["repeats"])


def _single(node: Node, x: Value) -> bool:
    return isinstance(node.inputs[0], tuple) and len(node.inputs[0]) == 1


_VIEWS = frozenset(
    f"aten.{op}"
    for op in (
        "view.default", "select.int", "slice.Tensor", "transpose.int", "permute.default",
        "unsqueeze.default", "squeeze.default", "squeeze.dim", "squeeze.dims", "diagonal.default",
        "alias.default", "detach.default",
    )
)  # fmt: skip
_TESTS: dict[str, Callable[[Node, Value], bool]] = {
    "aten.clone.default": _apart,
    "aten.alias.default": _always,
    "aten.detach.default": _without_gradient,
    "aten.contiguous.default": _always,
    "aten._to_copy.default": _same_type,
    "aten.view.default": _same_type,
    "aten.expand.default": _same_type,
    "aten.squeeze.dim": _no_ones,
    "aten.squeeze.dims": _no_ones,
    "aten.squeeze.default": _no_ones,
    "aten.dropout.default": _no_training,
    "aten.feature_dropout.default": _no_training,
    "aten.alpha_dropout.default": _no_training,
    "aten.slice.Tensor": _whole_slice,
    "aten.permute.default": _identity_order,
    "aten.transpose.int": _same_dims,
    "aten.add.Scalar": _integer_zero,
    "aten.sub.Scalar": _integer_zero,
    "aten.mul.Scalar": _one,
    "aten.div.Scalar": _one,
    "aten.constant_pad_nd.default": _no_padding,
    "aten.repeat.default": _once,
    "aten.cat.default": _single,
}


_REASONS: dict[Callable[[Node, Value], bool], str] = {
    _apart: "its operand's elements share memory",
    _no_ones: "a size that it would squeeze may be 1",
    _without_gradient: "it stops a gradient that training would follow",
    _no_training: "it drops out: the model is in training mode",
    _whole_slice: "it takes a part only",
    _identity_order: "it changes the order of dimensions",
    _same_dims: "it changes the order of dimensions",
    _integer_zero: "what it adds is not an integer 0 (0.0 added to -0.0 is 0.0)",
    _one: "its factor is not 1, or it changes the type",
    _no_padding: "it pads",
    _once: "it repeats",
    _single: "it joins several",
}


def _origin(node: Node, source: Value) -> Value | None:
    """What a view of a view may read instead: what the inner one reads."""
    inner = source.node
    if inner is None or inner.op != node.op:
        return None
    origin = inner.inputs[0]
    if origin is None or isinstance(origin, tuple):
        return None
    merges = node.op in ("aten.view.default", "aten.permute.default") or (
        node.op == "aten.transpose.int" and _axes(node) == _axes(inner)
    )
    return origin if merges else None


def _read(graph: Graph, node: Node, origin: Value) -> None:
    """Let a node do what it and the node before it did."""
    source = node.inputs[0]
    assert isinstance(source, Value) and source.node is not None
    if node.op == "aten.permute.default":
        dims = tuple(source.node.attributes["dims"][d] for d in node.attributes["dims"])
        graph.set_attributes(node, dims=tuple(d % len(dims) for d in dims))
    elif node.op == "aten.transpose.int":
        graph.set_attributes(node, dim0=0, dim1=0)
    graph.set_inputs_of(node, [origin])


def _axes(node: Node) -> set[int]:
    return {node.attributes["dim0"], node.attributes["dim1"]}
