"""What a selector finds in a graph: sets of nodes and parameters, combined part by part."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from dfc.errors import did_you_mean
from dfc.ir.graph import Graph, Node, Parameter
from dfc.ir.types import TensorType
from dfc.lang import syntax as s
from dfc.lang.wording import expression_text

_NUMBERED = re.compile(r"(.*?)(?:^|\.)(\d{1,9})(?:\.|$)")
Found = tuple[set[Node], set[Parameter]]


class Nothing(Exception):
    """A part of a selector finds nothing: where it stands, and what is nearest."""

    def __init__(self, message: str, at: s.At, help: str | None) -> None:
        super().__init__(message)
        self.at, self.help = at, help


@dataclass(frozen=True)
class Selection:
    """What a selector finds: nodes in the graph's order, and parameters in theirs."""

    nodes: list[Node]
    parameters: list[Parameter]


class Search:
    """Looks in one graph; `strict` says that finding nothing by a name is an error."""

    def __init__(self, graph: Graph, strict: bool) -> None:
        self.strict = strict
        self.nodes = list(graph.walk())
        self.parameters = graph.parameters

    def find(self, x: s.Expr) -> Selection:
        """All that is selected.

        Raises:  Nothing.
        """
        nodes, parameters = self._find(x)
        if self.strict and not nodes and not parameters and "worst(" not in expression_text(x):
            raise Nothing(f"nothing matches `{expression_text(x)}`", x.at, self._parts(x))
        return Selection(
            [n for n in self.nodes if n in nodes],
            [p for p in self.parameters.values() if p in parameters],
        )

    def _find(self, x: s.Expr) -> Found:
        if isinstance(x, s.Text):
            return self._modules(x)
        if isinstance(x, s.Unary):
            nodes, parameters = self._find(x.operand)
            return set(self.nodes) - nodes, set(self.parameters.values()) - parameters
        if isinstance(x, s.Binary):
            (a, p), (b, q) = self._find(x.left), self._find(x.right)
            return (a & b, p & q) if x.op in ("&", "and") else (a | b, p | q)
        assert isinstance(x, s.Call)
        by_name: dict[str, Callable[[s.Call], Found]] = {
            "op": self._ops, "dtype": self._dtypes, "param": self._params,
            "first": self._numbered, "last": self._numbered, "between": self._between,
            "worst": lambda x: (set(), set()),  # what is measured later
        }  # fmt: skip
        return by_name[x.name.name](x)

    def _with_parameters(self, nodes: set[Node]) -> Found:
        return nodes, {v for n in nodes for v in n.operands if isinstance(v, Parameter)}

    def _modules(self, x: s.Text) -> Found:
        matches = glob(x.value)
        nodes = {n for n in self.nodes if matches(_module(n))}
        if not nodes:
            self._nothing(x, "module", x.value, {_module(n) for n in self.nodes} - {""})
        return self._with_parameters(nodes)

    def _ops(self, x: s.Call) -> Found:
        wanted = _text(x.arguments[0])
        names = {op: _op_names(op) for op in {n.op for n in self.nodes}}
        chosen = {op for op, known in names.items() if any(_piece(wanted, k) for k in known)}
        if not chosen:
            self._nothing(x, "op", wanted, {known[-1] for known in names.values()})
        return self._with_parameters({n for n in self.nodes if n.op in chosen})

    def _dtypes(self, x: s.Call) -> Found:
        wanted = _text(x.arguments[0])
        types = {n: [r.type for r in n.results] for n in self.nodes}
        nodes = {n for n, some in types.items() if any(_is_dtype(t, wanted) for t in some)}
        return nodes, {p for p in self.parameters.values() if _is_dtype(p.type, wanted)}

    def _params(self, x: s.Call) -> Found:
        wish = _text(x.arguments[0])
        matches = glob("*" + wish if wish.startswith("*.") else wish)  # of any depth
        chosen = {p for p in self.parameters.values() if matches(p.name)}
        if not chosen:
            self._nothing(x, "parameter", wish, self.parameters)
        return {n for n in self.nodes if any(v in chosen for v in n.operands)}, chosen

    def _numbered(self, x: s.Call) -> Found:
        """The first or last `count` siblings of the longest row of numbered modules."""
        count = x.arguments[0]
        assert isinstance(count, s.Number)
        rows: dict[str, dict[int, set[Node]]] = {}
        for n in self.nodes:
            found = _NUMBERED.match(_module(n))
            if found:
                rows.setdefault(found[1], {}).setdefault(int(found[2]), set()).add(n)
        if not rows and self.strict:
            raise Nothing("no module has a number", x.at, "name modules by a path: a string")
        row = max(rows.values(), key=len, default={})
        numbers = sorted(row)
        of = int(count.value)
        chosen = numbers[-of:] if x.name.name == "last" else numbers[:of]
        return self._with_parameters(set().union(*(row[i] for i in chosen)))

    def _between(self, x: s.Call) -> Found:
        first, last = (self._find(a)[0] for a in x.arguments)
        if not first or not last:
            return set(), set()
        at = {n: i for i, n in enumerate(self.nodes)}
        start, stop = min(at[n] for n in first), max(at[n] for n in last)
        return self._with_parameters(set(self.nodes[start : stop + 1]))

    # Finding nothing

    def _nothing(self, x: s.Expr, kind: str, wanted: str, known: Iterable[str]) -> None:
        if self.strict:
            raise Nothing(f"no {kind} matches `{wanted}`", x.at, nearest(wanted, sorted(known)))

    def _parts(self, x: s.Expr) -> str | None:
        """How many nodes each part of a selector finds that finds none as a whole."""
        parts: list[s.Expr] = []
        waiting = [x]
        while waiting and len(parts) < 6:
            part = waiting.pop()
            if isinstance(part, s.Binary):
                waiting += [part.right, part.left]
            else:
                parts.append(part)
        if len(parts) < 2:
            return None
        counts = [f"`{expression_text(p)}` {len(self._find(p)[0])}" for p in parts]
        return f"nodes found by each part: {', '.join(counts)}"


