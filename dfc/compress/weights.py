"""Weights as codes: how they were found (a method), how they are stored, and which ops read them.

A method is a module of this package, `dfc.compress.<name>`, with a function

    encode(graph, layers, grid, ctx, data) -> Mapping[Parameter, Rounded]

that gives codes for the weight of each layer; `graph` is the one being quantized, still in floats,
`data` the name of the calibration data or None. A method may change the graph's float values (move
scales from one layer into the next) as long as the graph computes the same. A scheme that is not
about weights alone, `static`, is a module with

    apply(graph, options, ctx) -> int

where `options` is the pass with its fields; it gives how many changes it made.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfc.compress.grid import Grid, Rounded
from dfc.compress.weighted import Use, Weighted, put
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Parameter, Value
from dfc.ir.types import DType
from dfc.ops.builder import Builder
from dfc.ops.codes import groups_of, pack4

if TYPE_CHECKING:
    from torch import Tensor

    from dfc.rewrite.pass_ import Context

Encode = Callable[
    [Graph, Sequence[Weighted], Grid, "Context", str | None], Mapping[Parameter, Rounded]
]
_F16 = (6.104e-5, 65504.0)  # the normal numbers of float16


def find(kind: str, name: str, function: str) -> Any:
    """A method's or scheme's function.

    Raises:  DfcError Q012 when this installation has no such module.
    """
    module = f"dfc.compress.{name}"
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name != module:
            raise
        raise DfcError("Q012", f"the {kind} `{name}` is not there: no module {module}") from e
    return getattr(loaded, function)


@dataclass(frozen=True)
class Stored:
    """Codes and scales as parameters of a graph. `group` is None for one scale a row."""

    codes: Parameter
    scale: Parameter
    zero: Parameter | None
    bits: int
    group: int | None
    columns: int

    @property
    def nbytes(self) -> int:
        parts = (self.codes, self.scale, self.zero)
        return sum(int(p.tensor_type.nbytes) for p in parts if p is not None)  # type: ignore[arg-type, misc]


def store(graph: Graph, layer: Weighted, found: Rounded) -> Stored:
    """Add a weight's codes and scales to the graph, under names made of its own."""
    name, grid = layer.weight.name, found.grid
    k = layer.shape[1]
    dtype = layer.weight.tensor_type.dtype
    # What dequantize gives a convolution has the type of the scale.
    scale = found.scale.to(dtype.to_torch()) if layer.is_conv else storable(found.scale, dtype)
    codes, zero = _packed4(found, k) if grid.bits == 4 else (_bytes(found, layer), None)
    scale = scale if grid.group else scale.reshape(-1)
    if layer.is_experts:
        experts = int(layer.weight.tensor_type.shape[0])  # type: ignore[arg-type]
        codes, scale = (t.reshape(experts, -1, *t.shape[1:]) for t in (codes, scale))
        zero = None if zero is None else zero.reshape(experts, -1, zero.shape[1])
    return Stored(
        graph.add_constant(f"{name}.codes", codes),
        graph.add_constant(f"{name}.scale", scale),
        None if zero is None else graph.add_constant(f"{name}.zero", zero),
        grid.bits, grid.group, k,
    )  # fmt: skip


def storable(scale: Tensor, dtype: DType) -> Tensor:
    """Scales as they are stored: in float16 where all are normal numbers of it, else in the
    weight's dtype. Codes found for these lose nothing by it.

    Why:  a float32 scale for 32 weights of four bits adds a quarter to their size.
    """
    import torch

    sizes = scale.abs()
    fits = bool(((sizes >= _F16[0]) & (sizes <= _F16[1])).all())
    return scale.to(torch.float16 if fits and dtype.name != "bf16" else dtype.to_torch())


def _bytes(found: Rounded, layer: Weighted) -> Tensor:
    """Codes of eight bits, in the shape that the weight had."""
    import torch

    codes = found.codes.to(torch.int8)
    return codes.reshape(tuple(layer.weight.tensor_type.shape)) if layer.is_conv else codes  # type: ignore[arg-type]


def _packed4(found: Rounded, k: int) -> tuple[Tensor, Tensor | None]:
    """Codes of four bits two a byte, whole groups; the codes that fill up the last stand for 0."""
    import torch
    import torch.nn.functional as F

    grid = found.grid
    assert grid.group is not None
    codes = (found.codes - grid.low).to(torch.uint8)  # 0..15
    more = groups_of(k, grid.group) * grid.group - k
    packed = pack4(F.pad(codes, (0, more), value=-grid.low))
    if found.zero is None:
        return packed, None
    return packed, pack4(found.zero.round().to(torch.uint8))


def read_codes(graph: Graph, use: Use, stored: Stored, activations: str) -> Value:
    """Put the op that reads codes in the place of one that read the weight; its result."""
    b, node = Builder(graph, use.node), use.node
    dtype = str(node.results[0].tensor_type.dtype)
    if use.kind == "conv":
        axis = {"axis": 0} if stored.scale.tensor_type.rank == 1 else {"group": stored.group}
        weight = b("dfc.dequantize", stored.codes, stored.scale, **axis)
        graph.set_inputs_of(node, [node.inputs[0], weight, *node.inputs[2:]])
        return node.results[0]
    tables = [stored.codes, stored.scale] + ([stored.zero] if stored.bits == 4 else [])
    if use.kind == "embedding":
        attributes: dict[str, Any] = {"group": stored.group, "dtype": dtype}
        if stored.bits == 4:
            attributes["width"] = stored.columns
        made = b(f"dfc.embedding_w{stored.bits}", use.x, *tables, **attributes)
    elif use.kind == "experts":
        made = b(
            f"dfc.grouped_linear_w{stored.bits}", use.x, node.inputs[2], *tables,
            group=stored.group, activations=activations,
        )  # fmt: skip
    else:
        made = b(
            f"dfc.linear_w{stored.bits}", use.x, *tables, use.bias,
            group=stored.group, activations=activations,
        )  # fmt: skip
    put(graph, node, made)
    return made


def forget(graph: Graph, weight: Parameter) -> None:
    """Drop a weight that nothing reads or writes any more: it must not be saved."""
    written = any(m.target is weight for m in graph.mutations)
    if not weight.use_count and not written and weight.name in graph.parameters:
        graph.drop_parameter(weight.name)


__all__ = ["Encode", "Stored", "find", "forget", "read_codes", "store"]
