"""Sizes: equal expressions are equal objects, and text and numbers say the same."""

from __future__ import annotations

import math
import operator
from itertools import product
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dfc
from dfc.errors import DfcError
from dfc.ir.expr import FUNCTIONS, affine, call, evaluate, free, symbol, symbols
from dfc.ir.types import DTYPES, TensorType

# The same examples each time, on a machine as slow as it likes.
STEADY = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])

B, S = symbol("B"), symbol("S")
NAMES = ("B", "S", "u0")  # sizes are never negative; what a node computes from data may be

Formula = tuple[Any, ...]  # ("B",) | (7,) | (function, formula, formula)
BINARY = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "min": min,
    "max": max,
}

leaves = st.one_of(st.sampled_from(NAMES), st.integers(-9, 9)).map(lambda x: (x,))
formulas = st.recursive(
    leaves,
    lambda inner: st.tuples(st.sampled_from(sorted(BINARY)), inner, inner),
    max_leaves=8,
)
bindings = st.fixed_dictionaries(
    {"B": st.integers(0, 12), "S": st.integers(0, 12), "u0": st.integers(-7, 12)}
)


def build(f: Formula) -> Any:
    """The formula as an expression of ours."""
    if len(f) == 1:
        return symbol(f[0]) if isinstance(f[0], str) else f[0]
    a, b = build(f[1]), build(f[2])
    return BINARY[f[0]](a, b) if f[0] in "+-*" else call(f[0], a, b)


def compute(f: Formula, values: dict[str, int]) -> int:
    """The formula in plain Python."""
    if len(f) == 1:
        return values[f[0]] if isinstance(f[0], str) else f[0]
    result: int = BINARY[f[0]](compute(f[1], values), compute(f[2], values))
    return result


def parse_size(text: str) -> Any:
    """An attribute is parsed as any integer expression is."""
    graph = dfc.parse(f"dfc 1 graph @f() -> () {{ test.op(k={text}) return () }}")
    return next(graph.nodes).attributes["k"]


@settings(STEADY, max_examples=300)
@given(formulas, bindings)
def test_expressions_compute_what_python_computes(f: Formula, values: dict[str, int]) -> None:
    try:
        wanted = compute(f, values)
        made = build(f)
        found = evaluate(made, values)
    except ZeroDivisionError:
        return
    assert found == wanted
    assert type(found) is int


@settings(STEADY, max_examples=300)
@given(formulas)
def test_text_reads_back_to_the_same_object(f: Formula) -> None:
    try:
        made = build(f)
    except ZeroDivisionError:
        return
    again = parse_size(str(made))
    assert again == made and hash(again) == hash(made) and str(again) == str(made)


@settings(STEADY, max_examples=300)
@given(formulas, bindings, st.sampled_from(NAMES))
def test_partial_evaluation_agrees(f: Formula, values: dict[str, int], first: str) -> None:
    try:
        made = build(f)
        wanted = compute(f, values)
        part = evaluate(made, {first: values[first]})
    except ZeroDivisionError:
        return
    assert first not in symbols(part)
    assert evaluate(part, values) == wanted


@settings(STEADY, max_examples=200)
@given(formulas, formulas)
def test_sums_and_products_do_not_mind_the_order(f: Formula, g: Formula) -> None:
    try:
        a, b = build(f), build(g)
    except ZeroDivisionError:
        return
    assert a + b == b + a and a * b == b * a
    assert a - a == 0 and a * 0 == 0 and a + 0 == a and a * 1 == a
    assert (a + b) * (a - b) == a * a - b * b
    assert call("min", a, b) == call("min", b, a) and call("max", a, b) == call("max", b, a)
    assert hash(a + b) == hash(b + a)


@pytest.mark.parametrize("k", [-7, -3, -2, -1, 1, 2, 3, 7])
@pytest.mark.parametrize("a, b", [(1, 0), (2, 1), (-3, 5), (6, -7), (-1, -1), (7, 3)])
def test_division_by_numbers_of_both_signs(a: int, b: int, k: int) -> None:
    x = a * symbol("u0") + b
    quotient, remainder = call("floordiv", x, k), call("mod", x, k)
    for n in range(-12, 13):
        assert evaluate(quotient, {"u0": n}) == (a * n + b) // k
        assert evaluate(remainder, {"u0": n}) == (a * n + b) % k


def test_canonical_forms() -> None:
    assert B * S == S * B and str(S * B + 1) == "B*S + 1"
    assert B + B == 2 * B and B - B == 0 and isinstance(B - B, int)
    assert call("floordiv", 4 * B + 6, 2) == 2 * B + 3
    assert call("floordiv", B * S, B) == S
    assert call("mod", 4 * B + 6, 2) == 0
    assert call("mod", 5 * B + 7, 3) == call("mod", 2 * B + 1, 3)
    assert call("floordiv", B + 4, 2) - call("floordiv", B, 2) == 2  # type: ignore[operator]
    assert call("min", B, call("min", S, B)) == call("min", S, B)
    assert call("max", B, B + 1) == B + 1
    assert call("min", B, 4, 2) == call("min", 2, B)
    assert call("eq", B, S) == call("eq", S, B)
    assert call("not", call("eq", B, S)) == call("ne", B, S)
    assert call("le", B, B) is True and call("lt", B, B) is False
    assert str((B + 1) * (B - 1)) == "B*B - 1"
    assert call("max", 0, B) == B and call("min", B, S, 0) == call("min", 0, S, B) == 0
    assert call("max", 0, symbol("u0")) != symbol("u0")


