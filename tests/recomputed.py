"""Models whose stages recompute, and what their training gives."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

import dfc
from dfc.runtime.pipeline.staged_model import StagedModel
from tests.training_models import evenly

B = torch.export.Dim("B", min=1, max=64)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(0.3)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Skips(nn.Module):
    """Blocks with dropout whose head is their table, and whose end reads their beginning again."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(31, 8)
        self.blocks = nn.ModuleList(Block(8) for _ in range(4))

    def forward(self, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        first = x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(((x + first) @ self.table.weight.T).flatten(0, 1), y.flatten())


@cache
def staged() -> tuple[StagedModel, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    args = torch.randint(31, (10, 6)), torch.randint(31, (10, 6))
    graph = dfc.trace(Skips().train(), args, dynamic_shapes=({0: B}, {0: B}))
    return StagedModel(graph, evenly(graph, 4)), args


def equal(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> None:
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
