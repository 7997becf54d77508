"""Which dimensions of which values mean the same, found on the graph itself, op by op.

Every dimension of every value gets an axis (dfc.compress.axes). An op without a rule freezes all
that it touches, with the reason. Rules also note which attributes repeat a size (`edit`), so that
they can be rewritten when axes shrink, and which weights make and read an axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dfc.compress.axes import Axis, find, freeze, leaf, leaves, unite
from dfc.compress.weighted import reads_codes
from dfc.ir.expr import Size
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.types import TensorType

Dims = tuple[Axis, ...]
Sizes = Callable[[Axis], Size]  # the new size of an axis
Rule = Callable[["Analysis", Node], "Sequence[Dims] | None"]
BEFORE = "`prune` goes before `quantize`"
RULES: dict[str, Rule] = {}  # by the op's name without its overload, or with it

_SAME_PLACE: dict[
    str, Callable[[Node, int, int], int]
] = {  # op -> how dimension d of the result is found in the first operand
    "aten.t": lambda node, d, rank: rank - 1 - d,
    "aten.numpy_T": lambda node, d, rank: rank - 1 - d,
    "aten.permute": lambda node, d, rank: node.attributes["dims"][d] % rank,
    "aten.transpose": lambda node, d, rank: _swapped(node, d, rank),
    "aten._to_copy": lambda node, d, rank: d,
    "aten.clone": lambda node, d, rank: d,
    "aten.to": lambda node, d, rank: d,
    "aten.contiguous": lambda node, d, rank: d,
}


def _swapped(node: Node, d: int, rank: int) -> int:
    a, b = node.attributes["dim0"] % rank, node.attributes["dim1"] % rank
    return b if d == a else a if d == b else d


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register what an op does with dimensions: its results' axes, or None where it cannot say."""

    def register(function: Rule) -> Rule:
        for op in ops:
            RULES[op if "." in op else f"aten.{op}"] = function
        return function

    return register


@dataclass(frozen=True)
class Edit:
    """An attribute that repeats sizes: its value once axes have shrunk.

    `op` is given where the new sizes need another op: a split into equal parts may become uneven.
    """

    node: Node
    axes: Dims  # what it speaks of: without a change there, it stays as it is
    attributes: Callable[[Sizes], dict[str, Any]]
    op: str = ""


@dataclass(frozen=True)
class Use:
    """A weight that makes an axis (`makes`) or contracts over it."""

    axis: Axis
    node: Node
    parameter: Parameter | None
    dim: int
    source: Value | None = None  # what the weight is applied to, and where the axis lies in it
    source_dim: int = -1


@dataclass
class Analysis:
    """The axes of a graph's values.

    Cost:  one walk; each op unites a handful of axes.
    """

    graph: Graph
    dims: dict[Value, Dims] = field(default_factory=dict)
    edits: list[Edit] = field(default_factory=list)
    makers: list[Use] = field(default_factory=list)
    readers: list[Use] = field(default_factory=list)
    batches: list[Dims] = field(default_factory=list)  # of products of two activations
    rows: list[Dims] = field(default_factory=list)  # of each of those, the left one's own
    heads: list[Axis] = field(default_factory=list)  # what counts heads, for sure
    constant: set[Value] = field(default_factory=set)

    def run(self) -> Analysis:
        for v in self.graph.inputs:
            self._outside(v, f"it is a size of the input %{v.name}")
        changed = {m.target for m in self.graph.mutations}
        for p in self.graph.parameters.values():
            self.constant.add(p)
            self.dims[p] = tuple(leaf(s) for s in p.tensor_type.shape)
            if p in changed:
                self._freeze(p, f"the model writes to !{p.name}")
        for node in self.graph.nodes:
            self._node(node)
        for v in self.graph.result.operands:
            if isinstance(v.type, TensorType):
                self._freeze(v, f"it is a size of the output %{v.name}")
        return self

    def _outside(self, v: Value, reason: str) -> None:
        if isinstance(v.type, TensorType):
            self.dims[v] = tuple(leaf(s, reason) for s in v.type.shape)

    def _freeze(self, v: Value, reason: str) -> None:
        for axis in self.dims.get(v, ()):
            freeze(axis, reason)

    def _node(self, node: Node) -> None:
        operands = [v for v in node.operands if isinstance(v.type, TensorType)]
        if all(v in self.constant for v in operands):
            self.constant.update(node.results)
        found = RULES.get(node.op) or RULES.get(node.op.rpartition(".")[0])
        if found is None and is_pointwise(node):
            found = pointwise
        made = found(self, node) if found is not None and not node.graphs else None
        if made is None or not _fits(node, made):
            reason = f"no rule says how `{short(node.op)}` treats sizes{place(node)}"
            if reads_codes(node) or node.op == "dfc.quantize":
                reason = f"`{short(node.op)}` reads codes{place(node)}: {BEFORE}"
            for v in operands:
                self._freeze(v, reason)
            made = [self._fresh(r, reason) for r in node.results]
        for r, dims in zip(node.results, made, strict=True):
            if not isinstance(r.type, TensorType):
                continue
            self.dims[r] = tuple(dims)
            for axis, size in zip(dims, r.type.shape, strict=True):
                if not isinstance(size, int):
                    freeze_symbolic(axis)

    def _fresh(self, r: Value, reason: str) -> Dims:
        if not isinstance(r.type, TensorType):
            return ()
        return tuple(leaf(s, reason) for s in r.type.shape)

    # What rules use

    def of(self, v: Any) -> Dims:
        return self.dims[v]

    def edit(
        self, node: Node, axes: Sequence[Axis], attributes: Callable[[Sizes], dict[str, Any]],
        op: str = "",
    ) -> None:  # fmt: skip
        self.edits.append(Edit(node, tuple(axes), attributes, op))

    def makes(self, axis: Axis, node: Node, weight: Any, dim: int) -> None:
        """A weight's dimension makes an axis."""
        parameter, its_dim = parameter_of(weight, dim) or (None, -1)
        self.makers.append(Use(axis, node, parameter, its_dim))

    def reads(self, axis: Axis, node: Node, weight: Any, dim: int, x: Any, x_dim: int) -> None:
        """A weight's dimension is contracted with a value's."""
        parameter, its_dim = parameter_of(weight, dim) or (None, -1)
        self.readers.append(Use(axis, node, parameter, its_dim, x, x_dim))


