"""What every pass promises, on random graphs: same meaning, valid, deterministic, nothing left."""

from __future__ import annotations

from collections import Counter
from dataclasses import MISSING, Field, fields
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch

import dfc
from dfc.emit.fx import to_fx
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.ir.interpret import interpret
from dfc.ir.verify import verify
from dfc.rewrite.agree import judge
from dfc.rewrite.pass_ import CHANGES, DEFAULT, EXACT, Context, Pass, find_pass, pass_classes
from tests.random_graphs import random_graph, random_inputs

SEEDS = range(50)


def all_passes() -> list[Pass]:
    """Every pass that keeps results, and needs nothing but a graph."""
    classes = pass_classes()
    alone = [n for n in sorted(classes) if not any(map(is_required, fields(classes[n])))]  # type: ignore[arg-type]
    return [p for p in map(find_pass, alone) if p.numerics.kind != "changes"]


def is_required(option: Field[Any]) -> bool:
    return option.default is MISSING


def evaluate(graph: Graph, seed: int, double: bool = False, size: int = 3) -> list[Any]:
    torch.manual_seed(seed)
    return interpret(graph, random_inputs(graph, seed, size), double=double)


@cache
def expected(seed: int, size: int) -> tuple[list[Any], list[Any]]:
    graph = random_graph(seed)
    return evaluate(graph, seed, size=size), evaluate(graph, seed, double=True, size=size)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_graphs_are_valid_and_read_back(seed: int) -> None:
    graph = random_graph(seed)
    verify(graph)
    text = str(graph)
    again = dfc.parse(text)
    assert str(again) == text and again == graph
    assert str(graph.copy()) == text
    verify(again)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_graphs_mean_the_same_as_modules(seed: int) -> None:
    graph = random_graph(seed)
    module = to_fx(graph)
    for size in (2, 5):
        original, _ = expected(seed, size)
        torch.manual_seed(seed)
        results = module(*random_inputs(graph, seed, size))
        verdict = judge(list(results), original, original, exact=True)
        assert verdict.agrees, f"{verdict.difference}"


@pytest.mark.parametrize("p, seed", list(product(all_passes(), SEEDS)), ids=str)
def test_pass_keeps_meaning(p: Pass, seed: int) -> None:
    graph = random_graph(seed).copy()
    before = str(graph)
    changes = p.run(graph, Context())
    after = str(graph)
    assert (changes == 0) == (before == after), f"{changes} changes"
    verify(graph)
    for size in (2, 5):
        original, witness = expected(seed, size)
        results = evaluate(graph, seed, size=size)
        if p.numerics == CHANGES:  # judged by its own tests
            continue
        exact = p.numerics == EXACT
        verdict = judge(results, original, witness, exact=exact, rtol=p.numerics.rtol)
        assert verdict.agrees, f"{verdict.difference}\n{before}\n{after}"
        if not graph.ranges:
            break
    again = random_graph(seed).copy()
    assert p.run(again, Context()) == changes and str(again) == after, "not deterministic"
    if p.idempotent:
        assert p.run(graph, Context()) == 0, "the second run finds more to do"
        assert str(graph) == after


def test_random_graphs_are_varied_and_give_every_pass_work() -> None:
    ops: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    sizes: set[object] = set()
    work: Counter[str] = Counter()
    for seed in SEEDS:
        graph = random_graph(seed)
        for node in graph.walk():
            ops[node.op] += 1
            for r in node.results:
                dtypes[str(r.type).partition("[")[0]] += 1
                sizes.update(getattr(r.type, "shape", ()))
        for p in all_passes():
            work[p.name] += p.run(graph.copy(), Context()) > 0
    assert len(ops) >= 60, len(ops)
    assert {"f16", "f32", "f64", "i32", "i64", "bool"} <= set(dtypes)
    assert {0, 1, 2, 3, 7, 16} <= sizes
    # Two layers with constant weights, one after the other, are rare here: test_equalize has them.
    given = [p for p in all_passes() if p.name != "equalize"]
    assert all(work[p.name] >= 5 for p in given), work


@pytest.mark.parametrize("seed", range(0, 50, 5))
def test_default_passes_together_reach_an_end(seed: int) -> None:
    graph = random_graph(seed).copy()
    for _ in range(3):
        changes = sum(find_pass(name).run(graph, Context()) for name in DEFAULT)
        verify(graph)
        if not changes:
            break
    assert not changes


def test_cse_limit_bisects() -> None:
    cse = find_pass("cse")
    graph = max(map(random_graph, SEEDS), key=lambda g: cse.run(g.copy(), Context()))
    total = cse.run(graph.copy(), Context())
    assert total >= 3
    for limit in range(total + 2):
        assert find_pass("cse", {"limit": limit}).run(graph.copy(), Context()) == min(limit, total)


# Finding passes


def test_default_passes_exist() -> None:
    assert set(DEFAULT) <= set(pass_classes())


def test_every_pass_says_what_it_needs_ensures_and_costs() -> None:
    for name, cls in pass_classes().items():
        doc = cls.__doc__ or ""
        assert "Needs:" in doc and "Ensures:" in doc, name
        assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert cls.__module__.rpartition(".")[2] == name, f"pass {name} is not in {name}.py"


def test_unknown_pass_or_option_is_named_with_the_nearest() -> None:
    with pytest.raises(DfcError, match="did you mean `canonicalize`") as error:
        find_pass("canonicalise")
    assert (error.value.code, error.value.status) == ("Q001", 2)
    with pytest.raises(DfcError, match="did you mean `limit`") as error:
        find_pass("cse", {"limits": 3})
    assert error.value.code == "Q002"
    with pytest.raises(DfcError) as error:
        find_pass("cse", {"limit": "many"})
    assert error.value.code == "Q002"


def test_a_pass_prints_as_a_step() -> None:
    assert str(find_pass("cse")) == "cse"
    assert str(find_pass("cse", {"limit": 3})) == "cse{limit=3}"
