"""Writes: into slices and views, into buffers, into inputs; and outputs that alias."""

from __future__ import annotations

from tests.zoo import Built, zoo
from tests.zoo.functions import fixed, rows


@zoo("assignment to slices, steps, rows and masks of a copy")
def slice_assignment() -> Built:
    import torch

    def forward(self, x):
        y = x.clone()
        y[:, 1:3] = 0
        y[:, ::2] += 1
        y[0] = y[-1] * 2
        y[..., -1] = x[..., 0]
        y[y < 0] = 0.5
        y[:, [0, 3]] = y[:, [3, 0]]
        return y

    return rows(forward, lambda n: (torch.randn(n, 5),))


@zoo("in-place operators on views reach the base and the other views")
def views_written() -> Built:
    import torch

    def forward(self, x):
        base = x * 1
        left, right = base.chunk(2, dim=1)
        flat, turned = base.view(-1), base.t()
        left.mul_(2)
        right.copy_(left + 1)
        turned[0].zero_()
        flat[::3].add_(10)
        base.diagonal().fill_(7)
        return base, left, right, flat, turned

    return rows(forward, lambda n: (torch.randn(n, 6),))


@zoo("a view taken before the write and read after it")
def view_read_after_write() -> Built:
    import torch

    def forward(self, x):
        y = x + 0
        before = y[:, 0]
        copied = y[:, 0].clone()
        y.add_(1)
        return before * 2, copied * 2, y.sum()

    return rows(forward, lambda n: (torch.randn(n, 4),))


@zoo("writes through as_strided, expand made contiguous, unfold, select of select")
def odd_views_written() -> Built:
    import torch

    def forward(self, x):
        y = x.clone()
        y.as_strided((3,), (2,), 1).neg_()
        z = x[:1].expand(3, 6).contiguous()
        z[1, 2:4].sub_(5)
        w = x.unfold(0, 2, 1).clone()
        w.select(0, 0).select(1, 1).fill_(3)
        y.unsqueeze_(0).transpose_(1, 2)
        return y, z, w

    return fixed(forward, lambda: (torch.randn(4, 6),))


@zoo("index_put_ with and without accumulation, duplicates among the indices")
def index_writes() -> Built:
    import torch

    def forward(self, x, index):
        y = torch.zeros(6, 4).index_put((index,), x, accumulate=True)
        z = torch.zeros(6, 4).index_add_(0, index, x, alpha=0.5)
        z.index_fill_(0, index[:1], -1.0)
        w = torch.ones(6, 4).index_reduce_(0, index, x, "prod")
        y[index % 2, index % 4] += 1.0
        return y, z, w, torch.zeros(6, 4).masked_scatter(y > 0, x.expand(9, -1, -1))

    def make(n: int):
        return torch.randn(n, 4), torch.randint(0, 6, (n,))

    return rows(forward, make)


@zoo("scatter and its reductions, with a value and with a tensor")
def scatters() -> Built:
    import torch

    def forward(self, x, index):
        zeros = torch.zeros(x.shape[0], 6)
        return (
            zeros.scatter(1, index, 2.5),
            zeros.scatter_add(1, index, x),
            zeros.scatter_reduce(1, index, x, "amax", include_self=False),
            zeros.scatter_reduce(1, index, x, "mean"),
            zeros.scatter_reduce(1, index, x, "prod", include_self=True),
            x.gather(1, index % 4),
            torch.take_along_dim(x, x.argsort(1), 1),
        )

    return rows(forward, lambda n: (torch.randn(n, 4), torch.randint(0, 6, (n, 4))))


@zoo("select_scatter, slice_scatter, diagonal_scatter: functional writes")
def functional_writes() -> Built:
    import torch

    def forward(self, x):
        return (
            x.select_scatter(x[:, 0] * 3, 1, 2),
            x.slice_scatter(x[:, :2], 1, 1, 3),
            torch.diagonal_scatter(x[0].expand(4, 4), x[0]),
            torch.tril(x[:, None] * x[..., None], -1),
            torch.triu(x, 1),
            x.masked_fill(x > 0, -1.0),
        )

    return rows(forward, lambda n: (torch.randn(n, 4),))


