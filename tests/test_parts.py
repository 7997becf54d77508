"""What `on` and `except` of a step take: paths are what a module computes itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dfc
from dfc.errors import DfcError


class Twice(nn.Module):
    """Computes something itself, beside the layers inside."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) * 2


@pytest.mark.parametrize(
    ("step", "part"),
    [
        ("quantize int8 {}", 'on "0"'),
        ("sparsify {} by magnitude with ratio=0.5", '"0"'),
        ("smooth {} using calib", '"0"'),
    ],
)
def test_a_path_is_what_its_module_computes_itself(step: str, part: str) -> None:
    block = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    net, x = nn.Sequential(Twice(block), nn.Linear(64, 64)).eval(), torch.randn(3, 64)

    data = {"calib": [x]}

    def notes(step: str) -> tuple[str, ...]:
        text = f"dfc 1\ndata calib\nrecipe q {{\n  {step}\n}}\n"
        return tuple(dfc.compile(net, (x,), recipe=text, engine="eager", data=data).report.notes)

    told = '`except "0"` leaves out no layer: `"0.**"` takes what lies inside'
    assert any(told in n for n in notes(step.format('except "0"')))
    assert not any("no layer" in n for n in notes(step.format('except "0.**"')))
    with pytest.raises(DfcError, match=r'help: `"0.\*\*"` takes what lies inside'):
        notes(step.format(part))
