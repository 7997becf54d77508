"""What rules mean: each piece of a pattern, who else may read a value, which rule comes first."""

from __future__ import annotations

import re

import pytest

from dfc.errors import DfcError
from dfc.ir.graph import Node
from dfc.rewrite.deciding import base_of
from dfc.rewrite.match import Match, attempt
from tests.rule_graphs import (
    DOUBLE,
    ONE,
    fires,
    graph,
    rewritten,
    ruleset,
    run,
    shown,
    why_not,
)

# Patterns


def test_a_rule_is_applied_and_what_it_replaces_is_gone() -> None:
    text = ONE + "a = neg(x)\nb = neg(a)\nc = relu(b)\nreturn c"
    assert rewritten(DOUBLE, text) == ["c = relu(x)"]


def test_a_result_keeps_its_name() -> None:
    clauses = "match y = mul(x, 2)\nrewrite y = add(x, x)"
    text = ONE + "twice = mul(x, 2)\nreturn twice"
    assert rewritten(clauses, text) == ["twice = add(x, x)"]


@pytest.mark.parametrize("op", ["add", "aten.add", "aten.add.Tensor"])
def test_a_bare_name_is_any_overload(op: str) -> None:
    assert fires(f"match y = {op}(x, x)\nrewrite y = mul(x, 2)", ONE + "y = add(x, x)\nreturn y")


def test_an_overload_is_that_overload() -> None:
    clauses = "match y = aten.add.Scalar(x, 1)\nrewrite y = x"
    assert fires(clauses, ONE + "y = aten.add.Scalar(x, 1)\nreturn y")
    assert not fires(clauses, ONE + "y = add(x, x)\nreturn y")


def test_a_number_less_a_tensor_is_a_subtraction() -> None:
    """PyTorch writes `1 - x` as `rsub(x, 1)`: the first operand is what is subtracted."""
    clauses = "match y = sub({})\nrewrite y = neg(x)"
    text = ONE + "y = aten.rsub.Scalar(x, 1)\nreturn y"
    assert fires(clauses.format("1, x"), text)
    assert fires(clauses.format("1, other=x"), text)
    assert not fires(clauses.format("x, 1"), text)
    assert not fires("match y = aten.sub.Tensor(1, x)\nrewrite y = neg(x)", text)
    assert fires("match y = rsub(x, 1)\nrewrite y = neg(x)", text)
    text = "a: f32[2]\nb: f32[2]\ny = aten.rsub.Tensor(a, b, alpha={})\nreturn y"
    clauses = "match y = sub(x, z, alpha=2)\nrewrite y = sub(sub(x, z), z)"
    assert rewritten(clauses, text.format(2))[0].endswith("= sub(b, a)")
    assert not fires("match y = sub(x, z)\nrewrite y = x", text.format(2))


def test_what_a_pattern_does_not_name_has_its_default() -> None:
    clauses = "match y = add(a, b)\nrewrite y = a"
    text = "a: f32[2]\nb: f32[2]\ny = add(a, b, alpha={})\nreturn y"
    assert fires(clauses, text.format(1))
    assert (
        why_not(clauses, text.format(2)) == "%y has alpha=2; the pattern leaves it at its default"
    )
    assert fires("match y = add(a, b, alpha=_)\nrewrite y = a", text.format(2))


def test_dimensions_may_be_counted_from_either_end() -> None:
    clauses = "match y = softmax(x, -1)\nrewrite y = x"
    assert fires(clauses, ONE + "y = softmax(x, 1)\nreturn y")
    assert not fires(clauses, ONE + "y = softmax(x, 0)\nreturn y")
    clauses = "match y = sum(x, [-1])\nwhere rank(x) == 2\nrewrite y = sum(x, [1])"
    assert not run(clauses, graph(ONE + "y = sum(x, [0])\nreturn y")).firings


def test_commutative_ops_match_in_both_orders() -> None:
    clauses = "match y = add(relu(a), b)\nrewrite y = b"
    assert fires(clauses, "a: f32[2]\nb: f32[2]\nr = relu(a)\ny = add(b, r)\nreturn y")
    clauses = "match y = sub(relu(a), b)\nrewrite y = b"
    assert not fires(clauses, "a: f32[2]\nb: f32[2]\nr = relu(a)\ny = sub(b, r)\nreturn y")