def test_numbers_fold_to_numbers() -> None:
    for name, a, b in product(("floordiv", "mod", "min", "max"), (-7, 0, 7), (-3, 3)):
        found = call(name, a, b)
        assert type(found) is int and found == FUNCTIONS[name](a, b)
    assert call("truediv", 1, 4) == 0.25 and call("not", 0) is True


def test_types_of_numbers_are_told_apart() -> None:
    one, real, true = (call("where", call("lt", B, 2), x, 5) for x in (1, 1.0, True))
    assert len({one, real, true}) == 3
    assert one != real and real != true and one != true
    assert (one.kind, real.kind, true.kind) == ("int", "float", "bool")  # type: ignore[union-attr]


def test_floats_are_never_reordered() -> None:
    a, b = call("float", B), call("float", S)
    left = call("fadd", call("fadd", a, 1e16), b)
    right = call("fadd", a, call("fadd", 1e16, b))
    assert left != right
    values = {"B": 1, "S": 1}
    assert evaluate(left, values) == (1.0 + 1e16) + 1.0
    assert evaluate(right, values) == 1.0 + (1e16 + 1.0)


def test_a_division_by_zero_is_an_error_when_it_happens() -> None:
    with pytest.raises(ZeroDivisionError):
        call("floordiv", B, 0)
    ratio = call("floordiv", B, S)
    with pytest.raises(ZeroDivisionError):
        evaluate(ratio, {"B": 1, "S": 0})


@pytest.mark.parametrize(
    "size, parts",
    [(2 * B + 3, ("B", 2, 3)), (B, ("B", 1, 0)), (-B - 1, ("B", -1, -1)), (B * B, None),
     (B + S, None), (B + B // 2, None), ((B + 1) // 2, None), (2 * (B // (B // 2)), None),
     (7, None)],
)  # fmt: skip
def test_a_size_that_fixes_its_symbol_is_a_line(
    size: Any, parts: tuple[str, int, int] | None
) -> None:
    """`(B + 1) // 2` is 1 for two batches, and `B // (B // 2)` is no number at 0."""
    assert affine(size) == parts


def test_unknown_functions_are_refused() -> None:
    with pytest.raises(KeyError):
        call("system", B)
    with pytest.raises(DfcError, match="unknown function"):
        parse_size("system(B)")


def test_every_function_evaluates_and_reads_back() -> None:
    arguments: dict[str, tuple[Any, ...]] = {
        "where": (call("lt", B, S), B, 1), "not": (call("lt", B, S),), "float": (B,),
        "and": (call("lt", B, S), True), "or": (call("lt", B, S), False),
    }  # fmt: skip
    one = {"trunc", "floor", "ceil", "round", "sqrt", "exp", "log", "log2", "sin", "cos", "tan",
           "tanh", "abs"}  # fmt: skip
    for name, function in FUNCTIONS.items():
        args = arguments.get(name, (call("float", B),) if name in one else (B, 2))
        made = call(name, *args)
        assert free(made) and parse_size(str(made)) == made
        numbers = [evaluate(a, {"B": 6, "S": 7}) for a in args]
        found, wanted = evaluate(made, {"B": 6, "S": 7}), function(*numbers)
        assert (found, type(found)) == (wanted, type(wanted)), name


@pytest.mark.parametrize(
    "x", [0.1, -0.0, 1e-324, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, 1 / 3, 1e22, 2.0]
)
def test_floats_read_back_bit_for_bit(x: float) -> None:
    again = parse_size(repr(x))
    assert type(again) is float and math.copysign(1, again) == math.copysign(1, x) and again == x


def test_deep_expressions_do_not_recurse_when_they_are_built() -> None:
    total: Any = 0
    for i in range(5000):
        total = total + B * i
    assert total == B * sum(range(5000))


def test_types_substitute_and_print() -> None:
    t = TensorType(DTYPES["f32"], (B, 2 * S, 3))
    assert str(t) == "f32[B, 2*S, 3]" and t.symbols == {"B", "S"}
    assert t.substitute({"B": 4, "S": 5}) == TensorType(DTYPES["f32"], (4, 10, 3))
    assert t.substitute({"B": S}).shape == (S, 2 * S, 3)
    assert t.numel == 6 * B * S and t.nbytes == 24 * B * S
    assert not t.is_static and t.substitute({"B": 1, "S": 1}).is_static
