"""An optimizer that fails, for ranks that import what they train with."""

from __future__ import annotations

from typing import Any

import torch


class FailsSecond(torch.optim.SGD):
    """Its second step fails."""

    steps = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        if self.steps == 2:
            raise ValueError("two is too many")
        super().step()
