"""Which units matter least, by each measure, and how many go of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dfc
from dfc.compress.choice import Part, aligned, counts, counts_by_time
from dfc.compress.groups import Group, find_groups
from dfc.compress.importance import by_magnitude, by_taylor, per_unit
from dfc.compress.reconstruction import by_reconstruction
from dfc.ir.graph import Graph
from dfc.ir.interpret import interpret
from dfc.rewrite.pass_ import Context
from tests.pruned import Block, Net, X, numbers, prune, shape


@pytest.fixture(scope="module")
def graph() -> Graph:
    return dfc.trace(Net().eval(), (X,))


def test_a_ratio_of_the_time_goes_where_little_is_lost_for_much_of_it() -> None:
    from dfc.compress.axes import leaf

    dear, cheap, heads = Group(leaf(64), "ffn"), Group(leaf(64), "ffn"), Group(leaf(8), "heads")
    scores = {dear: torch.ones(64), cheap: torch.ones(64), heads: torch.full((8,), 1000.0)}
    parts = [
        Part(6.0, frozenset({dear.axis})),
        Part(1.0, frozenset({cheap.axis, heads.axis})),
        Part(3.0, frozenset()),  # what no group has a part in
    ]
    assert counts_by_time(scores, 0.3, 16, parts) == {dear: 32, cheap: 64, heads: 8}
    scores[dear] = torch.arange(64.0)  # its first 16 cost 80 a second, those of `cheap` 64
    assert counts_by_time(scores, 0.2, 16, parts) == {dear: 48, cheap: 16, heads: 8}
    scores[dear] = torch.full((64,), 1e6)
    assert counts_by_time(scores, 0.05, 16, parts) == {dear: 64, cheap: 32, heads: 8}
    least = counts_by_time(scores, 0.95, 16, parts)
    assert least == {dear: 16, cheap: 16, heads: 1}, "what is left when the ratio is out of reach"


def test_time_is_saved_where_it_is_spent() -> None:
    """Layers on long rows take more of it than the same layers on short ones."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.long, self.short = Block(), Block()

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.long(x), self.short(y)

    torch.manual_seed(0)
    two = Two().eval()
    two.short.load_state_dict(two.long.state_dict())
    x, y = torch.randn(512, 16), torch.randn(2, 16)
    small = prune(dfc.trace(two, (x, y)), ctx=Context(examples=[[x, y]]), ratio=0.2, scope="time")
    assert shape(small, "long.up.weight")[0] < 64 == shape(small, "short.up.weight")[0]


def test_counts_are_multiples_and_at_least_one_of_them() -> None:
    from dfc.compress.axes import leaf

    channels, heads = Group(leaf(64), "channels"), Group(leaf(12), "heads")
    assert [aligned(channels, n, 8) for n in (1, 43, 44, 64)] == [8, 40, 48, 64]
    assert aligned(heads, 8.4, 8) == 8 and aligned(Group(leaf(5), "ffn"), 3, 8) == 5
    scores = {channels: torch.ones(64), heads: torch.ones(12)}
    assert counts(scores, 0.5, 16, "layer") == {channels: 32, heads: 6}


def test_the_norm_of_a_head_is_that_of_its_rows() -> None:
    from dfc.compress.axes import find, leaf, refine

    width = leaf(6)
    heads, _ = refine(width, (3, 2))
    along = torch.arange(6.0)
    assert per_unit(width, along, find(heads)).tolist() == [1.0, 5.0, 9.0]


