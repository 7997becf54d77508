"""What right sides of rules write: nodes, names, parameters, sizes, places."""

from __future__ import annotations

import re

import pytest
import torch

from dfc.ir.graph import Loc
from dfc.ir.interpret import interpret
from tests.rule_graphs import (
    ONE,
    graph,
    rewritten,
    run,
    shown,
)


def test_a_right_side_has_names_of_its_own() -> None:
    clauses = "match y = mul(x, 4.0)\nrewrite t = add(x, x)\nrewrite y = add(t, t)"
    assert rewritten(clauses, ONE + "y = mul(x, 4.0)\nreturn y")[1].startswith("y = add(")


def test_a_right_side_that_is_used_twice_is_written_once() -> None:
    clauses = "match y = mul(x, 4.0)\nrewrite t = add(x, x)\nrewrite y = add(t, t)"
    assert len(rewritten(clauses, ONE + "y = mul(x, 4.0)\nreturn y")) == 2


SCALE = """
match   y = mul(linear(x, w), 2.0)
where   constant(w)
rewrite y = linear(x, mul!(w, 2.0))
"""


def test_compile_time_values_become_parameters() -> None:
    g = graph("x: f32[5, 4]\n!w: f32[3, 4]\ny = mul(linear(x, w), 2.0)\nreturn y")
    run(SCALE, g)
    (node,) = g.nodes
    made = node.inputs[1]
    assert made.name == "w.mul" and "w.mul" in g.parameters  # type: ignore[union-attr]
    data = g.parameters["w.mul"].data
    old = g.parameters["w"].data if "w" in g.parameters else None
    assert data is not None and (old is None or torch.equal(data.tensor(), old.tensor() * 2))


def test_equal_compile_time_values_are_one_parameter() -> None:
    g = graph("""
        x: f32[5, 4]
        z: f32[5, 4]
        !w: f32[3, 4]
        a = mul(linear(x, w), 2.0)
        b = mul(linear(z, w), 2.0)
        return a, b""")
    run(SCALE, g)
    assert len({n.inputs[1] for n in g.nodes}) == 1


def test_what_is_not_known_at_compile_time_is_not_computed_then() -> None:
    clauses = "match y = mul(linear(x, w), 2.0)\nrewrite y = linear(x, mul!(w, 2.0))"
    g = graph("x: f32[5, 4]\nw: f32[3, 4]\ny = mul(linear(x, w), 2.0)\nreturn y")
    before = shown(g)
    journal = run(clauses, g)
    assert [reason for _, _, reason in journal.refused] == ["%w is not known at compile time"]
    assert shown(g) == before


def test_a_compile_time_value_that_overflows_is_refused() -> None:
    clauses = "match y = mul(mul(x, c), 1e30)\nwhere constant(c)\nrewrite y = mul(x, mul!(c, 1e30))"
    g = graph("x: f32[3]\n!c: f32[] = 1e20\ny = mul(mul(x, c), 1e30)\nreturn y")
    assert "overflows" in run(clauses, g).refused[0][2]


@pytest.mark.parametrize(
    "rewrite, reason",
    [
        ("sum(x, [0])", "is rewritten|its replacement"),
        ("reshape(x, [7])", "refuses"),
        ("matmul(x, x)", "refuses"),
        ("linear(x)", "takes"),
        ("dim(x, 0)", "no value"),
    ],
)
def test_a_right_side_that_cannot_be_written_leaves_the_graph_alone(
    rewrite: str, reason: str
) -> None:
    g = graph(ONE + "y = relu(x)\nreturn y")
    before = str(g)
    journal = run(f"match y = relu(x)\nrewrite t = exp(x)\nrewrite y = {rewrite}", g)
    assert re.search(reason, journal.refused[0][2])
    assert str(g) == before


def test_sizes_may_be_symbolic() -> None:
    clauses = "match y = flatten(x, 1)\nrewrite y = view(x, [dim(x, 0), dim(x, 1) * dim(x, 2)])"
    g = graph("x: f32[B, S, 4]\ny = flatten(x, 1)\nreturn y")
    run(clauses, g)
    (node,) = g.nodes
    assert node.op == "aten.view.default"
    for shape in ((2, 3, 4), (5, 1, 4)):
        (y,) = interpret(g, [torch.ones(shape)])
        assert y.shape == (shape[0], shape[1] * 4)


def test_attributes_are_carried_over() -> None:
    clauses = "match y = relu(transpose(x, a, b))\nrewrite y = transpose(relu(x), a, b)"
    g = graph(ONE + "y = relu(transpose(x, 0, 1))\nreturn y")
    run(clauses, g)
    last = next(g.reversed_nodes)
    assert (last.attributes["dim0"], last.attributes["dim1"]) == (0, 1)


def test_new_nodes_stand_for_the_old_one() -> None:
    g = graph(ONE + "y = relu(x)\nreturn y")
    (node,) = g.nodes
    node.loc, node.stage = Loc("net.py", 7, "block"), 3
    run("match y = relu(x)\nrewrite y = clamp(x, 0.0)", g)
    (made,) = g.nodes
    assert (made.loc, made.stage) == (Loc("net.py", 7, "block"), 3)
