"""Small models to train in stages, and what plain PyTorch gives for them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import dfc
from dfc.ir.graph import Graph, Node
from dfc.planning.microbatches import cut
from dfc.runtime.pipeline.staged_model import StagedModel

B = torch.export.Dim("B", min=1, max=64)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [(nn.Linear(12, 12), nn.LayerNorm(12), nn.GELU()) for _ in range(4)]
        self.layers = nn.Sequential(*(part for layer in layers for part in layer))
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.layers(x)), y)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, s, 3, 2, w // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, s, w))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Tied(nn.Module):
    """A decoder whose head is its table: the first and the last stage share it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(31, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(3))

    def forward(self, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy((x @ self.table.weight.T).flatten(0, 1), y.flatten())


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(c, 2 * c, 3, padding=1) for c in (2, 4))
        self.up = nn.ModuleList(nn.Conv2d(3 * c, c, 3, padding=1) for c in (4, 2))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        skips = []
        for layer in self.down:
            skips.append(x)
            x = F.max_pool2d(torch.relu(layer(x)), 2)
        for layer in self.up:
            x = F.interpolate(x, scale_factor=2.0)
            x = layer(torch.cat([x, skips.pop()], 1))
        return F.mse_loss(x, y)


class Branches(nn.Module):
    """Two branches that meet, and one of them goes on beside the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.b = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 8))
        self.c = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b = self.a(x), self.b(x)
        return F.cross_entropy(self.c(a + b) + b[:, :3], y)


class Spectral(nn.Module):
    """Complex numbers go from stage to stage; of the complex weights one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.filter = nn.Parameter(torch.randn(5, dtype=torch.complex64))
        fixed = torch.randn(5, dtype=torch.complex64)
        self.fixed = nn.Parameter(fixed, requires_grad=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        f = torch.fft.rfft(torch.tanh(self.first(x))) * self.filter
        x = torch.fft.irfft(f * self.fixed + 0.1 * f.conj(), n=8)
        return F.mse_loss(self.last(x), y)


Made = tuple[nn.Module, tuple[Any, ...]]


MODELS: dict[str, Callable[[], Made]] = {
    "mlp": lambda: (MLP(), (torch.randn(10, 12), torch.randint(5, (10,)))),
    "tied": lambda: (Tied(), (torch.randint(31, (10, 6)), torch.randint(31, (10, 6)))),
    "unet": lambda: (UNet(), (torch.randn(10, 2, 8, 8), torch.randn(10, 2, 8, 8))),
    "branches": lambda: (Branches(), (torch.randn(10, 8), torch.randint(3, (10,)))),
    "spectral": lambda: (Spectral(), (torch.randn(10, 8), torch.randn(10, 8))),
}


@cache
def traced(name: str) -> tuple[nn.Module, tuple[Any, ...], Graph]:
    torch.manual_seed(0)
    model, args = MODELS[name]()
    return model, args, dfc.trace(model, args, dynamic_shapes=({0: B}, {0: B}))


def captured(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    model, args, _ = traced(name)
    return deepcopy(model), args


@cache
def staged(name: str, count: int) -> StagedModel:
    """Differentiated once for all tests: trainers have weights of their own."""
    graph = traced(name)[2]
    return StagedModel(graph, evenly(graph, count))


def evenly(graph: Graph, count: int) -> dict[Node, int]:
    """Equal numbers of nodes, in order."""
    nodes = list(graph.nodes)
    return {n: i * count // len(nodes) for i, n in enumerate(nodes)}


def reference(
    model: nn.Module, args: tuple[Any, ...], m: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Plain PyTorch: the same microbatches one after another, their gradients added."""
    model.zero_grad()
    parts = cut(dict(enumerate(args)), {0: 0, 1: 0}, m)
    total = torch.zeros(())
    for part in parts:
        loss = model(*part.values()) * (len(part[0]) / len(args[0]))
        loss.backward()
        total = total + loss.detach()
    return total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, e in expected.items():
        error = (found[name] - e).norm() / e.norm().clamp_min(1e-12)
        assert error <= 1e-6, f"{name}: {error}"


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, 1e-2)


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        self.drop = nn.Dropout(0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.drop(torch.relu(self.b(self.drop(torch.relu(self.a(x)))))))


def cross_entropy(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs, target)


def by_dimension(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Matrices decay, vectors learn slowly: a group of each, where there are any."""
    matrices = {"params": [p for p in parameters if p.ndim > 1], "lr": 1e-2, "weight_decay": 0.1}
    vectors = {"params": [p for p in parameters if p.ndim <= 1], "lr": 1e-3, "weight_decay": 0.0}
    return torch.optim.AdamW([g for g in (matrices, vectors) if g["params"]])