def test_a_name_is_one_value() -> None:
    clauses = "match y = add(relu(x), x)\nrewrite y = x"
    assert fires(clauses, ONE + "r = relu(x)\ny = add(r, x)\nreturn y")
    assert not fires(clauses, ONE + "z: f32[2, 3]\nr = relu(x)\ny = add(r, z)\nreturn y")


@pytest.mark.parametrize(
    "number, fits", [("0.5", True), ("0.25", False), ("-0.5", False), ("0.500001", False)]
)
def test_numbers_are_equal(number: str, fits: bool) -> None:
    clauses = "match y = mul(x, 0.5)\nrewrite y = div(x, 2.0)"
    assert fires(clauses, ONE + f"y = mul(x, {number})\nreturn y") == fits


@pytest.mark.parametrize(
    "number, fits", [("0.7071067811865476", True), ("0.707107", True), ("0.70", False)]
)
def test_numbers_within_tolerance(number: str, fits: bool) -> None:
    clauses = "match y = mul(x, ~=0.70710678)\nrewrite y = x"
    assert fires(clauses, ONE + f"y = mul(x, {number})\nreturn y") == fits


def test_a_constant_of_one_element_is_a_number() -> None:
    clauses = "match y = mul(x, 0.5)\nrewrite y = div(x, 2.0)"
    assert fires(clauses, ONE + "!half: f32[] = 0.5\ny = mul(x, half)\nreturn y")
    assert not fires(clauses, ONE + "!half: f32[3] = 0.5\ny = mul(x, half)\nreturn y")
    assert not fires(clauses, ONE + "half: f32[]\ny = mul(x, half)\nreturn y")


OPTIONAL = "match y = exp(relu?(neg?(x)))\nrewrite y = x"


@pytest.mark.parametrize(
    "inner, left",
    [("relu(neg(x))", []), ("neg(x)", []), ("relu(x)", []), ("x", []), ("tanh(x)", ["tanh"])],
)
def test_optional_ops_may_be_absent(inner: str, left: list[str]) -> None:
    g = graph(ONE + f"y = exp({inner})\nreturn y")
    run(OPTIONAL, g)
    assert [base_of(n.op) for n in g.nodes] == left


def test_names_in_an_absent_op_are_absent() -> None:
    clauses = "match y = exp(mul?(x, s))\nwhere absent(s)\nrewrite y = x"
    assert fires(clauses, ONE + "y = exp(x)\nreturn y")
    clauses = "match y = exp(mul?(x, s))\nwhere present(s)\nrewrite y = mul(x, default(s, 1.0))"
    assert fires(clauses, ONE + "y = exp(mul(x, 3.0))\nreturn y")


@pytest.mark.parametrize("op, fits", [("relu", True), ("tanh", True), ("sigmoid", False)])
def test_alternatives(op: str, fits: bool) -> None:
    clauses = "match y = exp(relu(x) | tanh(x))\nrewrite y = x"
    assert fires(clauses, ONE + f"y = exp({op}(x))\nreturn y") == fits


def test_alternatives_at_the_root() -> None:
    clauses = "match y = relu(x) | tanh(x)\nrewrite y = x"
    assert fires(clauses, ONE + "y = tanh(x)\nreturn y")


def test_patterns_have_names_and_names_of_their_own() -> None:
    clauses = """
    pattern scaled(a) = mul(a, s)
    rule r { match y = add(scaled(x), scaled(z))
      rewrite y = add(x, z)
      within 1e-5
    }"""
    text = ONE + "z: f32[2, 3]\ny = add(mul(x, 2.0), mul(z, 3.0))\nreturn y"
    assert fires(clauses, text)  # `s` of one use is not `s` of the other


@pytest.mark.parametrize("n", [1, 2, 4])
def test_tails_take_what_is_left(n: int) -> None:
    clauses = "match y = relu(cat([a, ...rest], 0))\nrewrite y = cat([relu(a), ...rest], 0)"
    items = ", ".join(["x"] + ["z"] * (n - 1))
    g = graph(f"x: f32[2]\nz: f32[3]\ny = relu(cat([{items}], 0))\nreturn y")
    run(clauses, g)
    last = next(g.reversed_nodes)
    assert base_of(last.op) == "cat"
    assert [v.name for v in last.inputs[0][1:]] == ["z"] * (n - 1)  # type: ignore[index, union-attr]


