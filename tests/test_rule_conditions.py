"""What conditions of rules mean, on sizes that are numbers and on those that are not."""

from __future__ import annotations

import pytest

import dfc
from dfc.ir.expr import call, symbol
from dfc.ir.verify import verify
from dfc.lang import syntax as s
from dfc.rewrite.conditions import holds
from dfc.rewrite.deciding import Facts
from tests.rule_graphs import (
    fires,
    why_not,
)

ADD = "match y = add(a, b)\n{}\nrewrite y = a"


def held(condition: str, a: str = "f32[2, 3]", b: str = "f32[3]", more: str = "") -> bool:
    return fires(ADD.format(f"where {condition}"), f"a: {a}\nb: {b}\n{more}y = add(a, b)\nreturn y")


@pytest.mark.parametrize(
    "condition",
    [
        "rank(a) == 2", "shape(a) == [2, 3]", "dim(a, -1) == dim(b, 0)", "numel(a) == 6",
        "dtype(a) == f32", "dtype(a) in [f16, f32]", "floating(a)", "not constant(a)",
        "dim(a, 0) < dim(a, 1) and rank(b) == 1", "rank(a) == 9 or rank(b) == 1",
        "dim(a, 0) * 3 == numel(a)", "dim(a, 1) % 2 == 1", "dim(a, 1) // 2 == 1",
        "max(rank(a), 5) == 5", "leading(a, 1) == [2]", "broadcasts(b, a)",
        "broadcast(a, b) == shape(a)", "static(a)", "users(a) == 1", "sqrt(4) ~= 2",
        "shape(a) != [3, 2]", "item(shape(a), 0) == 2", "not same(a, b)", "present(a)",
    ],
)  # fmt: skip
def test_conditions_that_hold(condition: str) -> None:
    assert held(condition)


@pytest.mark.parametrize(
    "condition",
    [
        "rank(a) == 3", "dim(a, 5) == 2", "dtype(a) == f16", "constant(b)", "finite(a)",
        "value(a) == 1", "broadcasts(a, b)", "not (rank(a) == 2)", "dim(a, 0) / 0 == 1",
        "absent(a)", "rank(a) == 2 and rank(b) == 2", "sqrt(0 - 1) == 1",
    ],
)  # fmt: skip
def test_conditions_that_do_not(condition: str) -> None:
    assert not held(condition)


@pytest.mark.parametrize(
    "condition, holds",
    [
        ("dim(a, 0) == dim(b, 0)", True),  # one symbol
        ("dim(a, 0) * 2 == dim(a, 0) + dim(b, 0)", True),
        ("dim(a, 0) == 4", False),  # for one size alone
        ("dim(a, 0) >= 1", True),  # the range says so
        ("dim(a, 0) <= 64", True),
        ("dim(a, 0) > 1", False),
        ("dim(a, 0) < 100 and dim(a, 0) > 0", True),
        ("dim(a, 0) == 4 or dim(a, 0) >= 1", True),  # undecided, then sure
        ("static(a)", False),
    ],
)
def test_conditions_on_symbolic_sizes_hold_for_every_size(condition: str, holds: bool) -> None:
    assert held(condition, "f32[B, 3]", "f32[B, 1]") == holds


def test_a_refusal_shows_what_the_condition_saw() -> None:
    text = "a: f32[2, 3]\nb: f32[3]\ny = add(a, b)\nreturn y"
    reason = why_not(ADD.format("where dim(a, 0) == dim(b, 0)"), text)
    assert reason == "dim(a, 0) is 2, dim(b, 0) is 3"
    text = "a: f32[B, 3]\nb: f32[3]\ny = add(a, b)\nreturn y"
    assert why_not(ADD.format("where dim(a, 0) == 4"), text) == "B and 4 may be equal or not"


def test_a_condition_on_the_op_that_made_a_value() -> None:
    clauses = "match y = add(a, b)\nwhere op(a) == relu\nrewrite y = a"
    assert fires(clauses, "x: f32[3]\nb: f32[3]\ny = add(relu(x), b)\nreturn y")
    assert not fires(clauses, "x: f32[3]\nb: f32[3]\ny = add(tanh(x), b)\nreturn y")


def test_finite_looks_at_constants() -> None:
    clauses = "match y = add(a, b)\nwhere finite(b)\nrewrite y = a"
    assert fires(clauses, "a: f32[3]\n!b: f32[3]\ny = add(a, b)\nreturn y")
    assert not fires(clauses, "a: f32[3]\n!b: f32[] = inf\ny = add(a, b)\nreturn y")


def test_a_size_that_the_ranges_decide_is_settled() -> None:
    """MPT cuts its bias of 64 positions to `64 - max(0, 64 - S)`, which is S for up to 64."""
    condition = s.Call(
        (0, 0), s.Word((0, 0), "broadcasts"), (s.Word((0, 0), "a"), s.Word((0, 0), "b"))
    )
    size = symbol("S")
    cut = 64 - call("max", 0, 64 - size)
    for most, fits in ((32, True), (64, True), (65, False), (None, False)):
        ending = "" if most is None else str(most)
        graph = dfc.parse(
            f"dfc 1 graph @f(%x: f32[S]) -> f32[S] where S in 1..{ending} {{ return %x }}"
        )
        assert holds(condition, {"a": (1, cut), "b": (2, size)}, Facts(graph)) == fits


def test_padding_is_known_for_all_sizes() -> None:
    graph = dfc.parse(
        "dfc 1 graph @f(%x: f32[B, S]) -> f32[B, S + 1] where B in 1..8, S in 1..8 {"
        " %y: f32[B, S + 1] = aten.constant_pad_nd.default(%x, pad=[0, 1], value=0.0) return %y }"
    )
    verify(graph)
