"""A decoder of Llama's shape without rotations: what streaming is measured with, at any size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

HEAD = 128


class Layer(nn.Module):
    """Grouped-query attention and a gated MLP."""

    def __init__(self, d: int, kv: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.q, self.o = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.k, self.v = nn.Linear(d, kv, bias=False), nn.Linear(d, kv, bias=False)
        self.gate, self.up = nn.Linear(d, inner, bias=False), nn.Linear(d, inner, bias=False)
        self.down = nn.Linear(inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (-1, HEAD)).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """Token ids to the next token's logits."""

    def __init__(self, layers: int, d: int, kv: int, inner: int, vocab: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.layers = nn.ModuleList(Layer(d, kv, inner) for _ in range(layers))
        self.norm = nn.RMSNorm(d)
        self.head = nn.Linear(d, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, -1])


def on_meta(layers: int, d: int, kv: int, inner: int, vocab: int, dtype: torch.dtype) -> Decoder:
    """The model without weights."""
    with torch.device("meta"):
        return Decoder(layers, d, kv, inner, vocab).to(dtype).eval()
