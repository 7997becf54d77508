"""Parts of a model by name and kind: `"blocks.*.mlp.**"`, `op(softmax) & dtype(f32)`.

Q020  a form that no selector has        Q021  a selector that matches nothing
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from dfc.errors import DfcError, Diagnostic, Span, did_you_mean
from dfc.ir.graph import Graph, Node, Parameter
from dfc.ir.types import DTYPES, TensorType
from dfc.lang import syntax as s
from dfc.lang.source import Source
from dfc.lang.wording import expression_text

FUNCTIONS = {"op": 1, "dtype": 1, "param": 1, "first": 1, "last": 1, "between": 2}


@dataclass(frozen=True)
class Selector:
    """A set of nodes of a graph, and of parameters.

    A string is a module path: `*` stands for one part or a piece of it, `**` for any number of
    parts. `op(name)` takes any overload; `param("glob")` the parameters and the nodes that read
    them; `first(n)` and `last(n)` the modules of the first and last n numbers; `between("a", "b")`
    the nodes from the first of a to the last of b. `not`, `&`, `|` combine.
    """

    what: s.Expr

    def __str__(self) -> str:
        return expression_text(self.what)

    def nodes(self, graph: Graph) -> list[Node]:
        """The selected nodes in order, nested graphs included.

        Raises:  DfcError Q021 when a part that selects by name matches nothing.
        Cost:    linear in the graph for each part of the selector.
        """
        universe = list(graph.walk())
        chosen = _select(self.what, graph, universe)
        return [n for n in universe if n in chosen]

    def parameters(self, graph: Graph) -> list[Parameter]:
        """The parameters that `param` names, or that a selected node reads."""
        chosen = dict.fromkeys(
            v for n in self.nodes(graph) for v in n.operands if isinstance(v, Parameter)
        )
        return [p for p in graph.parameters.values() if p in chosen]


def parse_selector(text: str, file: str = "<selector>") -> Selector:
    """A selector from text.

    Raises:  DfcError P for text that does not parse, Q020 for what is no selector.
    """
    from dfc.lang.reader import parse_expression

    source = Source(text, file)
    x = parse_expression(source)
    problems = check_selector(x, source)
    if problems:
        raise DfcError.of(problems)
    return Selector(x)


def is_selector(x: s.Expr) -> bool:
    """Whether an expression has the form of a selector."""
    return not check_selector(x, None)


def check_selector(x: s.Expr, source: Source | None) -> list[Diagnostic]:
    """What is wrong with the form of a selector: unknown functions, wrong arguments."""
    return list(_problems(x, source))


def _problems(x: s.Expr, source: Source | None) -> Iterator[Diagnostic]:
    def problem(message: str, at: s.At, help: str | None = None) -> Diagnostic:
        return Diagnostic("Q020", message, source.span(*at) if source else None, help)

    if isinstance(x, s.Text):
        return
    if isinstance(x, s.Binary) and x.op in ("|", "&", "and", "or"):
        yield from _problems(x.left, source)
        yield from _problems(x.right, source)
    elif isinstance(x, s.Unary) and x.op == "not":
        yield from _problems(x.operand, source)
    elif isinstance(x, s.Call):
        name = x.name.name
        if name not in FUNCTIONS:
            help = did_you_mean(name, [*FUNCTIONS]) or f"know: {', '.join(FUNCTIONS)}"
            yield problem(f"selectors have no function `{name}`", x.name.at, help)
        elif len(x.arguments) != FUNCTIONS[name] or x.keywords or x.mark:
            yield problem(f"`{name}` takes {FUNCTIONS[name]} argument(s)", x.at)
        else:
            for a in x.arguments:
                if not _argument_fits(name, a):
                    yield problem(f"`{name}` takes {_WANTED[name]}", a.at)
    elif isinstance(x, s.Word):
        yield problem(f"`{x.name}` is no selector", x.at, f'a module path is a string: "{x.name}"')
    else:
        yield problem(f"`{expression_text(x)}` is no selector", x.at)


_WANTED = {
    "op": "the name of an op", "dtype": "a dtype such as f32", "param": "a string",
    "first": "a whole number", "last": "a whole number", "between": "two module paths",
}  # fmt: skip


def _argument_fits(name: str, a: s.Expr) -> bool:
    if name in ("first", "last"):
        return _is_count(a)
    if name == "dtype":
        return isinstance(a, s.Word) and a.name in DTYPES
    return isinstance(a, s.Text) or (name == "op" and isinstance(a, s.Word))


def _is_count(a: s.Expr) -> bool:
    return isinstance(a, s.Number) and isinstance(a.value, int) and a.value > 0 and not a.unit


def _select(x: s.Expr, graph: Graph, universe: Sequence[Node]) -> set[Node]:
    if isinstance(x, s.Text):
        matches = _glob(x.value)
        found = {n for n in universe if matches(_module(n))}
        if not found:
            raise nothing(x, x.value, sorted({_module(n) for n in universe} - {""}), "module")
        return found
    if isinstance(x, s.Unary):
        return set(universe) - _select(x.operand, graph, universe)
    if isinstance(x, s.Binary):
        left, right = _select(x.left, graph, universe), _select(x.right, graph, universe)
        return left & right if x.op in ("&", "and") else left | right
    assert isinstance(x, s.Call)
    first = x.arguments[0]
    name = x.name.name
    if name == "op":
        wanted = first.name if isinstance(first, s.Word) else getattr(first, "value", "")
        found = {n for n in universe if wanted in _op_names(n.op)}
        if not found:
            raise nothing(x, wanted, sorted({_op_names(n.op)[-1] for n in universe}), "op")
        return found
    if name == "dtype":
        assert isinstance(first, s.Word)
        return {n for n in universe if first.name in _dtypes(n)}
    if name == "param":
        assert isinstance(first, s.Text)
        wish = first.value
        matches = _glob("*" + wish if wish.startswith("*.") else wish)  # of any depth
        names = {p.name for p in graph.parameters.values() if matches(p.name)}
        if not names:
            raise nothing(x, first.value, sorted(graph.parameters), "parameter")
        return {n for n in universe for v in n.operands if _is_parameter(v, names)}
    if name in ("first", "last"):
        assert isinstance(first, s.Number)
        return _numbered(universe, int(first.value), name == "last")
    return _between(x, graph, universe)


def _is_parameter(v: object, names: set[str]) -> bool:
    return isinstance(v, Parameter) and v.name in names


def _op_names(op: str) -> tuple[str, ...]:
    parts = op.split(".")
    return (op, ".".join(parts[:2]), parts[1]) if len(parts) > 1 else (op,)


def _dtypes(n: Node) -> set[str]:
    return {r.type.dtype.name for r in n.results if isinstance(r.type, TensorType)}


def _module(n: Node) -> str:
    return n.loc.module if n.loc else ""


_NUMBERED = re.compile(r"(.*?)(?:^|\.)(\d+)(?:\.|$)")


def _numbered(universe: Sequence[Node], count: int, last: bool) -> set[Node]:
    """The nodes of the first or last `count` siblings of the longest row of numbered modules."""
    rows: dict[str, dict[int, set[Node]]] = {}
    for n in universe:
        found = _NUMBERED.match(_module(n))
        if found:
            rows.setdefault(found[1], {}).setdefault(int(found[2]), set()).add(n)
    if not rows:
        return set()
    row = max(rows.values(), key=len)
    numbers = sorted(row)
    chosen = numbers[-count:] if last else numbers[:count]
    return set().union(*(row[i] for i in chosen))


def _between(x: s.Call, graph: Graph, universe: Sequence[Node]) -> set[Node]:
    ends = [_select(a, graph, universe) for a in x.arguments]
    at = {n: i for i, n in enumerate(universe)}
    start, stop = min(at[n] for n in ends[0]), max(at[n] for n in ends[1])
    return set(universe[start : stop + 1])


def nothing(x: s.Expr, wanted: str, known: Sequence[str], kind: str) -> DfcError:
    """A selector that matches nothing names what is nearest."""
    bare = wanted.replace("**", "").replace("*", "").strip(".")
    help = did_you_mean(bare or wanted, list(known), 3) or _begins_alike(bare, known)
    return DfcError("Q021", f"no {kind} matches `{wanted}`", help=help)


def _begins_alike(wanted: str, known: Sequence[str]) -> str | None:
    head = wanted.partition(".")[0]
    some = [k for k in known if head and head in k][:3] or list(known[:3])
    return "there are " + ", ".join(f"`{k}`" for k in some) if some else None


@cache
def _glob(pattern: str) -> _Glob:
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
            fresh: set[int] = set()
            for at in reach:
                if part == "**":
                    fresh |= set(range(at, len(names) + 1))
                elif at < len(names) and _piece(part, names[at]):
                    fresh.add(at + 1)
            reach = fresh
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


def located(error: DfcError, span: Span | None) -> DfcError:
    """The same error at a place in a file."""
    if span is None or error.diagnostics[0].span is not None:
        return error
    d = error.diagnostics[0]
    return DfcError(d.code, d.message, span=span, help=d.help, notes=d.notes)
