"""Encoders and decoders of text from Hugging Face, with and without a cache."""

from __future__ import annotations

from typing import Any

from tests.zoo import Built, batch, dim, sequence, zoo
from tests.zoo.huggingface import (
    TINY,
    decode_step,
    decoder,
    encoder,
    ids,
    model_of,
    padding_mask,
)

GROUPED = TINY | {"num_key_value_heads": 2, "head_dim": 8}


@zoo("post-norm encoder with learned positions and a pooler")
def bert() -> Built:
    return encoder(model_of("BertModel", "BertConfig", **TINY))


@zoo("matmul and softmax written out instead of scaled_dot_product_attention")
def bert_eager_attention() -> Built:
    return encoder(model_of("BertModel", "BertConfig", attention="eager", **TINY))


@zoo("the output projection is the embedding table: one weight, two uses")
def bert_masked_lm() -> Built:
    return encoder(model_of("BertForMaskedLM", "BertConfig", **TINY))


@zoo("a loss from labels; integer and float outputs of differing rank")
def bert_classifier_with_loss() -> Built:
    import torch

    def make(rows: int, tokens: int) -> dict[str, Any]:
        return {
            "input_ids": ids(rows, tokens),
            "token_type_ids": torch.randint(0, 2, (rows, tokens)),
            "labels": torch.randint(0, 3, (rows,)),
        }

    shape = {0: batch(), 1: sequence(32)}
    return Built.of(
        model_of("BertForSequenceClassification", "BertConfig", num_labels=3, **TINY),
        make,
        (2, 8),
        (1, 12),
        (3, 5),
        dynamic_shapes={
            "input_ids": shape,
            "token_type_ids": shape,
            "labels": {0: batch()},
        },
    )


@zoo("two outputs split from one tensor")
def bert_question_answering() -> Built:
    return encoder(model_of("BertForQuestionAnswering", "BertConfig", **TINY))


@zoo("positions are a cumulative sum over the tokens that are not padding")
def roberta() -> Built:
    return encoder(model_of("RobertaModel", "RobertaConfig", **TINY))


