"""Complete rules of the grammar to syntax: one method for each, called while lark parses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dfc.lang import syntax as s
from dfc.lang.syntax import At
from dfc.lang.tokens import Token

MAX_NESTING = 200  # of expressions; brackets have their own, smaller, limit
MAX_DIGITS = 19

_OPERATORS = {
    "EQ": "==", "NE": "!=", "LE": "<=", "GE": ">=", "LT": "<", "GT": ">", "NEAR": "~=", "IN": "in",
    "PLUS": "+", "MINUS": "-", "TIMES": "*", "OVER": "/", "FLOOR": "//", "REST": "%",
}  # fmt: skip
_PUNCTUATION = {
    "COMMA", "LBRACE", "RBRACE", "COLON", "LPAR", "RPAR", "EQUAL", "LSQB", "RSQB", "VBAR",
    "AMPERSAND", "__ANON_0",
}  # fmt: skip
_NUMERAL = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)(.*)")
Report = Callable[..., None]


class TooDeep(Exception):
    """An expression that is nested so deeply that reading ends; it has been told."""


@dataclass(slots=True)  # not frozen: a hundred thousand are made, and go at once
class _Spliced:
    """What a rule with a leading `_` gives to its parent."""

    items: list[Any]
    at: At


@dataclass(slots=True)
class _Bare:
    """What is no syntax by itself, such as the names before a `=`, with its place."""

    value: Any
    at: At


def _kept(rule: Any) -> tuple[int | None, ...]:
    """Which of the values that a rule takes are of use, None for an optional one that is absent."""
    names = [(str(x.name), x.is_term) for x in rule.expansion]
    of_use = [
        i for i, (name, term) in enumerate(names)
        if not term or not (name.startswith("_") or name in _PUNCTUATION)
    ]  # fmt: skip
    absent = rule.options.empty_indices
    if not absent:
        return tuple(of_use)
    positions = iter(range(len(names)))
    placed = [None if gone else next(positions) for gone in absent]
    return tuple(i for i in placed if i is None or i in of_use)


def _start(x: Any) -> int:
    return x.start if type(x) is Token else x.at[0]


def _end(x: Any) -> int:
    return x.end if type(x) is Token else x.at[1]


class Builder:
    """`report(code, message, at, help)` takes what is wrong with a complete rule."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.last = 0
        self.tight: set[int] = set()  # where a token begins that clings to what follows it

    def callback(self, rule: Any) -> Callable[[Sequence[Any]], Any]:
        """What lark calls when a rule is complete."""
        name = str(rule.alias or rule.origin.name)
        splices = name.startswith("_")
        made = None if splices else getattr(self, name, getattr(self, f"{name}_", None))
        if made is None and not splices:
            assert rule.options.expand1, name
            return self._passed_on
        return partial(self._complete, made, _kept(rule))

    def _passed_on(self, taken: Sequence[Any]) -> Any:
        self.last = _end(taken[0])
        return taken[0]

    def _complete(self, made: Any, kept: Sequence[int | None], taken: Sequence[Any]) -> Any:
        """What a rule makes of what was taken; `made` is None where its parent splices it in."""
        at = (_start(taken[0]), _end(taken[-1])) if taken else (self.last, self.last)
        self.last = at[1]
        items: list[Any] = []
        for i in kept:
            x: Any = None if i is None else taken[i]
            kind = type(x)
            if kind is _Bare:
                items.append(x.value)
            elif kind is not _Spliced:
                items.append(x)
            elif i == 0 and made is None:
                items = x.items  # a repetition grows in place: copying would be quadratic
            else:
                items += x.items
        if made is None:
            return _Spliced(items, at)
        found = made(at, items)
        return found if isinstance(found, s.Node) else _Bare(found, at)

    def entries(self, values: Sequence[Any]) -> tuple[s.Entry, ...]:
        """The complete entries on the stack of a text that ends early."""
        found = [i for v in values for i in (v.items if isinstance(v, _Spliced) else (v,))]
        return tuple(e for e in found if isinstance(e, s.Entry))

    # ---- the file

    def document(self, at: At, items: Sequence[Any]) -> s.Document:
        return s.Document(at, tuple(i for i in items if isinstance(i, s.Entry)))

    def version(self, at: At, items: Sequence[Any]) -> None:
        return None

    def import_(self, at: At, items: Sequence[Any]) -> s.Import:
        return s.Import(at, _string(items[0]))

    def data(self, at: At, items: Sequence[Any]) -> s.Data:
        return s.Data(at, tuple(map(_word, items)))

    def metric(self, at: At, items: Sequence[Any]) -> s.Metric:
        name, on, direction = items
        return s.Metric(at, _word(name), on and _word(on), direction.type == "HIGHER")

    # ---- targets

    def target(self, at: At, items: Sequence[Any]) -> s.Target:
        return s.Target(at, _word(items[0]), tuple(items[1:]))

    def device(self, at: At, items: Sequence[Any]) -> s.Device:
        return s.Device(at, _word(items[0]), items[1])

    def link(self, at: At, items: Sequence[Any]) -> s.Link:
        a, arrow, b, what = items
        return s.Link(at, _word(a), _word(b), arrow.type == "BOTH_WAYS", what)

    # ---- recipes

    def recipe(self, at: At, items: Sequence[Any]) -> s.Recipe:
        name, target, extends, block = items
        return s.Recipe(at, _word(name), target and _word(target), extends or (), block)

    def extends(self, at: At, items: Sequence[Any]) -> tuple[s.Word, ...]:
        return tuple(map(_word, items))

    def block(self, at: At, items: Sequence[Any]) -> tuple[s.Statement, ...]:
        return tuple(items)

    def doc(self, at: At, items: Sequence[Any]) -> s.Doc:
        return s.Doc(at, _string(items[0]))

    def goal(self, at: At, items: Sequence[Any]) -> s.Goal:
        return s.Goal(at, items[0].text, items[1])

    def step(self, at: At, items: Sequence[Any]) -> s.Step:
        label, verb, operands, *phrases, keep, options = items
        return s.Step(
            at, label and _word(label), _word(verb), operands or (), tuple(phrases), keep,
            options or (),
        )  # fmt: skip

    def phrase(self, at: At, items: Sequence[Any]) -> s.Phrase:
        return s.Phrase(at, items[0].text, items[1])

    def operands(self, at: At, items: Sequence[Any]) -> tuple[s.Expr, ...]:
        return tuple(items)

    def keep(self, at: At, items: Sequence[Any]) -> s.Expr:
        found: s.Expr = items[0]
        return found

    def keep_step(self, at: At, items: Sequence[Any]) -> s.Keep:
        label, condition, options = items
        return s.Keep(at, label and _word(label), condition, options or ())

    def with_(self, at: At, items: Sequence[Any]) -> tuple[s.Keyword, ...]:
        return tuple(items)

    def when(self, at: At, items: Sequence[Any]) -> s.When:
        condition, then, otherwise = items
        return s.When(at, condition, then, otherwise or ())

    # ---- rules

    def rule(self, at: At, items: Sequence[Any]) -> s.Rule:
        name, params, *clauses = items
        self.tight.add(name.start)
        return s.Rule(at, _word(name), params, tuple(clauses))

    def params(self, at: At, items: Sequence[Any]) -> tuple[s.Word, ...]:
        return tuple(_word(i) for i in items if i is not None)

    def match(self, at: At, items: Sequence[Any]) -> s.Match:
        return s.Match(at, items[0] or (), items[1])

    def rewrite(self, at: At, items: Sequence[Any]) -> s.Rewrite:
        return s.Rewrite(at, items[0] or (), items[1])

    def bound(self, at: At, items: Sequence[Any]) -> tuple[s.Word, ...]:
        return tuple(map(_word, items))

    def condition(self, at: At, items: Sequence[Any]) -> s.Condition:
        return s.Condition(at, items[0])

    def within(self, at: At, items: Sequence[Any]) -> s.Claim:
        number = self.numeral(at, items)
        if number.unit:
            self.report("P006", "a tolerance is a plain number", number.at)
        return s.Claim(at, float(number.value))

    def exact(self, at: At, items: Sequence[Any]) -> s.Claim:
        return s.Claim(at, None)

    def priority(self, at: At, items: Sequence[Any]) -> s.Priority:
        minus, *numeral = items
        if minus is not None:
            self.tight.add(minus.start)
        number = self.numeral(at, numeral)
        if number.unit or not isinstance(number.value, int):
            self.report("P006", "a priority is a whole number", number.at)
        return s.Priority(at, -int(number.value) if minus else int(number.value))

    def sample(self, at: At, items: Sequence[Any]) -> s.Sample:
        return s.Sample(at, items[0].text, tuple(items[1:]))

    def typed(self, at: At, items: Sequence[Any]) -> s.Typed:
        name, type_, mark = items
        return s.Typed(at, _word(name), type_, mark and _word(mark))

    def tensor(self, at: At, items: Sequence[Any]) -> s.TensorText:
        self.tight.add(items[0].start)
        return s.TensorText(at, _word(items[0]), tuple(i for i in items[1:] if i is not None))

    def pattern(self, at: At, items: Sequence[Any]) -> s.Pattern:
        self.tight.add(items[0].start)
        return s.Pattern(at, _word(items[0]), items[1], items[2])

    # ---- expressions

    def word(self, at: At, items: Sequence[Any]) -> s.Word:
        return _word(items[0])

    def text(self, at: At, items: Sequence[Any]) -> s.Text:
        return s.Text(at, _string(items[0]))

    def numeral(self, at: At, items: Sequence[Any]) -> s.Number:
        token = items[0]
        place = (token.start, token.end)
        found = _NUMERAL.match(token.text)
        assert found
        digits, unit = found.groups()
        value: float = 1  # fits wherever a number does: what is wrong with it is told once
        if sum(c.isdigit() for c in digits) > MAX_DIGITS:
            self.report("P005", f"a number may have {MAX_DIGITS} digits", place)
        elif float(digits) == float("inf"):
            self.report("P005", f"{digits} is larger than a float64 holds", place)
        else:
            value = int(digits) if digits.isdigit() else float(digits)
        return s.Number(place, value, unit)

    def call(self, at: At, items: Sequence[Any]) -> s.Expr:
        name, mark, *arguments = items
        self.tight.add(name.start)
        given = [a for a in arguments if a is not None]
        plain = tuple(a for a in given if isinstance(a, s.Expr))
        named = tuple(a for a in given if isinstance(a, s.Keyword))
        if any(isinstance(a, s.Keyword) for a in given[: len(plain)]):
            first = next(a for a in given if isinstance(a, s.Keyword))
            self.report("P002", "an argument without a name after one with a name", first.at)
        depth = self._depth(at, *plain, *(k.value for k in named))
        return s.Call(at, _word(name), plain, named, mark.text if mark else "", depth=depth)

    def group(self, at: At, items: Sequence[Any]) -> s.Expr:
        found: s.Expr = items[0]
        return found

    def list(self, at: At, items: Sequence[Any]) -> s.Expr:
        given = tuple(i for i in items if i is not None)
        return s.Several(at, given, depth=self._depth(at, *given))

    def tail(self, at: At, items: Sequence[Any]) -> s.Tail:
        return s.Tail(at, items[0].text)

    def keyword(self, at: At, items: Sequence[Any]) -> s.Keyword:
        return s.Keyword(at, _word(items[0]), items[1])

    def unary(self, at: At, items: Sequence[Any]) -> s.Expr:
        sign, x = items
        self.tight.add(sign.start)
        if sign.type == "MINUS" and isinstance(x, s.Number):
            return s.Number(at, -x.value, x.unit)
        return s.Unary(at, _OPERATORS[sign.type], x, depth=self._depth(at, x))

    def not_(self, at: At, items: Sequence[Any]) -> s.Expr:
        return s.Unary(at, "not", items[0], depth=self._depth(at, items[0]))

    def binary(self, at: At, items: Sequence[Any]) -> s.Expr:
        left, sign, right = items
        return self._binary(at, _OPERATORS[sign.type], left, right)

    compare = binary

    def or_(self, at: At, items: Sequence[Any]) -> s.Expr:
        return self._binary(at, "or", *items)

    def and_(self, at: At, items: Sequence[Any]) -> s.Expr:
        return self._binary(at, "and", *items)

    def either(self, at: At, items: Sequence[Any]) -> s.Expr:
        return self._binary(at, "|", *items)

    def both(self, at: At, items: Sequence[Any]) -> s.Expr:
        return self._binary(at, "&", *items)

    def _binary(self, at: At, op: str, left: s.Expr, right: s.Expr) -> s.Expr:
        return s.Binary(at, op, left, right, depth=self._depth(at, left, right))

    def _depth(self, at: At, *parts: s.Expr) -> int:
        """How deep an expression of these parts is nested.

        Raises:  TooDeep.
        """
        depth = 1 + max((p.depth for p in parts), default=0)
        if depth > MAX_NESTING:
            help = f"expressions nest at most {MAX_NESTING} deep"
            self.report("P004", "the expression is nested too deeply", at, help)
            raise TooDeep
        return depth


def _word(token: Token) -> s.Word:
    return s.Word((token.start, token.end), token.text)


def _string(token: Token) -> str:
    found: str = json.loads(token.text)
    return found
