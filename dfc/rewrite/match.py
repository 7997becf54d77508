"""Patterns over a graph: compiled once, tried where the root's op stands, with a reason if not.

R041  a rule took too many steps at one node: its pattern is ambiguous
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.lang import syntax as s
from dfc.rewrite.conditions import first_failure
from dfc.rewrite.deciding import Facts, base_of
from dfc.rewrite.patterns import (
    NODES,
    Env,
    Pattern,
    compile_pattern,
    height,
    root_bases,
    shown,
    size,
)
from dfc.rewrite.rule import Rule

MAX_STEPS = 100_000  # of one rule at one node: k commutative ops match in 2**k orders
CONDITIONS = 20  # steps that deciding the conditions of a rule counts for
MAX_CANDIDATES = 4096  # nodes that a second match line is tried on


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
    from dfc.rewrite.rule import pattern_names

    pattern = compile_pattern(m.pattern)
    names = tuple(w.name for w in m.names)
    mentions = frozenset(pattern_names(m.pattern))
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
            self._note(env, f"{shown(x)} {why}", pattern.source, None, blocker)

    def _note(
        self,
        env: Env,
        reason: str,
        pattern: s.Expr | None,
        condition: s.Expr | None,
        blocker: Node | None,
    ) -> None:
        progress = len(env[NODES]) + (condition is not None)
        if self.refusal is None or progress > self.refusal.progress:
            bound = {k: v for k, v in env.items() if k != NODES}
            self.refusal = Refusal(
                self.compiled.rule,
                progress,
                reason,
                pattern,
                condition,
                blocker,
                env[NODES],
                bound,
            )

    def run(self, node: Node) -> Match | None:
        first, *rest = self.compiled.lines
        for env in self._line(first, node, {NODES: ()}):
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
                env, f"{shown(known)} is no result of an op", line.pattern.source, None, None
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
        matched = set(env[NODES])
        for node in env[NODES]:
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
        failure = first_failure(rule.conditions, env, self.facts, self.explain)
        if failure is not None:
            if self.explain:
                self._note(env, failure.reason, None, failure.condition, None)
            return None
        bound = {k: v for k, v in env.items() if k != NODES}
        return Match(rule, bound, tuple(dict.fromkeys(env[NODES])), roots)


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
