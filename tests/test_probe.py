"""Which probes there are, how often they are run, and how far they are where they take long."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dfc
from dfc.capture.torch_export import trace
from dfc.ir.graph import Graph
from dfc.recipe import probing
from dfc.rewrite import probe
from dfc.rewrite.probe import Probes, make_probes


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


class Rows(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.exp() + 1  # two values of 8 numbers a row


def batches(rows: int, most: int, least: int = 1, count: int | None = None) -> list[int]:
    """The first sizes of the probes of an example with so many rows."""
    sizes = ({0: torch.export.Dim("B", min=least, max=most)},)
    graph = trace(Rows(), (torch.randn(7, 8),), dynamic_shapes=sizes)
    found = make_probes(graph, [torch.randn(rows, 8)], count=count)
    return [len(p.inputs[0]) for p in found.probes]


def test_beside_a_large_example_there_are_small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert batches(64, 100) == [64, 1, 65]
    monkeypatch.setattr(probe, "_MOST_ELEMENTS", 16 * 12)  # of twelve rows
    assert batches(64, 100) == [64, 1, 9]
    assert batches(64, 64) == [64, 1, 7]
    assert batches(11, 100) == [11, 1, 12]  # small ones are as they were
    assert batches(64, 100, least=40) == [64, 40, 41]
    further = batches(64, 500, count=12)[4:]  # behind the example with other values
    assert len(further) == 8 and max(further) <= 12 < 64


def test_a_versions_own_standard_is_computed_once_for_all_engines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    computed: list[Graph] = []
    compute = Probes._compute

    def counted(self: Probes, probe: probe.Probe) -> None:
        computed.append(self.graph)
        compute(self, probe)

    monkeypatch.setattr(Probes, "_compute", counted)
    recipe = "dfc 1\nrecipe r {\n  quantize int8\n}\n"
    x = torch.randn(2, 64)
    compiled = dfc.compile(nn.Linear(64, 64).eval(), (x,), recipe=recipe)
    assert len([e for e in compiled.report.engines if e.p50_ms is not None]) > 1
    own = [g for g in computed if any(n.op == "dfc.linear_w8" for n in g.walk())]
    assert len(own) == 2 and len(computed) == 4  # the example and other values


class Masked(nn.Module):
    """Looks in Python whether its mask leaves anything out, unless it is traced."""

    def __init__(self, while_traced: bool, ones: float) -> None:
        super().__init__()
        self.while_traced, self.ones = while_traced, ones

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        traced = torch.compiler.is_exporting()
        if self.while_traced if traced else bool(mask.all()):
            return x * self.ones
        return x * mask


SOME = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 1, 1]])


@pytest.mark.parametrize(
    ("while_traced", "ones", "mask", "told"),
    [
        (False, 2.0, SOME, True),  # the trace is wrong of ones
        (False, 1.0, SOME, False),
        (True, 1.0, torch.ones_like(SOME), True),  # the trace has no mask
        (False, 1.0, torch.ones_like(SOME), False),
        (True, 1.0, torch.ones(2, 6), True),
        (False, 2.0, SOME * 2, False),  # no mask
    ],
)
def test_a_mask_that_sends_the_model_another_way_than_its_trace_is_told(
    while_traced: bool, ones: float, mask: torch.Tensor, told: bool
) -> None:
    model, x = Masked(while_traced, ones).eval(), torch.randn(2, 6)
    compiled = dfc.compile(model, (x, mask), engine="eager")
    notes = [n for n in compiled.report.notes if "is for values of `mask` like the example's" in n]
    assert bool(notes) is told
    assert not told or "output 0[" in notes[0]


def test_a_mask_for_which_the_trace_is_wrong_is_refused_as_the_example() -> None:
    args = (torch.randn(2, 6), torch.ones_like(SOME))
    with pytest.raises(dfc.DfcError, match="with the example: output 0") as e:
        dfc.compile(Masked(False, 2.0).eval(), args, engine="eager")
    assert e.value.code == "T010" and "as for a mask of ones" in str(e.value)
