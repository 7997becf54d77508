"""What is wrong with rules as a set, or with one whose two sides agree: found on its own samples.

Errors:
R030  rules that undo each other                R031  a rule that applies to its own result for ever
R032  a rule that another always forestalls     R033  two rules of one priority for the same place
Warnings:
R034  a right side that costs more              R036  `refuses` samples that no condition refuses
R035  a name that nothing uses
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dfc.errors import Diagnostic
from dfc.ir.graph import Graph, Node, Parameter
from dfc.ir.types import TensorType
from dfc.lang import syntax as s
from dfc.rewrite.deciding import Facts, base_of
from dfc.rewrite.match import Attempt, Compiled, Match, Matcher
from dfc.rewrite.prove_build import Left
from dfc.rewrite.prove_choices import choices_of
from dfc.rewrite.prove_inputs import Plan, constants
from dfc.rewrite.prove_sample import Refused, Unbuildable, case_of
from dfc.rewrite.replace import Order, replace
from dfc.rewrite.rule import CONSTANTS, Rule, is_scoped, walk

GRAPHS = 4  # of each sample
MAX_STEPS = 40  # rewrites of one sample graph: no set of rules needs so many
# Ops that look at memory in another way and move nothing.
_VIEWS = frozenset(
    """view _unsafe_view reshape expand expand_as transpose permute t slice select narrow squeeze
    unsqueeze flatten unflatten detach alias unbind split split_with_sizes chunk""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Lint:
    """One finding about a rule; a warning is nothing that a user need act on."""

    rule: Rule
    problem: Diagnostic
    warning: bool = False

    def render(self) -> str:
        text = self.problem.render()
        return text.replace(": error[", ": warning[", 1) if self.warning else text


def lint(rules: Sequence[Rule]) -> list[Lint]:
    """Look at rules that are to be used together.

    Needs:  rules that were read without errors; they need not hold.
    Cost:   some milliseconds a rule; where a rule's root may be another's, they are tried on each
            other's samples.
    """
    graphs = {r.full_name: list(_sample_graphs(r)) for r in rules}
    matcher = Matcher(rules)
    found: list[Lint] = []
    for rule in rules:
        mine = graphs[rule.full_name]
        found += _unused(rule)
        found += _untried(rule)
        if mine:
            found += _uphill(rule, mine[0])
    found += _places(rules, graphs, matcher)
    found += _endless(rules, graphs, matcher)
    return found


def _lint(
    code: str, rule: Rule, message: str, help: str | None = None, warning: bool = False
) -> Lint:
    span = rule.source.span(*rule.at)
    return Lint(rule, Diagnostic(code, f"rule `{rule.name}`: {message}", span, help), warning)


def _sample_graphs(rule: Rule) -> Iterator[Left]:
    """A few left sides to which the rule applies."""
    compiled = Compiled(rule)
    for sample in rule.samples:
        if sample.kind != "applies":
            continue
        try:
            case = case_of(sample)
        except Unbuildable:
            continue
        data = constants(case, Plan("random inputs", seed=1))
        count = 0
        for _, built in choices_of(rule, case, data, 3 * GRAPHS):
            if isinstance(built, Unbuildable) or not built.used >= case.keys():
                continue
            if _match(compiled, built.graph, _root(rule, built)) is not None:
                yield built
                count += 1
            if count == GRAPHS:
                break


def _root(rule: Rule, left: Left) -> Node:
    node = left.roots[rule.roots[0]].node
    assert node is not None
    return node


def _match(compiled: Compiled, graph: Graph, node: Node) -> Match | None:
    if not node.results or base_of(node.op) not in compiled.bases:
        return None
    return Attempt(compiled, graph, Facts(graph), explain=False).run(node)


# Rules at the same place


def _places(
    rules: Sequence[Rule], graphs: dict[str, list[Left]], matcher: Matcher
) -> Iterator[Lint]:
    """Rules that apply where another does: always after it, or with nothing to choose by."""
    compiled = {c.rule.full_name: c for c in matcher.compiled}
    overlaps: dict[tuple[str, str], None] = {}  # the one that comes first, and the other
    hidden: dict[tuple[str, str], None] = {}
    for rule in rules:
        own = compiled[rule.full_name]
        before: dict[str, int] = {}  # how many graphs another takes from this rule
        for left in graphs[rule.full_name]:
            order = matcher.candidates(_root(rule, left))
            for other in order:
                if other is own or _match(other, left.graph, _root(rule, left)) is None:
                    continue
                name = other.rule.full_name
                if order.index(other) < order.index(own):
                    before[name] = before.get(name, 0) + 1
                    overlaps[name, rule.full_name] = None
                else:
                    overlaps[rule.full_name, name] = None
        hidden |= {(n, rule.full_name): None for n, c in before.items()
                   if c == len(graphs[rule.full_name])}  # fmt: skip
    for first, second in hidden:
        last, winner = compiled[second].rule, compiled[first].rule
        by = "its priority" if winner.priority > last.priority else "its size or its place"
        yield _lint(
            "R032",
            last,
            f"`{first}` applies to every sample of it, and comes first by {by}",
            "give this one a `priority` above the other's, or take it out",
        )
    for first, second in overlaps:
        a, b = compiled[first], compiled[second]
        if (a.rule.priority, a.size) == (b.rule.priority, b.size) and (first, second) not in hidden:
            yield _lint(
                "R033",
                b.rule,
                f"`{first}` applies to the same graph, and nothing says which comes first",
                "give one of them a `priority`",
            )


