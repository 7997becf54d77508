"""A user's script that goes on until it is interrupted: `python _endless.py WAY`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn

import dfc
from dfc.planning.balanced import balanced
from dfc.runtime.pipeline.local import Pipeline
from dfc.runtime.pipeline.processes import Processes
from dfc.runtime.pipeline.training import Trainer
from dfc.runtime.pipeline.training_processes import ProcessTrainer
from dfc.runtime.pipeline.training_ranks import RankTrainer


class Layers(nn.Module):
    """The mean of what it makes: a loss as well."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.mean(1)


class Loss(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).mean()


def pipeline(kind: Callable[..., Pipeline], **options: Any) -> None:
    x = torch.randn(64, 256)
    graph = dfc.trace(Layers().eval(), (x,), dynamic_shapes=({0: torch.export.Dim("B", max=64)},))
    with kind(graph, balanced(graph, 2, [x]), microbatches=8, threads=2, **options) as made:
        while True:
            made(x)


def training(kind: Callable[..., AbstractContextManager[Any]]) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    graph = dfc.trace(Loss(), (x,), dynamic_shapes=({0: torch.export.Dim("B", max=64)},))
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    options: dict[str, Any] = {"schedule": "1f1b", "microbatches": 8, "threads": 2}
    with kind(graph, balanced(graph, 2, (x,)), optimizer=optimizer, **options) as made:
        while True:
            made.step(x)


def on_ray(*given: Any, **options: Any) -> Pipeline:
    from dfc.runtime.pipeline.ray_ import RayLauncher

    return Processes(*given, launcher=RayLauncher, **options)


WAYS: dict[str, Callable[[], None]] = {
    "threads": partial(pipeline, Pipeline),
    "processes": partial(pipeline, Processes),
    "ray": partial(pipeline, on_ray),
    "training in threads": partial(training, Trainer),
    "training in processes": partial(training, ProcessTrainer),
    "training under torchrun": partial(training, RankTrainer),
}

if __name__ == "__main__":
    print("began", flush=True)
    WAYS[sys.argv[1]]()
