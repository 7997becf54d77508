"""What happened on the way: passes run one by one, each decision kept, and any node's own story."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dfc.counting import counted
from dfc.errors import DfcError, did_you_mean
from dfc.ir.graph import Graph, Node
from dfc.rewrite.deciding import Facts
from dfc.rewrite.explain import Site, graphs_of, is_near, nameless, tried
from dfc.rewrite.match import Compiled, Refusal
from dfc.rewrite.pass_ import KEPT, Context, Decision, Pass, named
from dfc.rewrite.rule import Rule

_SHARE = re.compile(r"\d[\d.e+-]*(?= %)")


@dataclass
class Step:
    """One pass: how many changes, what it decided and told, and which values were behind it."""

    text: str
    name: str
    changes: int
    decisions: list[Decision]
    values: Mapping[str, str]  # name -> op
    tells: bool = True  # whether the pass says why
    notes: tuple[str, ...] = ()  # what it told for the report


@dataclass
class Run:
    """A graph's way through passes. `graph` is what came out; `first` what there was before."""

    first: Mapping[str, Site]
    graph: Graph
    steps: list[Step] = field(default_factory=list)

    @property
    def names(self) -> str:
        return ", ".join(s.text for s in self.steps) or "no pass"


def run_through(
    graph: Graph,
    passes: Sequence[Pass],
    say: Callable[[str], None] = lambda what: None,
    data: Mapping[str, Any] | None = None,
    target: object | None = None,
) -> Run:
    """Run passes on a copy of a graph, and ask each for its reasons. Nothing is proved here."""
    from dfc.passes.fuse import Journal

    products: dict[str, Any] = {}
    copy = graph.copy()
    run = Run({named(r): Site.of(n) for n in copy.walk() for r in n.results}, copy)
    before = _values(copy)
    for p in passes:
        say(f"running {p}")
        known = len(products.get("notes", ()))
        ctx = Context(target=target, decisions=[], data=data or {}, products=products)
        changes = p.run(copy, ctx)
        after = _values(copy)
        decisions = [*(ctx.decisions or ()), *_fused(ctx, {**after, **before})]
        products = {k: v for k, v in ctx.products.items() if not isinstance(v, Journal)}
        tells = bool(decisions) or not changes
        if not tells:
            decisions = _differences(before, after)
        notes = tuple(products.get("notes", ())[known:])
        run.steps.append(Step(str(p), p.name, changes, decisions, after, tells, notes))
        before = after
    return run


def _values(graph: Graph) -> dict[str, str]:
    return {named(r): n.op for n in graph.walk() for r in n.results}


def _fused(ctx: Context, ops: Mapping[str, str]) -> list[Decision]:
    """The journal of `fuse` as decisions; `ops` by the values that they made or make."""
    from dfc.passes.fuse import JOURNAL, Journal

    journal = ctx.products.get(JOURNAL)
    if not isinstance(journal, Journal):
        return []
    found: list[Decision] = []
    for f in journal.firings:
        loc = _loc(f)
        value = f"%{f.value}"
        reason = f"`{f.rule.full_name}` makes {_count(len(f.made))} of {_count(len(f.gone))}"
        found.append(Decision(value, ops.get(value, ""), "fused", reason, value, loc))
        for name in f.gone:
            if name != f.value:
                by, op = f"by `{f.rule.full_name}`", ops.get(f"%{name}", "")
                found.append(Decision(f"%{name}", op, "fused", by, value, loc))
        for name in f.made:
            if name != f.value:
                reason = f"by `{f.rule.full_name}` for {value}"
                found.append(Decision(f"%{name}", ops.get(f"%{name}", ""), "made", reason, "", loc))
    for rule, name, reason in journal.refused:
        why, op = f"`{rule.full_name}` fits, but {reason}", ops.get(f"%{name}", "")
        found.append(Decision(f"%{name}", op, KEPT, why))
    return found


def _loc(firing: Any) -> Any:
    from dfc.ir.graph import Loc

    file, _, line = firing.place.partition(" (")[0].rpartition(":")
    return Loc(file, int(line) if line.isdigit() else 0, firing.module)


def _count(n: int) -> str:
    return f"{counted(n, 'op')}"


def _differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[Decision]:
    """What a pass did that does not tell: values that came, went or have another op."""
    silent = "the pass does not say why"
    gone = [Decision(v, op, "dropped", silent) for v, op in before.items() if v not in after]
    made = [Decision(v, op, "made", silent) for v, op in after.items() if v not in before]
    other = [
        Decision(v, op, "rewritten", f"`{before[v]}` is now `{op}`; {silent}")
        for v, op in after.items()
        if before.get(v, op) != op
    ]
    return [*gone, *made, *other]


# A pass


@dataclass
class Group:
    """Nodes with which a pass did the same for the same reason."""

    outcome: str
    reason: str
    decisions: list[Decision]

    @property
    def sites(self) -> list[Site]:
        return [site_of(d) for d in self.decisions]


