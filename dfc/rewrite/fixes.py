"""What would make a rule match: one change at a time, made on a copy of the graph and tried."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.types import TensorType
from dfc.lang import syntax as s
from dfc.lang.wording import expression_text
from dfc.rewrite.deciding import Facts, base_of
from dfc.rewrite.explain import Fix, NearMiss, Site, graphs_of, tried
from dfc.rewrite.match import Compiled, Match, Refusal
from dfc.rewrite.pass_ import Context, Pass, find_pass, named
from dfc.rewrite.patterns import signature
from dfc.rewrite.rule import Rule, conjunctions, walk

# What is tried by itself, before all together.
SIMPLIFY = ("remove_noops", "canonicalize", "fold_constants", "cse", "fold_batch_norm", "dce")
MAX_BYPASSED = 8
MAX_NODES = 20_000  # of a graph that other rules are tried on first


class Fixes:
    """Tries what may help a rule on one graph; what one pass does is found out once."""

    def __init__(self, rule: Rule, graph: Graph, sets: Sequence[str] = ()) -> None:
        """`sets` are the other rule sets that may have to run first."""
        self.rule, self.graph, self.sets = rule, graph, sets
        self.compiled = Compiled(rule)
        self._after: dict[str, Graph | None] = {}

    def nearest(self, miss: NearMiss) -> Fix | None:
        """The first change that lets the rule match there, None when no single one does."""
        r = miss.refusal
        for attempt in (
            self._by_pass, self._by_reader, self._by_attribute, self._by_bypass, self._by_dtype,
            self._by_range, self._by_rules, self._by_condition,
        ):  # fmt: skip
            found = attempt(r)
            if found is not None:
                return found
        return None

    def _matches(self, graph: Graph, like: Node, compiled: Compiled | None = None) -> bool:
        """Whether the rule matches where a node stood: by its name, else by its line."""
        compiled = compiled or self.compiled
        for g in graphs_of(graph):
            facts = Facts(g)
            for node in g.nodes:
                if _is_there(node, like) and isinstance(tried(compiled, g, node, facts), Match):
                    return True
        return False

    # Passes and rules that would clear the way

    def _by_pass(self, r: Refusal) -> Fix | None:
        for name in SIMPLIFY:
            after = self._result(name, lambda name=name: [find_pass(name)])  # type: ignore[misc]
            if after is not None and self._matches(after, r.nodes[0]):
                return Fix(f"run `{name}` before `fuse`{_does(name, r)}")
        after = self._result("simplify", lambda: [find_pass(n) for n in SIMPLIFY])
        if after is not None and self._matches(after, r.nodes[0]):
            return Fix("`apply simplify` before `fuse`")
        return None

    def _by_rules(self, r: Refusal) -> Fix | None:
        if len(self.graph) > MAX_NODES:
            return None
        for name in self.sets:
            options = {"rules": (name,)}
            after = self._result(f"rules {name}", lambda: [find_pass("fuse", options)])  # noqa: B023
            if after is not None and self._matches(after, r.nodes[0]):
                return Fix(f"`apply rules({name})` before it")
        return None

    def _result(self, key: str, passes: Callable[[], list[Pass]]) -> Graph | None:
        """The graph behind passes, None when they change nothing."""
        if key not in self._after:
            copy = self.graph.copy()
            try:
                changes = sum(p.run(copy, Context()) for p in passes())
            except DfcError:
                changes = 0
            self._after[key] = copy if changes else None
        return self._after[key]

    # Changes of the graph

    def _copied(self, r: Refusal) -> tuple[Graph, dict[Value, Value]]:
        graph = r.nodes[0].graph
        assert graph is not None
        return graph.copy_with_map()

    def _by_reader(self, r: Refusal) -> Fix | None:
        """Without the readers from outside, of which `blocker` is the first."""
        if r.pattern is not None or r.condition is not None:
            return None
        copy, twin = self._copied(r)
        inside = {twin[n.results[0]].node for n in r.nodes if n.results}
        readers: list[Node] = []
        for n in r.nodes[1:]:
            for result in n.results:
                value = twin[result]
                outside = [u for u in value.users if u not in inside]
                if outside:
                    dummy = copy.add_input(copy.fresh_name("other"), value.type)
                    copy.replace_uses(value, dummy, lambda u: u not in inside)
                    readers += outside
        if not readers or not self._matches(copy, r.nodes[0]):
            return None
        who = ", ".join(dict.fromkeys(_reader(n) for n in readers))
        return Fix(f"let {who} read something else; or say `where shared(...)` in the rule")

    def _by_attribute(self, r: Refusal) -> Fix | None:
        found = re.search(r"has (\w+)=(.*); the pattern leaves it at its default", r.reason)
        if not found or r.blocker is None or not r.blocker.results:
            return None
        copy, twin = self._copied(r)
        node = twin[r.blocker.results[0]].node
        name = found[1]
        if node is None or name not in node.attributes:
            return None
        default = signature(node.op).defaults.get(name)
        copy.set_attributes(node, **{name: default})
        if not self._matches(copy, r.nodes[0]):
            return None
        return Fix(
            f"{_place(r.blocker)} with {name}={default}; or, if the rule holds for "
            f"{name}={found[2]} as well, name `{name}=` in its pattern"
        )

    def _by_bypass(self, r: Refusal) -> Fix | None:
        """Without one op that gives a value of its operand's type."""
        for node in self._in_the_way(r):
            for operand in node.operands:
                if operand.type != node.results[0].type:
                    continue
                copy, twin = self._copied(r)
                bypassed = twin[node.results[0]].node
                copy.replace_uses(twin[node.results[0]], twin[operand])
                if bypassed is not None:
                    copy.erase(bypassed)
                if self._matches(copy, r.nodes[0]):
                    base = base_of(node.op)
                    return Fix(
                        f"leave out {_place(node)}, which alone stands in the way; "
                        f"or write `{base}?(...)` there in the rule"
                    )
        return None

    def _in_the_way(self, r: Refusal) -> Iterator[Node]:
        """The node that was found instead, what it reads, and what the names stand for."""
        graph = r.nodes[0].graph
        values = [v for v in r.bound.values() if isinstance(v, Value)]
        nodes = [r.blocker, *(v.node for v in values)]
        seen: dict[Node, None] = {}
        for node in nodes:
            fits = node is not None and node.graph is graph and len(node.results) == 1
            if node is not None and fits and node is not r.nodes[0]:
                seen[node] = None
        yield from list(seen)[:MAX_BYPASSED]

    def _by_dtype(self, r: Refusal) -> Fix | None:
        """One of the condition's tensors in another's dtype."""
        values = [v for v in _named_in(r) if isinstance(v.type, TensorType)]
        dtypes = {v.tensor_type.dtype for v in values}
        if len(dtypes) < 2:
            return None
        values.sort(key=lambda v: not isinstance(v, Parameter))  # a weight is changed more easily
        for v in values:
            for other in sorted(dtypes - {v.tensor_type.dtype}, key=str):
                copy, twin = self._copied(r)
                copy.set_type(twin[v], v.tensor_type.with_dtype(other))
                if self._matches(copy, r.nodes[0]):
                    return Fix(f"make {named(v)} {other}: it is {v.tensor_type.dtype}")
        return None

    def _by_range(self, r: Refusal) -> Fix | None:
        """A dynamic size that is never 1."""
        graph = r.nodes[0].graph
        if r.condition is None or graph is None:
            return None
        for symbol, (low, high) in graph.ranges.items():
            if (low or 0) >= 2:
                continue
            copy, _ = self._copied(r)
            copy.ranges[symbol] = (2, high)
            if self._matches(copy, r.nodes[0]):
                return Fix(f"declare the dynamic size `{symbol}` to be at least 2")
        return None

    # The rule itself

    def _by_condition(self, r: Refusal) -> Fix | None:
        """Without the condition that fails: is it the only one?"""
        if r.condition is None:
            return None
        kept = tuple(c for c in conjunctions(self.rule.conditions) if c is not r.condition)
        kept = tuple(c for c in kept if c not in tuple(conjunctions((r.condition,))))
        weaker = Compiled(dataclasses.replace(self.rule, conditions=kept))
        if not self._matches(self.graph, r.nodes[0], weaker):
            return None
        text = expression_text(r.condition)
        remedy = _remedy(r.condition)
        return Fix(f"`{text}` is all that fails{remedy}", tried=True)


def _remedy(c: s.Expr) -> str:
    name = c.name.name if isinstance(c, s.Call) else ""
    return {
        "constant": ": make it a parameter or a buffer of the model",
        "finite": ": build the mask with torch.finfo(dtype).min where it has -inf",
    }.get(name, "")


def _named_in(r: Refusal) -> list[Value]:
    """The values that the failing condition speaks of."""
    words = {w.name for w in walk(r.condition) if isinstance(w, s.Word)} if r.condition else set()
    return [v for k, v in r.bound.items() if k in words and isinstance(v, Value)]


def _is_there(node: Node, like: Node) -> bool:
    if not node.results or not like.results:
        return False
    if node.results[0].name == like.results[0].name:
        return True
    return node.loc is not None and node.loc == like.loc


def _place(node: Node) -> str:
    return str(Site.of(node))


def _reader(node: Node) -> str:
    return _place(node) if node.results else "the graph's outputs"


def _does(name: str, r: Refusal) -> str:
    blocker = r.blocker
    return f": it clears away {_place(blocker)}" if blocker is not None and blocker.results else ""
