"""Structures of arguments and results in graph text: lists, dicts, classes."""

from __future__ import annotations

import json
from typing import Any

from dfc.ir.tree import LEAF, Const, Map, Named, Seq, Tree
from dfc.lang.graph_types import CONSTANTS, OPERATORS, SCALARS, GraphTypes


class GraphTrees(GraphTypes):
    """Reads structures, leaf by leaf."""

    def tree(self, leaf: Any, types: bool = False) -> Tree:
        """A structure; `types` says that its leaves are types, as in the header of a graph."""
        self.enter()
        tree = self._tree(leaf, types)
        self.depth -= 1
        return tree

    def _tree(self, leaf: Any, types: bool) -> Tree:
        kind, word, following = self.kinds[self.i], self.words[self.i], self.words[self.i + 1]
        scalar = types and kind == "name" and word in SCALARS and following != "("
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
            if self.kinds[self.i] == "punct" and self.words[self.i] in OPERATORS:
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
            if plain and word not in CONSTANTS and "." not in word:
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
