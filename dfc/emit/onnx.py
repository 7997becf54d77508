"""Graph to ONNX: node by node, our own translation first, then torchlib's, then a decomposition.

The model is a function without state. A buffer or input that the graph writes to has its final
value as one more output, `<name>.new`, after the outputs of the call. A mutated buffer is also an
optional input: its initializer is the first state, and a caller who keeps state feeds back what
came out. No optimizer runs over the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxscript import ir

from dfc.emit import onnx_ops
from dfc.emit.decompose import decompose, why_indivisible
from dfc.emit.onnx_builder import (
    Builder,
    Call,
    NoTranslation,
    Operand,
    Root,
    Val,
    onnx_dtype,
)
from dfc.emit.onnx_ops.blocked import FIRST_OPSET
from dfc.emit.onnx_ops.float8 import FIRST_OPSET as FIRST_FLOAT8
from dfc.emit.onnx_sizes import Sizes
from dfc.emit.onnx_torchlib import model_functions, symbolic_value, translate
from dfc.errors import DfcError
from dfc.ir.expr import Expr
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.op import DeclaredOp
from dfc.ir.tree import Seq, paths
from dfc.ir.types import DTYPES, NoneType, TensorType, Type
from dfc.ops.aten import ASSERTIONS, AtenOp

if TYPE_CHECKING:
    from dfc.emit.onnx_export import Written

OPSET = 20  # of files: every runtime of the last years reads it
ENGINE_OPSET = 23  # of models for the ONNX Runtime at hand: the first with Attention
IR_VERSION = 10
_MAX_DEPTH = 12
# Ops that only move elements: ONNX Runtime has them in every element type.
_MOVES = frozenset(
    [
        "view",
        "reshape",
        "permute",
        "transpose",
        "t",
        "unsqueeze",
        "squeeze",
        "select",
        "slice",
        "cat",
        "stack",
        "split",
        "chunk",
        "split_with_sizes",
        "unbind",
        "flatten",
        "unflatten",
        "clone",
        "contiguous",
        "_to_copy",
        "embedding",
        "index_select",
        "narrow",
        "movedim",
        "alias",
        "detach",
        "view_as",
        "dropout",
    ]
)
_WIDE = {"bf16": "f32"}


def build_onnx(
    graph: Graph, *, opset: int = OPSET, contrib: bool = False, name: str | None = None
) -> ir.Model:
    """The graph as an ONNX model whose initializers refer to the parameters' own tensors.

    With `contrib`, operators of ONNX Runtime's own may stand where they are faster.

    Raises:  DfcError X001 for an op without a translation, X004 for a parameter without data.
    """
    onnx_ops.load()
    _require_types(graph, opset)
    root = Root(opset, contrib)
    sizes = Sizes()
    b = Builder(root, sizes)
    env: dict[Value, Val] = {}
    inputs = _inputs(graph, root, sizes, env)
    output_names = list(_output_names(graph, root))
    initializers = _parameters(graph, root, env)
    root.ranges = ranges = dict(graph.ranges)
    _translate_nodes(b, graph, env, ranges)
    outputs = _outputs(b, graph, env, output_names)
    stateful = [env[m.target] for m in graph.mutations if isinstance(m.target, Parameter)]
    replaced = {x for x, _ in root.derived if not x.uses()}
    initializers = [v for v in initializers if v not in replaced] + [*root.derived.values()]
    made = ir.Graph(
        [*inputs, *stateful],
        outputs,
        nodes=[*root.constant_nodes, *b.nodes],
        initializers=initializers,
        name=name or graph.name,
        opset_imports=root.domains,
    )
    model = ir.Model(made, ir_version=ir_version(opset), producer_name="dfc")
    if root.functions:
        _inline(model, root)
    return model


def _require_types(graph: Graph, opset: int) -> None:
    """Refuse weights of a type that the opset does not know.

    Raises:  DfcError X001.
    """
    for p in graph.parameters.values():
        dtype = str(p.tensor_type.dtype) if isinstance(p.type, TensorType) else ""
        if dtype.startswith("f8") and opset < FIRST_FLOAT8:
            message = f"opset {opset} has no {dtype}, which !{p.name} is stored in"
            raise DfcError("X001", message, help=f"write opset {FIRST_FLOAT8} or later")


def export_onnx(graph: Graph, path: str | os.PathLike[str], **options: Any) -> Written:
    """Write a graph as ONNX, proved on probes: see `dfc.emit.onnx_export`."""
    from dfc.emit.onnx_export import export_onnx as export

    return export(graph, path, **options)


def file_opset(graph: Graph) -> int:
    """The opset of files that name none: 21 where weights lie in groups, which is its first."""
    grouped = any(
        n.attributes.get("group") and n.attributes.get("activations") == "int8"
        for n in graph.walk()
        if n.op.startswith("dfc.linear_w")
    )
    return max(OPSET, FIRST_OPSET) if grouped else OPSET


def ir_version(opset: int) -> int:
    """The oldest file format that may name the opset, and not older than what we always wrote."""
    from onnx.helper import find_min_ir_version_for, make_opsetid

    return max(IR_VERSION, int(find_min_ir_version_for([make_opsetid("", opset)])))


def is_random(graph: Graph) -> bool:
    """Whether some node draws random numbers, so that two runs differ."""
    for node in graph.walk():
        info = node.info
        if isinstance(info, AtenOp) and info._draws(node.attributes):
            return True
    return False


def _inline(model: ir.Model, root: Root) -> None:
    """Put the bodies of torchlib's functions in place of their calls: standard ops only."""
    from onnxscript.ir.passes.common import InlinePass

    for f in model_functions(root.functions, root.opset):
        model.functions[f.identifier()] = f
    InlinePass()(model)
    model.functions.clear()
    for domain in set(model.graph.opset_imports) - set(root.domains):
        del model.graph.opset_imports[domain]


