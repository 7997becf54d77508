"""Dropping a file into tests/golden is a test: text, meaning, round trip, nothing left to do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.ir.interpret import interpret
from dfc.ir.types import ScalarType, TensorType
from dfc.ir.verify import verify
from dfc.rewrite.agree import judge
from dfc.rewrite.pass_ import EXACT, Context, Pass
from tests.golden_file import Golden, give_data, numbers, parse, show

FOLDER = Path(__file__).parent / "golden"
SPECIAL = (0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, 3e38, 0.5)


def goldens() -> list[Golden]:
    return [Golden.read(path) for path in sorted(FOLDER.glob("*.dfc"))]


@pytest.mark.parametrize("golden", goldens(), ids=str)
def test_golden(golden: Golden, request: pytest.FixtureRequest) -> None:
    original = golden.graph()
    verify(original)
    graph = original.copy()
    changes = [p.run(graph, Context()) for p in golden.passes]
    got = show(graph, original)
    if request.config.getoption("--bless"):
        blessed = replace(golden, before=show(original, original), after=got).text()
        golden.path.write_text(blessed)
    else:
        assert golden.before == show(original, original), "not as the printer writes it: --bless"
        assert got == golden.after
    verify(graph)
    check_promises(golden.passes, changes, original, graph)
    check_meaning(golden, original, graph)
    text = str(graph)
    assert str(parse(text.removeprefix("dfc 1\n"))) == text
    for p in golden.passes:
        if p.idempotent and getattr(p, "limit", None) is None:
            assert p.run(graph, Context()) == 0, f"{p} finds more to do the second time"
    assert show(graph, original) == got


def check_promises(passes: list[Pass], changes: list[int], original: Graph, graph: Graph) -> None:
    if not any(changes):
        assert graph == original, "0 changes, yet another graph"
    elif len(passes) == 1:
        assert str(graph) != str(original), f"{changes[0]} changes, yet the same graph"


def check_meaning(golden: Golden, original: Graph, graph: Graph) -> None:
    """Both graphs on the same inputs: small and size-1 symbols; special values for exact passes."""
    if not golden.weights:
        original, graph = original.copy(), graph.copy()
        give_data(original)
        give_data(graph)
    exact = all(p.numerics == EXACT for p in golden.passes)
    rtol = sum(p.numerics.rtol for p in golden.passes)
    for inputs in input_sets(original, exact):
        torch.manual_seed(0)
        before = interpret(original, inputs)
        torch.manual_seed(0)
        witness = interpret(original, inputs, double=True)
        torch.manual_seed(0)
        after = interpret(graph, inputs)
        verdict = judge(after, before, witness, exact=exact, rtol=rtol)
        assert verdict.agrees, f"{verdict.difference}"


def input_sets(graph: Graph, special: bool) -> Iterator[list[Any]]:
    names = sorted({s for v in graph.inputs for s in v.type.symbols})
    larger = {n: fit(graph, n, i + 2) for i, n in enumerate(names)}
    ones = {n: fit(graph, n, 1) for n in names}
    for sizes in (larger, ones):
        for salt in ("", "again"):
            yield [one_input(v.name + salt, v.type, sizes) for v in graph.inputs]
    if special:
        made = [one_input(v.name, v.type, larger) for v in graph.inputs]
        yield [specials(x) if isinstance(x, torch.Tensor) else x for x in made]


def fit(graph: Graph, name: str, size: int) -> int:
    low, high = graph.ranges.get(name, (0, None))
    return max(low, size if high is None else min(size, high))


def one_input(name: str, type: Any, sizes: dict[str, int]) -> Any:
    if isinstance(type, ScalarType):
        return {"int": 3, "float": 0.5, "bool": True}[type.name]
    assert isinstance(type, TensorType)
    return numbers(name, type.substitute(sizes))


def specials(x: torch.Tensor) -> torch.Tensor:
    if not x.is_floating_point():
        return x
    flat = [SPECIAL[i % len(SPECIAL)] for i in range(x.numel())]
    return torch.tensor(flat, dtype=x.dtype).reshape(x.shape)


# The collection


def test_there_are_goldens_for_every_pass() -> None:
    seen = Counter(step for g in goldens() for step in re.findall(r"[a-z_]+(?=[,{]|$)", g.steps))
    wanted = {
        "canonicalize", "remove_noops", "fold_constants", "fold_batch_norm", "cse", "dce",
        "decompose",
    }  # fmt: skip
    assert set(seen) >= wanted
    assert len(goldens()) >= 40


def test_each_golden_says_what_it_shows() -> None:
    for golden in goldens():
        assert golden.comment and golden.comment[0].startswith("# "), golden.path
        assert len(golden.before.splitlines()) <= 26, f"{golden}: one idea, few lines"


def test_missing_weights_are_a_clear_error() -> None:
    golden = next(g for g in goldens() if not g.weights)
    graph = golden.graph()
    with pytest.raises(DfcError) as error:
        interpret(graph, next(input_sets(graph, False)))
    assert error.value.code == "D002"
