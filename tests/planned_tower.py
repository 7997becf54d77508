"""A model of equal layers that is planned for machines of equal devices."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

import dfc
from dfc.ir.graph import Graph
from dfc.planning.machine import Device, Machine, Wire

LINK = Wire(1e9, 1e-6)
FAST = Device("a", "cuda", 1e9, 1e9, {"f32": 1e9})


def machine(n: int, *, memory: float = 1e9, wire: Wire | None = LINK) -> Machine:
    devices = tuple(replace(FAST, name=f"gpu{i}", memory=memory) for i in range(n))
    wires = {(i, j): wire for i in range(n) for j in (i - 1, i + 1) if 0 <= j < n and wire}
    return Machine("test", devices, wires)


class Tower(nn.Module):
    """Equal layers with a residual, and a table that the head shares."""

    def __init__(self, layers: int = 6, width: int = 32, vocabulary: int = 50) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return self.head(x)


def traced_tower() -> Graph:
    batch = torch.export.Dim("B", min=1, max=64)
    with torch.device("meta"):
        model = Tower()
        ids = torch.zeros(4, 7, dtype=torch.long)
    return dfc.trace(model, (ids,), dynamic_shapes=({0: batch},))


TARGET = """dfc 1

target pair {
  device gpu0 : h100
  device gpu1 : cuda(mem=80GB, peak=40TFLOPS, peak_bf16=500TFLOPS, bw=2TB/s, launch=5us)
  link gpu0 <-> gpu1 : nvlink(bw=450GB/s, latency=5us)
}
"""