def test_the_length_of_a_tail_is_known() -> None:
    clauses = "match y = cat([a, ...rest], 0)\nwhere len(rest) == 0\nrewrite y = a"
    assert fires(clauses, "x: f32[2]\ny = cat([x], 0)\nreturn y")
    assert why_not(clauses, "x: f32[2]\ny = cat([x, x], 0)\nreturn y") == "len(rest) is 1"


def test_several_results_of_one_op() -> None:
    clauses = "match a, b = split(x, 1)\nrewrite a, b = split_with_sizes(x, [1, 1])"
    text = "x: f32[2, 3]\na, b = split(x, 1)\ny = add(a, b)\nreturn y"
    assert rewritten(clauses, text) == ["a, b = split_with_sizes(x)", "y = add(a, b)"]


def test_a_result_that_the_rewrite_does_not_give_must_be_unused() -> None:
    clauses = "match a, b = split(x, 1)\nrewrite a = slice(x, 0, 0, 1)"
    assert not fires(clauses, "x: f32[2, 3]\na, b = split(x, 1)\ny = add(a, b)\nreturn y")
    assert fires(clauses, "x: f32[2, 3]\na, b = split(x, 1)\ny = relu(a)\nreturn y")


# Who else reads a value


def test_a_value_with_other_users_stays() -> None:
    text = ONE + "a = neg(x)\nb = neg(a)\nc = relu(a)\nreturn b, c"
    assert not fires(DOUBLE, text)
    assert why_not(DOUBLE, text, "b") == "%a is read by %c (aten.relu.default) as well"


def test_an_output_of_the_graph_stays() -> None:
    assert not fires(DOUBLE, ONE + "a = neg(x)\nb = neg(a)\nreturn a, b")


def test_a_shared_value_may_have_other_users() -> None:
    clauses = "match a = neg(x)\nmatch y = neg(a)\nwhere shared(a)\nrewrite y = x"
    text = ONE + "a = neg(x)\nb = neg(a)\nc = relu(a)\nd = add(b, c)\nreturn d"
    assert rewritten(clauses, text) == ["a = neg(x)", "c = relu(a)", "d = add(x, c)"]


def test_two_uses_by_matched_nodes_are_no_others() -> None:
    clauses = "match y = add(neg(x), neg(x))\nrewrite y = mul(x, -2.0)"
    assert fires(clauses, ONE + "a = neg(x)\ny = add(a, a)\nreturn y")


def test_random_ops_are_left_alone() -> None:
    clauses = "match y = relu(dropout(x, _, _))\nrewrite y = relu(x)"
    assert not fires(clauses, ONE + "d = dropout(x, 0.5, True)\ny = relu(d)\nreturn y")
    assert fires(clauses, ONE + "d = dropout(x, 0.5, False)\ny = relu(d)\nreturn y")


# Several lines

MERGE = """
match   q = linear(x, wq)
match   k = linear(x, wk)
where   constant(wq) and constant(wk)
rewrite q, k = split_with_sizes(linear(x, cat!([wq, wk], dim=0)), [dim(wq, 0), dim(wk, 0)], dim=-1)
"""
WEIGHTS = "x: f32[5, 4]\n!wq: f32[3, 4]\n!wk: f32[2, 4]\n"


def test_lines_may_match_anywhere() -> None:
    text = WEIGHTS + "q = linear(x, wq)\na = relu(q)\nk = linear(x, wk)\nb = relu(k)\nreturn a, b"
    found = rewritten(MERGE, text)
    assert [re.sub(r"\(.*", "", s.partition(" = ")[2]) for s in found] == [
        "linear", "split_with_sizes", "relu", "relu"
    ]  # fmt: skip


def test_both_lines_need_a_node_of_their_own() -> None:
    assert not fires(MERGE, WEIGHTS + "q = linear(x, wq)\nreturn q")


PAIR = """
match   a = exp(x)
match   b = exp(z)
match   y = add(a, b)
rewrite y = sum(exp(stack([x, z], 0)), [0])
"""


