"""What of a graph has constant weights that could be stored in fewer bits, and who reads them.

A weight is found once, with all of its readers: a table that an embedding and the output layer
share is quantized once, or not at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ops.builder import Builder

LINEAR = "aten.linear.default"
EMBEDDING = "aten.embedding.default"
_ADDMM = "aten.addmm.default"
EXPERTS = frozenset({"transformers.grouped_mm_fallback.default", "aten._grouped_mm.default"})
CONVOLUTIONS = frozenset(
    f"aten.{n}" for n in ("conv1d.default", "conv2d.default", "conv3d.default")
)
_PRODUCTS = frozenset({"aten.matmul.default", "aten.mm.default"})
_TRANSPOSED = frozenset({"aten.t.default", "aten.numpy_T.default"})
# Ops that read weights, other than those that can be quantized; for telling why they are kept.
_OTHERS = {
    **dict.fromkeys(
        (f"aten.{n}.input" for n in ("lstm", "gru", "rnn_tanh", "rnn_relu")),
        "recurrent layers take float weights",
    ),
    **dict.fromkeys(
        (f"aten.conv_transpose{n}" for n in ("1d.default", "2d.input", "3d.input")),
        "it is a transposed convolution",
    ),
    "aten.bmm.default": "its weights are a batch of matrices",
    **dict.fromkeys(EXPERTS, "its experts have a bias or a type of their own in the product"),
    "aten.bilinear.default": "its weights are a batch of matrices",
    "aten.convolution.default": "it is a transposed or general convolution",
    "aten.embedding_bag.default": "it adds rows up as it looks them up, as floats",
    "aten.embedding_bag.padding_idx": "it adds rows up as it looks them up, as floats",
}


_READERS = (
    "dfc.linear_w", "dfc.linear_f8", "dfc.grouped_linear_w", "dfc.embedding_w",
)  # fmt: skip


def reads_codes(node: Node) -> bool:
    """Whether a node reads a quantized weight: itself, or to give it to a layer in floats."""
    if node.op == "dfc.dequantize":
        return isinstance(node.inputs[0], Parameter) and node.inputs[0].tensor_type.rank > 1
    return node.op.startswith(_READERS)


@dataclass(frozen=True)
class Use:
    """One node that reads a weight: as a linear layer, a table of rows, a convolution, or a linear
    layer for each expert.

    `rows` says that outputs (or table rows) are the weight's first dimension, behind that of
    experts, as in torch.nn.Linear, and not its last.
    """

    node: Node
    kind: str  # "linear", "embedding", "conv" or "experts"
    rows: bool = True

    @property
    def x(self) -> Value:
        """The other operand: activations, or indices."""
        found = self.node.inputs[1 if self.node.op in (EMBEDDING, _ADDMM) else 0]
        assert isinstance(found, Value)
        return found

    @property
    def bias(self) -> Value | None:
        at = {LINEAR: 2, _ADDMM: 0}.get(self.node.op)
        found = None if at is None else self.node.inputs[at]
        return found if isinstance(found, Value) else None


@dataclass(frozen=True)
class Weighted:
    """A weight and everything that reads it."""

    weight: Parameter
    uses: tuple[Use, ...]

    @property
    def node(self) -> Node:
        return self.uses[0].node

    @property
    def is_conv(self) -> bool:
        return self.uses[0].kind == "conv"

    @property
    def is_experts(self) -> bool:
        return self.uses[0].kind == "experts"

    @property
    def rows(self) -> bool:
        return self.uses[0].rows

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs, of all experts, and inputs; or rows and columns of a table."""
        sizes = [int(s) for s in self.weight.tensor_type.shape]  # type: ignore[arg-type]
        if self.is_experts:
            experts, n, k = sizes if self.rows else (sizes[0], sizes[2], sizes[1])
            return experts * n, k
        first, rest = sizes[0], 1
        for s in sizes[1:]:
            rest *= s
        return (first, rest) if self.rows else (rest, first)


