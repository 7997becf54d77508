"""Sizes and choices that depend on values: masks, nonzero, unique, item, lengths, searching."""

from __future__ import annotations

from tests.zoo import Built, batch, zoo
from tests.zoo.functions import fixed, module, rows


@zoo("coordinates of what is positive, and how many there are")
def nonzero() -> Built:
    import torch

    def forward(self, x):
        where = torch.nonzero(x > 0)
        return where, where.shape[0], torch.argwhere(x > 1), (x > 0).sum()

    return rows(forward, lambda n: (torch.randn(n, 4),))


@zoo("elements chosen by a mask, reduced again to a fixed size")
def boolean_mask() -> Built:
    import torch
    from torch import nn

    def forward(self, x, mask):
        kept = x[mask]
        return torch.masked_select(x, x > 0).sum(), self.head(kept), kept.mean(0)

    def make(n: int):
        mask = torch.rand(n) > 0.4
        mask[0] = True
        return torch.randn(n, 4), mask

    return rows(forward, make, head=nn.Linear(4, 2))


@zoo("rows processed where a mask says so and written back")
def masked_update() -> Built:
    import torch
    from torch import nn

    def forward(self, x):
        active = x.sum(-1) > 0
        y = x.clone()
        y[active] = self.layer(x[active])
        return y

    return rows(forward, lambda n: (torch.randn(n, 4),), layer=nn.Linear(4, 4))


@zoo("distinct values with counts and an inverse")
def unique() -> Built:
    import torch

    def forward(self, x):
        values, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
        return values, inverse, counts, torch.unique_consecutive(x.flatten())

    return rows(forward, lambda n: (torch.randint(0, 5, (n, 4)),))


@zoo("segment sums: distinct keys become rows")
def segment_sum() -> Built:
    import torch

    def forward(self, x, key):
        keys, inverse = torch.unique(key, return_inverse=True)
        total = x.new_zeros(keys.shape[0], x.shape[1]).index_add_(0, inverse, x)
        return keys, total / torch.bincount(inverse).unsqueeze(-1)

    return rows(forward, lambda n: (torch.randn(n, 4), torch.randint(0, 3, (n,))))


@zoo("a slice whose length is an item of a tensor")
def item_slice() -> Built:
    import torch

    def forward(self, x, length):
        n = length.item()
        return x[:, :n].sum(1), x.narrow(1, 0, n)

    return fixed(forward, lambda: (torch.randn(2, 8), torch.randint(2, 8, ())))


@zoo("the same with the checks torch.export asks for")
def item_slice_checked() -> Built:
    import torch

    def forward(self, x, length):
        n = length.item()
        torch._check(n >= 0)
        torch._check(n <= x.shape[1])
        return x[:, :n].sum(1)

    return fixed(forward, lambda: (torch.randn(2, 8), torch.randint(2, 8, ())))


@zoo("a tensor whose size is an item: arange, zeros, repeat")
def item_size() -> Built:
    import torch

    def forward(self, count):
        n = count.item()
        return torch.arange(n) * 2, torch.zeros(n, 3) + 1, count.new_ones(2).repeat(n)

    return fixed(forward, lambda: (torch.randint(2, 8, ()),))


@zoo("longest length decides how much is computed: trim to the batch's maximum")
def trimmed_to_longest() -> Built:
    import torch
    from torch import nn

    def forward(self, x, lengths):
        longest = lengths.max().item()
        x = self.layer(x[:, :longest])
        mask = torch.arange(longest)[None, :, None] < lengths[:, None, None]
        return (x * mask).sum(1) / lengths[:, None]

    return rows(
        forward,
        lambda n: (torch.randn(n, 6, 4), torch.randint(1, 7, (n,))),
        layer=nn.Linear(4, 4),
    )


@zoo("lengths as small integers select the last valid frame and build masks")
def lengths_mask() -> Built:
    import torch

    def forward(self, x, lengths):
        mask = torch.arange(x.shape[1]) < lengths.unsqueeze(1)
        last = x[torch.arange(x.shape[0]), lengths.long() - 1]
        best = x.masked_fill(~mask.unsqueeze(-1), -1e9).amax(1)
        return last, best, mask.cumsum(1)

    return rows(
        forward,
        lambda n: (torch.randn(n, 6, 4), torch.randint(1, 7, (n,), dtype=torch.int8)),
    )


