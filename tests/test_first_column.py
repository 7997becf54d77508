"""Masks whose rows are all open somewhere, and angles that stand twice: seen, or rightly not."""

from __future__ import annotations

import pytest
import torch

import dfc
from dfc.ir.graph import Graph
from dfc.ir.interpret import interpret
from dfc.rewrite.copies import HALVES, PAIRS, repeats
from dfc.rewrite.first_column import first_column
from dfc.rewrite.intervals import ANY, FALSE, TRUE
from tests.random_graphs import random_graph, random_inputs


@pytest.mark.parametrize("seed", range(40))
def test_first_columns_stay_within_their_bounds(seed: int) -> None:
    graph = random_graph(seed, nodes=40)
    memo: dict = {}
    checked = 0

    def check(node: object, results: list[object]) -> None:
        nonlocal checked
        for value, x in zip(node.results, results, strict=True):  # type: ignore[attr-defined]
            found = first_column(value, memo)
            if found is ANY or not isinstance(x, torch.Tensor) or x.is_complex() or not x.numel():
                continue
            checked += 1
            data = (x[..., 0] if x.dim() else x).double()
            numbers = data[~torch.isnan(data)]
            assert found.nan or numbers.numel() == data.numel(), (value, found)
            assert ((found.low <= numbers) & (numbers <= found.high)).all(), (value, found)

    interpret(graph, random_inputs(graph, seed), observe=check)
    assert checked


def result(text: str, inputs: str = "%s: i64[S]", kind: str = "bool[S, S]") -> Graph:
    return dfc.parse(
        f"dfc 1\ngraph @f({inputs}) -> ({kind})\n    where S in 1..64 {{\n{text}\n  return %y\n}}"
    )


ARANGE = """%a: i64[S] = aten.arange.default(end=S, dtype=None)
  %row: i64[S, 1] = aten.unsqueeze.default(%a, dim=1)
  %col: i64[1, S] = aten.unsqueeze.default(%a, dim=0)
"""


@pytest.mark.parametrize(
    ("last", "column"),
    [
        ("%y: bool[S, S] = aten.le.Tensor(%col, %row)", TRUE),
        ("%y: bool[S, S] = aten.gt.Tensor(%col, %row)", FALSE),
        ("%y: bool[S, S] = aten.ge.Tensor(%row, %col)", TRUE),
        ("%y: bool[S, S] = aten.lt.Tensor(%col, %row)", None),  # row 0 sees nothing
        ("%y: bool[S, S] = aten.le.Tensor(%row, %col)", None),
        (
            "%c: bool[S, S] = aten.le.Tensor(%col, %row)\n"
            "%n: bool[S, S] = aten.logical_not.default(%c)\n"
            "%y: bool[S, S] = aten.logical_not.default(%n)",
            TRUE,
        ),
        (
            "%c: bool[S, S] = aten.le.Tensor(%col, %row)\n"
            "%y: bool[S, S] = aten.transpose.int(%c, dim0=0, dim1=1)",
            None,
        ),
    ],
)
def test_causal_masks_open_their_first_column(last: str, column: object) -> None:
    graph = result(ARANGE + last)
    found = first_column(graph.outputs[0])
    assert (found if found in (TRUE, FALSE) else None) == column


COPIES = """%f: f32[4] = aten.cos.default(%x)
"""


@pytest.mark.parametrize(
    ("text", "how", "yes"),
    [
        ("%y: f32[8] = aten.cat.default([%f, %f], dim=0)", HALVES, True),
        ("%y: f32[8] = aten.cat.default([%f, %f], dim=0)", PAIRS, False),
        ("%y: f32[8] = aten.cat.default([%f, %x], dim=0)", HALVES, False),
        (
            "%s: f32[4, 2] = aten.stack.default([%f, %f], dim=1)\n"
            "%y: f32[8] = aten.view.default(%s, size=[8])",
            PAIRS,
            True,
        ),
        (
            "%s: f32[2, 4] = aten.stack.default([%f, %f], dim=0)\n"
            "%y: f32[8] = aten.view.default(%s, size=[8])",
            PAIRS,
            False,
        ),
        (
            "%c: f32[8] = aten.cat.default([%f, %f], dim=0)\n"
            "%y: f32[8] = aten.mul.Tensor(%c, %z, alpha=1)".replace(", alpha=1", ""),
            HALVES,
            False,  # %z is another for each place
        ),
        (
            "%c: f32[8] = aten.cat.default([%f, %f], dim=0)\n"
            "%y: f32[8] = aten.mul.Scalar(%c, other=2.0)",
            HALVES,
            True,
        ),
    ],
)
def test_what_stands_twice_is_seen(text: str, how: str, yes: bool) -> None:
    graph = result(COPIES + text, "%x: f32[4], %z: f32[8], %s0: i64[S]", "f32[8]")
    assert repeats(graph.outputs[0], how) == yes
