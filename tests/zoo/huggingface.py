"""Builds Hugging Face models from small configurations, without the network."""

from __future__ import annotations

import os
from typing import Any

from tests.zoo import Built, batch, dim, sequence

TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def model_of(model: str, config: str, /, attention: str | None = None, **options: Any) -> Any:
    """The model class `model` of `transformers` on the configuration class `config`."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    if attention is not None:
        options["attn_implementation"] = attention
    return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()


def ids(*shape: int, vocab: int = 99) -> Any:
    """Token ids; none is among the first three, which are special in most configurations."""
    import torch

    return torch.randint(3, vocab, shape)


def padding_mask(rows: int, tokens: int, left: bool = False) -> Any:
    """Ones, with padding on the second half of each odd row."""
    import torch

    mask = torch.ones(rows, tokens, dtype=torch.int64)
    pad = slice(None, tokens // 2) if left else slice(tokens - tokens // 2, None)
    mask[1::2, pad] = 0
    return mask


def encoder(model: Any, *, longest: int = 32) -> Built:
    """A model that reads `input_ids` and `attention_mask`, batch and sequence dynamic."""

    def make(rows: int, tokens: int) -> dict[str, Any]:
        return {"input_ids": ids(rows, tokens), "attention_mask": padding_mask(rows, tokens)}

    shape = {0: batch(), 1: sequence(longest)}
    return Built.of(
        model,
        make,
        (2, 8),
        (1, 12),
        (3, 5),
        dynamic_shapes={"input_ids": shape, "attention_mask": shape},
    )


def decoder(model: Any, *, longest: int = 32) -> Built:
    """A causal model without cache: `input_ids` alone, batch and sequence dynamic."""
    model.config.use_cache = False
    return Built.of(
        model,
        lambda rows, tokens: {"input_ids": ids(rows, tokens)},
        (2, 8),
        (1, 12),
        (3, 5),
        dynamic_shapes={"input_ids": {0: batch(), 1: sequence(longest)}},
    )


def decode_step(model: Any, *, heads: int, width: int, new: int = 1) -> Built:
    """A causal model given `new` tokens and a DynamicCache; batch and past are dynamic."""
    import torch
    from transformers import DynamicCache
    from transformers.integrations.executorch import register_dynamic_cache_export_support

    register_dynamic_cache_export_support()
    layers = model.config.get_text_config().num_hidden_layers

    def make(rows: int, past: int) -> dict[str, Any]:
        cache = DynamicCache(config=model.config)
        for layer in range(layers):
            keys, values = torch.randn(2, rows, heads, past, width)
            cache.update(keys, values, layer)
        return {
            "input_ids": ids(rows, new),
            "attention_mask": padding_mask(rows, past + new, left=True),
            "past_key_values": cache,
            "use_cache": True,
        }

    past = dim("past", 48)
    rows = batch()
    cached = [{0: rows, 2: past} for _ in range(layers)]
    return Built.of(
        model,
        make,
        (2, 8),
        (1, 12),
        (3, 5),
        dynamic_shapes={
            "input_ids": {0: rows},
            "attention_mask": {0: rows, 1: past + new},
            "past_key_values": [cached, cached],
            "use_cache": None,
        },
    )
