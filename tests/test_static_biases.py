"""Static int8: biases bring means back, and ranges are of what counts: padding moves neither."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dfc
from dfc.compress.bias import first_samples
from dfc.errors import DfcError
from dfc.ir.interpret import interpret
from dfc.ir.verify import verify
from dfc.rewrite.driver import run_passes
from dfc.rewrite.pass_ import Context, find_pass
from tests.static_nets import TIDY, data, quantized, tiny


def test_biases_bring_the_means_back():
    x = data()
    plain, corrected = (quantized(tiny(), x, per="tensor", correct=c) for c in (False, True))

    def shift(graph):
        outs = [(interpret(graph, [b])[0], interpret(tiny(), [b])[0]) for b in x]
        return float(torch.cat([a - b for a, b in outs]).mean(0).abs().max())

    assert shift(corrected) < 0.3 * shift(plain)


class Masked(nn.Module):
    """Tokens of which some are padding."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 8)
        with torch.no_grad():
            self.table.weight[7] *= 30  # a token that stands out
            self.table.weight[0] = 300  # padding is far from all tokens

    def forward(self, input_ids, attention_mask):
        y = self.down(F.gelu(self.up(self.table(input_ids))))
        return y * attention_mask.unsqueeze(-1)


def masked():
    torch.manual_seed(0)
    batches = []
    for _ in range(4):
        ids = torch.randint(1, 50, (8, 6))
        mask = (torch.arange(6) < torch.randint(2, 6, (8, 1))).long()
        batches.append((ids * mask, mask))
    sizes = {0: torch.export.Dim("B", min=1), 1: torch.export.Dim("S", min=2, max=64)}
    graph = dfc.trace(Masked().eval(), batches[0], dynamic_shapes=(sizes, sizes))
    return run_passes(graph, [find_pass(n) for n in TIDY], mode="none").graph, batches


def test_padding_moves_no_bias_and_no_range():
    graph, batches = masked()
    tokens = torch.cat([m.reshape(-1) for _, m in batches]) != 0
    want = torch.cat([interpret(graph, list(b))[0].reshape(-1, 8) for b in batches])[tokens]
    shifts = []
    for correct in (False, True):
        made = quantized(graph, batches, correct=correct)
        found = torch.cat([interpret(made, list(b))[0].reshape(-1, 8) for b in batches])[tokens]
        assert (found - want).square().mean() < 5e-3 * want.square().mean()
        shifts.append(float((found - want).mean(0).abs().max()))
    assert shifts[1] < 0.2 * shifts[0]


def scales(graph):
    """Of what is rounded while the model runs, by the name of its constant."""
    nodes = [n for n in graph.nodes if n.op == "dfc.quantize"]
    return {n.inputs[1].name: float(n.inputs[1].data.tensor()) for n in nodes}


def test_what_linear_layers_read_keeps_its_whole_range():
    graph, batches = masked()
    whole, clipped, auto = (
        scales(quantized(graph, batches, range=r)) for r in ("minmax", "mse", "auto")
    )
    assert auto == whole and all(clipped[name] <= whole[name] for name in whole)
    assert clipped != whole
    whole, clipped, auto = (scales(quantized(tiny(), range=r)) for r in ("minmax", "mse", "auto"))
    assert auto == clipped != whole  # its linear layer shares the scale of what is pooled


def test_only_the_samples_that_are_asked_for_are_kept():
    kept = first_samples([[torch.ones(8, 2), torch.ones(3)], [torch.ones(8, 2), torch.ones(3)]], 12)
    assert [x.shape[0] for x, _ in kept] == [8, 4] and [len(m) for _, m in kept] == [3, 3]


def test_biases_are_corrected_again_after_other_changes():
    ctx = Context(data={"calib": data()})
    graph = quantized(tiny(), ctx=ctx, correct=False)
    once = find_pass("correct_bias", {"data": "calib"})
    assert once.run(graph, ctx) == 4
    verify(graph)
    (same,) = interpret(quantized(tiny()), data()[:1])
    torch.testing.assert_close(interpret(graph, data()[:1])[0], same)


def test_there_must_be_means_to_bring_back():
    with pytest.raises(DfcError, match="no means to restore") as e:
        find_pass("correct_bias", {"data": "calib"}).run(tiny().copy(), Context())
    assert e.value.code == "D085"