# Rules that do not come to an end


def _endless(
    rules: Sequence[Rule], graphs: dict[str, list[Left]], matcher: Matcher
) -> Iterator[Lint]:
    """Apply all rules to every sample graph until none fits; each circle is told once."""
    told: set[frozenset[str]] = set()
    for rule in rules:
        for left in graphs[rule.full_name][:2]:
            code, names = _run(left.graph.copy(), matcher)
            circle = frozenset(names)
            if not names or circle in told:
                continue
            told.add(circle)
            shown = ", ".join(f"`{n}`" for n in names)
            others = [n for n in names if n != rule.full_name]
            if code == "R031":
                message = f"the graph grows for ever: {shown} applies to its own result"
                yield _lint(code, rule, message, "ask in `where` for what the result lacks")
            elif others:
                message = f"the graph comes back to what it was: {shown} undo each other"
                yield _lint(code, rule, message, "take one out, or let it ask for more in `where`")
            else:
                message = "it applies to its own result, which comes back to what it was"
                yield _lint(code, rule, message, "ask in `where` for what the result lacks")


def _run(graph: Graph, matcher: Matcher) -> tuple[str, tuple[str, ...]]:
    """The rules that keep firing, and whether they go round (R030) or grow (R031); none is well."""
    seen = [graph.fingerprint()]
    fired: list[str] = []
    folded: dict[object, Parameter] = {}
    for _ in range(MAX_STEPS):
        name = _step(graph, matcher, folded)
        if name is None:
            return "", ()
        fired.append(name)
        now = graph.fingerprint()
        if now in seen:
            return "R030", tuple(dict.fromkeys(fired[seen.index(now) :]))
        seen.append(now)
    return "R031", tuple(dict.fromkeys(fired[-10:]))


def _step(graph: Graph, matcher: Matcher, folded: dict[object, Parameter]) -> str | None:
    """The first rewrite that works, made; the name of its rule."""
    facts = Facts(graph)
    for node in reversed(list(graph.nodes)):
        for compiled in matcher.candidates(node):
            match = Attempt(compiled, graph, facts, explain=False).run(node)
            if match is None:
                continue
            if not isinstance(replace(match, graph, Order(graph), folded), str):
                return compiled.rule.full_name
    return None


# One rule by itself


def _uphill(rule: Rule, left: Left) -> Iterator[Lint]:
    """Rules point downhill: bytes read and written, of what is computed when the model runs."""
    graph, twin = left.graph.copy_with_map()
    node = twin[_root(rule, left).results[0]].node
    assert node is not None
    match = _match(Compiled(rule), graph, node)
    if match is None or isinstance(replace(match, graph, Order(graph), {}), str):
        return
    before, after = _moved(left.graph), _moved(graph)
    if after > before:
        yield _lint(
            "R034",
            rule,
            f"the right side moves {after} bytes for the sample, the left {before}",
            "a rule that pays only in some cases should ask for them in `where`",
            warning=True,
        )


def _moved(graph: Graph) -> int:
    """Bytes that the nodes read and write, views left out."""
    total = 0
    for node in graph.nodes:
        if base_of(node.op) in _VIEWS:
            continue
        for v in (*node.operands, *node.results):
            if isinstance(v.type, TensorType) and isinstance(v.type.nbytes, int):
                total += v.type.nbytes
    return total


def _unused(rule: Rule) -> Iterator[Lint]:
    """Names that stand once in a pattern and nowhere else, not even in a sample."""
    counted: dict[str, int] = {}
    for m in rule.matches:
        for w in walk(m.pattern):
            if isinstance(w, s.Word | s.Tail):
                counted[w.name] = counted.get(w.name, 0) + 1
    used = set(rule.targets)
    for x in (*rule.conditions, *(r.value for r in rule.rewrites)):
        used |= {w.name for w in walk(x) if isinstance(w, s.Word | s.Tail)}
    used |= {g.name.name for sample in rule.samples for g in sample.given}
    for name, count in counted.items():
        known = name in used or name in CONSTANTS or name == "_" or is_scoped(name)
        if count == 1 and not known:
            yield _lint("R035", rule, f"nothing uses `{name}`", "write `_` for it", warning=True)


def _untried(rule: Rule) -> Iterator[Lint]:
    """Conditions that no `refuses` sample comes to: the ops themselves refuse every one."""
    refuses = [x for x in rule.samples if x.kind == "refuses"]
    if rule.conditions and refuses and all(_refused_by_ops(rule, x) for x in refuses):
        yield _lint(
            "R036",
            rule,
            "its conditions refuse none of the `refuses` samples: the ops themselves do",
            "give a sample that a condition refuses",
            warning=True,
        )


def _refused_by_ops(rule: Rule, sample: s.Sample) -> bool:
    try:
        case = case_of(sample)
    except Unbuildable:
        return False
    data = constants(case, Plan("random inputs", seed=1))
    refused = False
    for _, built in choices_of(rule, case, data, 3 * GRAPHS):
        if isinstance(built, Left) and built.used >= case.keys():
            return False
        refused = refused or isinstance(built, Refused)
    return refused
