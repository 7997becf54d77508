"""A residual network to prune, `prune` run on a copy of its graph, and what is left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import dfc
from dfc.ir.graph import Graph
from dfc.ir.verify import verify
from dfc.lang.selectors import parse_selector
from dfc.rewrite.pass_ import Context, find_pass

X = torch.linspace(-2, 2, 6 * 16).reshape(6, 16)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


def prune(graph: Graph, select: str = "", ctx: Context | None = None, **options: Any) -> Graph:
    if select:
        options["select"] = parse_selector(select)
    small = graph.copy()
    find_pass("prune", options).run(small, ctx or Context())
    verify(small)
    return small


def shape(graph: Graph, name: str) -> tuple[Any, ...]:
    return graph.parameters[name].tensor_type.shape


def numbers(graph: Graph, name: str) -> Tensor:
    data = graph.parameters[name].data
    assert data is not None
    return data.tensor()


def compiled(net: Net, steps: str, head: str = "", **options: Any) -> dfc.Compiled:
    text = f"dfc 1\n{head}\nrecipe r {{\n{steps}\n}}\n"
    return dfc.compile(net, (X,), recipe=text, engine="eager", **options)
