"""One op in terms of others: what a declared op says, or PyTorch's decomposition, traced."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from dfc.ir.expr import Expr, symbols
from dfc.ir.graph import Attributes, Graph
from dfc.ir.op import lookup
from dfc.ir.types import TensorType
from dfc.ops.builder import decomposable
from dfc.ops.builder import decompose as decompose_declared

if TYPE_CHECKING:
    from dfc.ir.graph import Range

OperandTypes = tuple[Any, ...]  # a type, None, or a tuple of those, for each operand


def _suffix(overload: str) -> str:
    return f".{overload}" if overload else ""


def decompose(
    op: str,
    types: OperandTypes,
    attributes: Mapping[str, Any],
    ranges: Mapping[str, Range],
) -> Graph | str:
    """A graph of the op's tensor operands in order, lists flattened; or why there is none.

    Its sizes use the same symbols as the types and attributes.
    """
    used: set[str] = set()
    for t in types:
        for x in t if isinstance(t, tuple) else (t,):
            used |= x.symbols if x is not None else frozenset()
    for value in attributes.values():
        for x in value if isinstance(value, tuple) else (value,):
            used |= symbols(x)
    bounds = tuple(sorted((s, ranges.get(s, (0, None))) for s in used))
    return _decompose(op, types, Attributes(attributes), bounds)


@cache
def why_indivisible(op: str) -> str | None:
    """Why an op cannot be decomposed, or None."""
    import torch
    from torch._decomp import decomposition_table

    from dfc.ops.aten import AtenOp

    info = lookup(op)
    if not isinstance(info, AtenOp):
        return "it has no decomposition"
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(
        info.kernel._schema.name + _suffix(info.kernel._schema.overload_name),
        "CompositeImplicitAutograd",
    )
    if info.kernel not in decomposition_table and not composite:
        return "PyTorch has no decomposition"
    return None


@cache
def _decompose(
    op: str,
    types: OperandTypes,
    attributes: Attributes,
    bounds: tuple[tuple[str, Range], ...],
) -> Graph | str:
    import torch
    from torch._decomp import decomposition_table
    from torch._dispatch.python import enable_python_dispatcher
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    from dfc.ops.aten import AtenOp
    from dfc.ops.symbolic import SymbolTable

    if decomposable(op):
        return _said(op, types, attributes, bounds)
    reason = why_indivisible(op)
    if reason:
        return reason
    info = lookup(op)
    assert isinstance(info, AtenOp)
    overload = info.kernel
    known = decomposition_table.get(overload)
    table = SymbolTable(dict(bounds), dynamic=bool(bounds))
    flat = [x for t in types for x in (t if isinstance(t, tuple) else (t,)) if x is not None]

    def function(*tensors: Any) -> Any:
        pending = iter(tensors)
        operands = [
            [None if x is None else next(pending) for x in t]
            if isinstance(t, tuple)
            else None
            if t is None
            else next(pending)
            for t in types
        ]
        values = {k: table.concrete_deep(v) for k, v in attributes.items()}
        args, kwargs = info.bind(operands, values, "cpu")
        if known is None:
            return overload.decompose(*args, **kwargs)
        return overload(*args, **kwargs)

    try:
        with (
            FakeTensorMode(shape_env=table.env, allow_non_fake_inputs=True),
            enable_python_dispatcher(),
            torch.no_grad(),
        ):
            fakes = [
                torch.empty([table.concrete(s) for s in t.shape], dtype=t.dtype.to_torch())
                for t in flat
            ]
            traced = make_fx(
                dispatch_functionalize(function, FunctionalTensorMode()),
                decomposition_table={} if known is None else {overload: known},
                tracing_mode="real",
            )(*fakes)
        return _graph(traced, table, flat, op)
    except Exception as e:  # noqa: BLE001 (tracing raises whatever a decomposition meets)
        text = str(e).strip()
        return f"its decomposition fails: {text.splitlines()[0] if text else type(e).__name__}"


def _said(
    op: str,
    types: OperandTypes,
    attributes: Attributes,
    bounds: tuple[tuple[str, Range], ...],
) -> Graph:
    """What a declared op writes of itself, in a graph of its own."""
    graph = Graph("decomposed", ranges=dict(bounds))
    inputs = [t and graph.add_input(f"in{i}", t) for i, t in enumerate(types)]
    node = graph.add(op, inputs, attributes)
    graph.set_outputs(decompose_declared(node))
    graph.erase(node)
    return graph


def _graph(traced: Any, table: Any, types: list[TensorType], op: str) -> Graph:
    import torch

    from dfc.capture.convert import Converter, Names

    class WithSizes(Converter):
        """Also knows `size` as a whole, which only decompositions call."""

        def node(self, node: Any) -> Any:
            if node.target in (torch.ops.aten.size.default, torch.ops.aten.sym_size.default):
                return tuple(self.names.scalar(s) for s in node.meta["val"])
            return super().node(node)

    graph = Graph("decomposed")
    names = Names()
    names.known = dict(table._names)
    converter = WithSizes(graph, traced, names)
    nodes = list(traced.graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    for i, (p, t) in enumerate(zip(placeholders, types, strict=True)):
        converter.env[p] = graph.add_input(f"in{i}", t)
    converter.convert(nodes)
    (output,) = [n for n in nodes if n.op == "output"]
    result = output.args[0]
    leaves = result if isinstance(result, (list, tuple)) else [result]
    flat: list[Any] = []
    for x in leaves:
        flat.extend(x if isinstance(x, (list, tuple)) else (x,))
    values = [converter.single(x) for x in flat]
    if any(n.op == op for n in graph.nodes):
        raise ValueError("it decomposes into itself")
    graph.set_outputs([v for v in values if v is not None])
    return graph


__all__ = ["Expr", "decompose"]