def described(node: Node) -> str:
    """A layer as messages name it: its result and its module path."""
    module = f" of `{node.loc.module}`" if node.loc and node.loc.module else ""
    return f"layer %{node.results[0].name}{module}"


def find_weighted(graph: Graph) -> tuple[list[Weighted], dict[Node, str]]:
    """Weights whose readers all could read codes instead, in the order of their first reader; and
    the nodes that read weights which must stay, each with the reason.

    Nested graphs are not looked into: what they read is kept.
    """
    uses: dict[Parameter, list[Use]] = {}
    kept: dict[Node, str] = {}
    for node in graph.nodes:
        use = _use(node)
        if use is not None:
            uses.setdefault(weight_read(node), []).append(use)
        elif node.op in _OTHERS and any(isinstance(v, Parameter) for v in node.operands):
            kept[node] = _OTHERS[node.op]
    written = {m.target for m in graph.mutations}
    found = []
    for weight, its in uses.items():
        reason = _why_not(weight, its, written)
        if reason is None:
            found.append(Weighted(weight, tuple(its)))
        else:
            kept.update(dict.fromkeys((u.node for u in its), reason))
    return found, kept


def _use(node: Node) -> Use | None:
    """How a node reads a constant weight, if it does."""
    inputs = node.inputs
    if node.op == EMBEDDING:
        return Use(node, "embedding") if isinstance(inputs[0], Parameter) else None
    if node.op in CONVOLUTIONS:
        return Use(node, "conv") if isinstance(inputs[1], Parameter) else None
    if node.op == LINEAR:
        return _product(node, inputs[1], turned=True)
    if node.op in _PRODUCTS:
        return _product(node, inputs[1])
    if node.op == _ADDMM:
        a, bias = node.attributes, inputs[0]
        plain = isinstance(bias, Value) and bias.tensor_type.rank == 1
        plain = plain and a.get("alpha", 1) == a.get("beta", 1) == 1
        return _product(node, inputs[2]) if plain else None
    if node.op in EXPERTS:
        return _experts(node)
    return None


def _experts(node: Node) -> Use | None:
    """Rows in runs, each times a matrix of a constant, as it lies or transposed."""
    x, weight, ends, *bias = node.inputs
    plain = isinstance(x, Value) and x.tensor_type.rank == 2 and ends is not None
    if not plain or any(b is not None for b in bias) or node.attributes.get("out_dtype"):
        return None
    assert isinstance(weight, Value)
    rows = _is_transposed(weight)
    source = weight.node.inputs[0] if rows and weight.node else weight
    if not isinstance(source, Parameter) or source.tensor_type.rank != 3:
        return None
    return Use(node, "experts", rows)


def _product(node: Node, weight: object, turned: bool = False) -> Use | None:
    """`x @ W`, or `x @ W.T`, with a constant W of two dimensions; `turned` turns what is read."""
    if not isinstance(weight, Value):
        return None
    transposed = _is_transposed(weight)
    source = weight.node.inputs[0] if transposed and weight.node else weight
    if not isinstance(source, Parameter) or source.tensor_type.rank != 2:
        return None
    return Use(node, "linear", rows=transposed != turned)


def _is_written_out(use: Use) -> bool:
    """Whether a use reads the weight itself, outputs first."""
    return use.node.op == EMBEDDING or (use.node.op == LINEAR and use.rows)


def _is_transposed(x: Value) -> bool:
    """Whether a value is a matrix, or one for each expert, with its last two dimensions swapped."""
    rank = x.tensor_type.rank if x.node is not None else 0
    if x.node is None or rank not in (2, 3):
        return False
    a, last = x.node.attributes, {rank - 2, rank - 1}
    if x.node.op == "aten.permute.default":
        return [d % rank for d in a["dims"]] == [*range(rank - 2), rank - 1, rank - 2]
    if x.node.op == "aten.transpose.int":
        return {a["dim0"] % rank, a["dim1"] % rank} == last
    return x.node.op in _TRANSPOSED and rank == 2


