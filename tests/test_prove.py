"""Rules are proved: every seeded mistake is found, and shown with the input that breaks it."""

from __future__ import annotations

import pytest

from dfc.lang.source import Source
from dfc.rewrite.prove import Proof, prove
from dfc.rewrite.read_rules import rules_of


def proof(text: str) -> Proof:
    (rule,) = rules_of(Source(f"dfc 1\nrule r {{\n{text}\n}}\n", "r.dfc"), "r").rules
    return prove(rule)


# Each is right for the sample that its author looked at. What is wrong, the rule, and what the
# counterexample must say.
WRONG = {
    "x - x is NaN where x is infinite": (
        """
        match   y = sub(x, x)
        rewrite y = zeros_like(x)
        exact
        applies x: f32[2, 3]
        refuses x: bool[2, 3]
        """,
        ["-inf", "left nan, right 0"],
    ),
    "x * 0 is not 0 for NaN": (
        """
        match   y = mul(x, 0)
        rewrite y = zeros_like(x)
        within  1e-3
        applies x: f32[2, 3]
        refuses x: bool[2, 3]
        """,
        ["left nan, right 0"],
    ),
    "reassociation rounds": (
        """
        match   y = add(add(a, b), c)
        rewrite y = add(a, add(b, c))
        exact
        applies a: f32[2, 3], b: f32[2, 3], c: f32[2, 3]
        refuses a: f32[2, 3], b: f32[4, 3], c: f32[2, 3]
        """,
        ["claim `within 1e-"],
    ),
    "softmax over another dimension": (
        """
        match   y = softmax(x, 1)
        rewrite y = softmax(x, -1)
        within  1e-5
        applies x: f32[4, 4]
        refuses x: i64[4, 4]
        """,
        ["one dimension more"],
    ),
    "relu is the identity on positive numbers alone": (
        """
        match   y = relu(x)
        rewrite y = x
        exact
        applies x: f32[2, 3]
        refuses x: bool[2, 3]
        """,
        ["left 0, right -"],
    ),
    "a cast to half precision rounds": (
        """
        match   y = _to_copy(_to_copy(x, dtype=f16), dtype=f32)
        rewrite y = x
        exact
        applies x: f32[2, 3]
        refuses x: f64[2, 3]
        """,
        ["random inputs", "left"],
    ),
    "a cast to integers and back": (
        """
        match   y = _to_copy(_to_copy(x, dtype=i64), dtype=f32)
        rewrite y = x
        within 1e-2
        applies x: f32[2, 3]
        refuses x: f64[2, 3]
        """,
        ["error"],
    ),
    "a bias that broadcasts": (
        """
        match   y = add(matmul(x, w), b)
        where   rank(w) == 2
        rewrite y = addmm(b, x, w)
        within  1e-5
        applies x: f32[4, 8], w: f32[8, 16], b: f32[16]
        refuses x: f32[4, 8], w: f32[2, 8, 16], b: f32[16]
        """,
        [],
    ),
    "the wrong scale": (
        """
        match   y = mul(mul(x, a), b)
        where   normal(a) and normal(b)
        rewrite y = mul(x, value(a) + value(b))
        within  1e-4
        applies x: f32[2, 3], a=2.0, b=2.0
        refuses x: f32[2, 3], a=2.0, b: f32[2, 3]
        """,
        ["a = 3.4", "b = 2.0"],
    ),
    "maximum keeps NaN": (
        """
        match   y = maximum(a, b)
        rewrite y = where(gt(a, b), a, b)
        exact
        applies a: f32[2, 3], b: f32[2, 3]
        refuses a: f32[2, 3], b: f32[4, 5]
        """,
        ["left nan"],
    ),
    "integer division rounds": (
        """
        match   y = floor_divide(mul(x, a), a)
        rewrite y = x
        exact
        applies x: i64[2, 3], a=2
        refuses x: i64[2, 3], a: i64[4, 5]
        """,
        ["the largest and smallest numbers"],
    ),
    "true division of integers gives floats": (
        """
        match   y = div(mul(x, a), a)
        rewrite y = x
        within  1e-5
        applies x: f32[2, 3], a=2.0
        refuses x: f32[2, 3], a: f32[4, 5]
        """,
        [],
    ),
    "as_strided looks at memory": (
        """
        match   y = t(x)
        rewrite y = as_strided(x, [dim(x, 1), dim(x, 0)], [1, dim(x, 1)])
        exact
        applies x: f32[2, 3]
        refuses x: f32[2, 3, 4]
        """,
        ["in memory"],
    ),
    "gelu by tanh is another function": (
        """
        match   y = gelu(x)
        rewrite y = gelu(x, approximate="tanh")
        within  1e-6
        applies x: f32[2, 8]
        refuses x: i64[2, 8]
        """,
        ["claim what holds, `within 1e-"],
    ),
    "a square root of a square is no identity": (
        """
        match   y = sqrt(mul(x, x))
        rewrite y = x
        within  1e-5
        applies x: f32[2, 8]
        refuses x: i64[2, 8]
        """,
        ["right -"],
    ),
    "view in place of transpose, right for one row": (
        """
        match   y = transpose(x, 0, 1)
        rewrite y = view(x, [dim(x, 1), dim(x, 0)])
        exact
        applies x: f32[1, 6]
        refuses x: f32[1, 6, 2]
        """,
        ["changed to"],
    ),
    "mean in place of sum, right for one element": (
        """
        match   y = sum(x, [-1], keepdim=True)
        rewrite y = mean(x, [-1], keepdim=True)
        within  1e-5
        applies x: f32[4, 1]
        refuses x: i64[4, 1]
        """,
        ["sizes 1 changed to"],
    ),
    "layer norm without what eps does": (
        """
        match   c = sub(x, mean(x, [-1], keepdim=True))
        match   y = mul(c, rsqrt(add(var(x, [-1], keepdim=True), eps)))
        rewrite y = layer_norm(x, [dim(x, -1)], None, None, value(eps))
        within  1e-5
        applies x: f32[2, 64], eps=1e-5
        refuses x: i64[2, 64], eps=1e-5
        """,
        [],
    ),
    "an epsilon that is dropped": (
        """
        match   y = mul(x, rsqrt(add(mean(mul(x, x), [-1], keepdim=True), eps)))
        rewrite y = rms_norm(x, [dim(x, -1)], None, 0.0)
        within  1e-4
        applies x: f32[2, 16], eps=1e-6
        refuses x: i64[2, 16], eps=1e-6
        """,
        ["0 everywhere"],
    ),
    "a division by zero": (
        """
        match   y = div(mul(x, b), b)
        rewrite y = x
        within  1e-4
        applies x: f32[2, 3], b: f32[2, 3]
        refuses x: f32[2, 3], b: f32[4, 5]
        """,
        ["left nan"],
    ),
    "clamp loses the order of its bounds": (
        """
        match   y = clamp(clamp(x, a, b), c, d)
        rewrite y = clamp(x, max(value(a), value(c)), min(value(b), value(d)))
        exact
        applies x: f32[2, 3], a=-1.0, b=1.0, c=-2.0, d=2.0
        refuses x: f32[2, 3], a=-1.0, b: f32[3], c=-2.0, d=2.0
        """,
        ["a = ", "left", "right"],
    ),
    "dropping a dtype": (
        """
        match   y = _to_copy(cumsum(x, 0, dtype=d), dtype=f32)
        where   dtype(x) == f32
        rewrite y = cumsum(x, 0)
        within  1e-5
        applies x: f32[2, 8], d=f64
        refuses x: f64[2, 8], d=f64
        """,
        ["d = i64"],
    ),
    "a constant within tolerance and a tighter claim": (
        """
        match   y = mul(x, ~=0.7978845608)
        rewrite y = mul(x, 0.7978845608028654)
        within  1e-7
        applies x: f32[2, 8]
        refuses x: f32[2, 8] constant
        """,
        ["claim what holds"],
    ),
    "a tail in another order": (
        """
        match   y = cat([a, ...rest], 0)
        rewrite y = cat([...rest, a], 0)
        exact
        applies a: f32[2, 3], rest: f32[0, 3]
        refuses a: f32[2, 3], rest: f32[3, 4]
        """,
        ["sizes 0 changed to"],
    ),
    "order of a product of matrices": (
        """
        match   y = matmul(a, b)
        rewrite y = matmul(b, a)
        within  1e-5
        applies a: f32[3, 3], b: f32[3, 3]
        refuses a: f32[3, 3], b: f32[4, 3]
        """,
        ["random inputs"],
    ),
    "attention over rows that are masked": (
        """
        match   y = matmul(softmax(add(matmul(q, kt), mask), -1), v)
        where   rank(q) == 4 and floating(q) and dtype(mask) == dtype(q)
        rewrite y = scaled_dot_product_attention(q, transpose(kt, -2, -1), v, mask, scale=1.0)
        within  1e-5
        applies q: f32[2, 2, 5, 8], kt: f32[2, 2, 8, 7], v: f32[2, 2, 7, 8], mask: f32[2, 1, 5, 7]
        refuses q: f32[2, 5, 8], kt: f32[2, 8, 7], v: f32[2, 7, 8], mask: f32[2, 5, 7]
        """,
        ["mask = -inf everywhere"],
    ),
    "attention whose mask broadcasts the scores": (
        """
        match   y = matmul(softmax(add(matmul(q, kt), mask), -1), v)
        where   rank(q) == 4 and floating(q) and dtype(mask) == dtype(q) and finite(mask)
        where   dtype(kt) == dtype(q) and dtype(v) == dtype(q)
        where   leading(q, 2) == leading(kt, 2) and leading(q, 2) == leading(v, 2)
        rewrite y = scaled_dot_product_attention(q, transpose(kt, -2, -1), v, mask, scale=1.0)
        within  1e-5
        applies q: f32[2, 2, 5, 8], kt: f32[2, 2, 8, 7], v: f32[2, 2, 7, 8],
                mask: f32[2, 1, 5, 7] constant
        refuses q: f32[2, 2, 5, 8], kt: f32[2, 2, 8, 7], v: f32[2, 2, 7, 8], mask: f32[2, 1, 5, 7]
        """,
        ["dimension 2 of q changed to 1"],
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_rule_is_refused_with_the_input_that_breaks_it(mistake: str) -> None:
    text, words = WRONG[mistake]
    found = proof(text)
    codes = [d.code for d in found.problems]
    assert codes and codes[-1] == "R022", found
    shown = found.problems[-1].render()
    assert "r.dfc:2:" in shown
    assert "note: left:" in shown and "note: right:" in shown and "help:" in shown
    for word in words:
        assert word in shown, shown


# Nothing is wrong with these, though much is unusual.
RIGHT = {
    "transposed twice": """
        match   y = transpose(transpose(x, a, b), a, b)
        rewrite y = x
        exact
        applies x: f32[2, 3, 4], a=0, b=2
        refuses x: f32[2, 3, 4], a=0, b=9   # no such dimension
        """,
    "addition commutes": """
        match   y = add(a, b)
        where   dtype(a) == dtype(b)
        rewrite y = add(b, a)
        exact
        applies a: f32[2, 3], b: f32[3]
        refuses a: f32[2, 3], b: f64[2, 3]
        """,
    "three projections at once": """
        match   q = linear(x, wq)
        match   k = linear(x, wk)
        match   v = linear(x, wv)
        where   constant(wq) and constant(wk) and constant(wv)
        rewrite q, k, v = split_with_sizes(linear(x, cat!([wq, wk, wv], dim=0)),
                                           [dim(wq, 0), dim(wk, 0), dim(wv, 0)], dim=-1)
        within  1e-5
        applies x: f32[2, 5, 8], wq: f32[8, 8] constant,
                wk: f32[4, 8] constant, wv: f32[4, 8] constant
        refuses x: f32[2, 5, 8], wq: f32[8, 8], wk: f32[4, 8], wv: f32[4, 8]
        """,
    "a constant within tolerance": """
        match   y = mul(x, ~=0.7978845608)
        where   floating(x)
        rewrite y = mul(x, 0.7978845608028654)
        within  1e-4
        applies x: f32[2, 8]
        refuses x: bool[2, 8]
        """,
    "any number of operands": """
        match   y = cat([a, ...rest], 0)
        where   len(rest) == 0
        rewrite y = a
        exact
        applies a: f32[2, 3]
        refuses a: f32[2, 3], rest: f32[2, 3]
        """,
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_rule_holds(name: str) -> None:
    found = proof(RIGHT[name])
    assert found.holds, found.problems[0].render()
    assert found.tally.inputs > 50


def test_a_rule_needs_samples_of_both_kinds() -> None:
    found = proof("match y = neg(neg(x))\nrewrite y = x\nexact")
    assert [d.code for d in found.problems] == ["R020", "R020"]


def test_a_sample_that_should_apply_and_does_not_says_why() -> None:
    found = proof(
        """
        match   y = neg(neg(x))
        where   rank(x) == 3
        rewrite y = x
        exact
        applies x: f32[2, 3]
        refuses x: f32[2]
        """
    )
    assert [d.code for d in found.problems] == ["R021"]
    assert "rank(x) is 2" in found.problems[0].message


def test_a_sample_that_should_be_refused_and_is_not() -> None:
    found = proof(
        """
        match   y = neg(neg(x))
        rewrite y = x
        exact
        applies x: f32[2, 3]
        refuses x: f32[2]
        """
    )
    assert [d.code for d in found.problems] == ["R023"]


def test_a_sample_that_shows_nothing_is_an_error() -> None:
    found = proof(
        """
        match   y = neg(neg(x))
        rewrite y = x
        exact
        applies x: f32[2, 3]
        refuses x: f32[2], y: f32[3]
        """
    )
    assert [d.code for d in found.problems] == ["R025"]


def test_a_right_side_of_another_type() -> None:
    found = proof(
        """
        match   y = sum(x, [-1])
        rewrite y = sum(x, [-1], keepdim=True)
        exact
        applies x: f32[2, 3]
        refuses x: f32[2, 3] constant
        """
    )
    assert [d.code for d in found.problems] == ["R024"]
    assert "`y` is f32[2], its replacement f32[2, 1]" in found.problems[0].message


def test_a_proof_is_the_same_every_time() -> None:
    text = WRONG["maximum keeps NaN"][0]
    assert proof(text).problems == proof(text).problems
