"""Branches, loops and transforms: torch.cond, while_loop, scan, map, vmap, grad, Python's own."""

from __future__ import annotations

from tests.zoo import Built, batch, zoo
from tests.zoo.functions import fixed, module, rows


@zoo("a branch chosen by a sum, both sides reading a parameter")
def cond() -> Built:
    import torch
    from torch import nn

    def forward(self, x):
        return torch.cond(
            x.sum() > 0, lambda x: self.left(x).relu(), lambda x: self.right(x) - 1, (x,)
        )

    return rows(
        forward, lambda n: (torch.randn(n, 4),), left=nn.Linear(4, 4), right=nn.Linear(4, 4)
    )


@zoo("a branch inside a branch, several results")
def cond_nested() -> Built:
    import torch

    def forward(self, x):
        def double(y):
            return y * 2, y + 3

        def halve(y):
            return y / 2, -y

        def positive(y):
            return torch.cond(y.max() > 1, double, halve, (y,))

        def negative(y):
            return y + 1, y - 1

        return torch.cond(x.mean() > 0, positive, negative, (x,))

    return rows(forward, lambda n: (torch.randn(n, 4),))


@zoo("a branch on a size that is dynamic")
def cond_on_size() -> Built:
    import torch

    def forward(self, x):
        return torch.cond(x.shape[0] > 4, lambda x: x.cos(), lambda x: x.sin(), (x,))

    return rows(forward, lambda n: (torch.randn(n, 4),))


@zoo("iterates until it has converged: the number of rounds depends on values")
def while_loop() -> Built:
    import torch
    from torch._higher_order_ops.while_loop import while_loop as loop

    def forward(self, x):
        def unfinished(step, y):
            return (step < 20) & (y.abs().max() > 0.1)

        def halve(step, y):
            return step + 1, y * 0.5

        return loop(unfinished, halve, (torch.tensor(0), x))

    return rows(forward, lambda n: (torch.randn(n, 4),))


@zoo("a recurrent cell scanned over time: the state and all outputs come back")
def scan() -> Built:
    import torch
    from torch import nn
    from torch._higher_order_ops.scan import scan as scanned

    def forward(self, state, x):
        def step(h, x):
            h = torch.tanh(self.inner(h) + self.outer(x))
            return h, h * 2

        return scanned(step, state, x, dim=0)

    return fixed(
        forward,
        lambda: (torch.randn(2, 4), torch.randn(5, 2, 3)),
        inner=nn.Linear(4, 4),
        outer=nn.Linear(3, 4),
    )


@zoo("a linear recurrence by associative scan")
def associative_scan() -> Built:
    import torch
    from torch._higher_order_ops.associative_scan import associative_scan as scanned

    def forward(self, gate, value):
        def combine(left, right):
            return left[0] * right[0], left[1] * right[0] + right[1]

        return scanned(combine, (gate.sigmoid(), value), dim=1, combine_mode="generic")

    return rows(forward, lambda n: (torch.randn(n, 6, 3), torch.randn(n, 6, 3)))


@zoo("a function mapped over the batch by the map operator")
def mapped() -> Built:
    import torch
    from torch._higher_order_ops.map import map as over

    def forward(self, x, weight):
        return over(lambda row, w: (row @ w).relu(), x, weight)

    return Built.of(
        module(forward),
        lambda n: (torch.randn(n, 3, 4), torch.randn(4, 2)),
        (3,),
        (1,),
        (5,),
        dynamic_shapes=({0: batch()}, None),
    )


@zoo("an ensemble: stacked weights under vmap and functional_call")
def vmap_ensemble() -> Built:
    import torch
    from torch import nn

    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(3, 4, 2))
            self.biases = nn.Parameter(torch.randn(3, 2))

        def forward(self, x):
            def member(weight, bias):
                return torch.tanh(x @ weight + bias)

            return torch.func.vmap(member)(self.weights, self.biases).mean(0)

    return rows(Ensemble(), lambda n: (torch.randn(n, 4),))


