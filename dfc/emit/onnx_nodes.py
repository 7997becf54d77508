"""Nodes to ONNX, one after the other: our own translation first, then torchlib's, then the op's.

What none of them takes is decomposed, and its parts are translated. bfloat16 is computed in f32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dfc.emit import onnx_ops
from dfc.emit.decompose import decompose
from dfc.emit.onnx_builder import Builder, Call, NoTranslation, Operand, Val
from dfc.emit.onnx_torchlib import translate
from dfc.emit.onnx_types import onnx_dtype
from dfc.emit.onnx_values import bind_type, torch_tensor
from dfc.ir.graph import Graph, Node, Value
from dfc.ir.op import DeclaredOp, lookup
from dfc.ir.types import DTYPES, NoneType, TensorType
from dfc.ops.aten import ASSERTIONS, AtenOp

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
_ROUNDED = {"bf16": "f32", "f16": "f32"}  # of ops that round rows to int8: they mean float32


def translate_nodes(
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
    info = lookup(call.op)
    name = info._arguments[0].name if isinstance(info, AtenOp) and info._arguments else ""
    names = onnx_info(call.op)
    if names and (name == names[0] or not name) and call.operands[0] is not None:
        return call.operands[0]
    return call.attributes.get(name)


def onnx_info(op: str) -> tuple[str, ...]:
    return tuple(o.name for o in lookup(op).operands)


def _torchlib(b: Builder, call: Call) -> Any:
    if any(isinstance(t, TensorType) and t.dtype.is_complex for t in call.results) and not any(
        b.is_complex(v) for v in call.values
    ):
        raise NoTranslation("")
    return translate(b, call)


def _declared(b: Builder, call: Call) -> Any:
    """A declared op by its own lowering to ONNX."""
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
    return any(isinstance(t, TensorType) and t.dtype.name in _wide_of(call) for t in types)


def _wide_of(call: Call) -> Mapping[str, str]:
    return _ROUNDED if call.attributes.get("activations") == "int8" else _WIDE


def _widened(b: Builder, call: Call, ranges: Mapping[str, Any], depth: int) -> list[Any]:
    """Cast to f32, translate, and leave it to `_settle` to cast back."""
    target_of = _wide_of(call)

    def wide(v: Val | None) -> Val | None:
        if v is None:
            return None
        type = v.meta["type"]
        if not isinstance(type, TensorType) or type.dtype.name not in target_of:
            return v
        key = ("wide", id(v))
        found = b.lookup(key)
        if found is None:
            target = type.with_dtype(DTYPES[target_of[type.dtype.name]])
            found = b.retype(b.cast_to(v, target.dtype), target)
            b.shared[key] = found
        return found  # type: ignore[no-any-return]

    operands = tuple(
        tuple(wide(v) for v in x) if isinstance(x, tuple) else wide(x) for x in call.operands
    )
    inner = call.widened(operands, target_of)
    return emit(b, inner, ranges, depth)