def test_taylor_is_the_squared_change_of_the_outputs() -> None:
    """For a linear model the first order is exact: both sides can be computed."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 3, bias=False)).eval()
    rows = torch.randn(400, 1, 4)
    graph = dfc.trace(net, (rows[0],))
    groups = find_groups(graph)
    (g,) = groups.prunable
    found = by_taylor(groups, [g], [[x] for x in rows], Context())[g] / len(rows)
    hidden = net[0](rows[:, 0])
    wanted = (hidden.square().mean(0) * net[1].weight.square().sum(0)).detach()
    torch.testing.assert_close(found, wanted, rtol=0.35, atol=0.0)
    assert found.argsort()[:2].tolist() == wanted.argsort()[:2].tolist()


def test_taylor_takes_gradients_whatever_the_caller_does(graph: Graph) -> None:
    data = Context(examples=[[X]])
    with torch.no_grad():
        small = prune(graph, ctx=data, ratio=0.5, by="taylor")
    assert sum("the example's inputs are all the data" in s for s in data.products["notes"]) == 1
    assert torch.equal(
        numbers(small, "layers.0.up.weight"),
        numbers(prune(graph, ctx=data, ratio=0.5, by="taylor"), "layers.0.up.weight"),
    )


def test_magnitude_does_not_let_a_wide_weight_drown_the_others(graph: Graph) -> None:
    groups = find_groups(graph)
    scores = by_magnitude(groups, groups.prunable)
    for score in scores.values():
        assert float(score.mean()) == pytest.approx(2.0), "mean 1 for each of two weights"


def test_reconstruction_takes_units_that_others_can_stand_for() -> None:
    """Two units that carry much, and the same; the rest carries little, each on its own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        net[0].weight[:2] = 5 * net[0].weight[0]
        net[0].bias[:2] = 1.0
    x = torch.randn(400, 16)
    graph = dfc.trace(net, (x,))
    data = Context(examples=[[x]])

    def error(by: str) -> float:
        small = prune(graph, '"0"', data, ratio=1 / 8, align=1, by=by, refit=True)
        assert shape(small, "0.weight") == (7, 16)
        with torch.no_grad():
            return float((interpret(small, [x])[0] - net(x)).norm() / net(x).norm())

    assert error("reconstruction") < 1e-3 < 0.01 < error("activation")


def test_what_cannot_be_refitted_has_the_scores_of_taylor() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)).eval()
    x = torch.randn(8, 3, 8, 8)
    graph = dfc.trace(net, (x,))
    data = Context(examples=[[x]])
    options = {"ratio": 0.5, "refit": True}
    small, other = (prune(graph, ctx=data, by=by, **options) for by in ("reconstruction", "taylor"))
    assert shape(small, "0.weight") == (8, 3, 3, 3)
    assert torch.equal(numbers(small, "2.weight"), numbers(other, "2.weight"))


def test_reconstruction_costs_what_solving_again_costs() -> None:
    """The order and the losses, against solving the least squares for every unit left out."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)).eval()
    x = torch.randn(300, 6)
    graph = dfc.trace(net, (x,))
    groups = find_groups(graph)
    (g,) = [g for g in groups.groups if g.size == 9]
    scores = by_reconstruction(groups, [g], [[x]], Context())[g] / 300
    with torch.no_grad():
        read = torch.cat([net[:2](x), torch.ones(300, 1)], 1).double()
    h = read.T @ read / 300
    h.diagonal().add_(10 / 300 * h.diagonal().mean())
    w = torch.cat([net[2].weight, net[2].bias[:, None]], 1).detach().double()

    def loss(units: list[int]) -> float:
        left = [*units, 9]
        gone = [i for i in range(9) if i not in units]
        rest = h[gone][:, gone] - h[gone][:, left] @ h[left][:, left].inverse() @ h[left][:, gone]
        return float((w[:, gone] @ rest * w[:, gone]).sum())  # gradients by the outputs are 1

    left = list(range(9))
    for unit in scores.argsort().tolist()[:-1]:
        fewer = {u: loss([i for i in left if i != u]) - loss(left) for u in left}
        assert unit == min(fewer, key=fewer.__getitem__)
        assert float(scores[unit]) == pytest.approx(fewer[unit], rel=1e-5)
        left.remove(unit)
