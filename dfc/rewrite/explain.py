"""Why a rule applies or not: its matches, and its near misses with the first thing that fails.

A near miss is a place where at least half of the rule's ops, and two, stand as the rule wants.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dfc.ir.graph import Graph, Node, Value
from dfc.lang import syntax as s
from dfc.lang.wording import expression_text
from dfc.rewrite.deciding import Facts
from dfc.rewrite.match import Attempt, Compiled, Match, Refusal
from dfc.rewrite.pass_ import Context, named
from dfc.rewrite.rule import Rule, walk


@dataclass(frozen=True)
class Site:
    """A place in the model: a value, the op that makes it, its module path and Python line."""

    value: str
    op: str
    module: str = ""
    place: str = ""

    @staticmethod
    def of(node: Node) -> Site:
        loc = node.loc
        line = f"{loc.file}:{loc.line}" if loc and loc.file else ""
        name = named(node.results[0]) if node.results else node.op
        return Site(name, node.op, loc.module if loc else "", line)

    def __str__(self) -> str:
        known = " at ".join(x for x in (self.op, self.place) if x)
        return f"{self.value} ({known})" if known else self.value


@dataclass(frozen=True)
class Fix:
    """What would make a rule match. `tried`: it was done on a copy of the graph, and the rule
    matched there."""

    text: str
    tried: bool = True

    def __str__(self) -> str:
        return self.text + (" (tried: it then matches)" if self.tried else "")


@dataclass
class NearMiss:
    """Places where a rule fails for one reason, the first failing condition and what it saw."""

    sites: list[Site]
    matched: int  # ops that stood as the rule wants
    size: int  # ops of the rule
    reason: str
    condition: str | None
    bound: dict[str, str]
    refusal: Refusal = field(repr=False)
    fix: Fix | None = None


@dataclass
class RuleReport:
    """Everything about one rule on one graph."""

    rule: Rule
    matched: list[Site]
    misses: list[NearMiss]
    taken: dict[str, list[Site]]  # by the name of the rule that takes these places first

    @property
    def count(self) -> int:
        """Places where the rule applies or nearly does."""
        return len(self.matched) + sum(len(m.sites) for m in self.misses)


def graphs_of(graph: Graph) -> Iterator[Graph]:
    """A graph and all graphs inside it."""
    yield graph
    for node in graph.nodes:
        for inner in node.graphs:
            yield from graphs_of(inner)


def explain_rule(rule: Rule, graph: Graph, competing: bool = False) -> RuleReport:
    """Try a rule everywhere; if `competing`, beside the other rules that dfc ships.

    Needs:   a graph as the pass `fuse` would see it; it stays as it is.
    """
    compiled = Compiled(rule)
    matches: list[Match] = []
    refusals: list[Refusal] = []
    for g in graphs_of(graph):
        facts = Facts(g)
        for node in g.nodes:
            found = tried(compiled, g, node, facts)
            if isinstance(found, Match):
                matches.append(found)
            elif found is not None and is_near(found, compiled):
                refusals.append(found)
    matches = _disjoint(matches)
    firings = _firings(graph) if competing else []
    used = {n for m in matches for n in m.nodes}
    near = _apart(refusals, used)
    misses = _grouped([r for r in near if not _taken_by(rule, r.nodes[0], firings)], compiled)
    taken: dict[str, list[Site]] = {}
    for m in matches:
        other = _taken_by(rule, m.anchor, firings)
        if other:
            taken.setdefault(other, []).append(Site.of(m.anchor))
    return RuleReport(rule, [Site.of(m.anchor) for m in matches], misses, taken)


def _disjoint(matches: Sequence[Match]) -> list[Match]:
    """Matches that do not replace the same values: a rule of three roots fits from each of them."""
    kept: list[Match] = []
    replaced: set[Value] = set()
    for m in matches:
        if replaced.isdisjoint(m.roots.values()):
            kept.append(m)
            replaced.update(m.roots.values())
    return kept


def _firings(graph: Graph) -> list[Any]:
    """What all rules do together, on a copy."""
    from dfc.passes.fuse import JOURNAL, Fuse

    ctx = Context()
    Fuse().run(graph.copy(), ctx)
    return list(ctx.products[JOURNAL].firings)


def _taken_by(rule: Rule, node: Node, firings: Sequence[Any]) -> str | None:
    """The rule that rewrites a node before this one can, if there is one."""
    name = node.results[0].name
    for f in firings:
        if name == f.value or name in f.gone:
            return None if f.rule.full_name == rule.full_name else str(f.rule.full_name)
    return None


def tried(compiled: Compiled, graph: Graph, node: Node, facts: Facts) -> Match | Refusal | None:
    """The rule at one node; None where its root's op does not stand."""
    from dfc.rewrite.deciding import base_of

    if not node.results or base_of(node.op) not in compiled.bases:
        return None
    attempt = Attempt(compiled, graph, facts, explain=True)
    return attempt.run(node) or attempt.refusal


