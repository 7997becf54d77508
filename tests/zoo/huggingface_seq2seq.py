"""Encoder-decoders from Hugging Face."""

from __future__ import annotations

from typing import Any

from tests.zoo import Built, batch, dim, zoo
from tests.zoo.huggingface import ids, model_of, padding_mask


def translator(model: Any) -> Built:
    """Source and target tokens, each with its own dynamic length."""

    def make(rows: int, source: int, target: int) -> dict[str, Any]:
        return {
            "input_ids": ids(rows, source),
            "attention_mask": padding_mask(rows, source),
            "decoder_input_ids": ids(rows, target),
            "use_cache": False,
        }

    source = {0: batch(), 1: dim("source", 32)}
    return Built.of(
        model,
        make,
        (2, 8, 6),
        (1, 12, 3),
        (3, 5, 9),
        dynamic_shapes={
            "input_ids": source,
            "attention_mask": source,
            "decoder_input_ids": {0: batch(), 1: dim("target", 32)},
            "use_cache": None,
        },
    )


_T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}

_BART = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}


@zoo("bucketed relative position bias computed once, RMS norm, one embedding for three uses")
def t5() -> Built:
    return translator(model_of("T5ForConditionalGeneration", "T5Config", **_T5))


@zoo("returns an EncoderDecoderCache, a class that pytree does not know")
def t5_cache_output() -> Built:
    return Built.of(
        model_of("T5ForConditionalGeneration", "T5Config", **_T5),
        lambda rows: {"input_ids": ids(rows, 6), "decoder_input_ids": ids(rows, 4)},
        (2,),
        (1,),
        (3,),
        dynamic_shapes={"input_ids": {0: batch()}, "decoder_input_ids": {0: batch()}},
    )


@zoo("T5 with a gated GELU and an untied head")
def t5_gated() -> Built:
    options = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return translator(model_of("T5ForConditionalGeneration", "T5Config", **_T5 | options))


@zoo("T5's encoder alone, as text-to-image pipelines use it")
def t5_encoder() -> Built:
    from tests.zoo.huggingface import encoder

    return encoder(model_of("T5EncoderModel", "T5Config", **_T5))


@zoo("separate relative biases in each layer")
def umt5() -> Built:
    return translator(model_of("UMT5ForConditionalGeneration", "UMT5Config", **_T5))


@zoo("cross-attention, learned positions with an offset, a final logits bias buffer")
def bart() -> Built:
    return translator(model_of("BartForConditionalGeneration", "BartConfig", **_BART))


@zoo("decode step of an encoder-decoder: encoder states and an EncoderDecoderCache go in")
def bart_cached() -> Built:
    import torch
    from torch import nn
    from transformers import DynamicCache, EncoderDecoderCache

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bart = model_of("BartForConditionalGeneration", "BartConfig", **_BART)

        def forward(self, token, encoded, own, cross):
            past = EncoderDecoderCache(DynamicCache(), DynamicCache())
            for layer, (pair, across) in enumerate(zip(own, cross, strict=True)):
                past.self_attention_cache.update(*pair, layer)
                past.cross_attention_cache.update(*across, layer)
                past.is_updated[layer] = True
            out = self.bart(
                decoder_input_ids=token,
                encoder_outputs=(encoded,),
                past_key_values=past,
                use_cache=True,
            )
            return out.logits, [(x.keys, x.values) for x in past.self_attention_cache.layers]

    def make(rows: int, source: int, past: int):
        own = tuple(tuple(torch.randn(2, rows, 4, past, 8)) for _ in range(2))
        cross = tuple(tuple(torch.randn(2, rows, 4, source, 8)) for _ in range(2))
        return ids(rows, 1), torch.randn(rows, source, 32), own, cross

    rows, source, past = batch(), dim("source", 32), dim("past", 48)
    return Built.of(
        Step(),
        make,
        (2, 8, 6),
        (1, 12, 3),
        (3, 5, 9),
        dynamic_shapes=(
            {0: rows},
            {0: rows, 1: source},
            (({0: rows, 2: past},) * 2,) * 2,
            (({0: rows, 2: source},) * 2,) * 2,
        ),
    )


@zoo("sinusoidal positions in a frozen parameter, SiLU")
def marian() -> Built:
    return translator(model_of("MarianMTModel", "MarianConfig", pad_token_id=0, **_BART))


@zoo("positions from a mask over padding ids, sinusoidal table grown on demand")
def m2m100() -> Built:
    return translator(model_of("M2M100ForConditionalGeneration", "M2M100Config", **_BART))


@zoo("pre-norm with a final norm; decoder inputs shifted from labels, loss returned")
def pegasus_with_loss() -> Built:
    def make(rows: int, source: int, target: int) -> dict[str, Any]:
        labels = ids(rows, target)
        labels[:, -1] = -100
        return {"input_ids": ids(rows, source), "labels": labels, "use_cache": False}

    return Built.of(
        model_of("PegasusForConditionalGeneration", "PegasusConfig", **_BART),
        make,
        (2, 8, 6),
        (1, 12, 4),
        (3, 5, 9),
        dynamic_shapes={
            "input_ids": {0: batch(), 1: dim("source", 32)},
            "labels": {0: batch(), 1: dim("target", 32, min=2)},
            "use_cache": None,
        },
    )


@zoo("embeddings normalised, as in machine translation across many languages")
def mbart() -> Built:
    return translator(model_of("MBartForConditionalGeneration", "MBartConfig", **_BART))


@zoo("speech to text: strided convolutions, then cross-attention")
def whisper() -> Built:
    import torch

    config = _BART | {
        "num_mel_bins": 16,
        "max_source_positions": 20,
        "max_target_positions": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    model = model_of("WhisperForConditionalGeneration", "WhisperConfig", **config)

    def make(rows: int, target: int) -> dict[str, Any]:
        return {
            "input_features": torch.randn(rows, 16, 40),
            "decoder_input_ids": ids(rows, target),
            "use_cache": False,
        }

    return Built.of(
        model,
        make,
        (2, 6),
        (1, 3),
        (3, 9),
        dynamic_shapes={
            "input_features": {0: batch()},
            "decoder_input_ids": {0: batch(), 1: dim("target", 32)},
            "use_cache": None,
        },
    )


@zoo("a vision encoder and a text decoder of different makes, joined by cross-attention")
def vision_encoder_decoder() -> Built:
    import torch
    import transformers
    from transformers import VisionEncoderDecoderConfig

    vision = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    text = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    model = transformers.VisionEncoderDecoderModel(config).eval()

    def make(rows: int, target: int) -> dict[str, Any]:
        return {
            "pixel_values": torch.randn(rows, 3, 32, 32),
            "decoder_input_ids": ids(rows, target),
            "use_cache": False,
        }

    return Built.of(
        model,
        make,
        (2, 6),
        (1, 3),
        (3, 9),
        dynamic_shapes={
            "pixel_values": {0: batch()},
            "decoder_input_ids": {0: batch(), 1: dim("target", 32)},
            "use_cache": None,
        },
    )
