"""What changed between two graphs: nodes paired by meaning, then told by module path.

Nodes are paired from the inputs on (same op, attributes and paired operands), by their place in a
module, and by the name of a result. What is left over was removed or added.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

from dfc.counting import counted
from dfc.ir.graph import Graph, Node, Parameter, Value, attribute_key
from dfc.ir.printer import attribute_text, node_text, parameter_text, range_text

_NUMBER = re.compile(r"\d+")
MAX_ALIGNED = 2000  # nodes of one module that are aligned by difflib, which is quadratic


@dataclass(frozen=True)
class Changed:
    """A node that stayed, and what is different about it."""

    before: Node
    after: Node
    what: tuple[str, ...]


@dataclass
class Diff:
    """What turns `before` into `after`; false when nothing does.

    `signature` and `parameters` are sentences; `inner` are the nested graphs that differ.
    """

    before: Graph
    after: Graph
    signature: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    removed: list[Node] = field(default_factory=list)
    added: list[Node] = field(default_factory=list)
    changed: list[Changed] = field(default_factory=list)
    moved: int = 0
    inner: list[Diff] = field(default_factory=list)
    pairs: dict[Node, Node] = field(default_factory=dict)

    def __bool__(self) -> bool:
        lists = (self.signature, self.parameters, self.removed, self.added, self.changed)
        return any(lists) or bool(self.inner)

    def words(self) -> list[str]:
        """One sentence for each thing that changed; equal sentences of sibling modules once."""
        lines = [*self.signature, *self.parameters, *_by_module(self)]
        for inner in self.inner:
            lines += [f"in @{inner.before.name}: {line}" for line in inner.words()]
        return lines

    def text(self, context: int = 2) -> str:
        """The nodes as graph text, `-` and `+` before those that changed, as in a patch."""
        lines = [f"--- @{self.before.name}", f"+++ @{self.after.name}"]
        lines += _patch(self, context)
        for inner in self.inner:
            lines += inner.text(context).splitlines()
        return "\n".join(lines)


def diff_graphs(before: Graph, after: Graph) -> Diff:
    """Compare two graphs.

    Cost:  linear in nodes, but for the rest that only its place in a module can pair.
    """
    found = Diff(before, after)
    _signature(found)
    values = _paired_values(found)
    pairs = _Pairs(before, after, values)
    pairs.by_meaning()
    pairs.by_place(lambda n: (n.op, *(str(r.type) for r in n.results)))
    pairs.by_meaning()
    pairs.by_name()
    pairs.by_place(lambda n: n.op)
    found.pairs = pairs.nodes
    taken = set(pairs.nodes.values())
    found.removed = [n for n in before.nodes if n not in pairs.nodes]
    found.added = [n for n in after.nodes if n not in taken]
    for a, b in pairs.nodes.items():
        what = tuple(_differences(a, b, values))
        if what:
            found.changed.append(Changed(a, b, what))
        for inner_a, inner_b in zip(a.graphs, b.graphs, strict=False):
            inner = diff_graphs(inner_a, inner_b)
            if inner:
                found.inner.append(inner)
    outputs = [values.get(v, v) for v in before.outputs]
    if outputs != list(after.outputs) and not (found.removed or found.added or found.changed):
        found.signature.append("the outputs are other values")
    return found


class _Pairs:
    """Nodes of `before` by their twins in `after`; `values` grows with them."""

    def __init__(self, before: Graph, after: Graph, values: dict[Value, Value]) -> None:
        self.before, self.after, self.values = before, after, values
        self.nodes: dict[Node, Node] = {}
        self.taken: set[Node] = set()

    def join(self, a: Node, b: Node) -> None:
        self.nodes[a] = b
        self.taken.add(b)
        self.values.update(zip(a.results, b.results, strict=False))

    def by_meaning(self) -> None:
        """Forwards: the same op on paired operands; of several, the one in the same place."""
        waiting: dict[object, list[Node]] = defaultdict(list)
        for b in self._free_after():
            waiting[_meaning(b, lambda v: v)].append(b)
        for a in self._free_before():
            twins = waiting.get(_meaning(a, lambda v: self.values.get(v, v)))
            if twins:
                best = next((b for b in twins if _place(b) == _place(a)), twins[0])
                twins.remove(best)
                self.join(a, best)

    def by_name(self) -> None:
        """What kept its op and the name of its result: operands were replaced."""
        named = {b.results[0].name: b for b in self._free_after() if b.results}
        for a in self._free_before():
            b = named.get(a.results[0].name) if a.results else None
            if b and b not in self.taken and b.op == a.op and _place(a) == _place(b):
                self.join(a, b)

    def by_place(self, key: Callable[[Node], Hashable]) -> None:
        """Within one module, in order, the nodes of equal key."""
        places: dict[str, tuple[list[Node], list[Node]]] = defaultdict(lambda: ([], []))
        for a in self._free_before():
            places[_place(a)][0].append(a)
        for b in self._free_after():
            places[_place(b)][1].append(b)
        for left, right in places.values():
            if not left or not right or max(len(left), len(right)) > MAX_ALIGNED:
                continue
            keys = [key(n) for n in left], [key(n) for n in right]
            for block in SequenceMatcher(None, *keys, autojunk=False).get_matching_blocks():
                for i in range(block.size):
                    self.join(left[block.a + i], right[block.b + i])

    def _free_before(self) -> list[Node]:
        return [n for n in self.before.nodes if n not in self.nodes]

    def _free_after(self) -> list[Node]:
        return [n for n in self.after.nodes if n not in self.taken]


def _meaning(node: Node, of: Callable[[Value], Value]) -> object:
    operands = tuple(
        tuple(None if v is None else of(v) for v in x)
        if isinstance(x, tuple)
        else (None if x is None else of(x))
        for x in node.inputs
    )
    return (node.op, operands, attribute_key(tuple(node.attributes.items())), len(node.graphs))


def _place(node: Node) -> str:
    return node.loc.module if node.loc else ""


def _differences(a: Node, b: Node, values: dict[Value, Value]) -> Iterator[str]:
    if a.op != b.op:
        yield f"{a.op} became {b.op}"
    for name in dict.fromkeys([*a.attributes, *b.attributes]):
        old, new = a.attributes.get(name, _ABSENT), b.attributes.get(name, _ABSENT)
        if attribute_key(old) != attribute_key(new):
            yield f"{name} was {_attribute(old)}, is {_attribute(new)}"
    if _operands(a, values) != _operands(b, {}):
        yield "other operands"
    for r, q in zip(a.results, b.results, strict=False):
        if r.type != q.type:
            yield f"{r.type} became {q.type}"
    if a.stage != b.stage:
        yield f"stage {a.stage} became {b.stage}"
    if a.binds != b.binds:
        yield "other bounds of its sizes"


_ABSENT = "absent"


def _attribute(x: Any) -> str:
    return _ABSENT if x is _ABSENT else attribute_text(x)


def _operands(node: Node, values: dict[Value, Value]) -> list[object]:
    found: list[object] = []
    for x in node.inputs:
        items = x if isinstance(x, tuple) else (x,)
        found.append(tuple(v if v is None else values.get(v, v) for v in items))
    return found


def _paired_values(diff: Diff) -> dict[Value, Value]:
    """Inputs by their name, parameters by name and then by data; says what has no twin."""
    before, after = diff.before, diff.after
    values: dict[Value, Value] = {}
    inputs = {v.name: v for v in after.inputs}
    for v in before.inputs:
        if v.name in inputs:
            values[v] = inputs[v.name]
    gone = [p for p in before.parameters.values() if p.name not in after.parameters]
    new = {p.name: p for p in after.parameters.values() if p.name not in before.parameters}
    for name, p in before.parameters.items():
        q = after.parameters.get(name)
        if q is not None:
            values[p] = q
            diff.parameters += _parameter_differences(p, q)
    by_data = {_digest(q): q for q in new.values() if q.data is not None}
    for p in gone:
        q = by_data.pop(_digest(p), None) if p.data is not None else None
        if q is None:
            diff.parameters.append(f"!{p.name}: {p.type} is gone")
            continue
        values[p] = q
        del new[q.name]
        diff.parameters.append(f"!{p.name} is called !{q.name}")
    diff.parameters += [f"!{q.name}: {q.type} is new" for q in new.values()]
    return values


def _digest(p: Parameter) -> tuple[object, str]:
    assert p.data is not None
    return p.type, p.data.sha256()


def _parameter_differences(p: Parameter, q: Parameter) -> Iterator[str]:
    if p.type != q.type:
        yield f"!{p.name}: {p.type} became {q.type}"
    elif p.data is not q.data and p.data and q.data and p.data.sha256() != q.data.sha256():
        yield f"!{p.name} has other numbers"
    elif (p.data is None) != (q.data is None):
        yield f"!{p.name} has {'no numbers any more' if q.data is None else 'numbers now'}"
    if p.kind != q.kind:
        yield f"!{p.name} was a {p.kind}, is a {q.kind}"


def _signature(diff: Diff) -> None:
    before, after = diff.before, diff.after
    old = {v.name: v.type for v in before.inputs}
    new = {v.name: v.type for v in after.inputs}
    say = diff.signature.append
    for name in dict.fromkeys([*old, *new]):
        if name not in new:
            say(f"the input %{name}: {old[name]} is gone")
        elif name not in old:
            say(f"the input %{name}: {new[name]} is new")
        elif old[name] != new[name]:
            say(f"the input %{name}: {old[name]} became {new[name]}")
    if [*old] != [*new] and set(old) == set(new):
        say("the inputs are in another order")
    types = [v.type for v in before.outputs], [v.type for v in after.outputs]
    if len(types[0]) != len(types[1]):
        say(f"{counted(len(types[0]), 'output')} became {len(types[1])}")
    else:
        for i, (a, b) in enumerate(zip(*types, strict=True)):
            if a != b:
                say(f"output {i}: {a} became {b}")
    if types[0] == types[1] and before.output_tree != after.output_tree:
        say("the outputs have another structure")
    for name in dict.fromkeys([*before.ranges, *after.ranges]):
        ranges = before.ranges.get(name), after.ranges.get(name)
        if ranges[0] != ranges[1]:
            shown = [range_text(name, r) if r else "nothing" for r in ranges]
            say(f"the range {shown[0]} became {shown[1]}")
    if len(before.mutations) != len(after.mutations):
        say(f"{len(before.mutations)} mutations became {len(after.mutations)}")


# In words


def _by_module(diff: Diff) -> Iterator[str]:
    """Sentences by module path; siblings that differ only in their numbers are told once."""
    places: dict[str, tuple[list[Node], list[Node], list[str]]] = {}

    def of(node: Node) -> tuple[list[Node], list[Node], list[str]]:
        return places.setdefault(_place(node), ([], [], []))

    for n in diff.removed:
        of(n)[0].append(n)
    for n in diff.added:
        of(n)[1].append(n)
    for c in diff.changed:
        if c.what != ("other operands",):  # follows from what its neighbours tell
            of(c.before)[2].append(f"{_short(c.before.op)}: {', '.join(c.what)}")
    told: dict[tuple[str, str], list[str]] = {}
    for place, (removed, added, changed) in places.items():
        for sentence in [*_exchange(removed, added), *_counted(changed)]:
            told.setdefault((_NUMBER.sub("*", place), sentence), []).append(place)
    for (_, sentence), where in told.items():
        yield f"{_siblings(where)}: {sentence}"
    rewired = sum(c.what == ("other operands",) for c in diff.changed)
    if rewired and not places:
        yield f"{counted(rewired, 'node reads', 'nodes read')} other values"


def _exchange(removed: Sequence[Node], added: Sequence[Node]) -> Iterator[str]:
    old, new = _ops(removed), _ops(added)
    if removed and added:
        yield f"{old} became {new}"
    elif removed:
        yield f"{old} {'is' if len(removed) == 1 else 'are'} gone"
    elif added:
        yield f"{new} {'is' if len(added) == 1 else 'are'} new"


def _ops(nodes: Sequence[Node]) -> str:
    return ", ".join(_counted(_short(n.op) for n in nodes))


def _counted(words: Iterable[str]) -> list[str]:
    return [w if n == 1 else f"{n} x {w}" for w, n in Counter(words).items()]


def _short(op: str) -> str:
    """`linear` of `aten.linear.default`; ops of other families keep theirs."""
    parts = op.split(".")
    return parts[1] if parts[0] == "aten" and len(parts) > 1 else op


def _siblings(places: Sequence[str]) -> str:
    if len(places) == 1:
        return places[0] or "(top)"
    numbers = [[int(n) for n in _NUMBER.findall(p)] for p in places]
    varying = [i for i in range(len(numbers[0])) if len({n[i] for n in numbers}) > 1]
    if len(varying) == 1:
        seen = sorted(n[varying[0]] for n in numbers)
        if seen == list(range(seen[0], seen[-1] + 1)):
            numbers_in = iter(range(len(numbers[0])))
            span = f"{seen[0]}-{seen[-1]}"
            shown = _NUMBER.sub(
                lambda m: span if next(numbers_in) == varying[0] else m.group(), places[0]
            )
            return f"{shown} ({len(places)} times)"
    return f"{_NUMBER.sub('*', places[0])} ({len(places)} times)"


# As text


def _patch(diff: Diff, context: int) -> list[str]:
    """The nodes of both graphs in one order, cut to what is near a change."""
    marked: list[tuple[str, str]] = []
    marked += _difference(
        [parameter_text(p) for p in diff.before.parameters.values()],
        [parameter_text(p) for p in diff.after.parameters.values()],
    )
    changed = {c.before for c in diff.changed}
    back = {b: a for a, b in diff.pairs.items()}
    left = list(diff.before.nodes)
    done = 0
    position = {n: i for i, n in enumerate(left)}
    for b in diff.after.nodes:
        a = back.get(b)
        if a is None:
            marked.append(("+", node_text(b)))
            continue
        for n in left[done : position[a]]:
            if n not in diff.pairs:
                marked.append(("-", node_text(n)))
        done = max(done, position[a] + 1)
        if a in changed:
            marked.append(("-", node_text(a)))
            marked.append(("+", node_text(b)))
        else:
            marked.append((" ", node_text(b)))
    marked += [("-", node_text(n)) for n in left[done:] if n not in diff.pairs]
    near = [
        any(m != " " for m, _ in marked[max(0, i - context) : i + context + 1])
        for i in range(len(marked))
    ]
    lines: list[str] = []
    for i, (mark, text) in enumerate(marked):
        if near[i]:
            lines.append(f"{mark} {text}")
        elif i and near[i - 1]:
            lines.append("  ...")
    return lines


def _difference(before: Sequence[str], after: Sequence[str]) -> Iterator[tuple[str, str]]:
    old, new = set(before), set(after)
    yield from (("-", t) for t in before if t not in new)
    yield from (("+", t) for t in after if t not in old)
