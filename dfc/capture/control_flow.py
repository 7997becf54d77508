"""Operators that call graphs: control flow keeps them, those that only wrap one give way to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx

from dfc.capture.convert import Converter
from dfc.errors import DfcError
from dfc.ir.expr import symbol
from dfc.ir.graph import Argument, Graph, Value
from dfc.ir.tree import LEAF, Leaf, Seq
from dfc.ir.types import INT

_INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast", "invoke_subgraph", "hints_wrapper",
            "tag_activation_checkpoint", "checkpoint", "wrap")  # fmt: skip


def higher_order(c: Converter, node: fx.Node, target: Any) -> Any:
    name = target.name() if callable(getattr(target, "name", None)) else str(target)
    name = str(name)
    args = cast(Any, node.args)
    if name in _INLINED:
        return inline(c, node, name)
    if name == "cond":
        predicate, yes, no, operands = args
        return with_graphs(c, node, "torch.cond", (yes, no), [predicate], operands, {})
    if name == "while_loop":
        condition, body, carried, more = args
        attributes = {"carried": len(carried)}
        return with_graphs(
            c,
            node,
            "torch.while_loop",
            (condition, body),
            [],
            [*carried, *more],
            attributes,
            loop=len(carried),
        )
    if name == "scan":
        combine, init, xs, *rest = args
        more = rest[-1] if rest and isinstance(rest[-1], (list, tuple)) else ()
        attributes = {"init": len(init), "xs": len(xs), "reverse": False}
        return with_graphs(
            c,
            node,
            "torch.scan",
            (combine,),
            [],
            [*init, *xs, *more],
            attributes,
        )
    if name in ("map_impl", "map"):
        body, xs, more = args
        attributes = {"xs": len(xs)}
        return with_graphs(c, node, "torch.map", (body,), [], [*xs, *more], attributes)
    raise DfcError("T022", f"the control flow operator `{name}` is not supported")


def inline(c: Converter, node: fx.Node, name: str) -> Any:
    """Put a wrapped sub-graph in place of the call."""
    modules = [
        a for a in node.args if isinstance(a, fx.Node) and isinstance(c.env[a], fx.GraphModule)
    ]
    if not modules:
        raise DfcError("T022", f"`{name}` without a graph")
    at = node.args.index(modules[0])
    inner = c.env[modules[0]]
    operands = node.args[at + 1 :]
    if name == "invoke_subgraph":
        operands = operands[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    nested = Converter(c.graph, inner, c.names)
    nested._counts = c._counts
    placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
    for p, x in zip(placeholders, operands, strict=True):
        nested.env[p] = c.env[x] if isinstance(x, fx.Node) else x
    nested.convert(list(inner.graph.nodes))
    (output,) = [n for n in inner.graph.nodes if n.op == "output"]
    result = output.args[0]
    leaves = list(result) if isinstance(result, (list, tuple)) else [result]
    found = [nested.env[r] if isinstance(r, fx.Node) else r for r in leaves]
    if name == "wrap_with_set_grad_enabled" and node.args[0] is False:
        found = [c.stopped(x, node) if isinstance(x, Value) else x for x in found]
    return tuple(found) if isinstance(result, (list, tuple)) else found[0]


def with_graphs(
    c: Converter,
    node: fx.Node,
    op: str,
    modules: Sequence[Any],
    first: Sequence[Any],
    operands: Sequence[Any],
    attributes: dict[str, Any],
    loop: int = 0,
) -> Any:
    outer = [c.scalar_or_none(x) for x in operands]
    scalars = {i: x for i, x in enumerate(outer) if x is not NotImplemented and i >= loop}
    kept = [x for i, x in enumerate(operands) if i not in scalars]
    values = [c.single(x) for x in (*first, *kept)]
    graphs = [nested_graph(c, c.env[m], c.name(m.name), scalars) for m in modules]
    types, _ = c.result_types(node.meta.get("val"), node)
    made = c.graph.add(
        op,
        [tuple(v for v in values if v is not None)],
        attributes,
        types=types,
        names=[c.name(node.name) for _ in types],
        graphs=graphs,
        binds=c.binds(node),
        loc=c.location(node),
    )
    return made.results


def nested_graph(
    c: Converter, module: fx.GraphModule, name: str, scalars: Mapping[int, Any]
) -> Graph:
    graph = Graph(name)
    inner = Converter(graph, module, c.names)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    arguments = []
    for i, p in enumerate(placeholders):
        value = p.meta.get("val")
        if i in scalars:
            if isinstance(value, torch.SymInt) and value.node.expr not in c.names.known:
                c.names.known[value.node.expr] = scalars[i]
            inner.env[p] = scalars[i]
            continue
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            fresh = c.names.fresh("u")
            c.names.known[value.node.expr] = symbol(fresh)
            graph.add_input(fresh, INT)
            inner.env[p] = symbol(fresh)
            arguments.append(Argument(fresh, LEAF))
            continue
        if isinstance(value, int) and not isinstance(value, torch.Tensor):
            fresh = c.names.fresh("u")
            graph.add_input(fresh, INT)
            inner.env[p] = symbol(fresh)
            arguments.append(Argument(fresh, LEAF))
            continue
        v = graph.add_input(inner.name(p.name), c.names.type_of(value))
        arguments.append(Argument(v.name, LEAF))
        inner.env[p] = v
    graph.arguments = tuple(arguments)
    inner.convert(list(module.graph.nodes))
    (output,) = [n for n in module.graph.nodes if n.op == "output"]
    result = output.args[0]
    leaves = list(result) if isinstance(result, (list, tuple)) else [result]
    outputs = [inner.single(x) for x in leaves]
    graph.set_outputs(
        [v for v in outputs if v is not None], Seq("tuple", tuple(Leaf() for _ in outputs))
    )
    return graph
