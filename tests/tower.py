"""A model to hold in less memory than its weights take, and the memory that does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dfc
from dfc.compiled import Compiled
from dfc.planning.weight_blocks import weight_bytes
from dfc.runtime.tiers.streamed import Streamed

B = torch.export.Dim("B", min=1, max=16)


class Tower(nn.Module):
    """A tied table that is read first and, turned, last; a buffer that calls write to."""

    def __init__(self, layers: int = 6, width: int = 96) -> None:
        super().__init__()
        self.table = nn.Embedding(64, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(layers)
        )
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        x = self.table(ids)
        for layer in self.layers:
            x = x + layer(x)
        return {"logits": x @ self.table.weight.T, "calls": self.calls * 2}


def ids(size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (size, 12), generator=torch.Generator().manual_seed(seed))


def saved_tower(path: Path, layers: int = 6) -> Path:
    torch.manual_seed(0)
    compiled = dfc.compile(
        Tower(layers).eval(), (ids(4),), dynamic_shapes=({0: B},), engine="eager", passes=[]
    )
    compiled.save(path)
    return path


def all_bytes(compiled: Compiled) -> int:
    return sum(weight_bytes(p) for p in compiled.graph.parameters.values())


def memory_of(compiled: Compiled, share: float, inputs: Sequence[Any]) -> int:
    """What holds so much of the weights, and what is computed of the inputs."""
    from dfc.ir.interpret import bind_inputs
    from dfc.planning.model import live_bytes

    sizes = bind_inputs(compiled.graph, inputs)
    return int(all_bytes(compiled) * share + live_bytes(compiled.graph, sizes))


def runner_of(compiled: Compiled) -> Streamed:
    assert isinstance(compiled.runner, Streamed)
    return compiled.runner
