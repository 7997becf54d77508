"""Moving things about: indexing, reshaping, rolling, masks and grids, sparse and nested tensors."""

from __future__ import annotations

from tests.zoo import Built, batch, dim, zoo
from tests.zoo.functions import fixed, module, rows


@zoo("every kind of index at once: slices, steps, None, ellipsis, lists, tensors, booleans")
def indexing() -> Built:
    import torch

    def forward(self, x, i):
        return (
            x[:, None, 1:-1:2],
            x[..., -1],
            x[:, [2, 0, 2]],
            x[:, i],
            x[:, i, :, None],
            x[:, :, self.mask],
            x[:, i[:, None], i[None]],
            x[:, -1, ...],
            x[:, 1:1],
            x[:, i, 1:3],
        )

    return Built.of(
        module(forward, mask=torch.tensor([True, False, True, True])),
        lambda n: (torch.randn(n, 4, 4), torch.randint(-4, 4, (2,))),
        (3,),
        (1,),
        (5,),
        dynamic_shapes=({0: batch()}, None),
    )


@zoo("roll, flip, rot90, permutations and moved axes")
def rearrangements() -> Built:
    import torch

    def forward(self, x):
        return (
            x.roll(1, 1),
            x.roll((1, -2), (1, 2)),
            x.flip(0, 2),
            x.rot90(1, (1, 2)),
            x.movedim(0, -1),
            x.swapaxes(1, 2),
            x.permute(2, 0, 1),
            x.unsqueeze(1).squeeze(),
            x.T if x.dim() == 2 else x.mT,
            x.tile(2, 1),
            x.repeat(1, 2, 1),
        )

    return rows(forward, lambda n: (torch.randn(n, 3, 4),))


@zoo("reshape with -1, of a dynamic size, merged and split, view_as, unflatten")
def reshapes() -> Built:
    import torch

    def forward(self, x):
        n = x.size(0)
        return (
            x.reshape(-1, 2),
            x.view(n, -1),
            x.transpose(0, 1).reshape(n * 3, 4),
            x.flatten(0, 1),
            x.unflatten(2, (2, -1)),
            x.reshape((*x.shape[:-2], -1)),
            x.expand(2, -1, -1, -1),
            x.ravel(),
            x.reshape(n * 12).view_as(x),
        )

    return rows(forward, lambda n: (torch.randn(n, 3, 4),))


@zoo("split, chunk, unbind, cat, stack, block_diag, with uneven parts")
def joins() -> Built:
    import torch

    def forward(self, x):
        a, b = x.split([1, 4], dim=1)
        parts = x.chunk(3, dim=1)
        return (
            torch.cat([b, a], 1),
            torch.stack(x.unbind(1), -1),
            parts[-1],
            x.tensor_split(3, dim=1),
            torch.hstack([a, b]),
            torch.block_diag(x[:1], x[:1]),
            torch.cat([x[:0], x]),
            torch.column_stack([x[:, 0], x]),
        )

    return rows(forward, lambda n: (torch.randn(n, 5),))


@zoo("sliding windows as overlapping views, framed and overlap-added")
def sliding_windows() -> Built:
    import torch

    def forward(self, x):
        frames = x.unfold(-1, 4, 2)
        total = torch.zeros_like(x)
        for i in range(frames.shape[1]):
            total[:, 2 * i : 2 * i + 4] += frames[:, i] * self.window
        return frames, frames.mean(-1), total

    return rows(forward, lambda n: (torch.randn(n, 10),), window=torch.hann_window(4))


@zoo("coordinates: meshgrid in both orders, linspace, cartesian products, broadcasting")
def coordinate_grids() -> Built:
    import torch

    def forward(self, x):
        h, w = x.shape[-2:]
        ys, xs = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
        xx, _ = torch.meshgrid(torch.arange(w), torch.arange(h), indexing="xy")
        grid = torch.stack([ys, xs]).expand(x.shape[0], -1, -1, -1)
        pairs = torch.cartesian_prod(torch.arange(2), torch.arange(3))
        return torch.cat([x, grid], 1), xx, pairs

    return Built.of(
        module(forward),
        lambda n, h, w: (torch.randn(n, 2, h, w),),
        (3, 5, 6),
        (1, 2, 9),
        (2, 7, 4),
        dynamic_shapes=({0: batch(), 2: dim("h", min=2), 3: dim("w", min=2)},),
    )


@zoo("all pairs of elements: a masked select inside an operator")
def combinations() -> Built:
    import torch

    def forward(self, x):
        left, right = torch.combinations(torch.arange(4)).unbind(1)
        return x[:, left] * x[:, right]

    return rows(forward, lambda n: (torch.randn(n, 4),))


@zoo("triangles: tril and triu of dynamic size, their indices, block-causal masks")
def triangles() -> Built:
    import torch

    def forward(self, x):
        t = x.shape[1]
        causal = torch.ones(t, t, dtype=torch.bool).tril()
        bias = torch.zeros(t, t).masked_fill(~causal, float("-inf"))
        blocks = torch.arange(t) // 3
        return bias + x.unsqueeze(1), blocks[:, None] >= blocks, torch.triu(bias, diagonal=-1)

    return Built.of(
        module(forward),
        lambda n, t: (torch.randn(n, t),),
        (2, 7),
        (1, 9),
        (3, 4),
        dynamic_shapes=({0: batch(), 1: dim("sequence")},),
    )