def site_of(d: Decision) -> Site:
    loc = d.loc
    line = f"{loc.file}:{loc.line}" if loc and loc.file else ""
    return Site(d.value, d.op, loc.module if loc else "", line)


def grouped(decisions: Sequence[Decision]) -> list[Group]:
    """Decisions by outcome and reason: what was done first, then what was left and why.

    Reasons that differ in a share alone are one, which tells the least and the largest.
    """
    groups: dict[tuple[str, str], Group] = {}
    for d in decisions:
        key = (d.outcome, _SHARE.sub("", nameless(d.reason)))
        groups.setdefault(key, Group(d.outcome, d.reason, [])).decisions.append(d)
    for g in groups.values():
        shares = [x for d in g.decisions for x in _SHARE.findall(d.reason)]
        if len(shares) == len(g.decisions) and len(set(shares)) > 1:
            least, most = min(shares, key=float), max(shares, key=float)
            g.reason = _SHARE.sub(f"{least} to {most}", g.reason)
    return sorted(groups.values(), key=lambda g: (g.outcome == KEPT, -len(g.decisions)))


# A node


@dataclass
class Event:
    step: str
    outcome: str
    text: str


@dataclass
class Story:
    """Everything that is known of one value, from where it was traced to what runs it."""

    value: str
    traced: Site | None
    events: list[Event]
    final: Site | None  # what stands in its place at the end
    engines: dict[str, str] = field(default_factory=dict)  # engine -> "" or why not
    nearest: list[tuple[str, Refusal]] = field(default_factory=list)  # rules that nearly fit


def story_of(run: Run, value: str) -> Story:
    """Follow a value by its name, through those that took its place."""
    events: list[Event] = []
    current = value
    exists = value in run.first
    for step in run.steps:
        for d in step.decisions:
            if d.value != current:
                continue
            into = f" into {d.into}" if d.into and d.into != current else ""
            events.append(Event(step.text, d.outcome, f"{d.outcome}{into}: {d.reason}"))
            if d.into:
                current = d.into
            exists = True
        if exists and current.startswith("%") and current not in step.values:
            if not events or events[-1].outcome not in ("dropped", "folded", "fused"):
                events.append(Event(step.text, "gone", f"{current} is gone behind it"))
            break
    node = node_named(run.graph, current)
    final = Site.of(node) if node else None
    if current.startswith("!") and current[1:] in run.graph.parameters:
        final = Site(current, "parameter")
    return Story(value, run.first.get(value), events, final)


def node_named(graph: Graph, value: str) -> Node | None:
    for node in graph.walk():
        if any(named(r) == value for r in node.results):
            return node
    return None


def nearest_rules(graph: Graph, node: Node, rules: Sequence[Rule]) -> list[tuple[str, Refusal]]:
    """The rules that came furthest with this node in them, the nearest first."""
    found: list[tuple[float, str, Refusal]] = []
    for g in graphs_of(graph):
        if node.graph is not g:
            continue
        facts = Facts(g)
        for rule in rules:
            compiled = Compiled(rule)
            for root in _roots(node, compiled.height):
                refusal = tried(compiled, g, root, facts)
                if not isinstance(refusal, Refusal) or node not in refusal.nodes:
                    continue
                if is_near(refusal, compiled):
                    share = refusal.progress / max(compiled.size, 1)
                    found.append((share, rule.full_name, refusal))
    best: dict[str, tuple[str, Refusal]] = {}
    for _, name, refusal in sorted(found, key=lambda f: -f[0]):
        best.setdefault(name, (name, refusal))
    return list(best.values())


def _roots(node: Node, height: int) -> list[Node]:
    """The node and what reads it, so far as a pattern looks back."""
    found: dict[Node, None] = {}
    level = [node]
    for _ in range(height):
        fresh = [n for n in level if n not in found and n.results]
        found.update(dict.fromkeys(fresh))
        level = [u for n in fresh for u in n.users]
        if len(found) > 64:
            break
    return list(found)


def chosen_values(run: Run, spec: str) -> list[str]:
    """What `%name`, a module path or an op stands for: values of the captured graph, else of a
    later one.

    Raises:  DfcError Q050 with the nearest names when it is nothing.
    """
    later = {v: op for s in run.steps for v, op in s.values.items()}
    if spec in run.first or spec in later:
        return [spec]
    modules = {v: s for v, s in run.first.items()}
    inside = [v for v, s in modules.items() if s.module == spec or s.module.startswith(f"{spec}.")]
    if inside:
        return inside
    by_op = [v for v, s in modules.items() if spec in (s.op, *s.op.split(".")[1:2])]
    by_op += [v for v, op in later.items() if op == spec and v not in by_op]
    if by_op:
        return by_op
    if f"%{spec}" in run.first or f"%{spec}" in later:
        return [f"%{spec}"]
    known = [*run.first, *{s.module for s in modules.values()}, *{s.op for s in modules.values()}]
    known += [n.lstrip("%") for n in run.first]
    help = did_you_mean(spec, known) or "give %NAME of a value, a module path, or an op"
    raise DfcError("Q050", f"no value, module or op is called `{spec}`", help=help)
