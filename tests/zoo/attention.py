"""PyTorch's own transformer modules, and attention as people write it."""

from __future__ import annotations

from typing import Any

from tests.zoo import Built, batch, sequence, zoo
from tests.zoo.functions import rows


def tokens(model: Any, width: int = 16, longest: int = 32) -> Built:
    """Float tokens, batch first, batch and sequence dynamic."""
    import torch

    return Built.of(
        model,
        lambda n, t: (torch.randn(n, t, width),),
        (2, 7),
        (1, 9),
        (3, 4),
        dynamic_shapes=({0: batch(), 1: sequence(longest)},),
    )


@zoo("the fused fast path of eval must not hide the layers")
def transformer_encoder() -> Built:
    from torch import nn

    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return tokens(nn.TransformerEncoder(layer, 2))


@zoo("padding mask given: the fast path would make nested tensors")
def transformer_encoder_masked() -> Built:
    import torch
    from torch import nn

    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
    net = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16))

    def make(n: int, t: int) -> dict[str, Any]:
        padded = torch.zeros(n, t, dtype=torch.bool)
        padded[1::2, -2:] = True
        return {"src": torch.randn(n, t, 16), "src_key_padding_mask": padded}

    shape = {0: batch(), 1: sequence(32)}
    return Built.of(
        net,
        make,
        (2, 7),
        (1, 9),
        (3, 4),
        dynamic_shapes={"src": shape, "src_key_padding_mask": shape},
    )


@zoo("encoder and decoder, causal mask made by the module from the length")
def transformer() -> Built:
    import torch
    from torch import nn

    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Transformer(16, 4, 1, 1, 32, batch_first=True)

        def forward(self, source, target):
            mask = self.net.generate_square_subsequent_mask(target.shape[1])
            return self.net(source, target, tgt_mask=mask, tgt_is_causal=True)

    return rows(Translator(), lambda n: (torch.randn(n, 6, 16), torch.randn(n, 5, 16)))


@zoo("self-attention that returns its averaged weights too")
def multihead_attention() -> Built:
    from torch import nn

    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)

    return tokens(SelfAttention())


@zoo("cross-attention with keys of other widths, added bias and zero tokens, per-head weights")
def multihead_cross_attention() -> Built:
    import torch
    from torch import nn

    class CrossAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options = {"kdim": 6, "vdim": 5, "add_bias_kv": True, "add_zero_attn": True}
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **options)

        def forward(self, x, key, value):
            return self.attention(x, key, value, average_attn_weights=False)

    return rows(
        CrossAttention(),
        lambda n: (torch.randn(n, 5, 16), torch.randn(n, 7, 6), torch.randn(n, 7, 5)),
    )


@zoo("rotary embedding as complex numbers: polar, view_as_complex, view_as_real")
def complex_rotary() -> Built:
    import torch
    from torch import nn

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48, bias=False)
            angles = torch.outer(torch.arange(64.0), 10000.0 ** -(torch.arange(0, 4, 2) / 4))
            self.register_buffer("rotation", torch.polar(torch.ones_like(angles), angles))

        def rotate(self, x):
            pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
            turned = pairs * self.rotation[: x.shape[1], None]
            return torch.view_as_real(turned).flatten(3).type_as(x)

        def forward(self, x):
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 4).unbind(2)
            q, k = self.rotate(q), self.rotate(k)
            y = nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
            )
            return y.transpose(1, 2).flatten(2)

    return tokens(Attention())


