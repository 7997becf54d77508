"""A rewrite rule, ready to be compiled: names resolved, patterns expanded, form checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from dfc.ir.types import DTYPES
from dfc.lang import syntax as s
from dfc.lang.source import Source
from dfc.rewrite.pass_ import Numerics

CONSTANTS: Mapping[str, object] = {
    "None": None, "True": True, "False": False, "inf": float("inf"), "nan": float("nan"),
    "pi": 3.141592653589793, **DTYPES,
}  # fmt: skip
# What conditions and sizes may call, and how many arguments each takes.
FUNCTIONS: Mapping[str, tuple[int, int]] = {
    "constant": (1, 1), "dim": (2, 2), "rank": (1, 1), "shape": (1, 1), "dtype": (1, 1),
    "floating": (1, 1), "value": (1, 1), "users": (1, 1), "numel": (1, 1), "len": (1, 1),
    "absent": (1, 1), "present": (1, 1), "shared": (1, 1), "finite": (1, 1), "op": (1, 1),
    "item": (2, 2), "same": (2, 2), "static": (1, 1), "broadcasts": (2, 2), "broadcast": (2, 2),
    "float": (1, 1), "normal": (1, 1), "default": (2, 2), "leading": (2, 2), "open_rows": (1, 2),
    "min": (1, 8), "max": (1, 8), "sqrt": (1, 1), "abs": (1, 1), "rsqrt": (1, 1),
    "halves": (1, 1), "pairs": (1, 1), "attends": (1, 4), "product": (2, 2),
    "moderate": (1, 1),
}  # fmt: skip
ARITHMETIC = ("min", "max", "sqrt", "abs", "rsqrt")  # ops as well, where tensors are given


@dataclass(frozen=True)
class Rule:
    """One rewrite, ready to be compiled. `matches` and `rewrites` have their patterns expanded.

    `roots` are the names that a match binds and the rewrite replaces; `shared` are interior values
    that may have other users.
    """

    name: str
    set: str
    source: Source
    at: s.At
    doc: str
    params: tuple[str, ...] | None
    matches: tuple[s.Match, ...]
    conditions: tuple[s.Expr, ...]
    rewrites: tuple[s.Rewrite, ...]
    claim: Numerics
    priority: int
    samples: tuple[s.Sample, ...]
    text: str

    @property
    def full_name(self) -> str:
        return f"{self.set}.{self.name}"

    @cached_property
    def targets(self) -> frozenset[str]:
        """The names that match lines give to results."""
        return frozenset(w.name for m in self.matches for w in m.names)

    @cached_property
    def roots(self) -> tuple[str, ...]:
        """The matched values that the rewrite replaces."""
        return tuple(w.name for r in self.rewrites for w in r.names if w.name in self.targets)

    @cached_property
    def in_order(self) -> tuple[s.Match, ...] | None:
        """The match lines, each after those whose results it reads; None if they form a circle."""
        left, done = [*self.matches], set[str]()
        found: list[s.Match] = []
        while left:
            ready = [m for m in left if not (_read(m) & self.targets) - done - _named_by(m)]
            if not ready:
                return None
            found.append(ready[0])
            left.remove(ready[0])
            done |= _named_by(ready[0])
        return tuple(found)

    @cached_property
    def shared(self) -> frozenset[str]:
        found = set()
        for c in conjunctions(self.conditions):
            if isinstance(c, s.Call) and c.name.name == "shared" and c.arguments:
                found |= {a.name for a in c.arguments if isinstance(a, s.Word)}
        return frozenset(found)

    @cached_property
    def digest(self) -> str:
        """Of the rule's text, patterns expanded: what a proof is kept under."""
        words = repr((self.matches, self.conditions, self.rewrites, self.claim, self.samples))
        return hashlib.sha256(words.encode()).hexdigest()

    def __str__(self) -> str:
        return self.full_name


@dataclass(frozen=True)
class RuleSet:
    """The rules of one file, in its order; the set's name is the file's."""

    name: str
    rules: tuple[Rule, ...]
    source: Source
    patterns: Mapping[str, s.Pattern] = field(default_factory=dict)


def _read(m: s.Match) -> set[str]:
    return {w.name for w in walk(m.pattern) if isinstance(w, s.Word | s.Tail)}


def _named_by(m: s.Match) -> set[str]:
    return {w.name for w in m.names}


def conjunctions(conditions: Sequence[s.Expr]) -> Iterator[s.Expr]:
    """The conditions that must all hold, one by one."""
    for c in conditions:
        stack = [c]
        while stack:
            x = stack.pop()
            if isinstance(x, s.Binary) and x.op == "and":
                stack += [x.right, x.left]
            else:
                yield x


def walk(x: s.Expr) -> Iterator[s.Expr]:
    """An expression and all that is in it, but for the names of what is called."""
    yield x
    if isinstance(x, s.Call):
        for a in (*x.arguments, *(k.value for k in x.keywords)):
            yield from walk(a)
    elif isinstance(x, s.Several):
        for a in x.items:
            yield from walk(a)
    elif isinstance(x, s.Unary):
        yield from walk(x.operand)
    elif isinstance(x, s.Binary):
        yield from walk(x.left)
        yield from walk(x.right)


def pattern_names(x: s.Expr) -> Iterator[str]:
    for w in walk(x):
        if isinstance(w, s.Word | s.Tail) and w.name != "_" and w.name not in CONSTANTS:
            yield w.name


def is_scoped(name: str) -> bool:
    """Whether a name belongs to the body of a pattern."""
    return "$" in name
