"""Rules are proved: every seeded mistake is found, and shown with the input that breaks it."""

from __future__ import annotations

from dfc.lang.source import Source
from dfc.rewrite.prove import Proof, prove
from dfc.rewrite.rule import rules_of


def proof(text: str) -> Proof:
    (rule,) = rules_of(Source(f"dfc 1\nrule r {{\n{text}\n}}\n", "r.dfc"), "r").rules
    return prove(rule)


def test_a_right_rule_holds() -> None:
    found = proof(
        """
        match   y = transpose(transpose(x, a, b), a, b)
        rewrite y = x
        exact
        applies x: f32[2, 3, 4], a=0, b=2
        refuses x: f32[2, 3, 4], a=0, b=9   # no such dimension
        """
    )
    assert found.holds, found.problems
    assert found.tally.inputs > 100


def test_relu_is_no_identity() -> None:
    found = proof(
        """
        match   y = relu(x)
        rewrite y = x
        exact
        applies x: f32[2, 3]
        refuses x: f32[2, 3]
        """
    )
    assert [d.code for d in found.problems] == ["R022"]
