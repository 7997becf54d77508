"""Patterns over a graph: compiled once, tried where the root's op stands, with a reason if not.

R041  a rule took too many steps at one node: its pattern is ambiguous
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from dfc.errors import DfcError
from dfc.ir.expr import Expr
from dfc.ir.graph import Graph, Node, Parameter, Value, attribute_key
from dfc.ir.op import REQUIRED, lookup
from dfc.ir.types import DType, TensorType
from dfc.lang import syntax as s
from dfc.lang.wording import expression_text
from dfc.rewrite.conditions import Facts, base_of, constant_number, first_failure, near
from dfc.rewrite.rule import CONSTANTS, Rule

MAX_STEPS = 100_000  # of one rule at one node: k commutative ops match in 2**k orders
CONDITIONS = 20  # steps that deciding the conditions of a rule counts for
MAX_CANDIDATES = 4096  # nodes that a second match line is tried on

_COMMUTATIVE = frozenset(
    """add mul maximum minimum eq ne logical_and logical_or logical_xor bitwise_and bitwise_or
    bitwise_xor""".split()  # noqa: SIM905
)
# Attributes that count dimensions, from the end when negative.
_DIMENSIONS = frozenset({"dim", "dims", "dim0", "dim1", "start_dim", "end_dim", "axis"})
_ONE_MORE = frozenset({"unsqueeze", "stack"})  # they count those of the result
# Where `dtype` that is the operand's own changes nothing.
_SAME_DTYPE = frozenset({"softmax", "log_softmax", "mean", "sum", "cumsum", "prod"})

Env = dict[str, Any]
_NODES = "$nodes"  # the nodes matched so far, in the environment


@dataclass(frozen=True)
class Match:
    """Where a rule applies: what its names stand for, all matched nodes, and the roots by name."""

    rule: Rule
    env: Mapping[str, Any]
    nodes: tuple[Node, ...]
    roots: Mapping[str, Value]

    @property
    def anchor(self) -> Node:
        root = next(iter(self.roots.values()))
        assert root.node is not None
        return root.node


@dataclass(frozen=True)
class Refusal:
    """Why a rule does not apply: how many nodes had matched, where it stopped, and the reason.

    `condition` is the condition that failed when the whole pattern matched; `blocker` the node that
    stands in the way; `bound` what the names stood for.
    """

    rule: Rule
    progress: int
    reason: str
    pattern: s.Expr | None = None
    condition: s.Expr | None = None
    blocker: Node | None = None
    nodes: tuple[Node, ...] = ()
    bound: Mapping[str, Any] = field(default_factory=dict)


# Arguments


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
            before = _shown(env[self.name])
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
            return near(found, self.value) if self.near else found == self.value
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
        return op == self.exact if self.exact else base_of(op) == self.base

    def on(self, node: Node, env: Env, m: Attempt) -> Iterator[Env]:
        """Match the arguments of a node of this op; those that are not named have their default."""
        sig = signature(node.op)
        names = sig.names[: len(self.arguments)]
        named = [*names, *(k for k, _ in self.keywords)]
        if len(names) < len(self.arguments) or any(k not in sig.names for k in named):
            m.fail(env, self, node, f"is {node.op}, which has other arguments")
            return
        for name in sig.names:
            if name not in named and not _is_default(node, name, sig):
                value = _shown(argument(node, name))
                m.fail(env, self, node, f"has {name}={value}; the pattern leaves it at its default")
                return
        if not node.pure:
            m.fail(env, self, node, "is random or has an effect")
            return
        patterns = (*self.arguments, *(p for _, p in self.keywords))
        values = [_counted(node, name, argument(node, name)) for name in named]
        inside = {**env, _NODES: (*env[_NODES], node)}
        patterns = tuple(_relative(p, node, name) for p, name in zip(patterns, named, strict=True))
        yield from _all(patterns, values, inside, m)
        if self.base in _COMMUTATIVE and len(self.arguments) >= 2:
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
    return inner | {p.base}


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


# Rules


@dataclass(eq=False)
class Line:
    names: tuple[str, ...]
    pattern: Pattern
    bases: frozenset[str]
    height: int
    mentions: frozenset[str]


class Compiled:
    """A rule ready to be tried: its lines, the first of which is anchored at a root."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        lines = [_line(m) for m in rule.matches]
        first = next(x for x in lines if rule.roots[0] in x.names)
        self.lines = [first, *(x for x in lines if x is not first)]
        self.size = sum(size(x.pattern) for x in lines)
        self.height = sum(x.height for x in lines)

    @property
    def bases(self) -> frozenset[str]:
        return self.lines[0].bases


