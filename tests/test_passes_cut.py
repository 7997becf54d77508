"""Shipped passes can be cut: they make as many changes as they may, and no more."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from dfc.ir.graph import Graph
from dfc.rewrite.pass_ import Context, find_pass, pass_classes
from tests.golden_file import Golden, give_data, parse


def fields_of_class(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


LIMITED = sorted(n for n, c in pass_classes().items() if "limit" in fields_of_class(c))
GOLDENS = [Golden.read(p) for p in sorted((Path(__file__).parent / "golden").glob("*.dfc"))]


def test_most_shipped_passes_can_be_cut() -> None:
    wanted = "canonicalize cse decompose fold_batch_norm fold_constants fuse remove_noops"
    assert set(wanted.split()) <= set(LIMITED)


@pytest.mark.parametrize("golden", [g for g in GOLDENS if g.steps in LIMITED], ids=str)
def test_a_shipped_pass_makes_as_many_changes_as_it_may(golden: Golden) -> None:
    def run(**options: Any) -> tuple[int, str]:
        graph = with_data(golden)
        return find_pass(golden.steps, options).run(graph, Context()), str(graph)

    total, whole = run()
    seen = [run(limit=n) for n in range(total + 1)]
    assert [n for n, _ in seen] == list(range(total + 1))
    assert seen[0][1] == str(with_data(golden)) and seen[-1][1] == whole
    if total and "skip" in fields_of_class(pass_classes()[golden.steps]):
        assert run(skip=tuple(range(total + 100))) == seen[0]
        assert run(skip=(0,))[0] < total + (golden.steps == "fuse") and run(skip=(0,))[1] != whole


def with_data(golden: Golden) -> Graph:
    graph = parse(golden.before)
    if golden.weights:
        give_data(graph)
    return graph
