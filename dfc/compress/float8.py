"""Weights as eight-bit floats: e4m3 has more digits, e5m2 more range; a scale for each output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.compress.rtn import matrix_of
from dfc.compress.weighted import Use, Weighted
from dfc.compress.weights import storable
from dfc.ir.graph import Graph, Parameter, Value
from dfc.ir.types import DTYPES
from dfc.ops.builder import Builder
from dfc.ops.quantized import LARGEST

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = {"e4m3": "f8e4m3fn", "e5m2": "f8e5m2"}


@dataclass(frozen=True)
class Floats:
    """`codes * scale` is the weight, about: the codes in its own shape, scale [N] or []."""

    codes: Parameter
    scale: Parameter
    error: float  # of the weight, as a share of its norm

    @property
    def nbytes(self) -> int:
        return sum(int(p.tensor_type.nbytes) for p in (self.codes, self.scale))  # type: ignore[arg-type, misc]


def store(graph: Graph, layer: Weighted, format: str, per_channel: bool) -> Floats:
    """Add a weight's codes and scales to the graph, under names made of its own.

    The largest weight of each output, or of all, becomes the largest number of the format.
    """
    name, dtype = layer.weight.name, layer.weight.tensor_type.dtype
    w = matrix_of(layer)
    largest = w.abs().amax(1) if per_channel else w.abs().amax()
    scale = (largest / LARGEST[FORMATS[format]]).masked_fill(largest == 0, 1.0)
    # What dequantize gives a convolution has the type of the scale.
    stored = scale.to(dtype.to_torch()) if layer.is_conv else storable(scale, dtype)
    codes, error = _encoded(w, stored, FORMATS[format])
    shape = tuple(layer.weight.tensor_type.shape) if layer.is_conv else layer.shape
    return Floats(
        graph.add_constant(f"{name}.codes", codes.reshape(shape)),  # type: ignore[arg-type]
        graph.add_constant(f"{name}.scale", stored),
        error,
    )


def _encoded(w: Tensor, scale: Tensor, dtype: str) -> tuple[Tensor, float]:
    by = scale.to(w.dtype)
    by = by[:, None] if by.dim() else by
    codes = (w / by).clamp(-LARGEST[dtype], LARGEST[dtype]).to(DTYPES[dtype].to_torch())
    error = (codes.to(w.dtype) * by - w).norm() / w.norm().clamp(min=1e-30)
    return codes, float(error)


def read(graph: Graph, use: Use, stored: Floats, activations: str) -> Value:
    """Put the op that reads the codes in the place of one that read the weight; its result."""
    b, node = Builder(graph, use.node), use.node
    if use.kind == "conv":
        axis = {"axis": 0} if stored.scale.tensor_type.rank else {}
        weight = b("dfc.dequantize", stored.codes, stored.scale, **axis)
        graph.set_inputs_of(node, [node.inputs[0], weight, *node.inputs[2:]])
        return node.results[0]
    made = b("dfc.linear_f8", use.x, stored.codes, stored.scale, use.bias, activations=activations)
    name = node.results[0].name
    graph.replace(node, [made])
    graph.rename(made, name)
    return made