@zoo("no token types, a head with a ReLU before the classifier")
def distilbert() -> Built:
    config = {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    return encoder(model_of("DistilBertForSequenceClassification", "DistilBertConfig", **config))


@zoo("one layer's weights used by every layer, factorised embeddings, gelu_new")
def albert() -> Built:
    return encoder(model_of("AlbertModel", "AlbertConfig", embedding_size=16, **TINY))


@zoo("projection between embedding and hidden width; a score per token")
def electra() -> Built:
    return encoder(model_of("ElectraForPreTraining", "ElectraConfig", embedding_size=16, **TINY))


@zoo("disentangled attention: gathers over log-bucketed relative positions, sequence-sized")
def deberta_v2() -> Built:
    config = TINY | {
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "conv_kernel_size": 3,
    }
    return encoder(model_of("DebertaV2Model", "DebertaV2Config", **config))


@zoo("disentangled attention whose window into a table of positions lies between two tensors")
def deberta() -> Built:
    config = TINY | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    return encoder(model_of("DebertaModel", "DebertaConfig", max_relative_positions=16, **config))


@zoo("masked tokens become zeros and the others are scaled by how many there are; rotary")
def esm() -> Built:
    config = TINY | {"position_embedding_type": "rotary", "pad_token_id": 1, "mask_token_id": 98}
    return encoder(model_of("EsmForMaskedLM", "EsmConfig", token_dropout=True, **config))


@zoo("relative position bias shared by all layers")
def mpnet() -> Built:
    return encoder(model_of("MPNetModel", "MPNetConfig", **TINY))


@zoo("einsum attention with the relative shift trick on sequence-first tensors")
def xlnet() -> Built:
    config = {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}
    return encoder(model_of("XLNetModel", "XLNetConfig", use_mems_eval=False, **config))


@zoo("local and global attention alternate, rotary, unpadded pre-norm")
def modernbert() -> Built:
    config = TINY | {"local_attention": 8, "num_hidden_layers": 3, "pad_token_id": 0}
    config |= {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return encoder(model_of("ModernBertModel", "ModernBertConfig", **config))


@zoo("a Fourier transform takes the place of attention: complex numbers inside")
def fnet() -> Built:
    return Built.of(
        model_of("FNetModel", "FNetConfig", **TINY),
        lambda rows, tokens: {"input_ids": ids(rows, tokens)},
        (2, 8),
        (1, 12),
        (3, 5),
        dynamic_shapes={"input_ids": {0: batch(), 1: sequence(32)}},
    )


@zoo("grouped 1x1 convolutions instead of linear layers, channels first")
def squeezebert() -> Built:
    return encoder(model_of("SqueezeBertModel", "SqueezeBertConfig", embedding_size=32, **TINY))


@zoo("span-based dynamic convolution by unfold, beside attention")
def convbert() -> Built:
    return encoder(model_of("ConvBertModel", "ConvBertConfig", embedding_size=16, **TINY))


@zoo("pooling inside attention halves the sequence between blocks, then upsamples")
def funnel() -> Built:
    config = {"vocab_size": 99, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64}
    return encoder(
        model_of("FunnelModel", "FunnelConfig", block_sizes=[1, 1], num_decoder_layers=1, **config)
    )


@zoo("sliding chunks by as_strided, data-dependent choice of global tokens")
def longformer() -> Built:
    model = model_of("LongformerModel", "LongformerConfig", attention_window=8, **TINY)
    return Built.of(
        model,
        lambda rows: {"input_ids": ids(rows, 16), "attention_mask": padding_mask(rows, 16)},
        (2,),
        (1,),
        (3,),
        dynamic_shapes={"input_ids": {0: batch()}, "attention_mask": {0: batch()}},
    )


@zoo("mean pooling under the mask and normalisation: how sentence embedders end")
def sentence_encoder() -> Built:
    import torch
    from torch import nn

    class SentenceEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = model_of("BertModel", "BertConfig", **TINY)

        def forward(self, input_ids, attention_mask):
            tokens = self.bert(input_ids=input_ids, attention_mask=attention_mask)[0]
            mask = attention_mask.unsqueeze(-1).expand(tokens.shape).float()
            mean = (tokens * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            return torch.nn.functional.normalize(mean, p=2, dim=1)

    return encoder(SentenceEncoder())


# Decoders.


def _gpt2(name: str = "GPT2LMHeadModel", **options: Any) -> Any:
    config = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return model_of(name, "GPT2Config", **config, **options)


@zoo("Conv1D weights stored transposed, tied output, learned positions")
def gpt2() -> Built:
    return decoder(_gpt2())


@zoo("attention scaled by layer and upcast to float32 inside")
def gpt2_reordered_attention() -> Built:
    return decoder(
        _gpt2(attention="eager", scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True)
    )


@zoo("one decode step with a DynamicCache in and out")
def gpt2_cached() -> Built:
    return decode_step(_gpt2(), heads=4, width=8)


@zoo("cache as nested tuples of tensors, as deployed decoders have it")
def gpt2_tuple_cache() -> Built:
    import torch
    from torch import nn
    from transformers import DynamicCache

    class TupleCache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = _gpt2()

        def forward(self, input_ids, past):
            cache = DynamicCache()
            for layer, (keys, values) in enumerate(past):
                cache.update(keys, values, layer)
            out = self.decoder(input_ids=input_ids, past_key_values=cache, use_cache=True)
            present = tuple((layer.keys, layer.values) for layer in cache.layers)
            return out.logits, present

    def make(rows: int, past: int):
        pairs = tuple(tuple(torch.randn(2, rows, 4, past, 8)) for _ in range(2))
        return ids(rows, 1), pairs

    rows, past = batch(), dim("past", 48)
    pair = ({0: rows, 2: past}, {0: rows, 2: past})
    return Built.of(
        TupleCache(),
        make,
        (2, 8),
        (1, 12),
        (3, 5),
        dynamic_shapes=({0: rows}, (pair, pair)),
    )


@zoo("returns a fresh cache and every hidden state: many outputs, nested")
def gpt2_prefill() -> Built:
    from transformers.integrations.executorch import register_dynamic_cache_export_support

    register_dynamic_cache_export_support()
    return Built.of(
        _gpt2(output_hidden_states=True),
        lambda rows, tokens: {"input_ids": ids(rows, tokens), "use_cache": True},
        (2, 8),
        (1, 12),
        (3, 5),
        dynamic_shapes={"input_ids": {0: batch(), 1: sequence(32)}, "use_cache": None},
    )


@zoo("every second layer attends to a window, without scaling")
def gpt_neo() -> Built:
    config = {"vocab_size": 99, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
    config |= {"attention_types": [[["global", "local"], 1]], "window_size": 4}
    return decoder(
        model_of("GPTNeoForCausalLM", "GPTNeoConfig", max_position_embeddings=64, **config)
    )


@zoo("rotary on a quarter of the head, attention and MLP side by side")
def gpt_neox() -> Built:
    return decoder(model_of("GPTNeoXForCausalLM", "GPTNeoXConfig", **TINY))


@zoo("rotary on interleaved pairs, gathered from a table of sines")
def gptj() -> Built:
    config = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
    return decoder(model_of("GPTJForCausalLM", "GPTJConfig", n_positions=64, **config))


@zoo("the decoder everybody copies: RMS norm, rotary, SwiGLU, grouped queries")
def llama() -> Built:
    return decoder(model_of("LlamaForCausalLM", "LlamaConfig", **GROUPED))


@zoo("repeat_kv, masks and softmax written out")
def llama_eager_attention() -> Built:
    return decoder(model_of("LlamaForCausalLM", "LlamaConfig", attention="eager", **GROUPED))


@zoo("padding and causal mask are combined by vmap")
def llama_padded() -> Built:
    model = model_of("LlamaForCausalLM", "LlamaConfig", use_cache=False, **GROUPED)
    return encoder(model)


@zoo("grouped-query decode step: cache has fewer heads than queries")
def llama_cached() -> Built:
    return decode_step(model_of("LlamaForCausalLM", "LlamaConfig", **GROUPED), heads=2, width=8)


@zoo("three new tokens at once on a cache: chunked prefill, speculative decoding")
def llama_cached_chunk() -> Built:
    model = model_of("LlamaForCausalLM", "LlamaConfig", **GROUPED)
    return decode_step(model, heads=2, width=8, new=3)


@zoo("weights in bfloat16, norms and softmax computed in float32")
def llama_bfloat16() -> Built:
    import torch

    return decoder(model_of("LlamaForCausalLM", "LlamaConfig", **GROUPED).to(torch.bfloat16))


@zoo("rotary frequencies rescaled by the Llama 3 rule, logits of the last token only")
def llama3_rope() -> Built:
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    model = model_of("LlamaForCausalLM", "LlamaConfig", rope_parameters=rope, **GROUPED)
    return Built.of(
        model,
        lambda rows, tokens: {
            "input_ids": ids(rows, tokens),
            "use_cache": False,
            "logits_to_keep": 1,
        },
        (2, 8),
        (1, 12),
        (3, 5),
        dynamic_shapes={
            "input_ids": {0: batch(), 1: sequence(32)},
            "use_cache": None,
            "logits_to_keep": None,
        },
    )


@zoo("StaticCache in the module: buffers of a fixed length written by index_copy_")
def llama_static_cache() -> Built:
    import torch
    from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

    config = GROUPED | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = model_of("LlamaForCausalLM", "LlamaConfig", **config)
    model.generation_config.use_cache = True
    model.generation_config.cache_implementation = "static"
    model.generation_config.cache_config = {"batch_size": 1, "max_cache_len": 16}
    wrapped = TorchExportableModuleWithStaticCache(
        model, batch_size=1, max_cache_len=16, device="cpu"
    )
    return Built.of(
        wrapped,
        lambda position: {"input_ids": ids(1, 1), "cache_position": torch.tensor([position])},
        (3,),
        (0,),
        (15,),
    )


@zoo("sliding-window mask shorter than the sequence")
def mistral() -> Built:
    return decoder(model_of("MistralForCausalLM", "MistralConfig", sliding_window=4, **GROUPED))


@zoo("bias on query, key and value only")
def qwen2() -> Built:
    return decoder(model_of("Qwen2ForCausalLM", "Qwen2Config", **GROUPED))


@zoo("decode step with biased projections and tied embeddings")
def qwen2_cached() -> Built:
    model = model_of("Qwen2ForCausalLM", "Qwen2Config", tie_word_embeddings=True, **GROUPED)
    return decode_step(model, heads=2, width=8)


@zoo("RMS norm on each head of query and key; head width not hidden / heads")
def qwen3() -> Built:
    return decoder(model_of("Qwen3ForCausalLM", "Qwen3Config", **GROUPED | {"head_dim": 16}))


@zoo("decode step with normalised queries and keys")
def qwen3_cached() -> Built:
    model = model_of("Qwen3ForCausalLM", "Qwen3Config", **GROUPED | {"head_dim": 16})
    return decode_step(model, heads=2, width=16)


@zoo("embedding scaled by a constant, norm weights stored as 1 + w")
def gemma() -> Built:
    return decoder(model_of("GemmaForCausalLM", "GemmaConfig", **GROUPED))


@zoo("tanh caps on attention scores and logits, four norms a layer, window every second layer")
def gemma2() -> Built:
    return decoder(
        model_of(
            "Gemma2ForCausalLM", "Gemma2Config", sliding_window=4, attention="eager", **GROUPED
        )
    )


_GEMMA3 = GROUPED | {
    "num_hidden_layers": 3,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}


@zoo("two rotary bases: one for windowed layers, one for global ones")
def gemma3() -> Built:
    return decoder(model_of("Gemma3ForCausalLM", "Gemma3TextConfig", **_GEMMA3))


@zoo("cache whose windowed layers keep only the last tokens")
def gemma3_cached() -> Built:
    return decode_step(
        model_of("Gemma3ForCausalLM", "Gemma3TextConfig", **_GEMMA3 | {"sliding_window": 64}),
        heads=2,
        width=8,
    )


@zoo("one fused projection for queries, keys and values, one for gate and up")
def phi3() -> Built:
    return decoder(model_of("Phi3ForCausalLM", "Phi3Config", pad_token_id=0, **GROUPED))


@zoo("partial rotary with parallel attention and MLP behind one layer norm")
def phi() -> Built:
    return decoder(model_of("PhiForCausalLM", "PhiConfig", **TINY))


_OPT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 16,
}


@zoo("positions with an offset of two from a mask; narrower word embeddings")
def opt() -> Built:
    return decoder(model_of("OPTForCausalLM", "OPTConfig", **_OPT))


@zoo("decode step whose positions come from the mask")
def opt_cached() -> Built:
    return decode_step(model_of("OPTForCausalLM", "OPTConfig", **_OPT), heads=4, width=8)


@zoo("one key and value head for all queries, packed into one projection")
def falcon() -> Built:
    config = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2}
    return decoder(model_of("FalconForCausalLM", "FalconConfig", num_attention_heads=4, **config))


@zoo("ALiBi: a bias that grows with distance, from a mask's cumulative sum")
def falcon_alibi() -> Built:
    config = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "alibi": True}
    config |= {"multi_query": False, "new_decoder_architecture": False, "use_cache": False}
    return encoder(model_of("FalconForCausalLM", "FalconConfig", num_attention_heads=4, **config))


@zoo("ALiBi through baddbmm, fused projection split by a view, own tanh GELU")
def bloom() -> Built:
    config = {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    return decoder(model_of("BloomForCausalLM", "BloomConfig", **config))


@zoo("ALiBi, no biases, clipped projections")
def mpt() -> Built:
    config = {"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
    return decoder(model_of("MptForCausalLM", "MptConfig", **config))


@zoo("layer norm with partial rotary and SwiGLU")
def stablelm() -> Built:
    config = TINY | {"num_key_value_heads": 2}
    return decoder(model_of("StableLmForCausalLM", "StableLmConfig", **config))


@zoo("every second layer without positions at all")
def smollm3() -> Built:
    config = GROUPED | {"no_rope_layers": [1, 0], "pad_token_id": 0, "bos_token_id": 1}
    return decoder(model_of("SmolLM3ForCausalLM", "SmolLM3Config", eos_token_id=2, **config))


@zoo("norm after attention and MLP, and across all heads of query and key")
def olmo2() -> Built:
    config = TINY | {"num_key_value_heads": 2, "eos_token_id": 2, "pad_token_id": 0}
    return decoder(model_of("Olmo2ForCausalLM", "Olmo2Config", **config))


@zoo("interleaved rotary by repeat_interleave, logits scaled, parallel residual")
def cohere() -> Built:
    return decoder(model_of("CohereForCausalLM", "CohereConfig", num_key_value_heads=2, **TINY))


@zoo("multipliers on embedding, residual, attention and logits")
def granite() -> Built:
    config = TINY | {"num_key_value_heads": 2, "embedding_multiplier": 12.0}
    config |= {"residual_multiplier": 0.2, "logits_scaling": 8.0, "attention_multiplier": 0.1}
    return decoder(model_of("GraniteForCausalLM", "GraniteConfig", **config))


@zoo("squared ReLU and layer norm with 1 + w")
def nemotron() -> Built:
    return decoder(model_of("NemotronForCausalLM", "NemotronConfig", num_key_value_heads=2, **TINY))


@zoo("the difference of two attention maps, with learned scalar weights")
def diffllama() -> Built:
    config = TINY | {"num_key_value_heads": 2}
    return decoder(model_of("DiffLlamaForCausalLM", "DiffLlamaConfig", **config))