def test_lines_are_joined_by_their_names() -> None:
    text = "x: f32[3]\nz: f32[3]\na = exp(x)\nb = exp(z)\ny = add(a, b)\nreturn y"
    assert fires(PAIR, text)
    text = "x: f32[3]\nz: f32[3]\na = exp(x)\nb = tanh(z)\ny = add(a, b)\nreturn y"
    assert not fires(PAIR, text)


BOTH = """
match   a = exp(x)
match   b = tanh(z)
where   rank(x) == 1 and shape(x) == shape(z)
rewrite s = stack([x, z], 0)
rewrite a = select(exp(s), 0, 0)
rewrite b = select(tanh(s), 0, 1)
"""


def test_a_rewrite_never_makes_a_circle() -> None:
    """`z` comes of `a`: nothing can compute both at once."""
    g = graph("x: f32[3]\na = exp(x)\nz = relu(a)\nb = tanh(z)\nreturn b")
    before = shown(g)
    journal = run(BOTH, g)
    assert not journal.firings
    assert {reason for _, _, reason in journal.refused} <= {
        "the values that it joins are needed before all of them are known"
    }
    assert shown(g) == before


@pytest.mark.parametrize(
    "lines",
    [
        "a = exp(x)\nb = tanh(w)\ny = add(a, b)",  # side by side
        "a = exp(x)\nz = relu(w)\nb = tanh(z)\ny = add(a, b)",  # the second needs more
        "z = relu(w)\nb = tanh(z)\nq = sin(x)\na = exp(q)\ny = add(a, b)",  # the first does
    ],
)
def test_the_new_nodes_stand_where_all_they_read_is_known(lines: str) -> None:
    found = rewritten(BOTH, f"x: f32[3]\nw: f32[3]\n{lines}\nreturn y")
    assert any("stack" in line for line in found)


def test_a_root_that_is_needed_before_the_others_are_known() -> None:
    text = "x: f32[3]\na = exp(x)\nu = sin(a)\nz = cos(x)\nb = tanh(z)\nv = add(u, b)\nreturn v"
    assert rewritten(BOTH, text)  # done or not, the graph is valid and means what it meant


# Which rule, and how often


def test_the_larger_pattern_comes_first_and_priority_before_it() -> None:
    small = "rule small { match y = relu(x)\nrewrite y = clamp(x, 0.0)\nwithin 1e-5\n%s\n}\n"
    large = "rule large { match y = relu(exp(x))\nrewrite y = exp(x)\nwithin 1e-5\n}\n"
    text = ONE + "y = relu(exp(x))\nreturn y"
    g = graph(text)
    assert [f.rule.name for f in run(small % "" + large, g).firings] == ["large"]
    g = graph(text)
    assert run(small % "priority 1" + large, g).firings[0].rule.name == "small"


def test_rules_are_applied_until_none_fits() -> None:
    g = graph(ONE + "y = neg(neg(neg(neg(neg(x)))))\nreturn y")
    assert len(run(DOUBLE, g).firings) == 2
    assert [base_of(n.op) for n in g.nodes] == ["neg"]


def test_rules_that_undo_each_other_are_an_error() -> None:
    both = """
    rule there { match y = neg(x)
      rewrite y = mul(x, -1.0)
      within 1e-5 }
    rule back { match y = mul(x, -1.0)
      rewrite y = neg(x)
      within 1e-5 }"""
    with pytest.raises(DfcError) as e:
        run(both, graph(ONE + "y = neg(x)\nreturn y"))
    assert e.value.code == "R040"


def test_a_match_tells_what_its_names_stand_for() -> None:
    g = graph(ONE + "y = mul(relu(x), 3.0)\nreturn y")
    node: Node = next(g.reversed_nodes)
    found = attempt(ruleset("match y = mul(relu(x), s)\nrewrite y = x").rules[0], g, node)
    assert isinstance(found, Match)
    assert found.env["x"] is g.inputs[0] and found.env["s"] == 3.0
    assert [base_of(n.op) for n in found.nodes] == ["mul", "relu"]
    assert attempt(ruleset("match y = exp(x)\nrewrite y = x").rules[0], g, node) is None