def weight_read(node: Node) -> Parameter:
    """The constant that a use reads, perhaps through a transposition."""
    found = node.inputs[{EMBEDDING: 0, _ADDMM: 2}.get(node.op, 1)]
    assert isinstance(found, Value)
    if not isinstance(found, Parameter):
        assert found.node is not None
        found = found.node.inputs[0]
    assert isinstance(found, Parameter)
    return found


def _why_not(weight: Parameter, uses: list[Use], written: set[Value]) -> str | None:
    """Why a weight cannot be stored as codes, None when it can."""
    dtype = weight.tensor_type.dtype
    if dtype.name not in ("f16", "bf16", "f32", "f64"):
        return f"its weight is {dtype}"
    if weight in written:
        return f"the model writes to !{weight.name}"
    if any(u.bias is weight for u in uses):
        return f"!{weight.name} is its bias too"
    if len({(u.kind in ("conv", "experts"), u.rows) for u in uses}) > 1:
        return f"!{weight.name} is read both as it lies and transposed"
    readers = set(weight.users)
    for reader in weight.users:  # a transposition counts as those who read it
        if any(_is_transposed(r) for r in reader.results):
            readers.discard(reader)
            readers.update(u for r in reader.results for u in r.users)
    others = [n for n in readers if n not in {u.node for u in uses}]
    if others:
        shown = f"%{others[0].results[0].name} ({others[0].op})" if others[0].results else "outputs"
        return f"!{weight.name} is read by {shown} as well, which takes floats"
    return None


def check_numbers(found: list[Weighted]) -> None:
    """Refuse a model without weights, and weights that no code stands for.

    Raises:  DfcError D002 and D090 that name the first layer and its module path.
    """
    import torch

    for w in found:
        if w.weight.data is None:
            raise DfcError(
                "D002",
                f"{described(w.node)}: the parameter !{w.weight.name} has no numbers to quantize",
                help="the model is on the meta device: give it weights first",
            )
        numbers = w.weight.data.tensor()
        if not math.isfinite(numbers.sum(dtype=torch.float64)):
            bad = numbers.numel() - int(torch.isfinite(numbers).sum())
            raise DfcError(
                "D090",
                f"{described(w.node)}: {bad} of {numbers.numel()} weights in !{w.weight.name} "
                "are NaN or infinite",
                help="no code stands for them: mend the model, or leave the layer out by `except`",
            )


def put(graph: Graph, node: Node, made: Value) -> None:
    """A value in the place of a node's, under its name; the transposition of a weight that then
    nobody reads goes too.
    """
    name = node.results[0].name
    transposed = [v.node for v in node.operands if v.node is not None and _is_transposed(v)]
    graph.replace(node, [made])
    graph.rename(made, name)
    for t in transposed:
        if t.graph is not None and not any(r.use_count for r in t.results):
            graph.erase(t)


def as_linear(graph: Graph, found: Weighted) -> Weighted:
    """Write every product with the weight as `aten.linear` of its transposed copy, [N, K].

    What is already one stays. The copy is a view: nothing is moved.
    """
    if found.is_conv or found.is_experts or all(map(_is_written_out, found.uses)):
        return found
    weight = found.weight
    if not found.rows:
        assert weight.data is not None
        weight = graph.add_constant(f"{weight.name}.T", weight.data.tensor().T)
    uses = []
    for u in found.uses:
        if _is_written_out(u):
            uses.append(u)
            continue
        made = Builder(graph, u.node).node(LINEAR, u.x, weight, u.bias)
        put(graph, u.node, made.result)
        uses.append(Use(made, "linear"))
    if weight is not found.weight and not found.weight.use_count:
        graph.drop_parameter(found.weight.name)
    return Weighted(weight, tuple(uses))
