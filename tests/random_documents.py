"""Documents drawn from the grammar: every statement there is, with expressions of any shape."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

WORDS = (
    "a", "b", "q", "x", "relu", "cse", "match", "where", "not_", "higher",
    "aten.add.Tensor", "dfc.linear_gelu", "latency", "data", "rule", "in_", "_", "None", "exact",
)  # fmt: skip
PLAIN = ("a", "b", "c", "q", "x", "y", "net", "small", "big_1")
NUMBERS = ("0", "1", "-3", "0.5", "12GiB", "1e-5", "80%", "0.5pp", "10us", "25GB/s")
TEXTS = ('""', '"a.*"', '"\\u00e9\\n\\""', '"# no {comment}"', '"blocks.**.mlp"')
BINARY = ("or", "and", "==", "!=", "<=", ">=", "<", ">", "~=", "in", "|", "&", "+", "-", "*",
          "/", "//", "%")  # fmt: skip


class Draw:
    """A document from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def one(self, of: Sequence[str]) -> str:
        return self.rng.choice(of)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def several(self, make: Callable[[], str], least: int = 1, most: int = 3) -> str:
        return f"{self.comma()}".join(make() for _ in range(self.rng.randint(least, most)))

    def comma(self) -> str:
        return self.one((", ", ",", " , ", ",\n      ", ",  # why\n  "))

    def space(self) -> str:
        return self.one((" ", "  ", "\t"))

    def name(self) -> str:
        return self.one(PLAIN)

    # Expressions

    def atom(self) -> str:
        kind = self.rng.randrange(4)
        if kind == 0:
            return self.name()
        return self.one((NUMBERS, TEXTS, NUMBERS)[kind - 1])

    def expression(self, depth: int = 3) -> str:
        if depth == 0 or self.chance(0.3):
            return self.atom()
        kind = self.rng.randrange(7)
        inner = lambda: self.expression(depth - 1)  # noqa: E731
        if kind < 2:
            op = self.one(BINARY)
            left, right = f"({inner()})", f"({inner()})"
            gap = self.one((" ", "\n    ")) if op in ("|", "&", "and", "or") else " "
            return f"{left}{gap}{op} {right}"
        if kind == 2:
            mark = self.one(("", "?", "!"))
            named = f"{self.comma()}{self.name()}={inner()}" if self.chance(0.4) else ""
            return f"{self.one(WORDS)}{mark}({self.several(inner)}{named})"
        if kind == 3:
            return f"[{self.several(inner, 0)}]".replace("[\n", "[")
        if kind == 4:
            return f"({self.one(('-', 'not ', '~='))}({inner()}))"
        if kind == 5:
            return f"({inner()})"
        return f"f(...{self.name()})"

    # Lines

    def statement(self, depth: int) -> list[str]:
        kind = self.rng.randrange(9)
        e = self.expression
        if kind == 0:
            return [f"{self.one(('minimize', 'maximize', 'require'))} {e()}"]
        if kind == 1 and depth:
            body = self.block(lambda: self.statement(depth - 1))
            other = self.block(lambda: self.statement(depth - 1))
            tail = ["} else {", *other[1:]] if self.chance(0.5) else ["}"]
            return [f"when {e()} {{", *body[1:-1], *tail]
        if kind == 2:
            label = self.one(("", "q ", "big_1 "))
            return [f"keep {label}if {e()}"]
        if kind == 3:
            return [self.one(TEXTS)]
        words = [f"{self.name()}:" * self.chance(0.3), self.one(("cse", "apply", "emit", "prune"))]
        if self.chance(0.5):
            words.append(self.several(e))
        for w in ("on", "by", "to", "from", "into", "except", "using", "at"):
            if self.chance(0.1):
                words.append(f"{w} {self.several(e)}")
        if self.chance(0.1):
            words.append(f"keep if {e()}")
        if self.chance(0.4):
            words.append("with " + self.several(lambda: f"{self.name()}={e(2)}"))
        return [self.space().join(filter(None, words))]

    def block(self, make: Callable[[], list[str]]) -> list[str]:
        lines = ["{"]
        for _ in range(self.rng.randrange(4)):
            if self.chance(0.2):
                lines.append(self.one(("# a comment", "#", "", "#! {odd", "\n\n")))
            made = make()
            if self.chance(0.2):
                made[-1] += self.one(("  # behind", "#close"))
            lines += made
        return [*lines, "}"]

    def clause(self) -> list[str]:
        e = self.expression
        names = f"{self.several(self.name, 1, 2)} = " if self.chance(0.6) else ""
        given = lambda: (  # noqa: E731
            f"{self.name()}: f32[{self.several(lambda: e(1), 0)}]{self.one((' constant', ''))}"
            if self.chance(0.6)
            else f"{self.name()}={e(1)}"
        )
        return [
            self.one(
                (
                    f"match {names}{e()}",
                    f"where {e()}",
                    f"rewrite {names}{e()}",
                    "exact",
                    f"within {self.one(('1e-5', '0'))}",
                    f"priority {self.one(('-1', '3'))}",
                    f"{self.one(('applies', 'refuses'))} {self.several(given)}",
                    self.one(TEXTS),
                )
            )
        ]

    def part(self) -> list[str]:
        facts = self.several(lambda: f"{self.name()}={self.one(NUMBERS[:6])}")
        if self.chance(0.6):
            return [f"device {self.name()}{self.one((':', ' : '))}cpu({facts})"]
        return [f"link {self.name()} {self.one(('->', '<->'))} {self.name()}: pcie({facts})"]

    def entry(self) -> list[str]:
        kind = self.rng.randrange(7)
        if kind == 0:
            return [f"import {self.one(TEXTS)}"]
        if kind == 1:
            return [f"data {self.several(self.name)}"]
        if kind == 2:
            on = self.one(("", " on a"))
            return [f"metric {self.name()}{on}, {self.one(('higher', 'lower'))} is better"]
        if kind == 3:
            body = self.block(self.part)
            return [f"target {self.name()} {body[0]}", *body[1:]]
        if kind == 4:
            params = self.one(("", f"({self.several(self.name, 0)})".replace("(\n", "(")))
            body = self.block(self.clause)
            return [f"rule {self.name()}{params} {body[0]}", *body[1:]]
        if kind == 5:
            return [f"pattern {self.name()}({self.name()}) = {self.expression()}"]
        head = f"recipe {self.name()}"
        head += self.one((" for edge", "")) + self.one((" extends a, b", ""))
        body = self.block(lambda: self.statement(2))
        return [f"{head} {body[0]}", *body[1:]]

    def document(self) -> str:
        lines = [self.one(("# top", "", "\n")), "dfc 1"]
        for _ in range(self.rng.randrange(1, 7)):
            if self.chance(0.3):
                lines.append(self.one(("", "# between", "\n\n")))
            lines += self.entry()
        return "\n".join(lines) + self.one(("", "\n", "\n\n", "  # end"))


def random_document(seed: int) -> str:
    return Draw(seed).document()
