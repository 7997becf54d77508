"""Patterns of rules: compiled from their text, matched against values with all their bindings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from dfc.ir.expr import Expr
from dfc.ir.graph import Node, Parameter, Value, attribute_key
from dfc.ir.op import REQUIRED, lookup
from dfc.ir.types import DType, TensorType
from dfc.lang import syntax as s
from dfc.lang.wording import expression_text
from dfc.rewrite.deciding import base_of, constant_number, near
from dfc.rewrite.rule import CONSTANTS

if TYPE_CHECKING:
    from dfc.rewrite.match import Attempt

COMMUTATIVE = frozenset(
    """add mul maximum minimum eq ne logical_and logical_or logical_xor bitwise_and bitwise_or
    bitwise_xor""".split()  # noqa: SIM905
)


def commutes(base: str, alpha: Any = None) -> bool:
    """Whether an op's first two operands may change places: those of `a + 2 * b` may not."""
    return base in COMMUTATIVE and alpha in (None, 1)


# The same op with its first two operands the other way round: `1 - x` is `rsub(x, 1)` in a graph.
_REVERSED = {"sub": "rsub"}
_OTHER_WAY = {"self": "other", "other": "self"}

# Attributes that count dimensions, from the end when negative.
_DIMENSIONS = frozenset({"dim", "dims", "dim0", "dim1", "start_dim", "end_dim", "axis"})
_ONE_MORE = frozenset({"unsqueeze", "stack"})  # they count those of the result
# Where `dtype` that is the operand's own changes nothing.
_SAME_DTYPE = frozenset({"softmax", "log_softmax", "mean", "sum", "cumsum", "prod"})

Env = dict[str, Any]
NODES = "$nodes"  # the nodes matched so far, in the environment


@dataclass(frozen=True)
class Signature:
    """The arguments of an op in the order of its schema: name, default, operand or attribute."""

    names: tuple[str, ...]
    operands: tuple[str, ...]
    defaults: Mapping[str, Any]


@cache
def signature(op: str) -> Signature:
    info = lookup(op)
    operands = tuple(o.name for o in info.operands)
    defaults: dict[str, Any] = {a.name: a.default for a in info.attributes}
    defaults |= {o.name: None if o.optional else REQUIRED for o in info.operands}
    order = [a.name for a in getattr(info, "_arguments", ())] or [*operands, *defaults]
    return Signature(tuple(dict.fromkeys(order)), operands, defaults)


def argument(node: Node, name: str) -> Any:
    """An argument of a node: an operand, or an attribute, also one in a tensor's place."""
    sig = signature(node.op)
    if name in sig.operands:
        at = sig.operands.index(name)
        x = node.inputs[at] if at < len(node.inputs) else None
        return node.attributes.get(name) if x is None else x
    return node.attributes.get(name)


# Patterns


class Pattern:
    """One piece of a compiled pattern. `match` gives every way to match, each an environment."""

    source: s.Expr

    def match(self, x: Any, env: Env, m: Attempt) -> Iterator[Env]:
        raise NotImplementedError


@dataclass(eq=False)
class Any_(Pattern):
    source: s.Expr

    def match(self, x: Any, env: Env, m: Attempt) -> Iterator[Env]:
        yield env


@dataclass(eq=False)
class Name(Pattern):
    """Binds a value or an attribute; the second time it must be the same."""

    source: s.Expr
    name: str

    def match(self, x: Any, env: Env, m: Attempt) -> Iterator[Env]:
        if self.name not in env:
            yield {**env, self.name: x}
        elif _same(env[self.name], x):
            yield env
        elif m.explain:
            before = shown(env[self.name])
            m.fail(env, self, x, f"is not {before}, which is `{self.name}` elsewhere")


@dataclass(eq=False)
class Constant(Pattern):
    """A number, word or dtype; `near` allows what is written with fewer digits."""

    source: s.Expr
    value: Any
    near: bool = False

    def match(self, x: Any, env: Env, m: Attempt) -> Iterator[Env]:
        if self._is(x, m):
            yield env
        else:
            m.fail(env, self, x, f"is not {expression_text(self.source)}")

    def _is(self, x: Any, m: Attempt) -> bool:
        if isinstance(self.value, (int, float)) and not isinstance(self.value, bool):
            found = constant_number(x)
            if isinstance(x, Value) and not _is_scalar(x):
                return False
            if found is None:
                return False
            if self.near or found != self.value:
                return self.near and near(found, self.value)
            return found != 0 or math.copysign(1, found) == math.copysign(1, self.value)
        return not isinstance(x, (Value, tuple)) and attribute_key(x) == attribute_key(self.value)