@zoo("vmap over the dynamic batch, nested, with an axis at the end")
def vmap_batch() -> Built:
    import torch

    def forward(self, x, y):
        pairs = torch.func.vmap(torch.func.vmap(torch.dot, (None, 0)), (0, None))(x, y)
        return pairs, torch.func.vmap(lambda r: r / r.norm(), in_dims=1, out_dims=1)(x)

    return Built.of(
        module(forward),
        lambda n: (torch.randn(n, 4), torch.randn(3, 4)),
        (5,),
        (1,),
        (7,),
        dynamic_shapes=({0: batch()}, None),
    )


@zoo("forces as the gradient of an energy, by torch.func.grad")
def func_grad() -> Built:
    import torch
    from torch import nn

    def forward(self, x):
        def energy(x):
            return self.net(x).square().sum()

        return energy(x), -torch.func.grad(energy)(x)

    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    return rows(forward, lambda n: (torch.randn(n, 3),), net=net)


@zoo("forces by torch.autograd.grad, as molecular potentials do it")
def autograd_grad() -> Built:
    import torch
    from torch import nn

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            energy = self.net(x).sum()
            (force,) = torch.autograd.grad(energy, x)
        return energy.detach(), -force

    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    return rows(forward, lambda n: (torch.randn(n, 3),), net=net)


@zoo("Jacobian and Hessian, Jacobian-vector product")
def jacobians() -> Built:
    import torch

    def forward(self, x):
        def f(x):
            return torch.stack([(x**2).sum(), x.prod()])

        _, tangent = torch.func.jvp(f, (x,), (torch.ones_like(x),))
        hessian = torch.func.jacrev(torch.func.jacrev(lambda x: (x**3).sum()))(x)
        return torch.func.jacrev(f)(x), tangent, hessian

    return fixed(forward, lambda: (torch.randn(4),))


@zoo("a tensor used as a Python bool: this graph holds for one side only")
def python_if_on_value() -> Built:
    import torch

    def forward(self, x):
        if x.sum() > 0:
            return x * 2
        return x - 1

    return rows(forward, lambda n: (torch.randn(n, 4),))


@zoo("a Python branch on a dynamic size")
def python_if_on_size() -> Built:
    import torch

    def forward(self, x):
        if x.shape[0] > 4:
            return x.cos()
        return x.sin()

    return rows(forward, lambda n: (torch.randn(n, 4),))


@zoo("a Python while loop on values: Newton's method until it is close")
def python_while() -> Built:
    import torch

    def forward(self, x):
        y = x
        while (y * y - x).abs().max() > 1e-4:
            y = 0.5 * (y + x / y)
        return y

    return rows(forward, lambda n: (torch.rand(n, 4) + 1,))


@zoo("a fixed number of rounds of an iteration with an early result")
def unrolled_loop() -> Built:
    import torch

    def forward(self, x):
        history = []
        for step in range(6):
            x = x - 0.1 * step * (x**3 - x)
            if step % 2:
                history.append(x)
        return torch.stack(history), min(x.shape[1], 3)

    return rows(forward, lambda n: (torch.randn(n, 4),))


@zoo("asserts: on shapes in Python, on values by torch._assert and torch._check")
def assertions() -> Built:
    import torch

    def forward(self, x):
        assert x.dim() == 2 and x.shape[1] == 4, "wants four columns"
        torch._check(x.shape[0] > 0)
        torch._assert_async((x.abs() < 100).all())
        return x + 1

    return rows(forward, lambda n: (torch.randn(n, 4),))


@zoo("gradient descent inside forward: a step of test-time training")
def inner_optimiser() -> Built:
    import torch

    def forward(self, x, y):
        def loss(weight):
            return (x @ weight - y).square().mean()

        weight = self.start
        for _ in range(3):
            gradient, value = torch.func.grad_and_value(loss)(weight)
            weight = weight - 0.1 * gradient
        return weight, value

    return rows(forward, lambda n: (torch.randn(n, 4), torch.randn(n)), start=torch.zeros(4))
