"""Speech and sound models from Hugging Face."""

from __future__ import annotations

from typing import Any

from tests.zoo import Built, batch, dim, zoo
from tests.zoo.huggingface import model_of

_SPEECH = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [8, 8, 8],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def waves(model: Any) -> Built:
    """Raw samples, batch and length dynamic."""
    import torch

    return Built.of(
        model,
        lambda rows, samples: {"input_values": torch.randn(rows, samples)},
        (2, 400),
        (1, 640),
        (3, 333),
        dynamic_shapes={"input_values": {0: batch(), 1: dim("samples", 4000, min=200)}},
    )


@zoo("strided 1-d convolutions with group norm, positions from a weight-normed convolution")
def wav2vec2() -> Built:
    return waves(model_of("Wav2Vec2Model", "Wav2Vec2Config", **_SPEECH))


@zoo("lengths computed from the mask, a mask scattered at the end of each row")
def wav2vec2_masked() -> Built:
    import torch

    def make(rows: int, samples: int) -> dict[str, Any]:
        mask = torch.ones(rows, samples, dtype=torch.int64)
        mask[1::2, samples // 2 :] = 0
        return {"input_values": torch.randn(rows, samples), "attention_mask": mask}

    shape = {0: batch(), 1: dim("samples", 4000, min=200)}
    config = _SPEECH | {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
    return Built.of(
        model_of("Wav2Vec2ForCTC", "Wav2Vec2Config", **config),
        make,
        (2, 400),
        (1, 640),
        (3, 333),
        dynamic_shapes={"input_values": shape, "attention_mask": shape},
    )


@zoo("weighted sum of all hidden states, mean over frames")
def hubert() -> Built:
    config = _SPEECH | {"use_weighted_layer_sum": True, "num_labels": 4}
    return waves(model_of("HubertForSequenceClassification", "HubertConfig", **config))


@zoo("gated relative positions in multi_head_attention_forward")
def wavlm() -> Built:
    return waves(
        model_of("WavLMModel", "WavLMConfig", num_buckets=16, max_bucket_distance=32, **_SPEECH)
    )


@zoo("squeezes time by pooling, upsamples after the transformer")
def sew() -> Built:
    return waves(model_of("SEWModel", "SEWConfig", squeeze_factor=2, **_SPEECH))


@zoo("the encoder of speech recognition alone, fixed length")
def whisper_encoder() -> Built:
    import torch
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=64,
        num_mel_bins=16,
        max_source_positions=20,
    )
    return Built.of(
        WhisperEncoder(config).eval(),
        lambda rows: {"input_features": torch.randn(rows, 16, 40)},
        (2,),
        (1,),
        (3,),
        dynamic_shapes={"input_features": {0: batch()}},
    )


@zoo("a vision transformer over overlapping patches of a spectrogram, two special tokens")
def audio_spectrogram_transformer() -> Built:
    import torch

    config = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_length": 40,
        "num_mel_bins": 32,
        "num_labels": 4,
    }
    return Built.of(
        model_of("ASTForAudioClassification", "ASTConfig", **config),
        lambda rows: {"input_values": torch.randn(rows, 40, 32)},
        (2,),
        (1,),
        (3,),
        dynamic_shapes={"input_values": {0: batch()}},
    )


@zoo("conformer: convolution modules, gated linear units, relative keys")
def wav2vec2_bert() -> Built:
    import torch

    config = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "feature_projection_input_dim": 20,
        "conv_depthwise_kernel_size": 5,
    }
    return Built.of(
        model_of("Wav2Vec2BertModel", "Wav2Vec2BertConfig", **config),
        lambda rows, frames: {"input_features": torch.randn(rows, frames, 20)},
        (2, 24),
        (1, 40),
        (3, 17),
        dynamic_shapes={"input_features": {0: batch(), 1: dim("frames", 256, min=8)}},
    )


@zoo("neural codec: causal padding computed from the length, LSTM, residual quantiser argmin")
def encodec() -> Built:
    import torch

    config = {
        "target_bandwidths": [1.5],
        "sampling_rate": 1600,
        "num_filters": 4,
        "hidden_size": 16,
        "codebook_size": 32,
        "codebook_dim": 16,
        "upsampling_ratios": [4, 2],
        "num_lstm_layers": 1,
        "kernel_size": 3,
    }
    return Built.of(
        model_of("EncodecModel", "EncodecConfig", **config),
        lambda rows: {"input_values": torch.randn(rows, 1, 320)},
        (2,),
        (1,),
        (3,),
        dynamic_shapes={"input_values": {0: batch()}},
    )


@zoo("text to spectrogram convolution stack: transposed convolutions as a vocoder")
def hifi_gan() -> Built:
    import torch

    config = {
        "model_in_dim": 16,
        "upsample_initial_channel": 16,
        "upsample_rates": [2, 2],
        "upsample_kernel_sizes": [4, 4],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3]],
    }
    return Built.of(
        model_of("SpeechT5HifiGan", "SpeechT5HifiGanConfig", **config),
        lambda rows, frames: {"spectrogram": torch.randn(rows, frames, 16)},
        (2, 10),
        (1, 17),
        (3, 6),
        dynamic_shapes={"spectrogram": {0: batch(), 1: dim("frames", 256, min=2)}},
    )
