"""What rules mean: each piece of a pattern, of a condition and of a right side on small graphs.

Graphs are written like right sides are: `x: f32[2, 3]` is an input, `!w: f32[3]` a parameter,
`a = relu(x)` a node.
"""

from __future__ import annotations

import re

import pytest
import torch

import dfc
from dfc.errors import DfcError
from dfc.ir.expr import call, symbol
from dfc.ir.graph import Argument, Graph, Loc, Node
from dfc.ir.interpret import interpret
from dfc.ir.tree import LEAF
from dfc.ir.types import DTYPES, TensorType
from dfc.ir.verify import verify
from dfc.ir.weights import TensorData
from dfc.lang import syntax as s
from dfc.lang.reader import parse_expression
from dfc.lang.source import Source
from dfc.ops.builder import Builder
from dfc.passes.fuse import JOURNAL, Fuse, Journal
from dfc.rewrite.conditions import holds
from dfc.rewrite.construct import Construction, construct
from dfc.rewrite.deciding import Facts, base_of
from dfc.rewrite.match import Match, Refusal, attempt
from dfc.rewrite.pass_ import Context
from dfc.rewrite.rule import RuleSet, rules_of
from dfc.rewrite.rulesets import instead


def tensor_type(text: str) -> TensorType:
    dtype, dims = re.fullmatch(r"(\w+)\[(.*)\]", text).groups()  # type: ignore[union-attr]
    sizes = [d.strip() for d in dims.split(",") if d.strip()]
    return TensorType(DTYPES[dtype], tuple(int(d) if d.isdigit() else symbol(d) for d in sizes))


def graph(text: str) -> Graph:
    made = Graph("f")
    env: dict[str, object] = {}
    to = Construction(Builder(made), Facts(made))
    for line in filter(None, map(str.strip, text.strip().splitlines())):
        if line.startswith("return"):
            made.set_outputs([env[n.strip()] for n in line[6:].split(",")])  # type: ignore[misc]
        elif line.startswith("!"):
            name, kind = (p.strip() for p in line[1:].split(":"))
            type_ = tensor_type(kind.partition(" = ")[0])
            given = kind.partition(" = ")[2]
            torch.manual_seed(len(made.parameters))
            data = torch.randn(type_.shape)  # type: ignore[arg-type]
            data = torch.full_like(data, float(given)) if given else data
            env[name] = made.add_parameter(name, type_, "parameter", TensorData(name, data))
        elif "=" in line:
            names, _, value = line.partition(" = ")
            found = construct(parse_expression(Source(value)), env, to)
            parts = found if isinstance(found, tuple) else (found,)
            for n, v in zip(names.split(","), parts, strict=True):
                env[n.strip()] = v
                made.rename(v, n.strip())
        else:
            name, kind = (p.strip() for p in line.split(":"))
            type_ = tensor_type(kind)
            made.ranges.update(dict.fromkeys(sorted(type_.symbols), (1, 64)))
            env[name] = made.add_input(name, type_)
    made.arguments = tuple(Argument(v.name, LEAF) for v in made.inputs)
    verify(made)
    return made


def ruleset(clauses: str) -> RuleSet:
    """One rule, or several that begin with `rule`. Nothing here is proved: see test_prove."""
    text = clauses if "rule " in clauses else f"rule r {{\n{clauses}\n}}"
    if "exact" not in text and "within" not in text:
        text = text.replace("}", "within 1e-5\n}")
    return rules_of(Source(f"dfc 1\n{text}\n", "t.dfc"), "t")


def shown(g: Graph) -> list[str]:
    def operand(x: object) -> str:
        if isinstance(x, tuple):
            return "[" + ", ".join(map(operand, x)) + "]"
        return "None" if x is None else x.name  # type: ignore[attr-defined]

    return [
        f"{', '.join(r.name for r in n.results)} = {base_of(n.op)}"
        f"({', '.join(operand(x) for x in n.inputs)})"
        for n in g.nodes
    ]


def rewritten(clauses: str, text: str) -> list[str]:
    """The nodes after the rule was applied wherever it fits; the graph means what it meant."""
    before, after = graph(text), graph(text)
    run(clauses, after)
    if not before.ranges:
        torch.manual_seed(0)
        inputs = [_values(v.tensor_type) for v in before.inputs]
        for a, b in zip(interpret(before, inputs), interpret(after, inputs), strict=True):
            torch.testing.assert_close(a, b)
    return shown(after)


def _values(t: TensorType) -> torch.Tensor:
    return torch.randn([int(str(d)) for d in t.shape]).to(t.dtype.to_torch())


def run(clauses: str, g: Graph) -> Journal:
    ctx = Context()
    with instead(ruleset(clauses)):
        Fuse(rules=("t",)).run(g, ctx)
    verify(g)
    journal = ctx.products[JOURNAL]
    assert isinstance(journal, Journal)
    return journal


def fires(clauses: str, text: str) -> bool:
    g = graph(text)
    return bool(run(clauses, g).firings)


def why_not(clauses: str, text: str, at: str = "y") -> str:
    g = graph(text)
    node = next(n for n in g.nodes if at in {r.name for r in n.results})
    found = attempt(ruleset(clauses).rules[0], g, node)
    assert isinstance(found, Refusal)
    return found.reason


# Patterns

DOUBLE = "match y = neg(neg(x))\nrewrite y = x"
ONE = "x: f32[2, 3]\n"


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


# Conditions

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


# Right sides


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
