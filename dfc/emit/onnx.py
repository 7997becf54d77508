"""Graph to ONNX: node by node, our own translation first, then torchlib's, then a decomposition.

The model is a function without state. A buffer or input that the graph writes to has its final
value as one more output, `<name>.new`, after the outputs of the call. A mutated buffer is also an
optional input: its initializer is the first state, and a caller who keeps state feeds back what
came out. No optimizer runs over the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from onnxscript import ir

from dfc.emit import onnx_ops
from dfc.emit.decompose import why_indivisible
from dfc.emit.onnx_builder import Builder, Root, Val
from dfc.emit.onnx_nodes import emit, translate_nodes
from dfc.emit.onnx_ops.blocked import FIRST_OPSET
from dfc.emit.onnx_ops.float8 import FIRST_OPSET as FIRST_FLOAT8
from dfc.emit.onnx_sizes import Sizes
from dfc.emit.onnx_torchlib import has_translation, model_functions
from dfc.emit.onnx_values import (
    claimed_output_names,
    input_names,
    output_names,
    write_inputs,
    write_outputs,
    write_parameters,
)
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.op import DeclaredOp
from dfc.ir.types import TensorType
from dfc.ops.aten import ASSERTIONS, AtenOp

if TYPE_CHECKING:
    from dfc.emit.onnx_export import Written

OPSET = 20  # of files: every runtime of the last years reads it
OLDEST_OPSET = 7  # that ONNX Runtime promises to run; before it, operands did not broadcast
ENGINE_OPSET = 23  # of models for the ONNX Runtime at hand: the first with Attention
IR_VERSION = 10


def build_onnx(
    graph: Graph,
    *,
    opset: int = OPSET,
    contrib: bool = False,
    name: str | None = None,
    saturates: bool = True,
) -> ir.Model:
    """The graph as an ONNX model whose initializers refer to the parameters' own tensors.

    With `contrib`, operators of ONNX Runtime's own may stand where they are faster. The processor
    that runs the model `saturates` where it adds pairs of 8-bit products in 16 bits: then no such
    sum may overflow.

    Raises:  DfcError X001 for an op without a translation, X004 for a parameter without data,
             X005 for an opset that does not exist.
    """
    onnx_ops.load()
    require_opset(opset)
    _require_types(graph, opset)
    root = Root(opset, contrib, saturates)
    sizes = Sizes()
    b = Builder(root, sizes)
    env: dict[Value, Val] = {}
    inputs = write_inputs(graph, root, sizes, env)
    names = list(claimed_output_names(graph, root))
    initializers = write_parameters(graph, root, env)
    root.ranges = ranges = dict(graph.ranges)
    translate_nodes(b, graph, env, ranges)
    outputs = write_outputs(b, graph, env, names)
    stateful = [env[m.target] for m in graph.mutations if isinstance(m.target, Parameter)]
    made = ir.Graph(
        [*inputs, *stateful],
        outputs,
        nodes=[*root.constant_nodes, *b.nodes],
        initializers=[*initializers, *root.derived.values()],
        name=name or graph.name,
        opset_imports=root.domains,
    )
    model = ir.Model(made, ir_version=ir_version(opset), producer_name="dfc")
    if root.functions:
        _inline(model, root)
    _drop_unused(made, [*initializers, *root.derived.values()], stateful)
    return model


def _drop_unused(graph: ir.Graph, weights: Iterable[Val], inputs: Iterable[Val]) -> None:
    """Take out what nothing reads, and such of the weights, but for those that are inputs too: dead
    nodes, and what a translation made before it turned out not to fit.

    Why:  ONNX Runtime warns of each when it loads the file, refuses to be handed a weight that it
          has dropped, and weights would lie in the file twice.
    """
    outputs, kept = set(graph.outputs), set(inputs)

    def is_read(v: ir.Value) -> bool:
        return v in outputs or any(u.node.graph is not None for u in v.uses())

    for node in reversed(graph):
        if not any(map(is_read, node.outputs)):
            graph.remove(node)
    for v in weights:
        if v.name is not None and v not in kept and not is_read(v):
            graph.initializers.pop(v.name, None)


def require_opset(opset: object) -> None:
    """Refuse what is no opset that the onnx library knows and ONNX Runtime runs.

    Raises:  DfcError X005 (status 2).
    """
    from onnx.defs import onnx_opset_version

    known = onnx_opset_version()
    if type(opset) is not int or not OLDEST_OPSET <= opset <= known:
        message = f"an opset is a whole number from {OLDEST_OPSET} to {known}, got {opset!r}"
        raise DfcError("X005", message, help=f"{OPSET} is usual", status=2)


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
        if n.op.startswith(("dfc.linear_w", "dfc.grouped_linear_w"))
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


__all__ = [
    "OPSET", "build_onnx", "emit", "export_onnx", "input_names", "is_random", "output_names",
    "why_not",
]  # fmt: skip