def is_near(refusal: Refusal, compiled: Compiled) -> bool:
    """Half of the ops, and two of them; or the whole pattern."""
    whole = refusal.pattern is None and refusal.condition is not None
    count = len(set(refusal.nodes))
    return whole or (count >= 2 and 2 * count >= compiled.size)


def _apart(refusals: Iterable[Refusal], used: set[Node]) -> list[Refusal]:
    """Of refusals about the same nodes, the one that came furthest; none inside a match."""
    kept: list[Refusal] = []
    seen = set(used)
    for r in sorted(refusals, key=lambda r: (-r.progress, -len(set(r.nodes)))):
        nodes = set(r.nodes)
        if nodes and not nodes & seen:
            kept.append(r)
            seen |= nodes
    return kept


def _grouped(refusals: Sequence[Refusal], compiled: Compiled) -> list[NearMiss]:
    """Near misses, the nearest first; what differs by the number of its layer alone is one."""
    groups: dict[tuple[object, ...], NearMiss] = {}
    for r in refusals:
        site = Site.of(r.nodes[0])
        condition = expression_text(r.condition) if r.condition is not None else None
        key = (layerless(site.module), site.op, condition, nameless(r.reason), len(set(r.nodes)))
        if key in groups:
            groups[key].sites.append(site)
            continue
        bound = {k: _shown(v) for k, v in r.bound.items() if k in _words(r.condition)}
        groups[key] = NearMiss(
            [site], len(set(r.nodes)), compiled.size, r.reason, condition, bound, r
        )
    found = list(groups.values())
    return sorted(found, key=lambda m: (-m.refusal.progress / max(m.size, 1), -len(m.sites)))


def _words(condition: s.Expr | None) -> set[str]:
    """The names that a condition speaks of."""
    words = walk(condition) if condition is not None else ()
    return {w.name for w in words if isinstance(w, s.Word)}


def layerless(module: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", module)


def nameless(text: str) -> str:
    """A reason without the names of values and the numbers of layers."""
    return re.sub(r"\(([\w.]*?)\.?\d+\.[\w.]*\)", r"(\1)", re.sub(r"([%!])[\w.]+", r"\1", text))


def _shown(x: Any) -> str:
    if isinstance(x, Value):
        made = f" = {x.node.op}" if x.node else ""
        return f"{named(x)}: {x.type}{made}"
    if isinstance(x, tuple):
        return "[" + ", ".join(map(_shown, x)) + "]"
    return "absent" if x is None else str(x)


def modules_text(sites: Sequence[Site]) -> str:
    """`blocks.0..11.attn (12)`: module paths, layers drawn together."""
    groups: dict[str, list[str]] = {}
    for site in sites:
        groups.setdefault(layerless(site.module), []).append(site.module)
    parts = [_range(pattern, modules) for pattern, modules in groups.items()]
    shown = ", ".join(parts[:6]) + (f" and {len(parts) - 6} more" if len(parts) > 6 else "")
    return shown


def _range(pattern: str, modules: Sequence[str]) -> str:
    count = f" ({len(modules)})" if len(modules) > 1 else ""
    distinct = list(dict.fromkeys(modules))
    if len(distinct) == 1 or pattern.count("*") != 1:
        return (distinct[0] if len(distinct) == 1 else pattern) + count or "the model itself"
    at = pattern.split(".").index("*")
    numbers = sorted(int(m.split(".")[at]) for m in distinct)
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    text = ",".join(f"{r[0]}..{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)
    return pattern.replace("*", text) + count
