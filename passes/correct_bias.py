"""Move the biases of quantized layers so that their results have the means that they had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfc.compress.batches import batches_of
from dfc.compress.bias import MEANS, correct, first_samples, is_correctable
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.rewrite.pass_ import CHANGES, KEPT, Context, Data, Pass

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Add to each layer's bias what rounding took from the mean of its channels.

    `quantize` with data does it once by itself. This step does it again, after other steps that
    change weights: `sparsify`, or another `quantize`. Layers are corrected in order, each behind
    those before it, and the means are those of the model before `quantize`.

    Needs:    a `quantize` step with data before it in the recipe, and the same data.
    Ensures:  the channels' means over the first samples of the data are what they were.
    Keeps:    all weights; layers whose bias is computed.
    Cost:     one run of 128 samples, all of them in memory at once.
    Raises:   DfcError D085 when no `quantize` step with data came before; D080..D084 for the data.
    Source:   Nagel et al., data-free quantization, arXiv 1906.04721, section 4.2.
    """

    name = "correct_bias"
    numerics = CHANGES
    idempotent = False
    phrases = {"using": "data"}  # noqa: RUF012

    data: Data

    def run(self, graph: Graph, ctx: Context) -> int:
        before: dict[str, Tensor] = ctx.products.get(MEANS, {})
        if not before:
            help = "put it behind `quantize int8 using DATA`, in one recipe"
            raise DfcError("D085", "`correct_bias` has no means to restore", help=help)
        batches: list[list[Any]] = first_samples(batches_of(ctx, self.data, graph))
        layers: dict[Node, Tensor] = {}
        for node in graph.nodes:
            mean = before.get(node.results[0].name) if node.results else None
            if mean is None:
                continue
            if is_correctable(node):
                layers[node] = mean
            else:
                ctx.decided(node, KEPT, "its bias is computed")
        for node, shift in correct(graph, layers, batches).items():
            ctx.decided(node, "corrected", f"by up to {float(shift.abs().max()):.3g}")
        return len(layers)
