"""A layer norm of a sum is what its two operators are, on every path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dfc
from dfc.emit.fx import to_fx
from dfc.runtime.kernels import library
from dfc.runtime.kernels.graph import kernels
from dfc.runtime.kernels.norm import AddNorm

pytestmark = pytest.mark.skipif(not library.state().built, reason="the kernels are not built")


def given(rows: int, n: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(rows + n)
    sizes = ((rows, n), (rows, n), (n,), (n,))
    return [torch.randn(size, generator=random) * 3 + 1 for size in sizes]


@pytest.mark.parametrize("rows, n", [(1, 1), (3, 7), (5, 32), (2, 45), (130, 768), (0, 8)])
def test_every_path_gives_the_same_bits_as_near_as_torch(rows: int, n: int) -> None:
    x, r, weight, bias = given(rows, n)
    want = nn.functional.layer_norm((x + r).double(), (n,), weight.double(), bias.double(), 1e-5)
    torchs = nn.functional.layer_norm(x + r, (n,), weight, bias, 1e-5)
    found, before = [], torch.get_num_threads()
    norm = AddNorm(1e-5)
    try:
        for path in library.state().paths:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                norm._path = path.encode()
                found.append(norm.run(x, r, weight, bias))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)
    if rows:
        error, its = ((y.double() - want).abs().max() for y in (found[0], torchs))
        assert error <= 2 * its + 2e-6


def test_a_norm_has_the_same_bits_with_and_without_the_addition() -> None:
    for rows, n in ((3, 7), (2, 45), (5, 64)):
        x, r, weight, bias = given(rows, n)
        norm = AddNorm(1e-5)
        assert torch.equal(norm.run(x + r, None, weight, bias), norm.run(x, r, weight, bias))


def test_rows_of_any_layout_are_taken_and_what_is_not_finite_stays_in_its_row() -> None:
    x, r, weight, bias = given(6, 40)
    norm = AddNorm(1e-5)
    want = norm.run(x, r, weight, bias)
    assert torch.equal(norm.run(x.T.contiguous().T, r, weight, bias), want)
    assert torch.equal(
        norm.run(*(t.view(2, 3, 40) for t in (x, r)), weight, bias).view(6, 40), want
    )
    x[2, 3] = torch.nan
    got = norm.run(x, r, weight, bias)
    assert got[2].isnan().all() and torch.equal(got[[0, 1, 3, 4, 5]], want[[0, 1, 3, 4, 5]])


class Model(nn.Module):
    def __init__(self, keeps_sum: bool = False, alpha: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm, self.last = nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 48)
        self.keeps_sum, self.alpha = keeps_sum, alpha

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        half = torch.relu(x)
        total = torch.add(self.linear(half), half, alpha=self.alpha)
        y = self.last(self.norm(total))
        return (y, total) if self.keeps_sum else (y,)


@pytest.mark.parametrize("options, taken", [
    ({}, True), ({"keeps_sum": True}, False), ({"alpha": 0.5}, False),
])  # fmt: skip
def test_a_sum_that_a_norm_alone_reads_is_left_to_it(
    options: dict[str, float], taken: bool
) -> None:
    model, x = Model(**options), torch.randn(2, 5, 24)  # type: ignore[arg-type]
    recipe = "dfc 1\nrecipe r {\n  quantize int8 with scheme=dynamic\n}"
    graph = dfc.compile(model, (x,), recipe=recipe, engine="eager", verify="none").graph
    module = to_fx(graph, kernels=kernels("cpu"))
    called = [n.target for n in module.graph.nodes if n.op == "call_function"]
    assert any(isinstance(getattr(f, "__self__", None), AddNorm) for f in called)
    assert (torch.ops.aten.add.Tensor in called) != taken
    for got, want in zip(module(x), to_fx(graph, kernels={})(x), strict=True):
        assert (got - want).norm() <= 1e-2 * want.norm()
    traced = to_fx(graph, kernels=kernels("cpu", traced=True))
    assert torch.ops.aten.layer_norm.default in [n.target for n in traced.graph.nodes]


def test_a_norm_that_no_layer_rounds_is_pytorchs() -> None:
    model, x = Model(), torch.randn(2, 5, 24)
    graph = dfc.compile(model, (x,), engine="eager", verify="none").graph
    module = to_fx(graph, kernels=kernels("cpu"))
    assert torch.ops.aten.layer_norm.default in [n.target for n in module.graph.nodes]
    assert torch.equal(module(x)[0], model(x)[0])
