"""Mixtures of experts: routing by top-k, experts by loop, by batched and by grouped matmul."""

from __future__ import annotations

from typing import Any

from tests.zoo import Built, batch, sequence, zoo
from tests.zoo.huggingface import TINY, decoder, model_of

_GROUPED = TINY | {"num_key_value_heads": 2}


def _mixtral(experts: str) -> Built:
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": experts}
    return decoder(model_of("MixtralForCausalLM", "MixtralConfig", **_GROUPED | options))


@zoo("a Python loop over the experts that were hit: data-dependent trip count and sizes")
def mixtral_loop() -> Built:
    return _mixtral("eager")


@zoo("each token gathers its experts' weights for a batched matmul")
def mixtral_batched() -> Built:
    return _mixtral("batched_mm")


@zoo("tokens sorted by expert, one grouped matmul with offsets")
def mixtral_grouped() -> Built:
    return _mixtral("grouped_mm")


_QWEN = _GROUPED | {
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
}


@zoo("a shared expert behind a sigmoid gate, beside the routed ones")
def qwen2_moe() -> Built:
    options = _QWEN | {"experts_implementation": "batched_mm"}
    return decoder(model_of("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **options))


@zoo("router logits returned per layer, load-balancing loss")
def qwen2_moe_router_loss() -> Built:
    options = _QWEN | {"experts_implementation": "grouped_mm", "output_router_logits": True}
    return decoder(model_of("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **options))


@zoo("top-k probabilities renormalised; norms on queries and keys")
def qwen3_moe() -> Built:
    options = _QWEN | {"head_dim": 8, "experts_implementation": "grouped_mm"}
    options.pop("shared_expert_intermediate_size")
    return decoder(model_of("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **options))


@zoo("clamped SwiGLU, biased experts, attention with a learned sink column")
def gpt_oss() -> Built:
    options = _GROUPED | {
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 4,
        "experts_implementation": "batched_mm",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return decoder(model_of("GptOssForCausalLM", "GptOssConfig", **options))


@zoo("latent attention: compressed keys and values; groups of experts chosen first")
def deepseek_v3() -> Built:
    options = TINY | {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "experts_implementation": "grouped_mm",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return decoder(model_of("DeepseekV3ForCausalLM", "DeepseekV3Config", **options))


@zoo("each token to one expert with a capacity limit, in an encoder-decoder")
def switch_transformers() -> Built:
    from tests.zoo.huggingface import encoder

    config = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
    config |= {"num_layers": 2, "num_sparse_encoder_layers": 1, "num_experts": 4}
    return encoder(model_of("SwitchTransformersEncoderModel", "SwitchTransformersConfig", **config))


@zoo("experts written by hand: every expert runs on every token, weighted by its gate")
def dense_experts() -> Built:
    import torch
    from torch import nn

    class DenseExperts(nn.Module):
        def __init__(self, width: int = 16, experts: int = 4, chosen: int = 2) -> None:
            super().__init__()
            self.chosen = chosen
            self.gate = nn.Linear(width, experts, bias=False)
            self.up = nn.Parameter(torch.randn(experts, width, 2 * width) * 0.2)
            self.down = nn.Parameter(torch.randn(experts, 2 * width, width) * 0.2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight, index = self.gate(x).softmax(-1).topk(self.chosen, dim=-1)
            weight = weight / weight.sum(-1, keepdim=True)
            gates = torch.zeros_like(self.gate(x)).scatter_(-1, index, weight)
            hidden = torch.einsum("btd,edh->bteh", x, self.up).relu()
            return torch.einsum("bteh,ehd,bte->btd", hidden, self.down, gates)

    return _activations(DenseExperts())


@zoo("the classic loop: boolean masks select each expert's tokens, index_add_ puts them back")
def looped_experts() -> Built:
    import torch
    from torch import nn

    class LoopedExperts(nn.Module):
        def __init__(self, width: int = 16, experts: int = 4) -> None:
            super().__init__()
            self.gate = nn.Linear(width, experts, bias=False)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(width, 32), nn.SiLU(), nn.Linear(32, width))
                for _ in range(experts)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.reshape(-1, x.shape[-1])
            weight, index = self.gate(flat).softmax(-1).topk(2, dim=-1)
            out = torch.zeros_like(flat)
            for number, expert in enumerate(self.experts):
                rows, slot = torch.where(index == number)
                out.index_add_(0, rows, expert(flat[rows]) * weight[rows, slot, None])
            return out.reshape(x.shape)

    return _activations(LoopedExperts())


def _activations(model: Any) -> Built:
    import torch

    return Built.of(
        model,
        lambda rows, tokens: (torch.randn(rows, tokens, 16),),
        (2, 8),
        (1, 12),
        (3, 5),
        dynamic_shapes=({0: batch(), 1: sequence(32)},),
    )