def _line(m: s.Match) -> Line:
    from dfc.rewrite.rule import _pattern_names

    pattern = compile_pattern(m.pattern)
    names = tuple(w.name for w in m.names)
    mentions = frozenset(_pattern_names(m.pattern))
    return Line(names, pattern, root_bases(pattern), height(pattern), mentions)


class Attempt:
    """One rule tried at one node: counts steps and, if `explain`, keeps the refusal that came
    furthest."""

    def __init__(self, compiled: Compiled, graph: Graph, facts: Facts, explain: bool) -> None:
        self.compiled, self.graph, self.facts, self.explain = compiled, graph, facts, explain
        self.steps = 0
        self.refusal: Refusal | None = None

    def step(self, count: int = 1) -> None:
        self.steps += count
        if self.steps > MAX_STEPS:
            name = self.compiled.rule.full_name
            raise DfcError(
                "R041",
                f"the rule `{name}` took {MAX_STEPS} steps at one node",
                help="its pattern can match in too many ways: name more of what it needs",
            )

    def fail(self, env: Env, pattern: Pattern, x: Any, why: str) -> None:
        if self.explain:
            blocker = x if isinstance(x, Node) else getattr(x, "node", None)
            self._note(env, f"{_shown(x)} {why}", pattern.source, None, blocker)

    def _note(
        self,
        env: Env,
        reason: str,
        pattern: s.Expr | None,
        condition: s.Expr | None,
        blocker: Node | None,
    ) -> None:
        progress = len(env[_NODES]) + (condition is not None)
        if self.refusal is None or progress > self.refusal.progress:
            bound = {k: v for k, v in env.items() if k != _NODES}
            self.refusal = Refusal(
                self.compiled.rule,
                progress,
                reason,
                pattern,
                condition,
                blocker,
                env[_NODES],
                bound,
            )

    def run(self, node: Node) -> Match | None:
        first, *rest = self.compiled.lines
        for env in self._line(first, node, {_NODES: ()}):
            for full in self._rest(rest, env):
                self.step(CONDITIONS)
                match = self._accepted(full)
                if match is not None:
                    return match
        return None

    def _line(self, line: Line, node: Node, env: Env) -> Iterator[Env]:
        if len(node.results) < len(line.names) or (len(line.names) == 1 and len(node.results) > 1):
            return
        for found in line.pattern.match(node.results[0], env, self):
            named = {**found}
            for name, result in zip(line.names, node.results, strict=False):
                if name in named and named[name] is not result:
                    break
                named[name] = result
            else:
                yield named

    def _rest(self, lines: Sequence[Line], env: Env) -> Iterator[Env]:
        """The further lines: first those whose result is known, then those that share a name."""
        if not lines:
            yield env
            return
        line = next((x for x in lines if any(n in env for n in x.names)), None)
        if line is None:
            line = next((x for x in lines if x.mentions & env.keys()), lines[0])
        others = [x for x in lines if x is not line]
        for node in self._candidates(line, env):
            for found in self._line(line, node, env):
                yield from self._rest(others, found)

    def _candidates(self, line: Line, env: Env) -> list[Node]:
        known = next((env[n] for n in line.names if n in env), None)
        if known is not None:
            if isinstance(known, Value) and known.node is not None:
                return [known.node]
            self._note(
                env, f"{_shown(known)} is no result of an op", line.pattern.source, None, None
            )
            return []
        taken = {env[n].node for n in self.compiled.rule.targets if n in env}
        bound = [env[n] for n in sorted(line.mentions) if n in env and isinstance(env[n], Value)]
        values = [v for v in bound if not isinstance(v, Parameter)] or bound
        if values:
            best = min(values, key=lambda v: v.use_count)
            # To explain, what is a little further away is tried as well, and fails by itself.
            found = _above(best, line.height + 2 * self.explain)
        else:
            found = list(self.graph.nodes)[:MAX_CANDIDATES]
        return [n for n in found if base_of(n.op) in line.bases and n not in taken]

    def _accepted(self, env: Env) -> Match | None:
        rule = self.compiled.rule
        roots = {name: env[name] for name in rule.roots}
        tops = {v.node for v in roots.values()}
        if len({id(v) for v in roots.values()}) < len(roots):
            return None
        shared = {env[n].node for n in rule.shared if isinstance(env.get(n), Value)}
        matched = set(env[_NODES])
        for node in env[_NODES]:
            if node in tops or node in shared:
                continue
            for result in node.results:
                outside = next((u for u in result.users if u not in matched), None)
                if outside is not None:
                    if self.explain:
                        self._note(env, _other_user(result, outside), None, None, outside)
                    return None
        for node in tops:  # results of a root that the rewrite does not replace
            for result in node.results if node else ():
                if result.use_count and not any(result is v for v in roots.values()):
                    if self.explain:
                        self._note(env, f"%{result.name} is needed, too", None, None, node)
                    return None
        failure = first_failure(rule.conditions, env, self.facts)
        if failure is not None:
            if self.explain:
                self._note(env, failure.reason, None, failure.condition, None)
            return None
        bound = {k: v for k, v in env.items() if k != _NODES}
        return Match(rule, bound, tuple(dict.fromkeys(env[_NODES])), roots)


