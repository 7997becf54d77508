"""Dropout in training: masks are drawn by counters, whatever the model is cut into."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dfc
from dfc.errors import DfcError
from dfc.ir.expr import symbol
from dfc.ir.interpret import interpret
from dfc.ir.types import TensorType, dtype_of
from dfc.runtime.pipeline.dropout import Mask, masked
from dfc.runtime.pipeline.staged_model import StagedModel
from dfc.runtime.pipeline.training import Trainer
from tests.training_models import B, Dropped, adamw, close, cross_entropy, evenly, reference


class Recurrent(nn.Module):
    """Two kinds of recurrent layers, the first of which reads what has no gradient."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.a = nn.LSTM(4, 6, num_layers=2, batch_first=True, dropout=dropout)
        self.b = nn.GRU(6, 5, batch_first=True)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.b(self.a(x)[0])[0][:, -1], y)


def test_recurrent_layers_draw_nothing_without_dropout_between_them() -> None:
    torch.manual_seed(0)
    args = (torch.randn(6, 3, 4), torch.randint(5, (6,)))
    model = Recurrent()
    graph = dfc.trace(model, args, dynamic_shapes=({0: B}, {0: B}))
    loss, expected = reference(model, args, 3)
    with Trainer(graph, evenly(graph, 2), microbatches=3, optimizer=adamw, threads=1) as trainer:
        torch.testing.assert_close(trainer.backward(*args), loss)
        close({n: p.grad for n, p in trainer.parameters.items()}, expected)
    dropped = dfc.trace(Recurrent(dropout=0.5), args)
    with pytest.raises(DfcError, match=r"N071.*`aten\.lstm\.input`.*draws random numbers"):
        StagedModel(dropped, evenly(dropped, 2))


def test_dropout_does_not_depend_on_how_the_model_is_cut() -> None:
    """The masks are drawn by counters; a loss may be a function of the model's outputs."""
    torch.manual_seed(1)
    model = Dropped()
    x, y = torch.randn(9, 8), torch.randint(4, (9,))
    graph = dfc.trace(model, (x,), dynamic_shapes=({0: B},))
    assert any("dropout" in n.op for n in graph.nodes)
    target = ("i64[B]",)
    curves = []
    for count, schedule, seed in ((1, "gpipe", 0), (3, "1f1b", 0), (2, "zb1p", 0), (1, "gpipe", 1)):
        with Trainer(graph, evenly(graph, count), schedule=schedule, microbatches=3,
                     loss=cross_entropy, targets=target, optimizer=adamw, threads=1,
                     seed=seed) as trainer:  # fmt: skip
            curves.append([float(trainer.step(x, y)) for _ in range(4)])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)
    assert curves[3] != pytest.approx(curves[0], rel=1e-2)
    assert len(set(curves[0])) == 4


@pytest.mark.parametrize("kind", ["causal", "bool", "float", "none"])
def test_attention_that_drops_out_is_its_own_parts(kind: str) -> None:
    """With a probability that drops nothing it is what PyTorch's is."""

    class Attention(nn.Module):
        def forward(self, *qkv: torch.Tensor) -> torch.Tensor:
            causal = kind == "causal"
            return F.scaled_dot_product_attention(*qkv, dropout_p=1e-12, is_causal=causal)

    torch.manual_seed(0)
    args = [torch.randn(2, 3, 5, 8) for _ in range(3)]
    if kind in ("bool", "float"):
        mask = torch.rand(5, 5)
        mask.diagonal().fill_(1)
        args.append(mask > 0.4 if kind == "bool" else mask)
    graph = dfc.trace(Attention(), tuple(args))
    (mask,) = masked(graph)
    found = interpret(graph, [*args, torch.ones(2, 3, 5, 5)])
    expected = F.scaled_dot_product_attention(*args, is_causal=kind == "causal")
    torch.testing.assert_close(found[0], expected)


def test_a_mask_is_zero_as_often_as_dropout_says() -> None:
    mask = Mask(0, TensorType(dtype_of(torch.float32), (100, symbol("B"))), 0.25)
    drawn = mask.draw(0, 0, 0, {"B": 100})
    assert drawn.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (drawn == 0).float().mean() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(drawn, mask.draw(0, 0, 0, {"B": 100}))
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert not torch.equal(drawn, mask.draw(*other, {"B": 100}))
