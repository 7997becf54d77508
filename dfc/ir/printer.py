"""A graph as text: lossless, stable, one line a node.

`parse(print_graph(g)) == g`. The canonical text renumbers values and leaves locations out: two
graphs are equal when their canonical texts are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from dfc.ir.expr import Expr, format_number
from dfc.ir.graph import Argument, Graph, Input, Loc, Node, Parameter, Range, Value
from dfc.ir.tree import Const, Leaf, Map, Opaque, Seq, Tree
from dfc.ir.types import DType

FORMAT_VERSION = 1
_PLAIN = re.compile(r"[A-Za-z0-9_.]+\Z")
_WORDS = frozenset({"None", "True", "False", "inf", "nan"})  # as keys, they are not strings
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def print_graph(graph: Graph) -> str:
    """The text of a graph file: the version line, then the graph."""
    return f"dfc {FORMAT_VERSION}\n" + "\n".join(_Printer(False).graph(graph, "")) + "\n"


def canonical_text(graph: Graph) -> str:
    """The text with values renumbered in order and without locations."""
    return "\n".join(_Printer(True).graph(graph, "")) + "\n"


def node_text(node: Node) -> str:
    """One node as its line of graph text, without its place in the source."""
    printer = _Printer(False)
    return printer.node(node, printer.names(node.graph or Graph()), loc=False)


def parameter_text(p: Parameter) -> str:
    """One parameter as its line of graph text."""
    return _Printer(False).parameter(p)


def attribute_text(value: Any) -> str:
    """One attribute as text that reads back to the same type and bits."""
    if value is None or isinstance(value, (bool, int, float)):
        return "None" if value is None else format_number(value)
    if isinstance(value, Expr):
        return str(value)
    if isinstance(value, DType):
        return value.name
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, complex):
        return f"complex({value.real!r}, {value.imag!r})"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(attribute_text, value)) + "]"
    if isinstance(value, Opaque):
        return f"opaque({json.dumps(value.text)})"
    raise TypeError(f"an attribute cannot be a {type(value).__name__}")


def parameter_name(name: str) -> str:
    return f"!{name}" if _PLAIN.match(name) else f"!{json.dumps(name)}"


def range_text(name: str, bounds: Range) -> str:
    low, high = bounds
    return f"{name} in {low}..{'' if high is None else high}"


def loc_text(loc: Loc) -> str:
    return f"loc({json.dumps(loc.file)}:{loc.line} {json.dumps(loc.module)})"


def tree_text(tree: Tree, leaf: Callable[[], str]) -> str:
    """A structure with each leaf as the caller writes it."""
    if isinstance(tree, Leaf):
        return leaf()
    if isinstance(tree, Const):
        return attribute_text(tree.value)
    parts = [tree_text(t, leaf) for t in tree.items]
    if isinstance(tree, Seq):
        inside = ", ".join(parts)
        if tree.kind == "list":
            return f"[{inside}]"
        return f"({inside},)" if len(parts) == 1 else f"({inside})"
    if isinstance(tree, Map):
        return _fields(tree.keys, parts)
    fields = json.loads(tree.context)
    if isinstance(fields, list) and len(fields) == len(parts) and all(map(_is_name, fields)):
        return json.dumps(tree.name) + _fields(fields, parts)
    return f"{json.dumps(tree.name)}<{json.dumps(tree.context)}>({', '.join(parts)})"


def _is_name(x: object) -> bool:
    return isinstance(x, str)


def _fields(keys: Any, parts: list[str]) -> str:
    def key(k: object) -> str:
        if isinstance(k, str):
            return k if _KEY.match(k) and k not in _WORDS else json.dumps(k)
        return attribute_text(k)

    return "{" + ", ".join(f"{key(k)}: {p}" for k, p in zip(keys, parts, strict=True)) + "}"


class _Printer:
    def __init__(self, canonical: bool) -> None:
        self.canonical = canonical

    def graph(self, graph: Graph, indent: str) -> Iterator[str]:
        names = self.names(graph)
        yield from self.header(graph, indent, names)
        for p in graph.parameters.values():
            yield f"{indent}  {self.parameter(p)}"
        if graph.parameters:
            yield ""
        for node in graph.nodes:
            yield f"{indent}  {self.node(node, names)}"
        leaves = iter(graph.outputs)
        yield f"{indent}  return {tree_text(graph.output_tree, lambda: names(next(leaves)))}"
        for node in graph.nodes:
            for inner in node.graphs:
                yield ""
                yield from self.graph(inner, indent + "  ")
        yield indent + "}"

    def names(self, graph: Graph) -> Callable[[Value], str]:
        if not self.canonical:
            return lambda v: parameter_name(v.name) if isinstance(v, Parameter) else "%" + v.name
        numbers: dict[Value, int] = {}
        inputs = set(graph.inputs)
        for node in graph.nodes:
            for r in node.results:
                numbers[r] = len(numbers)

        def name(v: Value) -> str:
            if isinstance(v, Parameter):
                return parameter_name(v.name)
            return f"%{v.name}" if v in inputs else f"%.{numbers[v]}"

        return name

    def header(self, graph: Graph, indent: str, names: Callable[[Value], str]) -> Iterator[str]:
        leaves = iter(graph.inputs)
        shown: list[str] = []
        keyword_only = False
        for a in graph.arguments:
            if a.keyword_only and not keyword_only:
                shown.append("*")
                keyword_only = True
            shown.append(self.argument(a, leaves, names))
        outputs = iter(graph.outputs)
        results = tree_text(graph.output_tree, lambda: str(next(outputs).type))
        if results.endswith('"'):
            results = f"({results})"  # `"name" {` begins a named structure
        lines = [f"{indent}graph @{graph.name}({', '.join(shown)}) -> {results}"]
        if graph.ranges:
            shown = [range_text(n, r) for n, r in graph.ranges.items()]
            lines.append(f"{indent}    where {', '.join(shown)}")
        if graph.requires:
            lines.append(f"{indent}    requires {', '.join(map(attribute_text, graph.requires))}")
        if graph.mutations:
            shown = [f"{names(m.target)} = {names(m.value)}" for m in graph.mutations]
            lines.append(f"{indent}    mutates {', '.join(shown)}")
        lines[-1] += " {"
        yield from lines

    def argument(self, a: Argument, leaves: Iterator[Value], names: Callable[[Value], str]) -> str:
        def leaf() -> str:
            v = next(leaves)
            return f"{names(v)}: {v.type}"

        text = tree_text(a.tree, leaf)
        plain = isinstance(a.tree, Leaf) and text.startswith(f"%{a.name}:")
        return text if plain else f"{a.name}={text}"

    def parameter(self, p: Parameter) -> str:
        words = [f"{parameter_name(p.name)}: {p.type}"]
        if p.kind != "parameter":
            words.append(p.kind)
        words.append(f"sha256:{p.data.sha256()}" if p.data else "meta")
        words += [f"tied {parameter_name(alias)}" for alias in p.aliases]
        return " ".join(words)

    def node(self, node: Node, names: Callable[[Value], str], loc: bool = True) -> str:
        def operand(x: Input) -> str:
            if isinstance(x, tuple):
                return "[" + ", ".join("None" if v is None else names(v) for v in x) + "]"
            return "None" if x is None else names(x)

        inside = [f"@{g.name}" for g in node.graphs]
        inside += map(operand, node.inputs)
        inside += [f"{k}={attribute_text(v)}" for k, v in node.attributes.items()]
        text = f"{node.op}({', '.join(inside)})"
        if node.results:
            results = ", ".join(f"{names(r)}: {r.type}" for r in node.results)
            text = f"{results} = {text}"
        if node.binds:
            binds = [range_text(b.symbol, (b.low or 0, b.high)) for b in node.binds]
            text += f" binds {', '.join(binds)}"
        if node.stage is not None:
            text += f" stage {node.stage}"
        if loc and node.loc and not self.canonical:
            text += f" {loc_text(node.loc)}"
        return text