def _other_user(value: Value, user: Node) -> str:
    if not user.results and user.op == "return":
        return f"%{value.name} is an output of the graph as well"
    place = f" at {user.loc}" if user.loc else ""
    read = f"%{user.results[0].name} ({user.op})" if user.results else "the graph's result"
    return f"%{value.name} is read by {read}{place} as well"


def _above(value: Value, height: int) -> list[Node]:
    """The nodes that read a value, directly or through at most `height - 1` others, in order."""
    found: dict[Node, None] = {}
    level: list[Node] = list(value.users)
    for _ in range(height):
        fresh = [n for n in level if n not in found]
        found.update(dict.fromkeys(fresh))
        if len(found) > MAX_CANDIDATES:
            break
        level = [u for n in fresh for u in n.users]
    return list(found)


class Matcher:
    """Rules by the op of their root; of several that fit, priority and then size decide."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.compiled = [Compiled(r) for r in rules]
        self.by_base: dict[str, list[Compiled]] = defaultdict(list)
        order = sorted(
            range(len(rules)),
            key=lambda i: (-rules[i].priority, -self.compiled[i].size, i),
        )
        for i in order:
            for base in self.compiled[i].bases:
                self.by_base[base].append(self.compiled[i])
        self.height = max((c.height for c in self.compiled), default=0)

    def candidates(self, node: Node) -> Sequence[Compiled]:
        return self.by_base.get(base_of(node.op), ()) if node.results else ()

    def first(self, graph: Graph, node: Node, facts: Facts) -> Match | None:
        """The match of the first rule that applies at a node."""
        for compiled in self.candidates(node):
            match = Attempt(compiled, graph, facts, explain=False).run(node)
            if match is not None:
                return match
        return None


def attempt(rule: Rule | Compiled, graph: Graph, node: Node) -> Match | Refusal | None:
    """Try a rule at a node and say why not; None where its root op does not even stand."""
    compiled = rule if isinstance(rule, Compiled) else Compiled(rule)
    if not node.results or base_of(node.op) not in compiled.bases:
        return None
    tried = Attempt(compiled, graph, Facts(graph), explain=True)
    return tried.run(node) or tried.refusal


def _shown(x: Any) -> str:
    if isinstance(x, Node):
        return f"%{x.results[0].name}" if x.results else x.op
    if isinstance(x, Parameter):
        return f"!{x.name}"
    if isinstance(x, Value):
        made = f" ({base_of(x.node.op)})" if x.node else " (an input)"
        return f"%{x.name}{made}"
    if isinstance(x, tuple):
        return "[" + ", ".join(map(_shown, x)) + "]"
    if isinstance(x, DType):
        return x.name
    return str(x) if isinstance(x, Expr) or x is not None else "an absent operand"
