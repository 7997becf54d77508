"""Inputs, parameters and outputs of an ONNX graph: their names, types and numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from onnxscript import ir

from dfc.emit.onnx_builder import Builder, Root, Val
from dfc.emit.onnx_sizes import Sizes
from dfc.emit.onnx_torchlib import symbolic_value
from dfc.emit.onnx_types import onnx_dtype, onnx_shape
from dfc.errors import DfcError
from dfc.ir.expr import Expr
from dfc.ir.graph import Graph, Parameter, Value
from dfc.ir.tree import Seq, paths
from dfc.ir.types import TensorType, Type

_PAST = "past_key_values."


def typed(root: Root, name: str, type: Type) -> Val:
    value = symbolic_value(root.opset)
    value.name = name
    value.dtype = onnx_dtype(type)
    value.shape = onnx_shape(type)
    value.meta["type"] = type
    return value


def write_inputs(graph: Graph, root: Root, sizes: Sizes, env: dict[Value, Val]) -> list[Val]:
    names = input_names(graph)
    found = []
    for v, name in zip(graph.inputs, names, strict=True):
        value = env[v] = typed(root, root.claim(name), v.type)
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
    """A name for each flat output, then `<target>.new` for each mutation.

    A cache that comes back is `present.0.key`: runtimes of decoders look for that name, and
    `past_key_values.0.key` is the input's.
    """
    prefix = "output" if isinstance(graph.output_tree, Seq) else ""
    names = [
        f"present.{p.removeprefix(_PAST)}" if p.startswith(_PAST) else p or "output"
        for p in paths(graph.output_tree, prefix)
    ]
    by_input = dict(zip(graph.inputs, input_names(graph), strict=True))
    return names + [f"{by_input.get(m.target, m.target.name)}.new" for m in graph.mutations]


def claimed_output_names(graph: Graph, root: Root) -> Iterator[str]:
    for name in output_names(graph):
        yield root.claim(name)


def write_parameters(graph: Graph, root: Root, env: dict[Value, Val]) -> list[Val]:
    found = []
    mutated = {m.target for m in graph.mutations}
    inner = _nested_parameters(graph)
    for p in [*graph.parameters.values(), *inner]:
        if not p._users and p not in mutated:
            continue
        value = env[p] = typed(root, root.claim(p.name), p.type)
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
            help="compile it with its weights: `dfc compile MODEL --weights FILE.safetensors`, "
            'or dfc.compile(..., weights="FILE.safetensors")',
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


def write_outputs(
    b: Builder, graph: Graph, env: Mapping[Value, Val], names: Sequence[str]
) -> list[Val]:
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
