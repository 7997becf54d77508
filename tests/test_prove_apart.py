"""Mistakes far from the sample: in another alternative, another magnitude, another number."""

from __future__ import annotations

import pytest

from dfc.lang.source import Source
from dfc.rewrite.prove import Proof, prove
from dfc.rewrite.read_rules import rules_of


def proof(text: str) -> Proof:
    (rule,) = rules_of(Source(f"dfc 1\nrule r {{\n{text}\n}}\n", "r.dfc"), "r").rules
    return prove(rule)


def identities(*patterns: str) -> str:
    return f"""
        match   y = {" | ".join(patterns)}
        rewrite y = x
        exact
        applies x: i64[2, 3]
        refuses x: bool[2, 3]
        """


# What is wrong, the rule, and what the counterexample must say.
WRONG = {
    "an eps that only small numbers see": (
        """
        match   y = layer_norm(x, n, w, b, 1e-5)
        rewrite y = layer_norm(x, n, w, b, 1e-12)
        within  1e-4
        applies x: f32[3, 8], n=[8], w: f32[8], b: f32[8]
        refuses x: i64[3, 8], n=[8], w: f32[8], b: f32[8]
        """,
        "numbers near 0.001",
    ),
    "a product of two constants that is more than float32 holds": (
        """
        match   y = mul(mul(x, a), b)
        where   normal(a) and normal(b) and dtype(x) == f32
        rewrite y = mul(x, value(a) * value(b))
        within  1e-5
        applies x: f32[2, 3], a=2.0, b=0.5
        refuses x: f64[2, 3], a=2.0, b=0.5
        """,
        "1e30 times as large",
    ),
    "the mean over another dimension": (
        """
        match   y = mean(x, d)
        where   dtype(x) == f32
        rewrite y = mul(sum(x, d), 1 / dim(x, -1))
        within  1e-5
        applies x: f32[3, 4], d=[-1]
        refuses x: f64[3, 4], d=[-1]
        """,
        "d = (0,)",
    ),
    "a transpose that a sample with one row does not show": (
        """
        match   y = view(x, [n])
        where   rank(x) == 2
        rewrite y = view(transpose(x, 0, 1), [n])
        exact
        applies x: f32[1, 4], n=4
        refuses x: f32[4], n=4
        """,
        "and their products",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_that_the_sample_does_not_show_is_found(mistake: str) -> None:
    text, words = WRONG[mistake]
    found = proof(text)
    assert [d.code for d in found.problems][-1:] == ["R022"], found
    assert words in found.problems[-1].render()


@pytest.mark.parametrize("place", (0, 3, 4))
def test_each_alternative_is_tried_with_other_types_than_the_sample_has(place: int) -> None:
    patterns = ["neg(neg(x))", "clone(x)", "mul(x, 1)", "sub(x, 0)"]
    patterns.insert(place, "ceil(x)")  # nothing to whole numbers
    found = proof(identities(*patterns))
    assert found.problems[0].code == "R022", found
    assert "i64 changed to f32" in found.problems[0].render()


def test_a_sum_with_alpha_does_not_commute() -> None:
    text = """
        match   z = add(x, mul(y, n), alpha=a)
        where   normal(n) and normal(a) and dtype(x) == f32 and dtype(y) == f32
        where   abs(value(n)) < 1e9 and abs(value(n)) > 1e-9
        rewrite z = add(x, y, alpha=value(n) * value(a))
        within  1e-5
        applies x: f32[2, 3], y: f32[2, 3], n=3.0, a=2
        refuses x: f64[2, 3], y: f32[2, 3], n=3.0, a=2
        """
    found = proof(text)
    assert found.holds, found.problems[0].render()


def test_sizes_that_the_left_side_takes_as_no_symbols_are_passed_by() -> None:
    text = """
        match   y = layer_norm(x, n, w, b, _)
        rewrite y = layer_norm(clone(x), n, w, b, {eps})
        within  1e-4
        applies x: f32[3, 8], n=[8], w: f32[8], b: f32[8]
        refuses x: i64[3, 8], n=[8], w: f32[8], b: f32[8]
        """
    assert proof(text.replace("_)", "1e-5)", 1).format(eps="1e-5")).holds
    assert not proof(text.format(eps="1e-5")).holds


@pytest.mark.parametrize("written, meant", [("7 % 4", "3"), ("-(2 - 5)", "3"), ("6 / 2", "3")])
def test_a_sample_computes_its_numbers(written: str, meant: str) -> None:
    text = f"""
        match   y = add(mul(x, n), 0)
        where   n == {meant} and dtype(x) == i64
        rewrite y = mul(x, n)
        exact
        applies x: i64[2, 3], n={written}
        refuses x: i64[2, 3], n=1
        """
    found = proof(text)
    assert found.holds, found.problems[0].render()


@pytest.mark.parametrize("written", ["4 / 0", '-"text"', '"a" - 1', "7 % 0", "sqrt(4)"])
def test_a_sample_that_is_no_number_is_an_error(written: str) -> None:
    text = f"""
        match   y = mul(x, n)
        rewrite y = mul(n, x)
        exact
        applies x: f32[2, 3], n={written}
        refuses x: f32[2, 3]
        """
    assert "R025" in [d.code for d in proof(text).problems]


def test_a_sample_that_should_be_refused_says_what_the_names_stood_for() -> None:
    text = """
        match   y = sqrt(add(x, e))
        where   dtype(x) == f32
        rewrite y = sqrt(add(e, x))
        exact
        applies x: f32[2, 3], e=1e-6
        refuses x: f64[3], e=1e-6
        """
    (problem,) = proof(text).problems
    assert problem.code == "R023"
    assert "`x` is !number" in problem.render() and "`e` is %x: f64[3]" in problem.render()
