"""A graph without its 16-bit types: what `autocast` did, taken back, for engines that cast alone.

Why:  a compiler that is told to compute in 16 bits chooses by itself where; casts that stand in the
      graph are converts to it, and keep its fusions apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dfc.compress.casting import F32, HALVES
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.node import ParameterData
from dfc.ir.types import DType, TensorType, Type
from dfc.ir.verify import infer_types

if TYPE_CHECKING:
    import torch

_CAST = "aten._to_copy.default"
_PRODUCTS = ("aten.linear", "aten.mm", "aten.bmm", "aten.addmm", "aten.matmul", "aten.conv",
             "aten.scaled_dot_product_attention", "dfc.multi_head_attention")  # fmt: skip


def half_of_products(graph: Graph) -> str | None:
    """`bf16` or `f16`: the type that a graph multiplies matrices in; None where it is no such."""
    types = [n.result.type for n in graph.walk() if n.op.startswith(_PRODUCTS) and n.results]
    found = {t.dtype.name for t in types if isinstance(t, TensorType) and t.dtype in HALVES}
    return "bf16" if "bf16" in found else next(iter(found), None)


def widened(graph: Graph) -> Graph:
    """A copy that computes in f32 what the graph computes in 16 bits.

    Ensures:  inputs, outputs and state have their types; casts stand at them alone, and at nodes
              that have no form in f32.
    Keeps:    weights as they were rounded: as f32 they are the same numbers.
    """
    return _Widening(graph.copy()).run()


class _Wide(ParameterData):
    """A 16-bit weight as f32, made when it is read."""

    def __init__(self, narrow: ParameterData) -> None:
        self.narrow = narrow

    def tensor(self) -> torch.Tensor:
        return self.narrow.tensor().float()

    def sha256(self) -> str:
        from dfc.ir.weights import tensor_sha256

        return tensor_sha256(self.tensor())


class _Widening:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        nodes = [*graph.nodes, graph.result]
        self.read = {n: [v.type for v in n.operands] for n in nodes}  # as it was
        self.narrowed: dict[tuple[Value, DType], Value] = {}

    def run(self) -> Graph:
        nodes = list(self.graph.nodes)
        written = {m.target for m in self.graph.mutations}
        for p in list(self.graph.parameters.values()):
            if _is_half(p.type) and p not in written:
                self._widen_parameter(p)
        for v in dict.fromkeys([*self.graph.inputs, *written]):
            if _is_half(v.type):
                self._read_wide(v, nodes[0] if nodes else None)
        for node, after in zip(nodes, [*nodes[1:], None], strict=True):
            if not self._drop_cast(node) and not self._widen_node(node):
                self._narrow_operands(node)
                for r in node.results:
                    if _is_half(r.type):
                        self._read_wide(r, after)
        self._narrow_operands(self.graph.result)
        return self.graph

    def _widen_parameter(self, p: Parameter) -> None:
        name, n = f"{p.name}.f32", 1
        while name in self.graph.parameters:
            name, n = f"{p.name}.f32.{n}", n + 1
        data = None if p.data is None else _Wide(p.data)
        wide = self.graph.add_parameter(name, _in_f32(p.type), p.kind, data, p.aliases)
        self.graph.replace_uses(p, wide)
        self.graph.drop_parameter(p.name)
        self.graph.rename(wide, p.name)

    def _read_wide(self, v: Value, before: Node | None) -> None:
        """What stays of 16 bits is cast once for its readers; the outputs get it as it is."""
        readers = {u for u in v.users if u is not self.graph.result}
        if readers:
            cast = self._cast(v, F32, before)
            self.narrowed[cast, v.tensor_type.dtype] = v
            self.graph.replace_uses(v, cast, lambda u: u in readers)

    def _cast(self, v: Value, dtype: DType, before: Node | None) -> Value:
        type = TensorType(dtype, v.tensor_type.shape)
        near = before or v.node
        return self.graph.add(
            _CAST, [v], {"dtype": dtype}, types=[type], names=[f"{v.name}_{dtype.name}"],
            before=before, loc=near.loc if near else None, stage=near.stage if near else None,
        ).result  # fmt: skip

    def _drop_cast(self, node: Node) -> bool:
        """A cast between f32 and 16 bits is none any more."""
        if node.op != _CAST or not _is_float(node.result.type):
            return False
        (source,) = node.operands
        if not isinstance(source.type, TensorType) or source.type.dtype != F32:
            return False
        self.graph.replace(node, [source])
        return True

    def _widen_node(self, node: Node) -> bool:
        """Whether the node has a form in f32; where it has none it is left as it was."""
        same = [v.type for v in node.operands] == self.read[node]
        if same and not any(_is_half(r.type) for r in node.results):
            return True
        if node.graphs:
            return False
        old = {k: v for k, v in node.attributes.items() if isinstance(v, DType) and v in HALVES}
        wanted = tuple(_in_f32(r.type) if _is_half(r.type) else r.type for r in node.results)
        self.graph.set_attributes(node, **dict.fromkeys(old, F32))
        if _inferred(node) != wanted:
            self.graph.set_attributes(node, **old)
            return False
        for r, t in zip(node.results, wanted, strict=True):
            self.graph.set_type(r, t)
        return True

    def _narrow_operands(self, node: Node) -> None:
        """Give a node operands of the types that it had."""
        types = iter(self.read[node])
        before = None if node is self.graph.result else node

        def one(v: Value | None) -> Value | None:
            return v if v is None else self._narrow(v, next(types), before)

        new = [tuple(map(one, x)) if isinstance(x, tuple) else one(x) for x in node.inputs]
        self.graph.set_inputs_of(node, new)

    def _narrow(self, v: Value, type: Type, before: Node | None) -> Value:
        if v.type == type or not isinstance(type, TensorType):
            return v
        if (v, type.dtype) not in self.narrowed:
            self.narrowed[v, type.dtype] = self._cast(v, type.dtype, before)
        return self.narrowed[v, type.dtype]


def _inferred(node: Node) -> tuple[Type, ...] | None:
    try:
        return infer_types(node)
    except DfcError:
        return None


def _is_half(type: Type) -> bool:
    return isinstance(type, TensorType) and type.dtype in HALVES


def _is_float(type: Type) -> bool:
    return isinstance(type, TensorType) and (type.dtype == F32 or type.dtype in HALVES)


def _in_f32(type: Type) -> TensorType:
    assert isinstance(type, TensorType)
    return TensorType(F32, type.shape)
