"""Parts of a model by name and kind: `"blocks.*.mlp.**"`, `op(softmax) & dtype(f32)`.

Q020  a form that no selector has        Q021  a selector that matches nothing
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from dfc.errors import DfcError, Diagnostic, did_you_mean
from dfc.ir.graph import Graph, Node, Parameter
from dfc.ir.types import DTYPES
from dfc.lang import syntax as s
from dfc.lang.search import Nothing, Search, Selection
from dfc.lang.source import Source
from dfc.lang.wording import expression_text

FUNCTIONS = {
    "op": 1, "dtype": 1, "param": 1, "first": 1, "last": 1, "between": 2, "worst": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Selector:
    """A set of nodes of a graph, and of parameters.

    A string is a module path: `*` stands for one part or a piece of it, `**` for any number of
    parts. `op(name)` takes any overload; `param("glob")` the parameters and the nodes that read
    them; `first(n)` and `last(n)` the modules of the first and last n numbers; `between("a", "b")`
    the nodes from the first of a to the last of b. `not`, `&`, `|` combine. Selected nodes select
    the parameters that they read. `worst(3)` and `worst(10%)` are the layers that a step costs
    most: a recipe measures them when it comes to the step; until then they select nothing.
    """

    what: s.Expr
    source: Source | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return expression_text(self.what)

    def find(self, graph: Graph) -> Selection:
        """What the selector finds in a graph as it was captured, nested graphs included.

        Raises:  DfcError Q021 when the whole, or a part that selects by name, finds nothing.
        Cost:    linear in the graph for each part of the selector.
        """
        search = Search(graph, strict=True)
        try:
            return search.find(self.what)
        except Nothing as e:
            span = self.source.span(*e.at) if self.source else None
            raise DfcError("Q021", str(e), span=span, help=e.help) from None

    def nodes(self, graph: Graph) -> list[Node]:
        """The nodes that are selected.

        Raises:  DfcError Q021.
        """
        return self.find(graph).nodes

    def nodes_left(self, graph: Graph) -> list[Node]:
        """The nodes that are selected in a graph that has been rewritten: perhaps none."""
        return Search(graph, strict=False).find(self.what).nodes

    def deeper(self, graph: Graph) -> str | None:
        """A help text where modules lie inside of those that are named: a path is what its module
        computes itself.
        """
        modules = {n.loc.module for n in graph.walk() if n.loc}
        paths = [p for p in _paths(self.what) if any(m.startswith(f"{p}.") for m in modules)]
        shown = ", ".join(f'`"{p}.**"`' for p in paths)
        return f"{shown} takes what lies inside" if paths else None

    def parameters(self, graph: Graph) -> list[Parameter]:
        """The parameters that `param` names, or that selected nodes read.

        Raises:  DfcError Q021.
        """
        return self.find(graph).parameters


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
    return Selector(x, source)


def selector_of(part: str | Selector, file: str = "<selector>") -> Selector:
    """A selector from its text; a plain module path, `layers.*`, needs no quotes of its own.

    Raises:  DfcError as `parse_selector`.
    """
    if isinstance(part, Selector):
        return part
    plain = all(c.isalnum() or c in "._*" for c in part)
    return parse_selector(f'"{part}"' if plain else part, file)


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
    "first": "a whole number above 0", "last": "a whole number above 0",
    "between": "two module paths", "worst": "a whole number above 0, or a share such as 10%",
}  # fmt: skip


def _argument_fits(name: str, a: s.Expr) -> bool:
    if name in ("first", "last"):
        return _is_count(a)
    if name == "worst":
        return _is_count(a) or _is_share(a)
    if name == "dtype":
        return isinstance(a, s.Word) and a.name in DTYPES
    return isinstance(a, s.Text) or (name == "op" and isinstance(a, s.Word))


def _is_count(a: s.Expr) -> bool:
    return isinstance(a, s.Number) and isinstance(a.value, int) and a.value > 0 and not a.unit


def _is_share(a: s.Expr) -> bool:
    return isinstance(a, s.Number) and a.unit == "%" and 0 < a.value <= 100


def worst_of(x: s.Expr) -> list[s.Call]:
    """Every `worst(...)` in a selector: what is measured when its step runs."""
    if isinstance(x, s.Call):
        return [x] if x.name.name == "worst" else []
    if isinstance(x, s.Binary):
        return worst_of(x.left) + worst_of(x.right)
    return worst_of(x.operand) if isinstance(x, s.Unary) else []


def _paths(x: s.Expr) -> list[str]:
    """The module paths in a selector."""
    if isinstance(x, s.Text):
        return [x.value]
    if isinstance(x, s.Binary):
        return _paths(x.left) + _paths(x.right)
    return _paths(x.operand) if isinstance(x, s.Unary) else []