def nearest(wanted: str, known: Sequence[str], count: int = 3) -> str | None:
    """The nearest known names; of a pattern, those near its first part that no name has;
    of what only holds others, all of these."""
    if wanted and any(k.startswith(f"{wanted}.") for k in known):
        return f"did you mean `{wanted}.**`?"
    if "*" in wanted:
        parts = sorted({part for name in known for part in name.split(".")})
        odd = [w for w in wanted.split(".") if w and "*" not in w and w not in parts]
        near = did_you_mean(odd[0], parts, count) if odd else None
    else:
        near = did_you_mean(wanted, known, count)
    if near:
        return near
    head = wanted.replace("*", "").strip(".").partition(".")[0]
    some = [k for k in known if head and head in k][:count] or list(known[:count])
    return "there are " + ", ".join(f"`{k}`" for k in some) if some else None


def _text(x: s.Expr) -> str:
    return x.name if isinstance(x, s.Word) else x.value if isinstance(x, s.Text) else ""


def _op_names(op: str) -> tuple[str, ...]:
    """`aten.add.Tensor`, `aten.add` and `add`."""
    parts = op.split(".")
    return (op, ".".join(parts[:2]), parts[1]) if len(parts) > 1 else (op,)


def _is_dtype(t: object, name: str) -> bool:
    return isinstance(t, TensorType) and t.dtype.name == name


def _module(n: Node) -> str:
    return n.loc.module if n.loc else ""


@lru_cache(1024)
def glob(pattern: str) -> _Glob:
    """What says whether a dotted path matches a pattern."""
    return _Glob(pattern)


class _Glob:
    """A module path with `*` and `**`; matched part by part, without backtracking regexes."""

    def __init__(self, pattern: str) -> None:
        self.parts = tuple(pattern.split(".")) if pattern else ()

    def __call__(self, path: str) -> bool:
        """Whether the whole path matches."""
        names = path.split(".") if path else []
        reach = {0}
        for part in self.parts:
            if part == "**":
                reach = set(range(min(reach), len(names) + 1))
            else:
                reach = {i + 1 for i in reach if i < len(names) and _piece(part, names[i])}
            if not reach:
                return False
        return len(names) in reach


def _piece(pattern: str, text: str) -> bool:
    """`fc*` against `fc1`: greedy pieces in order, linear."""
    if "*" not in pattern:
        return pattern == text
    head, *rest = pattern.split("*")
    if not text.startswith(head):
        return False
    at = len(head)
    for piece in rest[:-1]:
        at = text.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    tail = rest[-1]
    return len(text) - len(tail) >= at and text.endswith(tail)
