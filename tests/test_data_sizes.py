"""Results whose size data decide: how they are judged."""

from __future__ import annotations

import torch

import dfc
from dfc.rewrite.agree import judge


def test_where_float64_gives_another_size_the_original_is_what_counts() -> None:
    """0.1 * 10 is 1 in float32, and more than 1 in float64."""

    class Larger(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 10
            return y[y > 1] + 1

    x = torch.tensor([0.1, 2.0])
    compiled = dfc.compile(Larger(), (x,), engine="eager")
    assert compiled(x).tolist() == [21.0] and compiled.report.proved
    three, two = torch.ones(3), torch.ones(2, dtype=torch.float64)
    assert judge([three], [three], [two]).agrees
    assert not judge([three + 0.1], [three], [two]).agrees
