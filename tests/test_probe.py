"""How far the probes of a compilation are is told where they take long."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dfc
from dfc.recipe import probing


@pytest.mark.parametrize("long", [True, False])
def test_long_probes_tell_how_far_they_are(long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_LONG_S", -1.0 if long else 1e9)
    told: list[str] = []
    sizes = ({0: torch.export.Dim("B", min=1)},)
    model, args = nn.Linear(4, 3).eval(), (torch.randn(5, 4),)
    dfc.compile(model, args, dynamic_shapes=sizes, engine="eager", progress=told.append)
    said = [t for t in told if t.startswith("running the original on probe inputs")]
    assert said[0] == "running the original on probe inputs"
    whole = len(said)
    want = [f"running the original on probe inputs: {i} of {whole} done" for i in range(1, whole)]
    assert said[1:] == want and (whole > 2) is long
