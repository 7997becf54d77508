"""Control flow: nested graphs become the bodies of If, Loop and Scan, which see outer values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnxscript import ir

from dfc.emit.onnx_builder import Builder, Call, Val
from dfc.emit.onnx_ops.registry import translates
from dfc.emit.onnx_types import D
from dfc.ir.graph import Graph, Value
from dfc.ir.types import TensorType


@translates("torch.scalar")
def scalar(b: Builder, call: Call) -> Val:
    value = b.sizes.scalar(b, call.attributes["value"])
    # a fresh value: the shared one has no type of its own
    return b.op("Identity", value)


def _body(b: Builder, graph: Graph, given: Sequence[Val]) -> tuple[Builder, list[Val]]:
    """The nodes of a nested graph in a scope of their own, and its outputs."""
    from dfc.emit.onnx_nodes import translate_nodes
    from dfc.emit.onnx_values import bind_type

    inner = b.scope()
    env: dict[Value, Val] = dict(zip(graph.inputs, given, strict=True))
    for p in graph.parameters.values():
        env[p] = _parameter(b, p)
    for v, value in env.items():
        bind_type(inner.sizes, v.type, value)
        if not isinstance(v.type, TensorType):
            inner.sizes.bind_value(v.name, value)
    translate_nodes(inner, graph, env, {})
    return inner, [env[v] for v in graph.outputs]


def _parameter(b: Builder, p: Any) -> Val:
    from dfc.emit.onnx_values import torch_tensor

    tensor = torch_tensor(p.data.tensor(), p.name)
    value = b.array(tensor.numpy(), tensor.dtype)
    value.meta.setdefault("type", p.type)
    return value


def _graph(inner: Builder, inputs: Sequence[Val], outputs: Sequence[Val], name: str) -> ir.Graph:
    """A body whose outputs are its own: what comes from outside or twice is copied."""
    made_here = {id(o) for n in inner.nodes for o in n.outputs}
    finals: list[Val] = []
    for v in outputs:
        if id(v) not in made_here or any(v is f for f in finals):
            copied = inner.op("Identity", v)
            if v.dtype is not None:
                copied.dtype = v.dtype
            copied.shape = v.shape
            v = copied
        finals.append(v)
    for v in finals:
        if v.name is None:
            v.name = inner.root.claim(f"{name}.out")
    for n in inner.nodes:
        for o in n.outputs:
            if o.name is None:
                o.name = inner.root.claim(f"{name}.{n.op_type.lower()}")
        if n.name is None and n.outputs:
            n.name = n.outputs[0].name
    return ir.Graph(list(inputs), finals, nodes=inner.nodes, name=name)


def _fresh(b: Builder, v: Value, name: str) -> Val:
    from dfc.emit.onnx_values import typed

    return typed(b.root, b.root.claim(f"{name}.{v.name}"), v.type)


def _flat(call: Call) -> list[Val]:
    return list(call.values)


def _node(
    b: Builder, kind: str, inputs: Sequence[Val | None], attrs: Sequence[Any], out: int
) -> list[Val]:
    outputs = [b.value() for _ in range(out)]
    b.append(ir.Node("", kind, list(inputs), attrs, outputs=outputs))
    return outputs


@translates("torch.cond")
def cond(b: Builder, call: Call) -> list[Val]:
    node = call.graph_node
    predicate, *operands = _flat(call)
    branches = []
    for attr, graph in zip(("then_branch", "else_branch"), node.graphs, strict=True):
        name = b.root.claim(graph.name)
        inner, outputs = _body(b, graph, operands)
        branches.append(ir.AttrGraph(attr, _graph(inner, [], outputs, name)))
    return _node(b, "If", [b.cast(predicate, D.BOOL)], branches, len(call.results))


@translates("torch.while_loop")
def while_loop(b: Builder, call: Call) -> list[Val]:
    from dfc.emit.onnx_nodes import translate_nodes
    from dfc.emit.onnx_values import bind_type

    node = call.graph_node
    n = node.attributes["carried"]
    flat = _flat(call)
    carried, more = flat[:n], flat[n:]
    condition, body = node.graphs

    def check(scope: Builder, values: Sequence[Val]) -> Val:
        env = dict(zip(condition.inputs, [*values, *more], strict=True))
        for p in condition.parameters.values():
            env[p] = _parameter(scope, p)
        inner = Builder(scope.root, scope.sizes.nested(), scope)
        for v, value in env.items():
            bind_type(inner.sizes, v.type, value)
            if not isinstance(v.type, TensorType):
                inner.sizes.bind_value(v.name, value)
        translate_nodes(inner, condition, env, {})
        scope.nodes.extend(inner.nodes)
        found = scope.cast(env[condition.outputs[0]], D.BOOL)
        return scope.op("Reshape", found, scope.sizes.vector(scope, []))

    start = check(b, carried)
    name = b.root.claim(body.name)
    from dfc.emit.onnx_values import typed
    from dfc.ir.types import BOOL, INT

    step = typed(b.root, b.root.claim(f"{name}.step"), INT)
    going = typed(b.root, b.root.claim(f"{name}.going"), BOOL)
    inputs = [_fresh(b, v, name) for v in body.inputs[:n]]
    for v in inputs:
        v.shape = None  # a carried tensor may change its size
    inner, outputs = _body(b, body, [*inputs, *more])
    again = check(inner, outputs)
    graph = _graph(inner, [step, going, *inputs], [again, *outputs], name)
    return _node(b, "Loop", [None, start, *carried], [ir.AttrGraph("body", graph)], n)


@translates("torch.scan", "torch.map")
def scan(b: Builder, call: Call) -> list[Val]:
    node = call.graph_node
    a = node.attributes
    init, xs = a.get("init", 0), a["xs"]
    flat = _flat(call)
    state, rows, more = flat[:init], flat[init : init + xs], flat[init + xs :]
    (body,) = node.graphs
    name = b.root.claim(body.name)
    inputs = [_fresh(b, v, name) for v in body.inputs[: init + xs]]
    inner, outputs = _body(b, body, [*inputs, *more])
    graph = _graph(inner, inputs, outputs, name)
    attrs: list[Any] = [ir.AttrGraph("body", graph), ir.AttrInt64("num_scan_inputs", xs)]
    if a.get("reverse"):
        attrs.append(ir.AttrInt64s("scan_input_directions", [1] * xs))
        attrs.append(ir.AttrInt64s("scan_output_directions", [1] * (len(outputs) - init)))
    return _node(b, "Scan", [*state, *rows], attrs, len(call.results))
