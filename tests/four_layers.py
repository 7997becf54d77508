"""A network of four layers of which one costs the most, its data, and a recipe that rounds it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import dfc
from dfc.ir.graph import Graph

RECIPE = """dfc 1
data val
metric top1 on val, higher is better
recipe r {
  apply simplify
  q: autocast bf16
}
"""


class Net(nn.Module):
    """Four layers; rounding the second one's weights costs the most."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 16)
        self.c, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        with torch.no_grad():
            self.b.weight[0] *= 50

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        return self.head(torch.relu(self.c(x)))


def net() -> tuple[Net, tuple[Tensor]]:
    torch.manual_seed(0)
    return Net().eval(), (torch.randn(16, 8),)


def graph() -> tuple[Graph, list[Tensor]]:
    model, args = net()
    return dfc.trace(model, args), list(args)


def layers(found: Any) -> list[str]:
    return [e.layer for e in found.layers]


def data() -> list[tuple[Tensor, Tensor]]:
    model, _ = net()
    torch.manual_seed(1)
    xs = [torch.randn(16, 8) for _ in range(20)]
    return [(x, model(x).argmax(-1)) for x in xs]


def top1(run: Any, batches: Any) -> Tensor:
    return torch.cat([run(x).argmax(-1) == y for x, y in batches])