def why_not(node: Node) -> str | None:
    """Why a node has no translation, or None: for engines, told without building anything."""
    from dfc.emit.onnx_torchlib import has_translation

    onnx_ops.load()
    op = node.op
    if op in onnx_ops.REFUSED:
        return onnx_ops.REFUSED[op]
    if op in onnx_ops.REAL or op in onnx_ops.COMPLEX or op.split(".")[1] in ASSERTIONS:
        return None
    info = node.info
    if isinstance(info, DeclaredOp):
        known = hasattr(info.cls, "to_onnx") or hasattr(info.cls, "decompose")
        return None if known else "the op says nothing of ONNX"
    if has_translation(op, ENGINE_OPSET):
        return None
    return why_indivisible(op)


# Inputs, parameters, outputs


def _typed(root: Root, name: str, type: Type) -> Val:
    from dfc.emit.onnx_builder import onnx_shape

    value = symbolic_value(root.opset)
    value.name = name
    value.dtype = onnx_dtype(type)
    value.shape = onnx_shape(type)
    value.meta["type"] = type
    return value


def _inputs(graph: Graph, root: Root, sizes: Sizes, env: dict[Value, Val]) -> list[Val]:
    names = input_names(graph)
    found = []
    for v, name in zip(graph.inputs, names, strict=True):
        value = env[v] = _typed(root, root.claim(name), v.type)
        found.append(value)
        bind_type(sizes, v.type, value)
        if not isinstance(v.type, TensorType):
            sizes.bind_value(v.name, value)
    return found


def bind_type(sizes: Sizes, type: Type, value: Val) -> None:
    """The symbols that a tensor's shape tells."""
    if isinstance(type, TensorType):
        for axis, size in enumerate(type.shape):
            if isinstance(size, Expr):
                sizes.bind_dim(size, value, axis)


def input_names(graph: Graph) -> list[str]:
    """A name for each flat input, from the call's signature: `past_key_values.0.key`."""
    names = [p for a in graph.arguments for p in paths(a.tree, a.name)]
    return names if len(names) == len(graph.inputs) else [v.name for v in graph.inputs]


