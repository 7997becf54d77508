"""Apply rewrite rules until none fits."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter
from dfc.lang.selectors import Selector
from dfc.rewrite.deciding import Facts
from dfc.rewrite.match import Matcher
from dfc.rewrite.pass_ import EXACT, Context, Numerics, Pass, check_quota, close
from dfc.rewrite.replace import Order, Replaced, replace
from dfc.rewrite.rule import Rule
from dfc.rewrite.rulesets import proved_rules, select_rules

JOURNAL = "fuse"  # the name in Context.products


@dataclass(frozen=True)
class Firing:
    """One rewrite: the rule, the value it gave anew, and where that stands in the model."""

    number: int
    rule: Rule
    value: str
    module: str
    place: str
    gone: tuple[str, ...]
    made: tuple[str, ...]


@dataclass
class Journal:
    """What the rules did, in order, and what they could not for a reason found while writing."""

    firings: list[Firing] = field(default_factory=list)
    refused: list[tuple[Rule, str, str]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # rules of no use here, and why
    trying: Firing | None = None  # what is being done now: told when it fails half-way

    def __copy__(self) -> Journal:
        """One that goes on for itself: a run that is undone leaves nothing behind."""
        return Journal([*self.firings], [*self.refused])


@dataclass(frozen=True)
class Fuse(Pass):
    """Apply rewrite rules, shipped or the user's, until none of them fits any more.

    Needs:    a valid graph; `canonicalize` and `remove_noops` first for best effect.
    Ensures:  no rule that was named applies, unless the graph forbids it.
    Keeps:    values that others read; outputs; random and effectful nodes.
    Cost:     close to linear: rules are looked up by the op of their root; after the first round
              only what lies behind a change is looked at again.
    Raises:   DfcError R040 when rules keep undoing each other or let the graph grow; R020..R025
              for a rule of the user's that is wrong.
    """

    name = "fuse"

    phrases = {"": "rules", "on": "select", "except": "exclude"}  # noqa: RUF012

    rules: tuple[str, ...] = ()  # sets, rules, or set.rule; empty: all that dfc ships
    select: Selector | None = None  # only where the root lies in this part of the model
    exclude: Selector | None = None  # and not in this
    limit: int | None = None  # make at most this many rewrites; bisects a miscompile
    skip: tuple[int, ...] = ()  # rewrites by number that are left out: those found to be wrong

    @property
    def selected(self) -> tuple[Rule, ...]:
        return select_rules(self.rules)

    @property
    def numerics(self) -> Numerics:  # type: ignore[override]
        rtol = max((r.claim.rtol for r in self.selected if r.claim != EXACT), default=0.0)
        return close(rtol) if rtol else EXACT

    def run(self, graph: Graph, ctx: Context) -> int:
        check_quota(self.limit, self.skip)
        journal = ctx.products.setdefault(JOURNAL, Journal())
        proved = proved_rules(self.rules)
        journal.left_out |= {name: found[0].message for name, found in proved.left_out.items()}
        known = {*journal.left_out}
        matcher = Matcher(proved.rules)
        unread = {p for p in graph.parameters.values() if not p.use_count}
        done = _Run(self, matcher, journal, self._allowed(graph)).graph(graph)
        for name in [n for n in journal.left_out if n not in known]:
            ctx.note(f"fuse: {journal.left_out[name]}, so it is left out from there on")
        _drop_unread(graph, unread)
        return done

    def without(self, rule: str) -> Fuse | None:
        """The pass without a rule, told by its full name; None when there is no other."""
        held = proved_rules(self.rules).rules
        names = tuple(r.full_name for r in held if r.full_name != rule)
        return dataclasses.replace(self, rules=names) if names else None

    def _allowed(self, graph: Graph) -> Callable[[Node], bool]:
        """Which nodes may be a root. A new node lies where the node lay that it replaced."""
        if self.select is None and self.exclude is None:
            return lambda node: True
        known = set(graph.walk())
        chosen = set(self.select.nodes_left(graph)) if self.select else set(known)
        if self.exclude:
            chosen -= set(self.exclude.nodes_left(graph))
        places = {n.loc.module for n in chosen if n.loc}
        return lambda node: (
            node in chosen
            or (node not in known and node.loc is not None and node.loc.module in places)
        )


class _Run:
    """One run of the pass over a graph and the graphs inside."""

    def __init__(
        self, options: Fuse, matcher: Matcher, journal: Journal, allowed: Callable[[Node], bool]
    ) -> None:
        self.options, self.matcher, self.journal = options, matcher, journal
        self.allowed = allowed
        self.number = 0
        self.done = 0
        self.skipped: set[tuple[str, Node]] = set()
        self.refused: set[tuple[str, str, str]] = {
            (rule.full_name, name, why) for rule, name, why in journal.refused
        }

    def graph(self, graph: Graph) -> int:
        before = self.done
        for node in list(graph.nodes):
            for inner in node.graphs:
                self.graph(inner)
        self._rewrite(graph)
        return self.done - before

    def _rewrite(self, graph: Graph) -> None:
        order = Order(graph)
        fuel = 64 * len(graph) + 10_000
        folded: dict[object, Parameter] = {}
        facts = Facts(graph)
        # Backwards: what is nearer to the output is seen first, so a larger pattern wins over the
        # smaller one inside.
        waiting = deque(reversed(list(graph.nodes)))
        queued = set(waiting)
        recent: list[str] = []
        swept = self.done  # rewrites made before every node was last looked at
        while waiting or swept != self.done:
            if not waiting:
                # A condition may look further than a pattern: all once more, until nothing fits.
                swept = self.done
                waiting.extend(reversed(list(graph.nodes)))
                queued.update(waiting)
                continue
            node = waiting.popleft()
            queued.discard(node)
            if node.graph is not graph:
                continue
            replaced = self._at(graph, node, order, folded, facts)
            if replaced is None:
                continue
            facts = Facts(graph)
            recent.append(self.journal.firings[-1].rule.full_name)
            fuel -= 1 + len(replaced.made)
            if fuel < 0:
                raise _endless(recent)
            for n in self._behind(graph, replaced.made):
                if n not in queued:
                    queued.add(n)
                    waiting.append(n)

    def _at(
        self,
        graph: Graph,
        node: Node,
        order: Order,
        folded: dict[object, Parameter],
        facts: Facts,
    ) -> Replaced | None:
        """The first rewrite that works at a node, made."""
        from dfc.rewrite.match import Attempt

        for compiled in self.matcher.candidates(node):
            if self.done == self.options.limit:
                return None
            if compiled.rule.full_name in self.journal.left_out:
                continue
            try:
                match = Attempt(compiled, graph, facts, explain=False).run(node)
            except DfcError as e:
                if e.code != "R041":
                    raise
                self.journal.left_out[compiled.rule.full_name] = e.message
                continue
            if match is None or not self.allowed(node):
                continue
            if (match.rule.full_name, node) in self.skipped:
                continue  # looked at again, for what changed around it
            number = self.number
            self.number += 1
            if number in self.options.skip:
                self.skipped.add((match.rule.full_name, node))
                continue
            module = node.loc.module if node.loc else ""
            place = str(node.loc) if node.loc else ""
            name = node.results[0].name
            self.journal.trying = Firing(number, match.rule, name, module, place, (), ())
            found = replace(match, graph, order, folded)
            self.journal.trying = None
            if isinstance(found, str):
                refusal = (match.rule.full_name, name, found)
                if refusal not in self.refused:
                    self.refused.add(refusal)
                    self.journal.refused.append((match.rule, name, found))
                continue
            self.done += 1
            made = tuple(r.name for n in found.made for r in n.results)
            self.journal.firings.append(
                Firing(number, match.rule, name, module, place, found.gone, made)
            )
            return found
        return None

    def _behind(self, graph: Graph, made: Sequence[Node]) -> list[Node]:
        """What a change may let match: the new nodes and those that read them, so far as any
        pattern looks back."""
        found: dict[Node, None] = {}
        level = [n for n in made if n.graph is graph]
        for n in list(level):
            level += [v.node for v in n.operands if v.node is not None]
        for _ in range(self.matcher.height + 1):
            fresh = [n for n in level if n not in found and n is not graph.result]
            found.update(dict.fromkeys(fresh))
            level = [u for n in fresh for u in n.users]
            if len(found) > 512:
                break
        return list(found)


def _drop_unread(graph: Graph, before: set[Parameter]) -> None:
    """Weights that were merged into others would be stored beside them, as floats for ever."""
    kept = before | {m.target for m in graph.mutations}
    for p in list(graph.parameters.values()):
        if not p.use_count and p not in kept:
            graph.drop_parameter(p.name)


def _endless(recent: Sequence[str]) -> DfcError:
    names = ", ".join(f"`{n}`" for n in dict.fromkeys(recent[-50:]))
    return DfcError(
        "R040",
        f"the rules do not come to an end: {names} keep firing",
        help="one undoes what another does, or lets the graph grow; `dfc test` finds which",
    )