@dataclass(eq=False)
class List(Pattern):
    source: s.Expr
    items: tuple[Pattern, ...]
    tail: str | None

    def match(self, x: Any, env: Env, m: Attempt) -> Iterator[Env]:
        n = len(self.items)
        if not isinstance(x, tuple) or len(x) < n or (self.tail is None and len(x) != n):
            m.fail(env, self, x, f"is not {'at least ' * bool(self.tail)}{n} things")
            return
        for found in _all(self.items, x[:n], env, m):
            if self.tail is None:
                yield found
            elif self.tail not in found:
                yield {**found, self.tail: x[n:]}
            elif _same(found[self.tail], x[n:]):
                yield found


@dataclass(eq=False)
class Either(Pattern):
    source: s.Expr
    options: tuple[Pattern, ...]

    def match(self, x: Any, env: Env, m: Attempt) -> Iterator[Env]:
        for option in self.options:
            yield from option.match(x, env, m)


@dataclass(eq=False)
class Apply(Pattern):
    """An op on patterns: any overload of a bare name, or exactly the one that is named."""

    source: s.Call
    exact: str | None
    base: str
    arguments: tuple[Pattern, ...]
    keywords: tuple[tuple[str, Pattern], ...]
    optional: bool

    @cached_property
    def bases(self) -> frozenset[str]:
        """The ops that this may be."""
        other = () if self.exact else (_REVERSED.get(self.base, self.base),)
        return frozenset((self.base, *other))

    def match(self, x: Any, env: Env, m: Attempt) -> Iterator[Env]:
        m.step()
        node = x.node if isinstance(x, Value) else None
        if node is not None and x.index == 0 and self.is_op(node.op):
            yield from self.on(node, env, m)
        elif not self.optional:
            m.fail(env, self, x, f"is no {self.exact or self.base}")
        if self.optional and self.arguments:
            yield from self.arguments[0].match(x, env, m)

    def is_op(self, op: str) -> bool:
        return op == self.exact if self.exact else base_of(op) in self.bases

    def on(self, node: Node, env: Env, m: Attempt) -> Iterator[Env]:
        """Match the arguments of a node of this op; those that are not named have their default."""
        sig = signature(node.op)
        names = sig.names[: len(self.arguments)]
        named = [*names, *(k for k, _ in self.keywords)]
        if len(names) < len(self.arguments) or any(k not in sig.names for k in named):
            m.fail(env, self, node, f"is {node.op}, which has other arguments")
            return
        if base_of(node.op) != self.base:
            named = [_OTHER_WAY.get(name, name) for name in named]
        for name in sig.names:
            if name not in named and not _is_default(node, name, sig):
                value = shown(argument(node, name))
                m.fail(env, self, node, f"has {name}={value}; the pattern leaves it at its default")
                return
        if not node.pure:
            m.fail(env, self, node, "is random or has an effect")
            return
        patterns = (*self.arguments, *(p for _, p in self.keywords))
        values = [_counted(node, name, argument(node, name)) for name in named]
        inside = {**env, NODES: (*env[NODES], node)}
        patterns = tuple(_relative(p, node, name) for p, name in zip(patterns, named, strict=True))
        yield from _all(patterns, values, inside, m)
        if len(self.arguments) >= 2 and commutes(self.base, argument(node, "alpha")):
            swapped = (patterns[1], patterns[0], *patterns[2:])
            yield from _all(swapped, values, inside, m)


def _all(patterns: Sequence[Pattern], values: Sequence[Any], env: Env, m: Attempt) -> Iterator[Env]:
    """Match several patterns, the most particular first, so that names are bound by structure."""
    if not patterns:
        yield env
        return
    if len(patterns) == 1:
        yield from patterns[0].match(values[0], env, m)
        return
    for found in patterns[0].match(values[0], env, m):
        yield from _all(patterns[1:], values[1:], found, m)


def _is_default(node: Node, name: str, sig: Signature) -> bool:
    value, default = argument(node, name), sig.defaults.get(name)
    if default is REQUIRED or holds_value(value):
        return False
    if name == "dtype" and value is not None and base_of(node.op) in _SAME_DTYPE:
        first = next(node.operands, None)
        own = first.type if first else None
        return isinstance(own, TensorType) and own.dtype.is_float and value == own.dtype
    if isinstance(default, list):
        default = tuple(default)
    return attribute_key(_neutral(value)) == attribute_key(_neutral(default))


def holds_value(x: Any) -> bool:
    """Whether an argument is, or has in it, what is only known when the graph runs."""
    return isinstance(x, Value) or (isinstance(x, tuple) and any(map(holds_value, x)))


def _neutral(x: Any) -> Any:
    """1 and 1.0 are the same default of a number."""
    return float(x) if isinstance(x, int) and not isinstance(x, bool) else x


