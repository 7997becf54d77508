"""`dfc.explain`: why a rule, a pass or a node went the way it did, as text and as data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dfc.counting import counted
from dfc.errors import DfcError, did_you_mean
from dfc.ir.graph import Graph, Node
from dfc.rewrite.told import (
    INDENT,
    group_data,
    rule_data,
    rule_lines,
    short_story,
    story_data,
    story_lines,
)

if TYPE_CHECKING:
    from dfc.rewrite.pass_ import Pass
    from dfc.rewrite.rule import Rule
    from dfc.rewrite.story import Group, Run

Say = Callable[[str], None]
SHOWN = 8  # groups of a kind, unless all are asked for


@dataclass
class Explanation:
    """An answer: `str` is for people, `data` for programs."""

    lines: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join(self.lines)

    def __repr__(self) -> str:
        return str(self)


def explain(
    model: Any,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    *,
    rule: str | None = None,
    pass_: str | None = None,
    node: str | None = None,
    passes: Sequence[str | Pass | type[Pass]] | None = None,
    before: str | None = None,
    all: bool = False,
    progress: Say | None = None,
    data: Mapping[str, Any] | None = None,
    target: Any = None,
) -> Explanation:
    """Why a rule matched or nearly did, what a pass did and left, or one node's whole story.

    `model` is a model with its arguments, or a graph. `passes` is what runs (default: the shipped
    passes, then `fuse`); a rule is tried on the graph as it reaches `fuse`, or the pass that
    `before` names. `node` is `%name`, a module path or an op. Without these: an overview. `data` is
    what passes name, as for `dfc.compile`; `target`, for those that plan for one, is a target, its
    file or its text.
    Raises:  DfcError Q001, Q050, R008 for names that nothing has.
    """
    import dfc.api as api
    from dfc.rewrite.pass_ import DEFAULT, as_pass

    say = progress or (lambda what: None)
    if sum(x is not None for x in (rule, pass_, node)) > 1:
        raise DfcError("Q050", "one thing at a time: a rule, a pass or a node")
    say("tracing")
    graph = (
        model if isinstance(model, Graph) else api.trace(model, args or (), kwargs, dynamic_shapes)
    )
    chosen = [as_pass(p) for p in ((*DEFAULT, "fuse") if passes is None else passes)]
    asked = _Asked(graph, chosen, before, all, say, data or {}, _aim(target))
    if rule is not None:
        return asked.rule(rule)
    if pass_ is not None:
        return asked.pass_(pass_)
    return asked.node(node) if node is not None else asked.overview()


def _aim(target: Any) -> Any:
    """A target from its text or file."""
    if not isinstance(target, (str, os.PathLike)):
        return target
    from dfc.recipe.sources import plan_of

    return plan_of("O0", target=target).target


@dataclass
class _Asked:
    """One question about one graph."""

    graph: Graph
    passes: list[Pass]
    before: str | None
    all: bool
    say: Say
    data: Mapping[str, Any]
    target: object | None

    def _run(self, passes: Sequence[Pass]) -> Run:
        from dfc.rewrite.story import run_through

        return run_through(self.graph, passes, self.say, self.data, self.target)

    # A rule

    def rule(self, name: str) -> Explanation:
        from dfc.rewrite.explain import explain_rule
        from dfc.rewrite.fixes import Fixes
        from dfc.rewrite.rulesets import all_sets, proved_rules, select_rules

        rules = select_rules([name])
        head = self._head(self.before or "fuse", must=self.before is not None)
        run = self._run(head)
        proved = proved_rules((), self.say)
        found = Explanation()
        where = f"as it reaches `{self.before or 'fuse'}`, behind {run.names}"
        found.data = {"graph": where, "rules": []}
        far: list[str] = []
        for r in rules:
            self.say(f"trying {r.full_name}")
            report = explain_rule(r, run.graph, competing=r in proved.rules)
            fixes = Fixes(r, run.graph, [s for s in all_sets() if s != r.set])
            misses = report.misses if self.all else report.misses[:SHOWN]
            for miss in misses:
                self.say(f"trying what helps {r.name} at {miss.sites[0].module or miss.sites[0]}")
                miss.fix = fixes.nearest(miss)
            if report.count or len(rules) == 1:
                found.lines += rule_lines(report, len(misses))
            else:
                far.append(r.full_name)
            if r.full_name in proved.left_out:
                why = proved.left_out[r.full_name][0].message
                found.lines.append(f"  left out   it does not hold with this PyTorch: {why}")
            found.data["rules"].append(rule_data(report))
        if far:
            found.lines.append(f"nothing is near {', '.join(far)}")
        found.lines.append(f"({counted(len(run.graph), 'node')}; the graph {where})")
        return found

    def _head(self, stop: str, must: bool) -> list[Pass]:
        """The passes before one; all of them when it is not there."""
        names = [p.name for p in self.passes]
        if stop in names:
            return self.passes[: names.index(stop)]
        if must:
            help = did_you_mean(stop, names) or f"there are {', '.join(dict.fromkeys(names))}"
            raise DfcError("Q050", f"no pass called `{stop}` runs", help=help)
        return self.passes

    # A pass

    def pass_(self, name: str) -> Explanation:
        from dfc.rewrite.pass_ import find_pass
        from dfc.rewrite.story import grouped

        names = [p.name for p in self.passes]
        if name in names:
            at = names.index(name)
            head, it = self.passes[:at], self.passes[at]
        else:
            head, it = (
                self._head(self.before or "fuse", must=self.before is not None),
                find_pass(name),
            )
        run = self._run([*head, it])
        step = run.steps[-1]
        groups = grouped(step.decisions)
        behind = ", ".join(s.text for s in run.steps[:-1]) or "capture"
        found = Explanation(data={"pass": step.text, "behind": behind, "changes": step.changes})
        found.data["decisions"] = [group_data(g) for g in groups]
        changes = counted(step.changes, "change")
        found.lines.append(f"{step.text}: {changes}, behind {behind}")
        found.lines += self._group_lines(groups)
        found.lines += [f"  note: {note}" for note in step.notes]
        found.data["notes"] = list(step.notes)
        if not groups:
            found.lines.append("  there was nothing that it looks for")
        if not step.tells:
            found.lines.append("  a pass tells more when it calls `ctx.decided(node, ...)`")
        if name == "fuse":
            found.lines.append("  why a rule did not apply elsewhere: --rule NAME, or --node NAME")
        return found

    def _group_lines(self, groups: Sequence[Group]) -> list[str]:
        from dfc.rewrite.explain import modules_text

        lines: list[str] = []
        shown = groups if self.all else groups[: 2 * SHOWN]
        for g in shown:
            d = g.decisions[0]
            into = f" into {d.into}" if d.into and d.into != d.value else ""
            lines.append(f"  {g.outcome:<10} {g.sites[0]}{into}: {g.reason}")
            rest = g.sites[1:]
            if rest:
                modules = modules_text(g.sites) or "the model itself"
                lines.append(f"{INDENT}and {len(rest)} more like it: {modules}")
        if len(shown) < len(groups):
            lines.append(f"  ... and {len(groups) - len(shown)} more kinds (--all shows them)")
        return lines

    # A node

    def node(self, spec: str) -> Explanation:
        from dfc.rewrite.story import (
            chosen_values,
            nearest_rules,
            node_named,
            story_of,
        )

        run = self._run(self.passes)
        values = chosen_values(run, spec)
        stories = [story_of(run, v) for v in values]
        if len(stories) == 1:
            story = stories[0]
            node = node_named(run.graph, story.final.value) if story.final else None
            if node is not None:
                story.engines = engines_say(node)
                self.say("looking for the nearest rule")
                story.nearest = nearest_rules(run.graph, node, self._rules())[:3]
            return Explanation(story_lines(story), story_data(story))
        found = Explanation(data={"nodes": [story_data(s) for s in stories]})
        found.lines.append(f"{spec}: {counted(len(stories), 'value')}, behind {run.names}")
        shown = stories if self.all else stories[: 4 * SHOWN]
        found.lines += [f"  {short_story(s)}" for s in shown]
        if len(shown) < len(stories):
            found.lines.append(f"  ... and {len(stories) - len(shown)} more (--all shows them)")
        return found

    def _rules(self) -> tuple[Rule, ...]:
        """The rules that the passes apply; all that dfc ships when none applies any."""
        from dfc.passes.fuse import Fuse
        from dfc.rewrite.rulesets import proved_rules

        named = [p.rules for p in self.passes if isinstance(p, Fuse)] or [()]
        found = {r.full_name: r for names in named for r in proved_rules(names, self.say).rules}
        return tuple(found.values())

    # All of it

    def overview(self) -> Explanation:
        from dfc.rewrite.explain import explain_rule
        from dfc.rewrite.story import grouped

        count = len(self.graph)
        run = self._run(self.passes)
        found = Explanation(data={"nodes_before": count, "nodes_after": len(run.graph)})
        found.lines.append(f"{count} -> {counted(len(run.graph), 'node')}")
        found.data["passes"] = []
        for step in run.steps:
            done = Counter(d.outcome for d in step.decisions if d.changed)
            kept = [g for g in grouped(step.decisions) if g.outcome == "kept"]
            what = ", ".join(f"{n} {o}" for o, n in done.items())
            if kept:
                left = sum(len(g.decisions) for g in kept)
                most = f"{len(kept[0].decisions)}: {kept[0].reason}"
                what += f"{'; ' * bool(what)}{left} left ({most})"
            found.lines.append(f"  {step.text:<18} {step.changes:>4} changes  {what}".rstrip())
            found.lines += [f"    note: {note}" for note in step.notes]
            entry = {"pass": step.text, "changes": step.changes, "outcomes": dict(done)}
            entry["notes"] = list(step.notes)
            entry["kept"] = {g.reason: len(g.decisions) for g in kept}
            found.data["passes"].append(entry)
        fired = Counter(
            d.reason.split("`")[1]
            for s in run.steps for d in s.decisions
            if d.outcome == "fused" and " makes " in d.reason
        )  # fmt: skip
        rows: list[tuple[str, int, int]] = []
        for r in self._rules():
            self.say(f"trying {r.full_name}")
            misses = sum(len(m.sites) for m in explain_rule(r, run.graph).misses)
            if fired[r.full_name] or misses:
                rows.append((r.full_name, fired[r.full_name], misses))
        if rows:
            found.lines.append("rules (near misses are those that are left at the end)")
        for name, n, misses in sorted(rows, key=lambda row: (-row[1], row[2])):
            near = counted(misses, "near miss") if misses else ""
            found.lines.append(f"  {name:<32} {n:>4} applied  {near}".rstrip())
        found.data["rules"] = [{"rule": n, "applied": a, "near_misses": m} for n, a, m in rows]
        ops = Counter(n.op for n in run.graph.walk()).most_common(10)
        found.data["ops"] = dict(ops)
        found.lines.append("what is left: " + ", ".join(f"{n} {op}" for op, n in ops))
        found.lines.append("more: --rule NAME, --pass NAME, --node %NAME|MODULE|OP")
        return found


def engines_say(node: Node) -> dict[str, str]:
    """What each engine says of a node: "" when it takes it, else why not."""
    from dfc.runtime.engines import engine_names, find_engine

    found: dict[str, str] = {}
    for name in engine_names():
        try:
            found[name] = find_engine(name).supports(node) or ""
        except DfcError as e:
            found[name] = e.message
    return found
