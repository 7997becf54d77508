"""How the user's nested arguments and results become trees: torch's pytrees seen by dfc."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch.utils._pytree as pytree

from dfc.ir import tree
from dfc.ir.caches import cache_context
from dfc.ir.expr import Expr
from dfc.ir.tree import CACHE, LEAF, Const, Map, Named, Opaque, Seq, Structure, Tree
from dfc.ir.types import DTYPES, DType

# torch keys named tuples by collections.namedtuple itself, and has the class in the context.
_NAMED_TUPLE: Any = collections.namedtuple


def tree_of(spec: pytree.TreeSpec, leaf: Callable[[], object | None]) -> Tree:
    """A pytree spec as a tree; `leaf()` gives None for a value, or the constant in its place."""
    if spec.is_leaf():
        constant = leaf()
        return constant if isinstance(constant, Const) else LEAF
    items = tuple(tree_of(child, leaf) for child in spec.children())
    kind, context = spec.type, spec.context
    if kind in (tuple, list):
        return Seq(kind.__name__, items)
    if kind is dict:
        return Map(tuple(map(plain_key, context)), items)
    cls = context if kind is _NAMED_TUPLE else kind
    name = class_name(cls)
    if name == CACHE:
        return Named(name, cache_context(context[1]), items)
    text = _context_text(kind, context)
    _register(cls, kind, name, text, context)
    return Named(name, text, items)


def plain_key(key: Any) -> Any:
    return key if isinstance(key, (str, int, bool, float)) or key is None else Opaque(repr(key))


def constant(value: Any) -> Const:
    """An argument or result that is not a tensor, as text can hold it."""
    import torch

    if isinstance(value, torch.dtype):
        return Const(
            next((d for d in DTYPES.values() if d.to_torch() is value), Opaque(repr(value)))
        )
    if value is None or isinstance(value, (bool, int, float, str, complex, Expr, DType)):
        return Const(value)
    return Const(Opaque(repr(value)))


def class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _context_text(kind: Any, context: Any) -> str:
    """The context as canonical JSON: field names where it is just that."""
    if kind is _NAMED_TUPLE:
        return json.dumps(list(context._fields))
    definition = pytree.SUPPORTED_SERIALIZED_TYPES.get(kind)
    dump: Any = definition.to_dumpable_context if definition else repr
    attempts: tuple[Callable[[], Any], ...] = (lambda: context, lambda: (dump or repr)(context))
    for attempt in attempts:
        try:
            value = attempt()
            if isinstance(value, str) and attempt is not None:
                with contextlib.suppress(ValueError):
                    value = json.loads(value)
            # A dataclass's context is [fields with values, fields that are None].
            if _is_field_pair(value) and not value[1]:
                value = value[0]
            return json.dumps(value)
        except TypeError:
            continue
    return json.dumps(repr(context))


def _is_field_pair(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(isinstance(v, (list, tuple)) for v in value)
        and all(isinstance(n, str) for v in value for n in v)
    )


_CONTEXTS: dict[tuple[str, str], Any] = {}


def _register(cls: type, kind: Any, name: str, text: str, context: Any) -> None:
    """Make the class known to `dfc.ir.tree`, with the context object behind its text."""
    _CONTEXTS[name, text] = context

    def flatten(value: Any) -> tuple[Sequence[object], str]:
        children, found = pytree.SUPPORTED_NODES[kind].flatten_fn(value)
        return list(children), _context_text(kind, found)

    def build(children: Sequence[object], text: str) -> object:
        if (name, text) not in _CONTEXTS:
            return tree.record(text, children)
        known = _CONTEXTS[name, text]
        return pytree.SUPPORTED_NODES[kind].unflatten_fn(children, known)

    tree.register(cls, Structure(name, flatten, build))


def register_example(value: Any) -> None:
    """Make dataclasses inside an example known to torch's pytrees: torch.export insists."""
    seen: set[int] = set()
    pending = [value]
    while pending:
        x = pending.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, dict):
            pending.extend(x.values())
        elif isinstance(x, (list, tuple)):
            pending.extend(x)
        elif dataclasses.is_dataclass(x) and not isinstance(x, type):
            register_dataclass(type(x))
            pending.extend(getattr(x, f.name) for f in dataclasses.fields(x))


def register_dataclass(cls: type) -> None:
    if cls not in pytree.SUPPORTED_NODES:
        import torch

        torch.export.register_dataclass(cls, serialized_type_name=class_name(cls))


def flat_leaves(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], pytree.TreeSpec]:
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    return leaves, spec