@zoo("a counter and a moving average kept in buffers and read in the same call")
def counting_buffers() -> Built:
    import torch

    def forward(self, x):
        self.steps += 1
        self.average.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return x - self.average, self.steps

    return rows(
        forward,
        lambda n: (torch.randn(n, 4),),
        steps=torch.zeros((), dtype=torch.int64),
        average=torch.zeros(4),
    )


@zoo("a buffer replaced by assignment instead of written in place")
def buffer_reassigned() -> Built:
    import torch

    def forward(self, x):
        self.last = x.mean(0)
        return x + self.last

    return rows(forward, lambda n: (torch.randn(n, 4),), last=torch.zeros(4))


@zoo("a cache of keys written at a position by index_copy_")
def key_value_buffer() -> Built:
    import torch
    from torch import nn

    def forward(self, x, position):
        key, value = self.project(x).chunk(2, -1)
        self.keys.index_copy_(1, position, key)
        self.values[:, position] = value
        scores = x @ self.keys.mT
        allowed = torch.arange(8) <= position[:, None]
        return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ self.values

    def make():
        return torch.randn(2, 1, 4), torch.randint(0, 8, (1,))

    return fixed(
        forward,
        make,
        project=nn.Linear(4, 8),
        keys=torch.randn(2, 8, 4),
        values=torch.randn(2, 8, 4),
    )


@zoo("a rolling window: the buffer shifted and its end overwritten")
def rolling_buffer() -> Built:
    import torch

    def forward(self, x):
        self.window.copy_(torch.cat([self.window[:, 1:], x[:, None]], 1))
        return self.window.mean(1), self.window[:, -1]

    return fixed(forward, lambda: (torch.randn(2, 3),), window=torch.zeros(2, 5, 3))


@zoo("the caller's tensor is changed")
def input_mutated() -> Built:
    import torch

    def forward(self, x, y):
        x.add_(1)
        y[:, 0] = x.sum(1)
        return x * y

    return rows(forward, lambda n: (torch.randn(n, 4), torch.randn(n, 4)))


@zoo("the caller's tensor is changed and returned")
def input_mutated_and_returned() -> Built:
    import torch

    def forward(self, x):
        return x.relu_(), x

    return rows(forward, lambda n: (torch.randn(n, 4),))


@zoo("outputs that are inputs, views of inputs, views of each other, parameters")
def aliased_outputs() -> Built:
    import torch
    from torch import nn

    def forward(self, x):
        y = x * 2
        return x, x[:, 1:], y, y.view(-1), self.weight, self.weight.t(), self.table

    return rows(
        forward,
        lambda n: (torch.randn(n, 4),),
        weight=nn.Parameter(torch.randn(2, 3)),
        table=torch.arange(3.0),
    )


@zoo("one value returned twice, a constant, None, a Python number, an empty tuple")
def constant_outputs() -> Built:
    import torch

    def forward(self, x):
        y = x + 1
        return y, y, torch.ones(2), None, 3, 2.5, True, (y, ()), x.shape[1]

    return rows(forward, lambda n: (torch.randn(n, 4),))


@zoo("a size that is dynamic returned as a Python int")
def size_output() -> Built:
    import torch

    def forward(self, x):
        return x.sum(0), x.shape[0], x.shape[0] * 2 + 1, x.numel()

    return rows(forward, lambda n: (torch.randn(n, 4),))


@zoo("in-place after a branch of the same value, as residual blocks have it")
def inplace_residual() -> Built:
    import torch
    from torch import nn

    def forward(self, x):
        y = self.linear(x)
        skip = y
        y = torch.relu_(y)
        y += skip
        y[:, 0] *= skip[:, 1]
        return y.clamp_(max=2).sqrt_()

    return rows(forward, lambda n: (torch.randn(n, 4),), linear=nn.Linear(4, 4))


@zoo("out= arguments: results written into preallocated tensors")
def out_arguments() -> Built:
    import torch

    def forward(self, x):
        result = torch.empty_like(x)
        torch.add(x, 1, out=result)
        stacked = x.new_empty(2, *x.shape)
        torch.stack([x, result], out=stacked)
        return result, stacked

    return rows(forward, lambda n: (torch.randn(n, 4),))
