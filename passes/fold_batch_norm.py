"""Fold inference batch norm into the convolution or linear layer before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.compress.weights import forget
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.rewrite.pass_ import KEPT, Context, Pass, Quota, close

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
    Ensures:  no such batch norm is left, nor a constant that it alone read.
    Keeps:    weights that something else reads (the scaled ones are new parameters).
    Why:      the norm reads and writes the whole activation; folded, it costs nothing.
    """

    name = "fold_batch_norm"
    numerics = close(1e-5)
    limit: int | None = None  # fold at most this many; bisects a miscompile
    skip: tuple[int, ...] = ()  # folds by number that are left out: those found to be wrong

    def run(self, graph: Graph, ctx: Context) -> int:
        quota = Quota(self.limit, self.skip)
        for norm in graph.nodes:
            if norm.op not in _NORMS:
                continue
            reason = _why_not(graph, norm)
            if reason is not None:
                ctx.decided(norm, KEPT, reason)
                continue
            if not quota.allows(norm):
                continue
            source = norm.inputs[0]
            assert isinstance(source, Value)
            ctx.decided(norm, "folded", "scales the weights of the layer before it", source)
            _fold(graph, norm, source)
        return quota.done


def _why_not(graph: Graph, norm: Node) -> str | None:
    """Why a norm cannot be folded into the layer before it, None when it can."""
    source = norm.inputs[0]
    if not isinstance(source, Value) or source.node is None:
        return "its input is no layer's result but the graph's own input"
    layer = source.node
    if layer.op not in _LAYERS:
        return f"its input %{source.name} is no convolution or linear layer but {layer.op}"
    if source.use_count != 1:
        return f"%{source.name} is read by others as well: {_readers(source, norm)}"
    if norm.attributes.get("training", False):
        return "it is in training mode: call `.eval()` on the model"
    if layer.attributes.get("transposed", False):
        return f"%{source.name} is a transposed convolution"
    if any(r.use_count for r in norm.results[1:]):
        return "its statistics are read as well"
    weight, bias = layer.inputs[1], layer.inputs[2]
    gamma, beta, mean, variance = norm.inputs[1:5]
    mutated = {m.target for m in graph.mutations}
    for x in (weight, bias, gamma, beta, mean, variance):
        if x is None:
            continue
        if not isinstance(x, Parameter):
            return f"%{getattr(x, 'name', x)} is computed, not a constant"
        if x.data is None:
            return f"!{x.name} has no numbers: the model has no weights"
        if x in mutated:
            return f"the model writes to !{x.name}"
    if not isinstance(weight, Parameter) or mean is None or variance is None:
        return "it has no running statistics"
    if source.tensor_type.rank != weight.tensor_type.rank:
        # sequences into linear, no batch into conv
        return "dimension 1, which it normalises, is not the layer's output channels"
    return None


def _readers(source: Value, norm: Node) -> str:
    others = [n for n in source.users if n is not norm]
    shown = [f"%{n.results[0].name} ({n.op})" if n.results else "an output" for n in others]
    return ", ".join(shown) or "twice by the norm itself"


def _fold(graph: Graph, norm: Node, source: Value) -> None:
    layer = source.node
    assert layer is not None
    weight, bias = layer.inputs[1], layer.inputs[2]
    gamma, beta, mean, variance = norm.inputs[1:5]
    names = [x.name for x in (weight, norm.results[0]) if isinstance(x, Value)]
    scaled, shifted = _fused(weight, bias, gamma, beta, mean, variance, norm.attributes["eps"])
    new_weight = graph.add_constant(f"{names[0]}.{norm.results[0].name}", scaled)
    new_bias = graph.add_constant(f"{names[0]}.{norm.results[0].name}.bias", shifted)
    graph.set_inputs_of(layer, [layer.inputs[0], new_weight, new_bias, *layer.inputs[3:]])
    graph.replace_uses(norm.results[0], source)
    graph.erase(norm)
    for x in dict.fromkeys((weight, bias, gamma, beta, mean, variance)):
        if isinstance(x, Parameter):
            forget(graph, x)


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