def output_names(graph: Graph) -> list[str]:
    """A name for each flat output, then `<target>.new` for each mutation."""
    prefix = "output" if isinstance(graph.output_tree, Seq) else ""
    names = [p or "output" for p in paths(graph.output_tree, prefix)]
    by_input = dict(zip(graph.inputs, input_names(graph), strict=True))
    return names + [f"{by_input.get(m.target, m.target.name)}.new" for m in graph.mutations]


def _output_names(graph: Graph, root: Root) -> Iterator[str]:
    for name in output_names(graph):
        yield root.claim(name)


def _parameters(graph: Graph, root: Root, env: dict[Value, Val]) -> list[Val]:
    found = []
    mutated = {m.target for m in graph.mutations}
    inner = _nested_parameters(graph)
    for p in [*graph.parameters.values(), *inner]:
        if not p._users and p not in mutated:
            continue
        value = env[p] = _typed(root, root.claim(p.name), p.type)
        value.const_value = _tensor(p, value.name or p.name)
        found.append(value)
    return found


def _nested_parameters(graph: Graph) -> list[Parameter]:
    """Constants that only a branch or a loop body knows."""
    known = {id(p) for p in graph.parameters.values()}
    found = []
    for node in graph.walk():
        for g in node.graphs:
            for p in g.parameters.values():
                if id(p) not in known:
                    known.add(id(p))
                    found.append(p)
    return found


def _tensor(p: Parameter, name: str) -> ir.TensorProtocol:
    if p.data is None:
        raise DfcError(
            "X004",
            f"the parameter `{p.name}` has no data, so its weights cannot be written",
            help="load the weights before exporting",
        )
    return torch_tensor(p.data.tensor(), name)


def torch_tensor(tensor: Any, name: str) -> ir.TensorProtocol:
    """A torch tensor as an initializer that shares its memory."""
    import torch
    from torch.onnx._internal.exporter._core import TorchTensor

    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return TorchTensor(tensor.resolve_neg(), name=name)


def _outputs(b: Builder, graph: Graph, env: Mapping[Value, Val], names: Sequence[str]) -> list[Val]:
    """The outputs under their names; what is an input, a constant or a known output is copied."""
    made_here = {id(o) for n in b.nodes for o in n.outputs}
    taken: set[int] = set()
    outputs = []
    for v, name in zip(graph.result.operands, names, strict=True):
        value = env[v]
        if id(value) not in made_here or id(value) in taken:
            value = b.op("Identity", value)
        taken.add(id(value))
        value.name = name
        value.dtype = onnx_dtype(v.type)
        value.meta.pop("type", None)
        b.retype(value, v.type)
        outputs.append(value)
    return outputs


# Nodes


def _translate_nodes(
    b: Builder, graph: Graph, env: dict[Value, Val], ranges: dict[str, Any], depth: int = 0
) -> None:
    for node in graph.nodes:
        if node.op.split(".")[1] in ASSERTIONS:
            continue
        call = Call(
            node.op,
            tuple(_read(x, env) for x in node.inputs),
            node.attributes,
            tuple(r.type for r in node.results),
            node.loc,
            node,
        )
        for bind in node.binds:
            ranges.setdefault(bind.symbol, (bind.low or 0, bind.high))
        results = emit(b, call, ranges, depth, node.results[0].name if node.results else "")
        for r, value in zip(node.results, results, strict=True):
            if value is not None:
                env[r] = value
        for bind in node.binds:
            _bind(b, node, bind.symbol, env)


def _read(x: Any, env: Mapping[Value, Val]) -> Operand:
    if isinstance(x, tuple):
        return tuple(None if v is None else env.get(v) for v in x)
    return None if x is None else env.get(x)


def _bind(b: Builder, node: Node, name: str, env: Mapping[Value, Val]) -> None:
    for r in node.results:
        if isinstance(r.type, TensorType):
            bind_type(b.sizes, r.type, env[r])
        elif not b.sizes.knows(name):
            b.sizes.bind_value(name, env[r])


