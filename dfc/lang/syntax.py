"""What a file of recipes, targets and rules says: values that print back and carry their place.

`at` is the range of offsets in the source; it takes no part in equality.
"""

from __future__ import annotations

from dataclasses import dataclass, field

At = tuple[int, int]


@dataclass(frozen=True)
class Node:
    at: At = field(compare=False, repr=False)


# ---- Expressions: one shape for patterns, conditions, goals, options and selectors.


@dataclass(frozen=True)
class Expr(Node):
    """`depth` counts nested expressions; the reader bounds it, so that walking may recurse."""

    depth: int = field(default=1, compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Word(Expr):
    """A name, dotted where it names an op."""

    name: str


@dataclass(frozen=True)
class Number(Expr):
    """A number with its unit: 12GiB is Number(12, "GiB"). An int unless written otherwise."""

    value: int | float
    unit: str = ""


@dataclass(frozen=True)
class Text(Expr):
    """A string, escapes resolved."""

    value: str


@dataclass(frozen=True)
class Call(Expr):
    """`name(arguments, key=value)`; mark is "?" (may be absent), "!" (compile time) or ""."""

    name: Word
    arguments: tuple[Expr, ...]
    keywords: tuple[Keyword, ...] = ()
    mark: str = ""


@dataclass(frozen=True)
class Several(Expr):
    """A list, in ( ) or [ ]."""

    items: tuple[Expr, ...]


@dataclass(frozen=True)
class Unary(Expr):
    """`not x`, `-x`, or `~=x` (a constant within tolerance)."""

    op: str
    operand: Expr


@dataclass(frozen=True)
class Binary(Expr):
    """or, and, ==, !=, <=, >=, <, >, ~=, in, |, &, +, -, *, /, //, %."""

    op: str
    left: Expr
    right: Expr


@dataclass(frozen=True)
class Tail(Expr):
    """`...rest`: the operands from here on."""

    name: str


@dataclass(frozen=True)
class Keyword(Node):
    """`name=value`, of a call, a `with` or a sample."""

    name: Word
    value: Expr


# ---- Recipes


@dataclass(frozen=True)
class Phrase(Node):
    """`using calib`, `except "head.**"`."""

    word: str
    operands: tuple[Expr, ...]


@dataclass(frozen=True)
class Step(Node):
    """`label: verb operands phrases keep if condition with options`.

    The built-in verbs apply, verify, emit and revert are steps as well.
    """

    label: Word | None
    verb: Word
    operands: tuple[Expr, ...] = ()
    phrases: tuple[Phrase, ...] = ()
    keep: Expr | None = None
    options: tuple[Keyword, ...] = ()


@dataclass(frozen=True)
class Keep(Node):
    """`keep label if condition`: `faster`, or a comparison; without a label, the step before."""

    label: Word | None
    condition: Expr
    options: tuple[Keyword, ...] = ()


@dataclass(frozen=True)
class When(Node):
    condition: Expr
    then: tuple[Statement, ...]
    otherwise: tuple[Statement, ...] = ()


@dataclass(frozen=True)
class Goal(Node):
    """kind is minimize, maximize or require."""

    kind: str
    what: Expr


@dataclass(frozen=True)
class Doc(Node):
    """A string alone on its line, at the top of a recipe or rule: what it is for."""

    text: str


Statement = Step | Keep | When | Goal | Doc


@dataclass(frozen=True)
class Recipe(Node):
    name: Word
    target: Word | None
    extends: tuple[Word, ...]
    body: tuple[Statement, ...]


# ---- Targets


@dataclass(frozen=True)
class Device(Node):
    name: Word
    what: Expr


@dataclass(frozen=True)
class Link(Node):
    """Between two devices; `both` says that it goes both ways."""

    source: Word
    sink: Word
    both: bool
    what: Expr


@dataclass(frozen=True)
class Target(Node):
    name: Word
    parts: tuple[Device | Link, ...]


# ---- Rules


@dataclass(frozen=True)
class Match(Node):
    """`names = pattern`; no names when only one value is matched and nothing refers to it."""

    names: tuple[Word, ...]
    pattern: Expr


@dataclass(frozen=True)
class Condition(Node):
    what: Expr


@dataclass(frozen=True)
class Rewrite(Node):
    """`names = expression`: a name that a `match` has bound is replaced, any other is local."""

    names: tuple[Word, ...]
    value: Expr


@dataclass(frozen=True)
class Claim(Node):
    """`exact` (tolerance None) or `within tolerance`."""

    tolerance: float | None


@dataclass(frozen=True)
class Priority(Node):
    value: int


@dataclass(frozen=True)
class TensorText(Node):
    """`f32[2, 16]` as written."""

    dtype: Word
    dims: tuple[Expr, ...]


@dataclass(frozen=True)
class Typed(Node):
    """`x: f32[2, 16] constant`; the mark is None or a word such as constant."""

    name: Word
    type: TensorText
    mark: Word | None


@dataclass(frozen=True)
class Sample(Node):
    """kind is applies or refuses; attributes are given as `name=value`."""

    kind: str
    given: tuple[Typed | Keyword, ...]


Clause = Doc | Match | Condition | Rewrite | Claim | Priority | Sample


@dataclass(frozen=True)
class Rule(Node):
    """params are None when the rule does not list them."""

    name: Word
    params: tuple[Word, ...] | None
    clauses: tuple[Clause, ...]


@dataclass(frozen=True)
class Pattern(Node):
    """A named piece of pattern, used like an op: `pattern rms(x, e) = rsqrt(add(mean(x), e))`."""

    name: Word
    params: tuple[Word, ...]
    body: Expr


# ---- The file


@dataclass(frozen=True)
class Import(Node):
    path: str


@dataclass(frozen=True)
class Data(Node):
    names: tuple[Word, ...]


@dataclass(frozen=True)
class Metric(Node):
    name: Word
    data: Word | None
    higher_is_better: bool


Entry = Import | Data | Metric | Target | Recipe | Rule | Pattern


@dataclass(frozen=True)
class Document(Node):
    entries: tuple[Entry, ...]
    version: int = 1
