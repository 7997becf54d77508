"""Interval analysis: no value ever leaves its bounds, and the masks of real models are finite."""

from __future__ import annotations

import pytest
import torch

import dfc
from dfc.ir.graph import Graph
from dfc.ir.interpret import interpret
from dfc.rewrite.intervals import ANY, interval
from tests.random_graphs import random_graph, random_inputs


@pytest.mark.parametrize("seed", range(80))
def test_values_stay_within_their_bounds(seed: int) -> None:
    graph = random_graph(seed, nodes=40)
    memo: dict = {}
    checked = 0

    def check(node: object, results: list[object]) -> None:
        nonlocal checked
        for value, x in zip(node.results, results, strict=True):  # type: ignore[attr-defined]
            found = interval(value, memo)
            if found is ANY or not isinstance(x, torch.Tensor) or x.is_complex() or not x.numel():
                continue
            checked += 1
            data = x.double()
            numbers = data[~torch.isnan(data)]
            assert found.nan or numbers.numel() == data.numel(), (value, found)
            assert ((found.low <= numbers) & (numbers <= found.high)).all(), (value, found)

    interpret(graph, random_inputs(graph, seed), observe=check)
    assert checked


def mask(text: str) -> Graph:
    return dfc.parse(
        "dfc 1\ngraph @f(%keep: bool[2, 4], %x: f32[2, 4]) -> (f32[2, 4]) {\n"
        f"{text}\n  return %y\n}}"
    )


@pytest.mark.parametrize(
    ("text", "finite"),
    [
        ("%y: f32[2, 4] = aten.full.default(size=[2, 4], fill_value=1.5, dtype=f32)", True),
        ("%y: f32[2, 4] = aten.full.default(size=[2, 4], fill_value=-inf, dtype=f32)", False),
        ("%y: f32[2, 4] = aten.add.Scalar(%x, other=1, alpha=1)", False),
        ("%y: f32[2, 4] = aten._to_copy.default(%keep, dtype=f32)", True),
        (
            "%z: f32[] = aten.zeros.default(size=[], dtype=f32)\n"
            "%y: f32[2, 4] = aten.where.ScalarOther(%keep, %z, other=-3.4028234663852886e+38)",
            True,
        ),
        (
            "%z: f32[] = aten.zeros.default(size=[], dtype=f32)\n"
            "%w: f32[2, 4] = aten.where.ScalarOther(%keep, %z, other=-3.4028234663852886e+38)\n"
            "%y: f32[2, 4] = aten.add.Scalar(%w, other=-5.0, alpha=1)",
            True,  # the sum rounds back to the largest number
        ),
        (
            "%z: f32[] = aten.zeros.default(size=[], dtype=f32)\n"
            "%w: f32[2, 4] = aten.where.ScalarOther(%keep, %z, other=-3.4028234663852886e+38)\n"
            "%y: f32[2, 4] = aten.add.Tensor(%w, %w, alpha=1)",
            False,
        ),
        (
            "%w: f32[2, 4] = aten.softmax.int(%x, dim=1, dtype=None)\n"
            "%y: f32[2, 4] = aten.masked_fill.Scalar(%w, %keep, value=0)",
            False,  # x may hold NaN
        ),
    ],
)
def test_what_is_known_to_be_finite(text: str, finite: bool) -> None:
    assert interval(mask(text).outputs[0]).finite is finite