def emit(
    b: Builder, call: Call, ranges: Mapping[str, Any], depth: int = 0, name: str = ""
) -> list[Val | None]:
    """Translate one call; the results have the call's types, to the element type."""
    start = len(b.nodes)
    outer, b.call = b.call, call
    try:
        found = _attempt(b, call, ranges, depth)
        results = _settle(b, call, found)
    finally:
        b.call = outer
    _label(b, call, start, results, name)
    return results


def _settle(b: Builder, call: Call, found: Any) -> list[Val | None]:
    values = list(found) if isinstance(found, (list, tuple)) else [found]
    values += [None] * (len(call.results) - len(values))
    results: list[Val | None] = []
    for value, type in zip(values, call.results, strict=False):
        if value is None or isinstance(type, NoneType):
            results.append(None)
            continue
        wanted = onnx_dtype(type)
        if value.dtype is not None and value.dtype != wanted:
            value = b.op("Cast", value, to=wanted)
        known = value.meta.get("type")
        if (
            known is not None and isinstance(known, TensorType) != isinstance(type, TensorType)
        ) or (
            isinstance(known, TensorType)
            and isinstance(type, TensorType)
            and known.dtype != type.dtype
        ):
            value = b.op("Identity", value)
        value.dtype = wanted
        results.append(b.retype(value, type))
    return results


def _label(b: Builder, call: Call, start: int, results: Sequence[Val | None], name: str) -> None:
    """Names and provenance of the nodes that a call became."""
    root = b.root
    loc = call.loc
    base = name or call.op.split(".")[1]
    props = {"dfc.op": call.op}
    if loc is not None and loc.module:
        props["dfc.module"] = loc.module
    if loc is not None and loc.file:
        props["dfc.loc"] = f"{loc.file}:{loc.line}"
    if name:
        for r in results:
            if r is not None and r.name is None:
                r.name = root.claim(base)
    for node in b.nodes[start:]:
        if "dfc.op" not in node.metadata_props or name:
            node.metadata_props.update(props)
        if not name:
            continue
        for o in node.outputs:
            if o.name is None:
                o.name = root.claim(f"{base}.{node.op_type.lower()}")
        if node.name is None and node.outputs:
            node.name = node.outputs[0].name


def _attempt(b: Builder, call: Call, ranges: Mapping[str, Any], depth: int) -> Any:
    if _needs_widening(call):
        return _widened(b, call, ranges, depth)
    reasons: list[str] = []
    start = len(b.nodes)
    for way in (_own, _torchlib, _declared):
        try:
            return way(b, call)
        except NoTranslation as e:
            del b.nodes[start:]
            if str(e):
                reasons.append(str(e))
    types = tuple(
        tuple(None if v is None else v.meta["type"] for v in x)
        if isinstance(x, tuple)
        else None
        if x is None
        else x.meta["type"]
        for x in call.operands
    )
    if depth < _MAX_DEPTH:
        inner = decompose(call.op, types, call.attributes, ranges)
        if isinstance(inner, Graph):
            return _inlined(b, call, inner, ranges, depth)
        reasons.append(inner)
    raise b.refuse("; ".join(dict.fromkeys(reasons)))


def _own(b: Builder, call: Call) -> Any:
    if call.op in onnx_ops.REFUSED:
        raise b.refuse(onnx_ops.REFUSED[call.op])
    is_complex = any(b.is_complex(v) for v in call.values) or any(
        isinstance(t, TensorType) and t.dtype.is_complex for t in call.results
    )
    entry = (onnx_ops.COMPLEX if is_complex else onnx_ops.REAL).get(call.op)
    if entry is None:
        raise NoTranslation("")
    return entry.function(b, *[_argument(call, name) for name in entry.wants])


def _argument(call: Call, wanted: str) -> Any:
    if wanted == "call":
        return call
    if wanted == "x":
        return _first(call)
    if wanted in call.attributes:
        value = call.attributes[wanted]
        if value is not None:
            return value
    info = onnx_info(call.op)
    for o, x in zip(info, call.operands, strict=False):
        if o == wanted:
            return x
    if wanted not in call.attributes and wanted not in info:
        raise AssertionError(f"{call.op} has no argument {wanted}")
    return None