def _fits(node: Node, made: Sequence[Dims]) -> bool:
    """Whether a rule's axes have the sizes of the results: ops may have forms it does not know."""
    return len(made) == len(node.results) and all(
        not isinstance(r.type, TensorType) or tuple(find(x).size for x in dims) == r.type.shape
        for r, dims in zip(node.results, made, strict=True)
    )


def freeze_symbolic(axis: Axis) -> None:
    """A leaf whose size only running the graph tells is never cut."""
    for x in leaves(axis):
        if not isinstance(x.size, int):
            x.frozen.setdefault(f"its size `{x.size}` is known only when the model runs")


def parameter_of(v: Any, dim: int) -> tuple[Parameter, int] | None:
    """The parameter that a value is, transposed or cast, and which dimension of it."""
    while isinstance(v, Value) and v.node is not None:
        step = _SAME_PLACE.get(v.node.op.rpartition(".")[0])
        first = v.node.inputs[0] if v.node.inputs else None
        if step is None or not isinstance(first, Value):
            return None
        dim, v = step(v.node, dim, first.tensor_type.rank), first
    return (v, dim) if isinstance(v, Parameter) else None


def is_pointwise(node: Node) -> bool:
    """Whether PyTorch says that the op treats elements alone."""
    import torch

    overload = getattr(node.info, "overload", None)
    if overload is None or torch.Tag.pointwise not in overload.tags:
        return False
    return all(isinstance(x, Value) or x is None for x in node.inputs)


def pointwise(a: Analysis, node: Node) -> Sequence[Dims]:
    """Results and operands have the same indices, where they are not broadcast."""
    shape = node.results[0].tensor_type.shape
    made: list[Axis | None] = [None] * len(shape)
    for v in node.operands:
        if isinstance(v.type, TensorType):
            for i, axis in enumerate(reversed(a.of(v))):
                at = len(shape) - 1 - i
                if find(axis).size == 1 and shape[at] != 1:
                    continue
                if made[at] is None:
                    made[at] = axis
                else:
                    unite(made[at], axis, short(node.op) + place(node))  # type: ignore[arg-type]
    dims = tuple(m if m is not None else leaf(s) for m, s in zip(made, shape, strict=True))
    return [dims for _ in node.results]


def short(op: str) -> str:
    """`conv2d` of `aten.conv2d.default`."""
    return op.split(".")[1] if op.startswith("aten.") else op


def place(node: Node) -> str:
    """Where a node comes from, as the end of a sentence."""
    if node.loc is None:
        return ""
    return f" in `{node.loc.module}`" if node.loc.module else f" at {node.loc}"


def analyse(graph: Graph) -> Analysis:
    """The axes of all values of a graph."""
    import dfc.compress.dims_contract
    import dfc.compress.dims_norm
    import dfc.compress.dims_parts
    import dfc.compress.dims_shape  # noqa: F401

    return Analysis(graph).run()
