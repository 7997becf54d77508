"""Graph text to graph: one pass over the tokens, fast enough for 100 000 nodes.

The grammar is dfc/lang/graph.lark; this parser accepts the same language (a test compares
them) and builds the graph while it reads. It needs no torch: ops are known by name only, and the
verifier checks them.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from dfc.errors import DfcError, Span, did_you_mean
from dfc.ir.expr import FUNCTIONS, Expr, Scalar, call, symbol
from dfc.ir.graph import Argument, Bind, Graph, HashOnly, Input, Loc, Range, Value
from dfc.ir.printer import FORMAT_VERSION
from dfc.ir.tree import LEAF, Const, Leaf, Map, Named, Opaque, Seq, Tree
from dfc.ir.types import BOOL, DTYPES, FLOAT, INT, NONE, TensorType, Type
from dfc.lang.source import hidden_at, hidden_name

MAX_BYTES = 256 * 1024 * 1024
MAX_DEPTH = 64
MAX_DIGITS = 19
MAX_RANK = 32
MAX_NAME = 256
MAX_TERMS = 256  # of one size: a product of sums grows beyond all bounds

_TOKEN = re.compile(
    r"""
    (?P<space>[ \t\r\n]+|\#[^\n]*)
  | (?P<type>(?!return\[)[a-z][a-z0-9]*\[[^\]\n"]*\])
  | (?P<hash>sha256:[0-9a-f]{64}(?![0-9A-Za-z]))
  | (?P<value>%\.?[A-Za-z0-9_]+)
  | (?P<param>!(?:[A-Za-z0-9_.]+|"(?:[^"\\\n]|\\.)*"))
  | (?P<graph>@[A-Za-z0-9_]+)
  | (?P<string>"(?:[^"\\\n]|\\.)*")
  | (?P<number>[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)
  | (?P<name>[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_0-9]+)*)
  | (?P<punct>->|\.\.|//|[()\[\]{},:=*+\-%<>])
    """,
    re.VERBOSE,
)
_SCALARS: dict[str, Type] = {"int": INT, "float": FLOAT, "bool": BOOL, "none": NONE}
_NUMBERS = {"inf": float("inf"), "nan": float("nan")}
_CONSTANTS: dict[str, Any] = {"None": None, "True": True, "False": False, **_NUMBERS}
_KINDS = ("buffer", "constant", "state")
_OPERATORS = ("+", "-", "*", "//", "%")


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


class _Parser:
    def __init__(self, text: str, filename: str) -> None:
        self.text = text
        self.filename = filename
        self.kinds: list[str] = []
        self.words: list[str] = []
        self.starts: list[int] = []
        self.types: dict[str, TensorType] = {}
        self.i = 0
        self.depth = 0
        at = hidden_at(text)
        if at is not None:
            message = f"{hidden_name(text[at])} is not allowed here"
            self.fail("P009", message, at, at + 1, "delete it; in a string write it as an escape")
        self._tokenize(text, self.kinds, self.words, self.starts, 0)
        for _ in range(2):  # two, so that looking at the word behind the last one is safe
            self.kinds.append("end")
            self.words.append("end of text")
            self.starts.append(len(text))

    def _tokenize(
        self, text: str, kinds: list[str], words: list[str], starts: list[int], offset: int
    ) -> None:
        at = 0
        for found in _TOKEN.finditer(text):
            start = found.start()
            if start != at:
                break
            at = found.end()
            kind = found.lastgroup
            if kind != "space":
                kinds.append(kind or "")
                words.append(found.group())
                starts.append(start + offset)
        if at != len(text):
            bad = text[at]
            hint = "a string must end on its line" if bad == '"' else None
            self.fail("P001", f"unexpected character {bad!r}", at + offset, at + offset + 1, hint)

    # errors

    def fail(
        self, code: str, message: str, start: int, end: int, help: str | None = None
    ) -> NoReturn:
        line = self.text.count("\n", 0, start) + 1
        begin = self.text.rfind("\n", 0, start) + 1
        stop = self.text.find("\n", begin)
        source = self.text[begin : stop if stop >= 0 else len(self.text)]
        col = start - begin + 1
        span = Span(self.filename, line, col, col + max(end - start, 1), source)
        raise DfcError(code, message, span=span, help=help)

    def fail_here(self, message: str, code: str = "P002", help: str | None = None) -> NoReturn:
        start = self.starts[self.i]
        end = start + (len(self.words[self.i]) if self.kinds[self.i] != "end" else 0)
        self.fail(code, message, start, end, help)

    def expected(self, what: str) -> NoReturn:
        got = self.words[self.i]
        self.fail_here(
            f"expected {what}, got `{got}`"
            if self.kinds[self.i] != "end"
            else f"expected {what}, got the end of the text"
        )

    # tokens

    def accept(self, word: str) -> bool:
        if self.words[self.i] == word and self.kinds[self.i] != "string":
            self.i += 1
            return True
        return False

    def need(self, word: str) -> None:
        if not self.accept(word):
            self.expected(f"`{word}`")

    def take(self, kind: str, what: str) -> str:
        if self.kinds[self.i] != kind:
            self.expected(what)
        self.i += 1
        return self.words[self.i - 1]

    def integer(self) -> int:
        negative = self.accept("-")
        word = self.take("number", "an integer")
        if not word.isdigit():
            self.i -= 1
            self.expected("an integer")
        if len(word) > MAX_DIGITS:
            self.i -= 1
            self.fail_here(
                f"an integer may have {MAX_DIGITS} digits, this one has {len(word)}", "P007"
            )
        return -int(word) if negative else int(word)

    def string(self) -> str:
        word = self.take("string", "a string")
        return self.unquote(word)

    def unquote(self, word: str) -> str:
        try:
            text = json.loads(word)
        except ValueError:
            self.i -= 1
            self.fail_here("a string with a bad escape", "P002")
        assert isinstance(text, str)
        return text

    def enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail_here(f"nested deeper than {MAX_DEPTH}", "P007")

    # the file

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

    # structures

    def tree(self, leaf: Any, types: bool = False) -> Tree:
        """A structure; `types` says that its leaves are types, as in the header of a graph."""
        self.enter()
        tree = self._tree(leaf, types)
        self.depth -= 1
        return tree

    def _tree(self, leaf: Any, types: bool) -> Tree:
        kind, word, following = self.kinds[self.i], self.words[self.i], self.words[self.i + 1]
        scalar = types and kind == "name" and word in _SCALARS and following != "("
        if scalar or kind in ("value", "param", "type"):
            leaf()
            return LEAF
        if kind == "string" and following in ("{", "<"):
            return self.named(leaf, types)
        if kind == "punct" and word in ("(", "["):
            start = self.i
            self.i += 1
            close = ")" if word == "(" else "]"
            items = []
            comma = True
            while not self.accept(close):
                items.append(self.tree(leaf, types))
                comma = self.accept(",")
                if not comma:
                    self.need(close)
                    break
            if word == "[" or len(items) != 1 or comma:
                return Seq("tuple" if word == "(" else "list", tuple(items))
            if self.kinds[self.i] == "punct" and self.words[self.i] in _OPERATORS:
                self.i = start  # `(B // 2) + 1`: the bracket belongs to an expression
                return Const(self.expression())
            return items[0]
        if kind == "punct" and word == "{":
            keys, items = self.fields(leaf, types)
            return Map(tuple(keys), tuple(items))
        return Const(self.attribute())

    def fields(self, leaf: Any, types: bool) -> tuple[list[Any], list[Tree]]:
        self.need("{")
        keys: list[Any] = []
        items: list[Tree] = []
        while not self.accept("}"):
            word = self.words[self.i]
            plain = self.kinds[self.i] == "name" and self.words[self.i + 1] == ":"
            if plain and word not in _CONSTANTS and "." not in word:
                keys.append(word)
                self.i += 1
            else:
                keys.append(self.attribute())
            self.need(":")
            items.append(self.tree(leaf, types))
            if not self.accept(","):
                self.need("}")
                break
        return keys, items

    def named(self, leaf: Any, types: bool) -> Tree:
        name = self.string()
        if self.words[self.i] == "{":
            keys, items = self.fields(leaf, types)
            return Named(name, json.dumps(keys), tuple(items))
        self.need("<")
        context = self.string()
        self.need(">")
        self.need("(")
        children: list[Tree] = []
        while not self.accept(")"):
            children.append(self.tree(leaf, types))
            if not self.accept(","):
                self.need(")")
                break
        return Named(name, context, tuple(children))

    # types and scalars

    def type(self) -> Type:
        word = self.words[self.i]
        if self.kinds[self.i] == "type":
            known = self.types.get(word)
            if known is None:
                known = self.types[word] = self.tensor_type(word)
            self.i += 1
            return known
        if word in _SCALARS:
            self.i += 1
            return _SCALARS[word]
        self.expected("a type such as `f32[2, B]`")

    def tensor_type(self, word: str) -> TensorType:
        name, _, inside = word.partition("[")
        dtype = DTYPES.get(name)
        if dtype is None:
            self.fail_here(
                f"unknown element type `{name}`", "P003", did_you_mean(name, list(DTYPES))
            )
        kinds: list[str] = []
        words: list[str] = []
        starts: list[int] = []
        self._tokenize(inside[:-1], kinds, words, starts, self.starts[self.i] + len(name) + 1)
        saved = self.kinds, self.words, self.starts, self.i
        end = saved[2][saved[3]] + len(word) - 1
        self.kinds, self.words, self.starts = [*kinds, "end"], [*words, "]"], [*starts, end]
        self.i = 0
        shape: list[Any] = []
        while self.kinds[self.i] != "end":
            at = self.i
            size = self.expression()
            if isinstance(size, (float, bool)) or (isinstance(size, int) and size < 0):
                self.i = at
                self.fail_here(f"a size cannot be {size}", "P003")
            shape.append(size)
            if not self.accept(",") and self.kinds[self.i] != "end":
                self.expected("`,` or `]`")
        if len(shape) > MAX_RANK:
            self.fail_here(
                f"a tensor may have {MAX_RANK} dimensions, this has {len(shape)}", "P007"
            )
        self.kinds, self.words, self.starts, self.i = saved
        return TensorType(dtype, tuple(shape))

    def attribute(self) -> Any:
        kind, word = self.kinds[self.i], self.words[self.i]
        following = self.words[self.i + 1]
        if following in (",", ")", "]", "}") or kind == "string":
            self.i += 1
            if kind == "number":
                return self.number(word)
            if kind == "string":
                return self.unquote(word)
            if kind == "name":
                if word in _CONSTANTS:
                    return _CONSTANTS[word]
                return DTYPES[word] if word in DTYPES else self.size_symbol(word)
            self.i -= 1
        if kind == "punct" and word == "[":
            self.enter()
            self.i += 1
            items = []
            while not self.accept("]"):
                items.append(self.attribute())
                if not self.accept(","):
                    self.need("]")
                    break
            self.depth -= 1
            return tuple(items)
        if kind == "name" and following == "(" and word in ("complex", "opaque"):
            self.i += 2
            if word == "opaque":
                value: Any = Opaque(self.string())
            else:
                real = self.expression()
                self.need(",")
                imaginary = self.expression()
                if isinstance(real, Expr) or isinstance(imaginary, Expr):
                    self.fail_here("a complex number is made of two numbers", "P008")
                value = complex(float(real), float(imaginary))
            self.need(")")
            return value
        if word in ("None", *DTYPES) and following not in _OPERATORS:
            self.i += 1
            return DTYPES.get(word)
        return self.expression()

    def size_symbol(self, word: str) -> Expr:
        if "." in word:
            self.i -= 1
            self.expected("a value")
        if len(word) > MAX_NAME:
            self.i -= 1
            self.fail_here(f"a name may have {MAX_NAME} characters", "P007")
        return symbol(word)

    def number(self, word: str) -> int | float:
        if word.isdigit():
            if len(word) > MAX_DIGITS:
                self.i -= 1
                self.fail_here(f"an integer may have {MAX_DIGITS} digits", "P007")
            return int(word)
        return float(word)

    def expression(self) -> Scalar:
        """sum := product (('+'|'-') product)*"""
        self.enter()
        at = self.i
        total: Any = self.product()
        while self.words[self.i] in ("+", "-") and self.kinds[self.i] == "punct":
            minus = self.words[self.i] == "-"
            self.i += 1
            right: Any = self.product()
            self.integers(at, total, right)
            total = total - right if minus else total + right
        self.depth -= 1
        result: Scalar = total
        return result

    def product(self) -> Any:
        at = self.i
        total: Any = self.factor()
        while self.words[self.i] in ("*", "//", "%") and self.kinds[self.i] == "punct":
            sign = self.words[self.i]
            self.i += 1
            right: Any = self.factor()
            self.integers(at, total, right)
            if sign == "*":
                total = total * right
                if isinstance(total, Expr) and len(total.terms) > MAX_TERMS:
                    self.fail_here(f"a size may have {MAX_TERMS} terms", "P007")
            elif right == 0:
                self.i -= 1
                self.fail_here("division by zero", "P008")
            else:
                total = call("floordiv" if sign == "//" else "mod", total, right)
        return total

    def integers(self, at: int, *operands: Any) -> None:
        for x in operands:
            if isinstance(x, (float, bool)) or (isinstance(x, Expr) and x.kind != "int"):
                self.i = at
                self.fail_here("`+ - * // %` are for integers; floats use `fadd`, `fmul`", "P008")

    def factor(self) -> Any:
        if self.accept("-"):
            self.enter()
            at = self.i
            inner = self.factor()
            self.depth -= 1
            if not isinstance(inner, float):
                self.integers(at, inner)
            return -inner
        if self.accept("("):
            inner = self.expression()
            self.need(")")
            return inner
        kind, word = self.kinds[self.i], self.words[self.i]
        if kind == "number":
            self.i += 1
            return self.number(word)
        if kind == "name" and self.words[self.i + 1] == "(":
            return self.function(word)
        if word == "None" or word in DTYPES:
            self.fail_here(f"`{word}` is not a number", "P008")
        if kind == "name":
            self.i += 1
            return _CONSTANTS[word] if word in _CONSTANTS else self.size_symbol(word)
        self.expected("a number or a size")

    def function(self, word: str) -> Scalar:
        if word not in FUNCTIONS:
            self.fail_here(
                f"unknown function `{word}`", "P004", did_you_mean(word, list(FUNCTIONS))
            )
        at = self.i
        self.i += 2
        args = []
        while not self.accept(")"):
            args.append(self.expression())
            if not self.accept(","):
                self.need(")")
                break
        try:
            return call(word, *args)
        except (TypeError, ValueError, ArithmeticError) as e:
            self.i = at
            self.fail_here(f"`{word}` cannot take these arguments: {e}", "P008")


__all__ = ["Leaf", "parse_graph"]