@zoo("where with scalars, with broadcasting, with mixed types, nested")
def where_forms() -> Built:
    import torch

    def forward(self, x):
        return (
            torch.where(x > 0, x, 0.0),
            torch.where(x > 0, 1, 0),
            torch.where(x > 0, 1.5, x.double()),
            torch.where(x[:, :1] > 0, x, -x),
            torch.where(x > 1, 2, torch.where(x < -1, -2, 0)),
            torch.heaviside(x, torch.tensor(0.5)),
            x.masked_fill(x.isnan() | (x < 0), float("inf")),
        )

    return rows(forward, lambda n: (torch.randn(n, 4),))


@zoo("reductions over no dimension, all, several, kept, of booleans and integers")
def reductions() -> Built:
    import torch

    def forward(self, x):
        positive = x > 0
        return (
            x.sum(),
            x.sum((0, 2)),
            x.mean((1, 2), keepdim=True),
            x.prod(1),
            positive.any(1),
            positive.all(),
            positive.sum(dtype=torch.int32),
            positive.float().mean(),
            x.amax((1, 2)),
            x.amin(0),
            x.int().sum(1),
            x.count_nonzero(1),
            x.sum(0, dtype=torch.float64),
        )

    return rows(forward, lambda n: (torch.randn(n, 3, 4),))


@zoo("bags of embeddings by offsets, weighted sums, maxima")
def embedding_bags() -> Built:
    import torch
    import torch.nn.functional as F

    def forward(self, index, offsets, weights):
        return (
            F.embedding_bag(index, self.table, offsets, mode="mean"),
            F.embedding_bag(index, self.table, offsets, mode="sum", per_sample_weights=weights),
            F.embedding_bag(index.view(2, -1), self.table, mode="max"),
            F.embedding(index, self.table, padding_idx=0),
        )

    def make():
        return torch.randint(0, 9, (8,)), torch.tensor([0, 3, 3]), torch.rand(8)

    return fixed(forward, make, table=torch.randn(9, 4))


@zoo("embeddings rescaled in place when read: max_norm writes the weight")
def embedding_max_norm() -> Built:
    import torch
    from torch import nn

    return rows(nn.Embedding(9, 4, max_norm=1.0), lambda n: (torch.randint(0, 9, (n, 3)),))


@zoo("a sparse matrix as a buffer, multiplied with a dense input")
def sparse_matrix() -> Built:
    import torch

    def forward(self, x):
        return torch.sparse.mm(self.adjacency, x)

    adjacency = (torch.rand(5, 5) > 0.6).float().to_sparse()
    return fixed(forward, lambda: (torch.randn(5, 3),), adjacency=adjacency)


@zoo("a nested tensor: rows of unequal length without padding")
def nested_tensor() -> Built:
    import torch
    from torch import nn

    def forward(self, x, y):
        nested = torch.nested.nested_tensor([x, y], layout=torch.jagged)
        return torch.nested.to_padded_tensor(self.layer(nested), 0.0)

    return fixed(forward, lambda: (torch.randn(3, 4), torch.randn(5, 4)), layer=nn.Linear(4, 2))


@zoo("many dimensions, and dimensions of size one squeezed and broadcast away")
def many_dimensions() -> Built:
    import torch

    def forward(self, x):
        y = x[:, None, :, None, None, :, None]
        z = (y * self.weight).sum((3, 4))
        return z.squeeze(), z.squeeze(1), z.permute(*range(z.dim())[::-1]), torch.atleast_3d(x[0])

    return rows(forward, lambda n: (torch.randn(n, 2, 3),), weight=torch.randn(1, 1, 3, 2, 3, 2))


@zoo("a Python float computed from sizes scales the result; arithmetic on sizes")
def size_arithmetic() -> Built:
    import math

    import torch

    def forward(self, x):
        n, t = x.shape
        padding = (-t) % 4
        y = torch.nn.functional.pad(x, (0, padding))
        y = y.view(n, -1, 4).mean(-1)
        scale = math.sqrt(t) + 1 / n + math.log(n + 1)
        return y * scale, max(t, 5) + torch.zeros(()), x[:, : (t + 1) // 2], t / 2 + x.sum()

    return Built.of(
        module(forward),
        lambda n, t: (torch.randn(n, t),),
        (3, 7),
        (1, 8),
        (2, 13),
        dynamic_shapes=({0: batch(), 1: dim("time")},),
    )


@zoo("sizes that must divide: patches of four cut from a dynamic length")
def divisible_size() -> Built:
    import torch

    def forward(self, x):
        return x.view(x.shape[0], x.shape[1] // 4, 4).sum(-1)

    return Built.of(
        module(forward),
        lambda n, t: (torch.randn(n, 4 * t),),
        (3, 3),
        (1, 1),
        (2, 5),
        dynamic_shapes=({0: batch(), 1: 4 * dim("quarter", 32)},),
    )


@zoo("dynamic quantisation written out: range, zero point, integer matmul, rescale")
def dynamic_quantized() -> Built:
    import torch
    from torch import nn

    class Dynamic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            scale = torch.rand(4, 1) / 50 + 0.01
            self.register_buffer("weight", torch.randint(-127, 128, (4, 6), dtype=torch.int8))
            self.register_buffer("scale", scale)

        def forward(self, x):
            low, high = torch.aminmax(x, dim=-1, keepdim=True)
            step = torch.clamp((high - low) / 255, min=1e-8)
            zero = (-low / step).round().to(torch.int32)
            q = torch.clamp((x / step).round().to(torch.int32) + zero, 0, 255)
            product = (q - zero).float() @ self.weight.float().T
            return product * step * self.scale.T

    return rows(Dynamic(), lambda n: (torch.randn(n, 6),))
