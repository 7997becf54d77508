"""Graph text to graph: one pass over the tokens, fast enough for 100 000 nodes.

The grammar is dfc/lang/graph.lark; this parser accepts the same language (a test compares
them) and builds the graph while it reads. It needs no torch: ops are known by name only, and the
verifier checks them.
"""

from __future__ import annotations

from typing import Any

from dfc.errors import DfcError, did_you_mean
from dfc.ir.expr import Scalar
from dfc.ir.graph import Argument, Bind, Graph, HashOnly, Input, Loc, Range, Value
from dfc.ir.printer import FORMAT_VERSION
from dfc.ir.tree import LEAF, Tree
from dfc.ir.types import TensorType, Type
from dfc.lang.graph_trees import GraphTrees

MAX_BYTES = 256 * 1024 * 1024

_KINDS = ("frozen", "buffer", "constant", "state")


def parse_graph(text: str, file: str = "<string>") -> Graph:
    """Read graph text.

    Raises:  DfcError P001..P009 with `file:line:col`; the graph is not verified.
    """
    if len(text) > MAX_BYTES:
        raise DfcError(
            "P007", f"{file} has {len(text)} characters; graph text may have {MAX_BYTES}"
        )
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _Parser(text, file).file()


class _Parser(GraphTrees):
    """Reads graphs: their heads, parameters and nodes."""

    def file(self) -> Graph:
        if not self.accept("dfc"):
            self.fail_here("a dfc file starts with the line `dfc 1`", "P006")
        version = self.integer()
        if version != FORMAT_VERSION:
            self.i -= 1
            self.fail_here(
                f"version {version} of the format is not known, only {FORMAT_VERSION}", "P006"
            )
        graph = self.graph()
        if self.kinds[self.i] != "end":
            self.expected("the end of the text")
        return graph

    def graph(self) -> Graph:
        self.enter()
        self.need("graph")
        graph = Graph(self.take("graph", "a graph name such as `@main`")[1:])
        values: dict[str, Value] = {}
        graph.arguments = self.arguments(graph, values)
        self.need("->")
        header_types: list[tuple[int, Type]] = []
        if self.kinds[self.i] == "string" and self.words[self.i + 1] not in ("{", "<"):
            self.expected("a structure of types; a string alone stands in brackets")
        header_tree = self.tree(lambda: header_types.append((self.i, self.type())), types=True)
        mutations: list[tuple[int, str, int, str]] = []
        if self.accept("where"):
            graph.ranges = self.ranges()
        if self.accept("requires"):
            graph.requires = self.conditions()
        if self.accept("mutates"):
            mutations = self.mutations()
        self.need("{")
        while self.kinds[self.i] == "param":
            self.parameter(graph)
        pending: list[tuple[Any, list[tuple[int, str]]]] = []
        while self.words[self.i] != "return":
            if self.words[self.i] == "}" or self.kinds[self.i] == "end":
                self.expected("`return`")
            self.node(graph, values, pending)
        self.returns(graph, values, header_tree, header_types, mutations)
        inner: dict[str, tuple[int, Graph]] = {}
        while self.words[self.i] == "graph":
            at = self.i + 1
            nested = self.graph()
            if nested.name in inner:
                self.i = at
                self.fail_here(f"two nested graphs are called @{nested.name}", "P005")
            inner[nested.name] = (at, nested)
        self.need("}")
        resume = self.i
        known = list(inner)
        for node, names in pending:
            node.graphs = tuple(self.nested(inner, known, at, name) for at, name in names)
        for name, (at, _) in inner.items():
            self.i = at
            self.fail_here(f"no node uses the nested graph @{name}", "P005")
        self.i = resume
        self.depth -= 1
        return graph

    def nested(
        self, inner: dict[str, tuple[int, Graph]], known: list[str], at: int, name: str
    ) -> Graph:
        found = inner.pop(name, None)
        if found is None:
            self.i = at
            if name in known:
                self.fail_here(f"another node uses the nested graph @{name}", "P005")
            help = did_you_mean(name, known)
            self.fail_here(f"there is no nested graph @{name}", "P004", help)
        return found[1]

    def arguments(self, graph: Graph, values: dict[str, Value]) -> tuple[Argument, ...]:
        self.need("(")
        found: list[Argument] = []
        keyword_only = False
        while not self.accept(")"):
            if self.accept("*"):
                keyword_only = True
            elif self.kinds[self.i] == "value":
                name = self.words[self.i][1:]
                self.typed_input(graph, values)
                found.append(Argument(name, LEAF, keyword_only))
            else:
                name = self.take("name", "an argument such as `%x: f32[2]` or `flag=True`")
                self.need("=")
                tree = self.tree(lambda: self.typed_input(graph, values))
                found.append(Argument(name, tree, keyword_only))
            if not self.accept(","):
                self.need(")")
                break
        return tuple(found)

    def typed_input(self, graph: Graph, values: dict[str, Value]) -> None:
        at = self.i
        name = self.take("value", "a value such as `%x`")[1:]
        self.need(":")
        type = self.type()
        if name in values:
            self.i = at
            self.fail_here(f"two values are called %{name}", "P005")
        values[name] = graph.add_input(name, type)

    def ranges(self) -> dict[str, Range]:
        found: dict[str, Range] = {}
        while True:
            name, bounds = self.range()
            found[name] = bounds
            if not self.accept(","):
                return found

    def range(self) -> tuple[str, Range]:
        name = self.take("name", "a size such as `B`")
        if "." in name:
            self.i -= 1
            self.expected("a size such as `B`")
        self.need("in")
        low = self.integer()
        self.need("..")
        high = self.integer() if self.kinds[self.i] == "number" else None
        if high is not None and high < low:
            self.i -= 1
            self.fail_here(f"the range {low}..{high} of `{name}` is empty", "P008")
        return name, (low, high)

    def conditions(self) -> tuple[Scalar, ...]:
        found = [self.expression()]
        while self.accept(","):
            found.append(self.expression())
        return tuple(found)

    def mutations(self) -> list[tuple[int, str, int, str]]:
        found = []
        while True:
            at = self.i
            if self.kinds[at] not in ("param", "value"):
                self.expected("a parameter or an input")
            target = self.words[at]
            self.i += 1
            self.need("=")
            if self.kinds[self.i] not in ("param", "value"):
                self.expected("a value")
            found.append((at, target, self.i, self.words[self.i]))
            self.i += 1
            if not self.accept(","):
                return found

    def parameter(self, graph: Graph) -> None:
        at = self.i
        name = self.param_name(self.words[at])
        self.i += 1
        self.need(":")
        type = self.type()
        if not isinstance(type, TensorType):
            self.i -= 1
            self.expected("a tensor type")
        kind = "parameter"
        if self.words[self.i] in _KINDS:
            kind = self.words[self.i]
            self.i += 1
        data = None
        if not self.accept("meta"):
            data = HashOnly(self.take("hash", "`sha256:` and 64 hex digits, or `meta`")[7:])
        aliases = []
        while self.accept("tied"):
            aliases.append(self.param_name(self.take("param", "a parameter such as `!w`")))
        if name in graph.parameters:
            self.i = at
            self.fail_here(f"two parameters are called !{name}", "P005")
        graph.add_parameter(name, type, kind, data, tuple(aliases))

    def param_name(self, word: str) -> str:
        return self.unquote(word[1:]) if word.startswith('!"') else word[1:]

    # nodes

    def node(self, graph: Graph, values: dict[str, Value], pending: list[Any]) -> None:
        kinds, words = self.kinds, self.words
        names: list[str] = []
        types: list[Type] = []
        places: list[int] = []
        while kinds[self.i] == "value":
            places.append(self.i)
            names.append(words[self.i][1:])
            self.i += 1
            self.need(":")
            types.append(self.type())
            if self.accept("="):
                break
            self.need(",")
            if kinds[self.i] != "value":
                self.expected("a value such as `%x`")
        op = self.take("name", "an op such as `aten.relu.default`")
        self.need("(")
        inputs: list[Input] = []
        graphs: list[tuple[int, str]] = []
        attributes: dict[str, Any] = {}
        while not self.accept(")"):
            kind = kinds[self.i]
            if kind == "name" and words[self.i + 1] == "=":
                key = words[self.i]
                if key in attributes:
                    self.fail_here(f"the attribute `{key}` is given twice", "P005")
                self.i += 2
                attributes[key] = self.attribute()
            elif kind == "graph":
                graphs.append((self.i, words[self.i][1:]))
                self.i += 1
            elif attributes:
                self.expected("an attribute such as `dim=0`")
            else:
                inputs.append(self.operand(graph, values))
            if not self.accept(","):
                self.need(")")
                break
        binds: list[Bind] = []
        stage = loc = None
        if self.accept("binds"):
            while True:
                name, (low, high) = self.range()
                binds.append(Bind(name, low, high))
                if not self.accept(","):
                    break
        if self.accept("stage"):
            stage = self.integer()
        if self.accept("loc"):
            loc = self.loc()
        for place, name in zip(places, names, strict=True):
            if name in values:
                self.i = place
                self.fail_here(f"two values are called %{name}", "P005")
            values[name] = None  # type: ignore[assignment]
        node = graph.add(
            op, inputs, attributes, types=types, names=names, binds=binds, stage=stage, loc=loc
        )
        for name, r in zip(names, node.results, strict=True):
            values[name] = r
        if graphs:
            pending.append((node, graphs))

    def operand(self, graph: Graph, values: dict[str, Value]) -> Input:
        kind = self.kinds[self.i]
        if kind == "value" or kind == "param":
            return self.value(graph, values)
        if self.accept("None"):
            return None
        if self.accept("["):
            found: list[Value | None] = []
            while not self.accept("]"):
                found.append(None if self.accept("None") else self.value(graph, values))
                if not self.accept(","):
                    self.need("]")
                    break
            return tuple(found)
        self.expected("an operand such as `%x`, `!w`, `None` or `[%x, %y]`")

    def value(self, graph: Graph, values: dict[str, Value]) -> Value:
        word = self.words[self.i]
        kind = self.kinds[self.i]
        found: Value | None = None
        if kind == "value":
            found = values.get(word[1:])
        elif kind == "param":
            found = graph.parameters.get(self.param_name(word))
        else:
            self.expected("a value such as `%x` or `!w`")
        if found is None:
            known = [f"%{n}" for n in values] + [f"!{n}" for n in graph.parameters]
            self.fail_here(f"`{word}` is not defined here", "P004", did_you_mean(word, known))
        self.i += 1
        return found

    def loc(self) -> Loc:
        self.need("(")
        file = self.string()
        self.need(":")
        line = self.integer()
        module = self.string()
        self.need(")")
        return Loc(file, line, module)

    def returns(
        self,
        graph: Graph,
        values: dict[str, Value],
        header_tree: Tree,
        header_types: list[tuple[int, Type]],
        mutations: list[tuple[int, str, int, str]],
    ) -> None:
        at = self.i
        self.need("return")
        leaves: list[Value] = []
        tree = self.tree(lambda: leaves.append(self.value(graph, values)))
        if tree != header_tree:
            self.i = at
            self.fail_here("`return` and the header differ in structure", "P008")
        for v, (place, type) in zip(leaves, header_types, strict=True):
            if v.type != type:
                self.i = place
                self.fail_here(f"the header says {type}, `return` gives {v!r}", "P008")
        pairs = []
        resume = self.i
        for place, _, value_place, _ in mutations:
            self.i = place
            target = self.value(graph, values)
            self.i = value_place
            pairs.append((target, self.value(graph, values)))
        self.i = resume
        graph.set_outputs(leaves, tree, pairs)