@zoo("rows repeated as often as a tensor says: durations in speech synthesis")
def repeat_by_duration() -> Built:
    import torch

    def forward(self, x, durations):
        long = torch.repeat_interleave(x, durations, dim=0)
        return long, torch.repeat_interleave(x, 2, dim=1)

    return rows(forward, lambda n: (torch.randn(n, 3), torch.randint(1, 4, (n,))))


@zoo("split sizes that come from a tensor")
def split_by_tolist() -> Built:
    import torch

    def forward(self, x, sizes):
        return torch.stack([part.sum(0) for part in x.split(sizes.tolist())])

    def make():
        first = torch.randint(1, 6, ())
        return torch.randn(7, 3), torch.stack([first, 7 - first])

    return fixed(forward, make)


@zoo("non-maximum suppression as a loop over sorted boxes of a fixed number")
def non_maximum_suppression() -> Built:
    import torch

    def forward(self, boxes, scores):
        order = scores.argsort(descending=True)
        b = boxes[order]
        area = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
        low = torch.maximum(b[:, None, :2], b[None, :, :2])
        high = torch.minimum(b[:, None, 2:], b[None, :, 2:])
        inner = (high - low).clamp(min=0).prod(-1)
        overlap = inner / (area[:, None] + area[None] - inner)
        keep = torch.ones(6, dtype=torch.bool)
        for i in range(6):
            keep = keep & ~((overlap[i] > 0.5) & keep[i] & (torch.arange(6) > i))
        return order[keep], scores[order[keep]]

    def make():
        corner = torch.rand(6, 2)
        return torch.cat([corner, corner + 0.2 + torch.rand(6, 2)], 1), torch.rand(6)

    return fixed(forward, make)


@zoo("binary search in sorted edges, both sides, by tensor and by scalar")
def searching() -> Built:
    import torch

    def forward(self, x):
        rows = self.edges.expand(x.shape[0], -1)
        return (
            torch.bucketize(x, self.edges),
            torch.bucketize(x, self.edges, right=True, out_int32=True),
            torch.searchsorted(rows.contiguous(), x),
            torch.searchsorted(self.edges, 0.25),
            torch.isin(x.round(), self.edges),
        )

    return rows(
        forward,
        lambda n: (torch.randn(n, 4).round(decimals=1),),
        edges=torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]),
    )


@zoo("nucleus sampling's filter: sort, cumulative sum, mask, scatter back")
def nucleus_filter() -> Built:
    import torch

    def forward(self, logits):
        values, order = logits.sort(descending=True, dim=-1)
        drop = values.softmax(-1).cumsum(-1) > 0.8
        drop = torch.cat([torch.zeros_like(drop[:, :1]), drop[:, :-1]], 1)
        drop = torch.zeros_like(drop).scatter(1, order, drop)
        floor = logits.topk(4, dim=-1).values[:, -1:]
        return logits.masked_fill(drop, float("-inf")).masked_fill(logits < floor, float("-inf"))

    return rows(forward, lambda n: (torch.randn(n, 9),))


@zoo("one hot with the number of classes given, and as rows of an identity matrix")
def one_hot() -> Built:
    import torch
    import torch.nn.functional as F

    def forward(self, x):
        return F.one_hot(x, 6), torch.eye(6)[x]

    return rows(forward, lambda n: (torch.randint(0, 6, (n, 3)),))


@zoo("one hot whose number of classes is the largest value plus one")
def one_hot_open() -> Built:
    import torch
    import torch.nn.functional as F

    def forward(self, x):
        return F.one_hot(x)

    return rows(forward, lambda n: (torch.randint(0, 6, (n, 3)),))


@zoo("indices chosen by argmax and used to gather")
def argmax_gather() -> Built:
    import torch

    def forward(self, scores, values):
        best = scores.argmax(-1)
        picked = values[torch.arange(values.shape[0]), best]
        same = values.gather(1, best[:, None, None].expand(-1, 1, 3)).squeeze(1)
        return picked, same, torch.index_select(self.table, 0, best)

    return Built.of(
        module(forward, table=torch.randn(5, 2)),
        lambda n: (torch.randn(n, 5), torch.randn(n, 5, 3)),
        (3,),
        (1,),
        (4,),
        dynamic_shapes=({0: batch()}, {0: batch()}),
    )


@zoo("a window of a table between two tensors: its place in memory is checked as its size is")
def window_between_tensors() -> Built:
    import torch

    def forward(self, x, reach):
        return x + self.table[8 - reach : 8 + reach].sum(0)

    return fixed(
        forward,
        lambda: (torch.randn(3, 4), torch.randint(1, 8, ())),
        table=torch.randn(16, 4),
    )
