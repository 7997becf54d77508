"""What tests of the `dfc` command share: a small model as a user writes it, what came of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

NET = """
import torch
from torch.export import Dim


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(8, 16)
        self.bn = torch.nn.BatchNorm1d(16)
        self.head = torch.nn.Linear(16, 4)

    def forward(self, x):
        return {"logits": self.head(torch.relu(self.bn(self.fc(x)))), "total": x.sum()}


def build():
    torch.manual_seed(0)
    return Net().eval(), (torch.randn(3, 8),), None, {"x": {0: Dim("B", max=64)}}


def meta():
    with torch.device("meta"):
        return Net().eval(), (torch.randn(3, 8),)


class Ids(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(10, 4)

    def forward(self, ids, *, scale):
        return self.table(ids) * scale, ids.to(torch.bfloat16)


def ids():
    torch.manual_seed(0)
    example = torch.tensor([[0, 9, 3]]), {"scale": torch.ones(())}
    return Ids().eval(), (example[0],), example[1], {"ids": {0: "B", 1: "S"}, "scale": None}
"""


class Ran(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]
