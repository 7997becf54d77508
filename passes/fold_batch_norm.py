"""Fold inference batch norm into the convolution or linear layer before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.types import TensorType
from dfc.rewrite.pass_ import Context, Pass, close

if TYPE_CHECKING:
    import torch

_NORMS = {
    "aten.batch_norm.default",
    "aten._native_batch_norm_legit_no_training.default",
}
# op -> which dimension of its weight counts the output channels
_LAYERS = {
    "aten.conv1d.default": 0,
    "aten.conv2d.default": 0,
    "aten.conv3d.default": 0,
    "aten.convolution.default": 0,
    "aten.linear.default": 0,
}


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Scale the weights of a convolution or linear layer by the batch norm that follows it.

    Needs:    batch norm in inference mode, constant weights, a layer with no other reader.
    Ensures:  no such batch norm is left.
    Keeps:    weights that something else reads (the scaled ones are new parameters).
    Why:      the norm reads and writes the whole activation; folded, it costs nothing.
    """

    name = "fold_batch_norm"
    numerics = close(1e-5)

    def run(self, graph: Graph, ctx: Context) -> int:
        return sum(_fold(graph, node) for node in graph.nodes if node.op in _NORMS)


def _fold(graph: Graph, norm: Node) -> int:
    source = norm.inputs[0]
    if not isinstance(source, Value) or source.node is None or source.use_count != 1:
        return 0
    layer = source.node
    if layer.op not in _LAYERS or norm.attributes.get("training", False):
        return 0
    if layer.attributes.get("transposed", False) or any(r.use_count for r in norm.results[1:]):
        return 0
    weight, bias = layer.inputs[1], layer.inputs[2]
    gamma, beta, mean, variance = norm.inputs[1:5]
    mutated = {m.target for m in graph.mutations}
    for x in (weight, bias, gamma, beta, mean, variance):
        if x is not None and (not isinstance(x, Parameter) or x.data is None or x in mutated):
            return 0
    if not isinstance(weight, Parameter) or mean is None or variance is None:
        return 0
    if source.tensor_type.rank != weight.tensor_type.rank:
        return 0  # sequences into linear, no batch into conv: dimension 1 is not the channels
    names = [x.name for x in (weight, norm.results[0]) if isinstance(x, Value)]
    scaled, shifted = _fused(weight, bias, gamma, beta, mean, variance, norm.attributes["eps"])
    new_weight = _parameter(graph, f"{names[0]}.{norm.results[0].name}", scaled)
    new_bias = _parameter(graph, f"{names[0]}.{norm.results[0].name}.bias", shifted)
    graph.set_inputs_of(layer, [layer.inputs[0], new_weight, new_bias, *layer.inputs[3:]])
    graph.replace_uses(norm.results[0], source)
    graph.erase(norm)
    return 1


def _fused(
    weight: object, bias: object, gamma: object, beta: object, mean: object, variance: object,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The scaled weight and bias, computed in float64 and rounded once."""
    import torch

    def wide(x: object, default: float) -> torch.Tensor:
        if x is None:
            return torch.full((), default, dtype=torch.float64)
        assert isinstance(x, Parameter) and x.data is not None
        return x.data.tensor().double()

    w = wide(weight, 0.0)
    scale = wide(gamma, 1.0) / torch.sqrt(wide(variance, 1.0) + eps)
    scale = scale.expand(w.shape[0])
    shifted = wide(beta, 0.0) + (wide(bias, 0.0) - wide(mean, 0.0)) * scale
    assert isinstance(weight, Parameter)
    dtype = weight.tensor_type.dtype.to_torch()
    scaled = w * scale.reshape(-1, *[1] * (w.dim() - 1))
    return scaled.to(dtype), shifted.to(dtype)


def _parameter(graph: Graph, wish: str, tensor: torch.Tensor) -> Parameter:
    from dfc.ir.weights import TensorData

    name, n = wish, 1
    while name in graph.parameters:
        name, n = f"{wish}.{n}", n + 1
    data = TensorData(name, tensor)
    return graph.add_parameter(name, TensorType.of(tensor), "constant", data)