def _counted(node: Node, name: str, x: Any) -> Any:
    """Dimensions counted from the front."""
    rank = _rank(node) if name in _DIMENSIONS else None
    if rank is None:
        return x
    if isinstance(x, tuple):
        return tuple(d % rank if type(d) is int and -rank <= d < rank else d for d in x)
    return x % rank if type(x) is int and -rank <= x < rank else x


def _rank(node: Node) -> int | None:
    first = next(node.operands, None)
    if first is None or not isinstance(first.type, TensorType):
        return None
    return first.type.rank + (base_of(node.op) in _ONE_MORE) or None


def _relative(p: Pattern, node: Node, name: str) -> Pattern:
    """A pattern's `dim=-1` counted from the front for this node."""
    rank = _rank(node) if name in _DIMENSIONS else None
    if rank is None:
        return p
    if isinstance(p, Constant) and type(p.value) is int and p.value < 0:
        return Constant(p.source, p.value + rank)
    if isinstance(p, List):
        return List(p.source, tuple(_relative(i, node, name) for i in p.items), p.tail)
    return p


def _is_scalar(x: Value) -> bool:
    return isinstance(x.type, TensorType) and x.type.rank == 0


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Value) or isinstance(b, Value):
        return a is b or (
            isinstance(a, Parameter) and isinstance(b, Parameter) and _equal_constants(a, b)
        )
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return attribute_key(a) == attribute_key(b)


def _equal_constants(a: Parameter, b: Parameter) -> bool:
    numbers = constant_number(a), constant_number(b)
    return a.type == b.type and numbers[0] is not None and numbers[0] == numbers[1]


def compile_pattern(x: s.Expr) -> Pattern:
    """A pattern of a match line, its named patterns expanded."""
    if isinstance(x, s.Word):
        if x.name == "_":
            return Any_(x)
        return Constant(x, CONSTANTS[x.name]) if x.name in CONSTANTS else Name(x, x.name)
    if isinstance(x, s.Number):
        return Constant(x, x.value)
    if isinstance(x, s.Text):
        return Constant(x, x.value)
    if isinstance(x, s.Unary):
        assert isinstance(x.operand, s.Number)
        return Constant(x, x.operand.value, near=True)
    if isinstance(x, s.Several):
        tail = x.items[-1].name if x.items and isinstance(x.items[-1], s.Tail) else None
        items = x.items[:-1] if tail else x.items
        return List(x, tuple(map(compile_pattern, items)), tail)
    if isinstance(x, s.Binary):
        return Either(x, tuple(_options(x)))
    assert isinstance(x, s.Call), x
    name = x.name.name
    bare = name.removeprefix("aten.")
    exact = name if "." in bare else None
    keywords = tuple((k.name.name, compile_pattern(k.value)) for k in x.keywords)
    arguments = tuple(map(compile_pattern, x.arguments))
    return Apply(x, exact, base_of(name) if exact else bare, arguments, keywords, x.mark == "?")


def _options(x: s.Expr) -> Iterator[Pattern]:
    if isinstance(x, s.Binary) and x.op == "|":
        yield from _options(x.left)
        yield from _options(x.right)
    else:
        yield compile_pattern(x)


def root_bases(p: Pattern) -> frozenset[str]:
    """The ops that a pattern's root may be."""
    if isinstance(p, Either):
        return frozenset().union(*map(root_bases, p.options))
    if not isinstance(p, Apply):
        return frozenset()
    inner = root_bases(p.arguments[0]) if p.optional and p.arguments else frozenset()
    return inner | p.bases


def size(p: Pattern) -> int:
    """Ops in a pattern: of several rules, the larger says more."""
    if isinstance(p, Apply):
        inside = sum(map(size, (*p.arguments, *(k for _, k in p.keywords))))
        return inside + (not p.optional)
    if isinstance(p, List):
        return sum(map(size, p.items))
    return min(map(size, p.options)) if isinstance(p, Either) else 0


def height(p: Pattern) -> int:
    """The longest chain of ops in a pattern: how far back from its root it looks."""
    if isinstance(p, Apply):
        return 1 + max([0, *map(height, (*p.arguments, *(k for _, k in p.keywords)))])
    parts = p.items if isinstance(p, List) else p.options if isinstance(p, Either) else ()
    return max([0, *map(height, parts)])


def shown(x: Any) -> str:
    if isinstance(x, Node):
        return f"%{x.results[0].name}" if x.results else x.op
    if isinstance(x, Parameter):
        return f"!{x.name}"
    if isinstance(x, Value):
        made = f" ({base_of(x.node.op)})" if x.node else " (an input)"
        return f"%{x.name}{made}"
    if isinstance(x, tuple):
        return "[" + ", ".join(map(shown, x)) + "]"
    if isinstance(x, DType):
        return x.name
    return str(x) if isinstance(x, Expr) or x is not None else "an absent operand"