@zoo("the minimal GPT: causal mask as a buffer sliced to the length, masked_fill")
def nano_gpt() -> Built:
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width: int = 16) -> None:
            super().__init__()
            self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
            )
            mask = torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32)
            self.register_buffer("mask", mask, persistent=False)

        def forward(self, x):
            b, t, c = x.size()
            q, k, v = self.qkv(self.first(x)).split(c, dim=2)
            q, k, v = (z.view(b, t, 4, c // 4).transpose(1, 2) for z in (q, k, v))
            scores = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
            scores = scores.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf"))
            y = (scores.softmax(-1) @ v).transpose(1, 2).contiguous().view(b, t, c)
            x = x + self.out(y)
            return x + self.mlp(self.second(x))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(50, 16), nn.Embedding(32, 16)
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.head = nn.Linear(16, 50, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, index, targets=None):
            x = self.tokens(index) + self.positions(torch.arange(index.shape[1]))
            for block in self.blocks:
                x = block(x)
            logits = self.head(x)
            if targets is None:
                return logits, None
            flat = logits.view(-1, logits.size(-1))
            return logits, nn.functional.cross_entropy(flat, targets.view(-1), ignore_index=-1)

    shape = {0: batch(), 1: sequence(32)}
    return Built.of(
        GPT(),
        lambda n, t: (torch.randint(0, 50, (n, t)), torch.randint(-1, 50, (n, t))),
        (2, 7),
        (1, 9),
        (3, 4),
        dynamic_shapes=(shape, shape),
    )


@zoo("rows of a mask with no allowed key: softmax of all -inf")
def fully_masked_rows() -> Built:
    import torch
    import torch.nn.functional as F

    def forward(self, q, mask):
        safe = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        scores = (q @ q.mT).masked_fill(~mask, float("-inf"))
        return safe, scores.softmax(-1), scores.softmax(-1).nan_to_num(0.0)

    def make(n: int):
        mask = torch.rand(n, 1, 5, 5) > 0.4
        mask[:, :, 2] = False
        return torch.randn(n, 2, 5, 4), mask

    return rows(forward, make)


@zoo("flex_attention: a score function traced into a higher-order operator")
def flex_attention() -> Built:
    import torch
    from torch.nn.attention.flex_attention import flex_attention as attend

    def forward(self, q, k, v):
        def closer(score, b, h, i, j):
            return score - (i - j).abs() * 0.1

        return attend(q, k, v, score_mod=closer)

    return rows(forward, lambda n: tuple(torch.randn(3, n, 2, 16, 16)))


@zoo("linear attention by einsum with running sums over the sequence")
def linear_attention() -> Built:
    import torch
    from torch import nn

    class LinearAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
            state = torch.einsum("btk,btv->btkv", k, v).cumsum(1)
            weight = torch.einsum("btk,btk->bt", q, k.cumsum(1))
            return torch.einsum("btk,btkv->btv", q, state) / weight.unsqueeze(-1)

    return tokens(LinearAttention())


@zoo("a recommender: bags of embeddings with offsets, pairwise products, lower triangle taken")
def dlrm() -> Built:
    import torch
    from torch import nn

    class DLRM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bags = nn.ModuleList(nn.EmbeddingBag(20, 8, mode="sum") for _ in range(3))
            self.bottom = nn.Sequential(nn.Linear(5, 8), nn.ReLU())
            self.top = nn.Sequential(nn.Linear(14, 4), nn.ReLU(), nn.Linear(4, 1), nn.Sigmoid())
            self.register_buffer("pairs", torch.tril_indices(4, 4, -1))

        def forward(self, dense, sparse):
            x = self.bottom(dense)
            columns = [x, *(bag(sparse[:, i]) for i, bag in enumerate(self.bags))]
            stacked = torch.stack(columns, 1)
            products = torch.bmm(stacked, stacked.mT)[:, self.pairs[0], self.pairs[1]]
            return self.top(torch.cat([x, products], 1)).squeeze(-1)

    return rows(DLRM(), lambda n: (torch.randn(n, 5), torch.randint(0, 20, (n, 3, 4))))


@zoo("message passing on a graph: gather by edge, scatter by target, normalised by degree")
def graph_convolution() -> Built:
    import torch
    from torch import nn

    from tests.zoo import dim

    class GraphConvolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 8)

        def forward(self, x, edges):
            source, target = edges
            degree = torch.zeros(x.shape[0]).index_add(0, target, torch.ones(edges.shape[1]))
            weight = degree.clamp(min=1).rsqrt()
            messages = self.linear(x)[source] * (weight[source] * weight[target])[:, None]
            total = torch.zeros(x.shape[0], 8).index_add(0, target, messages)
            highest = torch.zeros(x.shape[0], 8).scatter_reduce(
                0, target[:, None].expand(-1, 8), messages, "amax", include_self=False
            )
            return torch.cat([total, highest], -1)

    def make(nodes: int, edges: int):
        return torch.randn(nodes, 6), torch.randint(0, nodes, (2, edges))

    return Built.of(
        GraphConvolution(),
        make,
        (5, 12),
        (1, 3),
        (8, 20),
        dynamic_shapes=({0: dim("nodes")}, {1: dim("edges", 256)}),
    )