def _first(call: Call) -> Any:
    """The op's first argument: a tensor, or a number where the schema or the call has one."""
    from dfc.ir.op import lookup

    info = lookup(call.op)
    name = info._arguments[0].name if isinstance(info, AtenOp) and info._arguments else ""
    names = onnx_info(call.op)
    if names and (name == names[0] or not name) and call.operands[0] is not None:
        return call.operands[0]
    return call.attributes.get(name)


def onnx_info(op: str) -> tuple[str, ...]:
    from dfc.ir.op import lookup

    return tuple(o.name for o in lookup(op).operands)


def _torchlib(b: Builder, call: Call) -> Any:
    if any(isinstance(t, TensorType) and t.dtype.is_complex for t in call.results) and not any(
        b.is_complex(v) for v in call.values
    ):
        raise NoTranslation("")
    return translate(b, call)


def _declared(b: Builder, call: Call) -> Any:
    """A declared op by its own lowering to ONNX."""
    from dfc.ir.op import DeclaredOp, lookup

    if call.op.startswith("aten."):
        raise NoTranslation("")
    info = lookup(call.op)
    lowering = getattr(info.cls, "to_onnx", None) if isinstance(info, DeclaredOp) else None
    if lowering is None:
        raise NoTranslation("the op says nothing of ONNX")
    assert isinstance(info, DeclaredOp)
    found = info.instance(call.attributes).to_onnx(b, *call.operands)  # type: ignore[attr-defined]
    if found is None:
        raise NoTranslation("")
    return found


def _inlined(
    b: Builder, call: Call, inner: Graph, ranges: Mapping[str, Any], depth: int
) -> list[Any]:
    env: dict[Value, Val] = dict(zip(inner.inputs, call.values, strict=True))
    for p in inner.parameters.values():
        assert p.data is not None
        tensor = torch_tensor(p.data.tensor(), p.name)
        env[p] = b.array(tensor.numpy(), tensor.dtype)
        if "type" not in env[p].meta:
            env[p].meta["type"] = p.type
    for node in inner.nodes:
        if node.op.split(".")[1] in ASSERTIONS:
            continue
        part = Call(
            node.op,
            tuple(_read(x, env) for x in node.inputs),
            node.attributes,
            tuple(r.type for r in node.results),
            call.loc,
            node,
        )
        for r, value in zip(node.results, emit(b, part, ranges, depth + 1), strict=True):
            if value is not None:
                env[r] = value
    return [env[v] for v in inner.outputs]


# Half precision


def _needs_widening(call: Call) -> bool:
    base = call.op.split(".")[1]
    if call.graph_node is not None and call.graph_node.graphs:
        return False
    if base in _MOVES:
        return False
    types = [v.meta.get("type") for v in call.values] + list(call.results)
    return any(isinstance(t, TensorType) and t.dtype.name in _WIDE for t in types)


def _widened(b: Builder, call: Call, ranges: Mapping[str, Any], depth: int) -> list[Any]:
    """Cast to f32, translate, and leave it to `_settle` to cast back."""

    def wide(v: Val | None) -> Val | None:
        if v is None:
            return None
        type = v.meta["type"]
        if not isinstance(type, TensorType) or type.dtype.name not in _WIDE:
            return v
        key = ("wide", id(v))
        found = b.lookup(key)
        if found is None:
            target = type.with_dtype(DTYPES[_WIDE[type.dtype.name]])
            found = b.retype(b.cast_to(v, target.dtype), target)
            b.shared[key] = found
        return found  # type: ignore[no-any-return]

    operands = tuple(
        tuple(wide(v) for v in x) if isinstance(x, tuple) else wide(x) for x in call.operands
    )
    inner = call.widened(operands, _WIDE)
    return emit(b, inner, ranges, depth)


__all__ = [
    "OPSET", "build_onnx", "emit", "export_onnx", "input_names", "is_random", "output_names",
    "why_not",
]  # fmt: skip
