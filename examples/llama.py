"""Llama 3 without weights, to plan what it takes on devices that are not here.

    dfc plan examples/llama.py:llama_70b -t examples/four_h100.dfc -m 16 --svg build/timeline.svg
    dfc plan examples/llama.py:llama_8b -t examples/four_h100.dfc --train --schedule 1f1b

The model lies on the meta device: it has shapes and no numbers, so a laptop plans it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

TOKENS = 2048
Plannable = tuple[nn.Module, tuple[Tensor, ...]]


def llama_8b() -> Plannable:
    """8 billion parameters: 32 layers of 4096."""
    return _llama(hidden_size=4096, intermediate_size=14336, layers=32, heads=32)


def llama_70b() -> Plannable:
    """70 billion parameters: 80 layers of 8192."""
    return _llama(hidden_size=8192, intermediate_size=28672, layers=80, heads=64)


def _llama(*, hidden_size: int, intermediate_size: int, layers: int, heads: int) -> Plannable:
    """The model in bfloat16, and one sequence of `TOKENS` token ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden_size, intermediate_size=intermediate_size, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, vocab_size=128256, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config).bfloat16().eval(), (
            torch.zeros(1, TOKENS, dtype=torch.long),
        )
