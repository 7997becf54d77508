"""Equalize: channels are balanced between two layers, and results stay what they were."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn

import dfc
from dfc.compress.equalizing import pairs_of
from dfc.ir.interpret import interpret
from dfc.rewrite.pass_ import KEPT, Context, find_pass


def traced(net, *shape):
    x = torch.randn(4, *shape)
    return dfc.trace(net.eval(), (x,))


def uneven(layer, axis=0, seed=0):
    """Give the channels of a layer weights of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-2, 2, layer.weight.shape[axis])
    sizes = sizes[torch.randperm(len(sizes), generator=g)]
    shape = [1] * layer.weight.dim()
    shape[axis] = -1
    with torch.no_grad():
        layer.weight *= sizes.reshape(shape)
        if axis == 0:
            layer.bias *= sizes
    return layer


def chain(act):
    torch.manual_seed(0)
    return nn.Sequential(
        uneven(nn.Conv2d(3, 16, 1)), act, uneven(nn.Conv2d(16, 16, 3, 1, 1, groups=16)), act,
        nn.Conv2d(16, 8, 1), nn.Flatten(), nn.Linear(8 * 16, 5),
    )  # fmt: skip


def run(graph, data=None, **options):
    made = graph.copy()
    ctx = Context(data={"calib": data} if data else {}, decisions=[])
    if data:
        options["data"] = "calib"
    return made, find_pass("equalize", options).run(made, ctx), ctx.decisions


def spread(w):
    """How many times as large the largest channel is as the smallest."""
    sizes = w.flatten(1).abs().amax(1)
    return float(sizes.max() / sizes.min())


def weights(graph):
    return [n.inputs[1].data.tensor() for n in graph.nodes if n.op == "aten.conv2d.default"]


def test_channels_are_balanced_and_results_stay():
    graph = traced(chain(nn.ReLU()), 3, 4, 4)
    made, changes, _ = run(graph)
    assert changes == 2
    before, after = (max(spread(w) for w in weights(g)[:2]) for g in (graph, made))
    assert before > 1000 and after < 0.1 * before
    x = torch.randn(4, 3, 4, 4)
    torch.testing.assert_close(interpret(made, [x]), interpret(graph, [x]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_of_the_second_layer_are_minded(groups):
    torch.manual_seed(0)
    net = nn.Sequential(uneven(nn.Conv2d(3, 8, 1)), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=groups))
    graph = traced(net, 3, 5, 5)
    made, changes, _ = run(graph)
    x = torch.randn(4, 3, 5, 5)
    assert changes == 1
    torch.testing.assert_close(interpret(made, [x]), interpret(graph, [x]), rtol=1e-4, atol=1e-4)


def test_both_layers_have_equal_channels_afterwards():
    torch.manual_seed(0)
    graph = traced(nn.Sequential(uneven(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3)), 4)
    made, _, _ = run(graph)
    (pair,) = pairs_of(made, lambda node, reason: None)
    first, second = (n.inputs[1].data.tensor() for n in (pair.first, pair.second))
    torch.testing.assert_close(first.abs().amax(1), pair.columns(second).abs().amax(1))


def test_relu6_is_left_alone_without_data():
    graph = traced(chain(nn.ReLU6()), 3, 4, 4)
    _, changes, decisions = run(graph)
    assert changes == 0
    assert any(d.outcome == KEPT and "ReLU6 clips behind it" in d.reason for d in decisions)


def test_relu6_clips_nothing_that_it_did_not_clip():
    data = [torch.randn(16, 3, 4, 4) for _ in range(3)]
    graph = traced(chain(nn.ReLU6()), 3, 4, 4)
    made, changes, _ = run(graph, [x[:4] for x in data])
    assert changes == 2
    for x in data:
        (want,), (got,) = interpret(graph, [x[:4]]), interpret(made, [x[:4]])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    clips = collections.Counter(n.op for n in made.nodes)
    assert clips["aten.relu6.default"] + clips["aten.hardtanh.default"] == 2


def test_a_value_with_other_readers_is_kept():
    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x).relu()
            return self.b(y) + y

    _, changes, decisions = run(traced(Shortcut(), 4))
    assert changes == 0
    assert any("is read by 2 nodes" in d.reason for d in decisions)


def test_other_activations_are_kept():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
    _, changes, decisions = run(traced(net, 4))
    assert changes == 0 and any("aten.gelu.default, which a scale" in d.reason for d in decisions)
