"""A pass of one's own: Whisper multiplies every query by a constant, so the weights may as well.

python examples/custom_pass.py
dfc compile examples/custom_pass.py:build --use examples/custom_pass.py -p fold_scale
dfc explain examples/custom_pass.py:build --use examples/custom_pass.py --pass fold_scale
"""

from __future__ import annotations

from typing import Any

import dfc


@dfc.pass_
class FoldScale(dfc.Pass):
    """Multiply the weights of a linear layer by the constant that its result is multiplied by.

    Needs:    constant weights, and a layer whose result nothing else reads.
    Ensures:  no such product is left.
    """

    name = "fold_scale"  # what a recipe calls it
    numerics = dfc.close(1e-5)  # it rounds in another place; dfc proves that it is no more
    largest: float = 1e4  # an option: `fold_scale with largest=10`

    def run(self, graph: dfc.Graph, ctx: dfc.Context) -> int:
        changes = 0
        for product in graph.nodes:
            layer = product.inputs[0].node if product.op == "aten.mul.Scalar" else None
            if layer is None or layer.op != "aten.linear.default":
                continue
            x, *weights = layer.inputs
            factor = product.attributes["other"]
            if layer.result.use_count > 1 or abs(factor) > self.largest:
                ctx.decided(product, "kept", "others read the layer, or the factor is too large")
                continue
            ctx.decided(product, "folded", f"the weights hold the factor {factor}", layer.result)
            scaled = [w and graph.add_constant(f"{w.name}.scaled", w.data.tensor() * factor)
                      for w in weights]  # fmt: skip
            graph.set_inputs_of(layer, [x, *scaled])
            graph.replace(product, layer.results)
            changes += 1
        return changes


def build() -> tuple[Any, tuple[Any, ...]]:
    import torch
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    torch.manual_seed(0)
    sizes = dict(d_model=64, encoder_ffn_dim=128, num_mel_bins=16, max_source_positions=50)
    config = WhisperConfig(encoder_layers=4, encoder_attention_heads=4, **sizes)
    return WhisperEncoder(config).eval(), (torch.randn(1, 16, 100),)


if __name__ == "__main__":
    model, args = build()
    compiled = dfc.compile(model, args, passes=[FoldScale(), "dce"], engine="eager")
    print(compiled.report)
    print(dfc.explain(model, args, pass_="fold_scale", passes=[FoldScale()]))
