"""Architectures that hardly any other resembles: of each the part that is its own."""

from __future__ import annotations

from typing import Any

from tests.zoo import Built, batch, dim, zoo
from tests.zoo.huggingface import TINY, decoder, ids, model_of, padding_mask

_DECODER = TINY | {
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2
}  # fmt: skip


@zoo(
    "several streams per token of which one is updated, embeddings of each layer's own, top-k gates"
)
def gemma3n() -> Built:
    own = {
        "vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 8, "altup_num_inputs": 2,
        "laurel_rank": 4, "num_kv_shared_layers": 0, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.5, 0.0],
    }  # fmt: skip
    return decoder(model_of("Gemma3nForCausalLM", "Gemma3nTextConfig", **_DECODER, **own))


@zoo("keys and values from one latent vector, rotary in a part of each head, shared experts")
def deepseek_v2() -> Built:
    own = {
        "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1,
    }  # fmt: skip
    return decoder(model_of("DeepseekV2ForCausalLM", "DeepseekV2Config", **TINY, **own))


@zoo("attention and a state-space layer beside each other, with multipliers of every part")
def falcon_h1() -> Built:
    own = {
        "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
        "mamba_n_groups": 1, "mamba_chunk_size": 8,
    }  # fmt: skip
    return decoder(model_of("FalconH1ForCausalLM", "FalconH1Config", **_DECODER, **own))


@zoo("lightning attention: blocks of linear attention with decay, and experts")
def minimax() -> Built:
    own = {
        "num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 8,
        "layer_types": ["linear_attention", "full_attention"],
    }  # fmt: skip
    return decoder(model_of("MiniMaxForCausalLM", "MiniMaxConfig", **_DECODER, **own))


@zoo("exponential gates with a running maximum")
def xlstm() -> Built:
    own = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2}
    return decoder(model_of("xLSTMForCausalLM", "xLSTMConfig", num_blocks=1, **own))


@zoo("a few latent vectors that attend to all inputs, and outputs that attend to them")
def perceiver() -> Built:
    own = {
        "vocab_size": 99, "d_latents": 16, "num_latents": 8, "d_model": 16, "num_blocks": 1,
        "num_self_attends_per_block": 2, "num_self_attention_heads": 2,
        "num_cross_attention_heads": 2, "max_position_embeddings": 16,
    }  # fmt: skip
    return Built.of(
        model_of("PerceiverForMaskedLM", "PerceiverConfig", **own),
        lambda rows: {"inputs": ids(rows, 16), "attention_mask": padding_mask(rows, 16)},
        (2,),
        (3,),
        dynamic_shapes={"inputs": {0: batch()}, "attention_mask": {0: batch()}},
    )


@zoo("a series in patches, normalized by its own mean and spread, which come back at the end")
def patchtst() -> Built:
    import torch

    own = {
        "num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8,
        "prediction_length": 4, "d_model": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "ffn_dim": 32,
    }  # fmt: skip
    return Built.of(
        model_of("PatchTSTForPrediction", "PatchTSTConfig", **own),
        lambda rows: {"past_values": torch.rand(rows, 32, 2)},
        (2,),
        (3,),
        dynamic_shapes={"past_values": {0: batch()}},
    )


@zoo("convolutions over sound of any length, then an encoder and a decoder with rotary positions")
def moonshine() -> Built:
    import torch

    own = {
        "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64,
        "encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1,
        "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4,
        "max_position_embeddings": 64, "use_cache": False,
    }  # fmt: skip

    def make(rows: int, samples: int) -> dict[str, Any]:
        return {"input_values": torch.randn(rows, samples), "decoder_input_ids": ids(rows, 6)}

    samples = dim("samples", 9000, min=2000)
    return Built.of(
        model_of("MoonshineForConditionalGeneration", "MoonshineConfig", **own),
        make,
        (2, 4000),
        (3, 4500),
        dynamic_shapes={
            "input_values": {0: batch(), 1: samples},
            "decoder_input_ids": {0: batch()},
        },
    )


@zoo("speech from text: durations are drawn, and say how long the sound is")
def vits() -> Built:
    own = {
        "vocab_size": 38, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "ffn_dim": 32, "flow_size": 16, "spectrogram_bins": 9, "upsample_initial_channel": 16,
        "upsample_rates": [4, 4], "upsample_kernel_sizes": [8, 8], "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3]], "prior_encoder_num_flows": 2,
        "prior_encoder_num_wavenet_layers": 1, "posterior_encoder_num_wavenet_layers": 1,
        "duration_predictor_num_flows": 2, "duration_predictor_filter_channels": 16,
    }  # fmt: skip
    model = model_of("VitsModel", "VitsConfig", **own)
    return Built.of(model, lambda rows: {"input_ids": ids(rows, 8, vocab=38)}, (1,))
