"""The call structure of a graph: how nested arguments and results map to flat lists of values.

A tree is tuples, lists, dicts and registered classes around leaves. A leaf is one value of the
graph; a ``Const`` is anything else that was seen while tracing (a number, a string, None, a size).
Classes are known by a name that is looked up in a registry, never imported from data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfc.errors import DfcError
from dfc.ir.expr import Expr, evaluate


@dataclass(frozen=True)
class Leaf:
    """One value of the graph; leaves are numbered in the order in which they are met."""


@dataclass(frozen=True)
class Opaque:
    """A constant argument that text cannot hold, known by its `repr` alone."""

    text: str

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Const:
    """A value that is part of the structure: a number, string, None, or a size expression."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Const) and repr(self.value) == repr(other.value)

    def __hash__(self) -> int:
        return hash(repr(self.value))


@dataclass(frozen=True)
class Seq:
    """A tuple or a list."""

    kind: str
    items: tuple[Tree, ...]


@dataclass(frozen=True)
class Map:
    """A dict with the keys in order."""

    keys: tuple[object, ...]
    items: tuple[Tree, ...]


@dataclass(frozen=True)
class Named:
    """An instance of a registered class: its registered name, its context as JSON, its children."""

    name: str
    context: str
    items: tuple[Tree, ...]


Tree = Leaf | Const | Seq | Map | Named
LEAF = Leaf()

# transformers' caches: their leaves are named by layer, as exporters of decoders name them.
CACHE = "transformers.cache_utils.DynamicCache"
PAIR_OF_CACHES = "transformers.cache_utils.EncoderDecoderCache"


@dataclass(frozen=True)
class Structure:
    """How a class is taken apart and put together."""

    name: str
    flatten: Callable[[Any], tuple[Sequence[object], str]]
    build: Callable[[Sequence[object], str], object]


_BY_CLASS: dict[type, Structure] = {}
_BY_NAME: dict[str, Structure] = {}


def register(cls: type, structure: Structure) -> None:
    """Make a class known, so that trees may contain its instances. Later wins."""
    _BY_CLASS[cls] = structure
    _BY_NAME[structure.name] = structure


def is_known(name: str) -> bool:
    return name in _BY_NAME


class Record(dict[str, Any]):
    """What a result of an unknown class becomes: its fields, by key and by attribute."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def record(context: str, parts: Sequence[object]) -> Record:
    """The parts by field name where the context names them, else by position."""
    return Record(zip(map(str, _fields(context, len(parts))), parts, strict=True))


def _fields(context: str, count: int) -> Sequence[object]:
    """The names of that many parts, or their positions."""
    found = json.loads(context)
    named = found.get("fields") if isinstance(found, dict) else found
    return named if isinstance(named, list) and len(named) == count else range(count)


def children(tree: Tree) -> tuple[Tree, ...]:
    return () if isinstance(tree, (Leaf, Const)) else tree.items


def leaf_count(tree: Tree) -> int:
    return 1 if isinstance(tree, Leaf) else sum(map(leaf_count, children(tree)))


def paths(tree: Tree, prefix: str) -> Iterator[str]:
    """A readable name for each leaf: `past.0.key`."""
    if isinstance(tree, Leaf):
        yield prefix
        return
    if isinstance(tree, Named) and tree.name in (CACHE, PAIR_OF_CACHES):
        yield from _cache_paths(tree, prefix, "")
        return
    for key, child in zip(_keys(tree), children(tree), strict=True):
        yield from paths(child, f"{prefix}.{key}" if prefix else str(key))


def _cache_paths(cache: Tree, prefix: str, part: str) -> Iterator[str]:
    """`past.0.key` of a decoder's cache; `past.0.decoder.key` and `past.0.encoder.key` of both."""
    start = f"{prefix}." if prefix else ""
    if isinstance(cache, Named) and cache.name == PAIR_OF_CACHES:
        for item, name in zip(cache.items, ("decoder.", "encoder."), strict=True):
            yield from _cache_paths(item, prefix, name)
        return
    for side, name in zip(children(cache), ("key", "value"), strict=True):
        for layer, tensor in enumerate(children(side)):
            yield from paths(tensor, f"{start}{layer}.{part}{name}")


def _keys(tree: Tree) -> Sequence[object]:
    if isinstance(tree, Map):
        return tree.keys
    if isinstance(tree, Named):
        return _fields(tree.context, len(tree.items))
    return range(len(children(tree)))


def flatten(tree: Tree, value: object, path: str) -> Iterator[object]:
    """The leaves of a value that must have this structure.

    Raises:  DfcError K010 where the structure differs, K011 where a constant does.
    """
    if isinstance(tree, Leaf):
        yield value
    elif isinstance(tree, Const):
        if not _same(tree.value, value):
            raise DfcError(
                "K011",
                f"`{path}` was {tree.value!r} when the model was traced, got {_brief(value)}",
                help="trace the model again with this value",
            )
    else:
        parts = _parts(tree, value, path)
        for key, child, part in zip(_keys(tree), tree.items, parts, strict=True):
            yield from flatten(child, part, f"{path}[{key!r}]")


def _same(a: object, b: object) -> bool:
    if isinstance(a, Opaque):
        return a.text == repr(b)
    return type(a) is type(b) and (a == b or repr(a) == repr(b))


def _brief(value: object) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"a {type(value).__name__} of shape {list(shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(str, value))}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value)[:80]


def _parts(tree: Seq | Map | Named, value: object, path: str) -> Sequence[object]:
    """The children of a value, in the tree's order."""
    if isinstance(tree, Seq):
        kind = tuple if tree.kind == "tuple" else list
        if isinstance(value, (tuple, list)) and len(value) == len(tree.items):
            return value
        expected = f"a {kind.__name__} of {len(tree.items)}"
    elif isinstance(tree, Map):
        if isinstance(value, Mapping) and set(value) == set(tree.keys):
            return [value[k] for k in tree.keys]
        expected = f"a dict with the keys {', '.join(map(repr, tree.keys))}"
    else:
        structure = _BY_CLASS.get(type(value))
        fields = [str(k) for k in _keys(tree)]
        if structure and structure.name == tree.name:
            parts, context = structure.flatten(value)
            if context == tree.context:
                return parts
        elif isinstance(value, Mapping) and set(value) == set(fields):
            return [value[k] for k in fields]
        expected = f"a `{tree.name}` as seen while tracing, or a dict of {', '.join(fields)}"
    raise DfcError("K010", f"`{path}` must be {expected}, got {_brief(value)}")


def build(tree: Tree, leaves: Iterator[object], bindings: Mapping[str, Any]) -> object:
    """The value of this structure with the given leaves; sizes are taken from the bindings."""
    if isinstance(tree, Leaf):
        return next(leaves)
    if isinstance(tree, Const):
        return evaluate(tree.value, bindings) if isinstance(tree.value, Expr) else tree.value
    parts = [build(child, leaves, bindings) for child in tree.items]
    if isinstance(tree, Seq):
        return tuple(parts) if tree.kind == "tuple" else parts
    if isinstance(tree, Map):
        return dict(zip(tree.keys, parts, strict=True))
    structure = _BY_NAME.get(tree.name)
    if structure:
        return structure.build(parts, tree.context)
    return record(tree.context, parts)
