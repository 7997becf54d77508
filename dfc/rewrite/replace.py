"""A match replaced by what the rule writes instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dfc.counting import counted
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.op import OpRefused
from dfc.ops.builder import Builder
from dfc.rewrite.construct import Construction, construct
from dfc.rewrite.deciding import Facts
from dfc.rewrite.match import Match


@dataclass
class Order:
    """Where each node stands, as numbers: new nodes stand where their anchor stood."""

    graph: Graph
    of: dict[Node, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.of = {n: i for i, n in enumerate(self.graph.nodes)}

    def place(self, node: Node, like: Node) -> None:
        self.of[node] = self.of[like]

    def __getitem__(self, node: Node) -> int:
        return self.of[node]


@dataclass(frozen=True)
class Replaced:
    """What a rewrite did: the nodes that are new and those that are gone."""

    made: tuple[Node, ...]
    gone: tuple[str, ...]
    roots: Mapping[str, Value]


def replace(
    match: Match,
    graph: Graph,
    order: Order,
    folded: dict[object, Parameter],
    builder: type[Builder] = Builder,
) -> Replaced | str:
    """Write the right side, let it take the roots' place, and erase what nobody reads any more.

    Gives the reason instead where the graph does not allow it; the graph is untouched then.
    """
    rule = match.rule
    anchor = _anchor(match, order)
    if anchor is None:
        return "the values that it joins are needed before all of them are known"
    to = Construction(builder(graph, anchor), Facts(graph), rule.source, folded)
    env: dict[str, Any] = dict(match.env)
    values: dict[str, Any] = {}
    before = set(graph.parameters)
    try:
        for r in rule.rewrites:
            found = construct(r.value, env, to)
            parts = found if isinstance(found, tuple) else (found,)
            if len(parts) != len(r.names):
                raise DfcError(
                    "R012", f"{counted(len(parts), 'value')} for {counted(len(r.names), 'name')}",
                    span=rule.source.span(*r.at),
                )  # fmt: skip
            for w, part in zip(r.names, parts, strict=True):
                (values if w.name in match.roots else env)[w.name] = part
        reason = _other_type(match, values)
    except (DfcError, OpRefused) as e:
        reason = e.message if isinstance(e, DfcError) else str(e)
    if reason is not None:
        _undo(graph, to, before)
        return reason
    for node in to.made:
        order.place(node, anchor)
    return _put(match, graph, to, values)


def _anchor(match: Match, order: Order) -> Node | None:
    """The node before which everything that is read is known and nothing new is needed yet."""
    roots = [v.node for v in match.roots.values() if v.node is not None]
    first = min(roots, key=lambda n: order[n])
    matched = set(match.nodes)
    latest = -1
    for value in _values(match.env.values()):
        if value.node is not None and value.node not in matched:
            latest = max(latest, order[value.node])
    shared = [match.env[n] for n in match.rule.shared if isinstance(match.env.get(n), Value)]
    for value in shared:
        latest = max(latest, order[value.node] if value.node else -1)
    if latest < order[first]:
        return first
    used = [
        order.of.get(u, len(order.of))
        for v in match.roots.values()
        for u in v.users
        if u not in matched
    ]
    needed = min(used, default=len(order.of))
    last = max(roots, key=lambda n: order[n])
    return last if latest < order[last] <= needed else None


def _values(x: Any) -> list[Value]:
    found: list[Value] = []
    for v in x:
        if isinstance(v, Value):
            found.append(v)
        elif isinstance(v, tuple):
            found += _values(v)
    return found


def _other_type(match: Match, values: Mapping[str, Any]) -> str | None:
    for name, root in match.roots.items():
        made = values.get(name)
        if not isinstance(made, Value):
            return f"`{name}` is rewritten to no value"
        if made.type != root.type:
            return f"`{name}` is {root.type}, its replacement {made.type}"
    return None


def _undo(graph: Graph, to: Construction, before: set[str]) -> None:
    for node in reversed(to.made):
        graph.erase(node)
    for name in [n for n in graph.parameters if n not in before]:
        graph.drop_parameter(name)
    to.folded.clear()


def _put(match: Match, graph: Graph, to: Construction, values: Mapping[str, Value]) -> Replaced:
    names = {name: root.name for name, root in match.roots.items()}
    tops = []
    for name, root in match.roots.items():
        graph.replace_uses(root, values[name])
        if root.node not in tops:
            tops.append(root.node)
    gone: list[str] = []
    waiting = [n for n in tops if n is not None]
    matched = set(match.nodes)
    while waiting:
        node = waiting.pop()
        if node.graph is None or any(r.use_count for r in node.results):
            continue
        operands = [v.node for v in node.operands if v.node in matched]
        gone.append(node.results[0].name)
        graph.erase(node)
        waiting += [n for n in operands if n is not None]
    taken: set[Value] = set()
    for name, value in values.items():
        new = value.node in to.made and value not in taken
        if new and names[name] not in graph._names:
            graph.rename(value, names[name])
            taken.add(value)
    return Replaced(tuple(n for n in to.made if n.graph is graph), tuple(gone), dict(values))
