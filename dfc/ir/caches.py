"""transformers' key-value caches and outputs as structures, whether traced here or read from text.

A cache of layers that all grow is its keys and its values; one with windows also says which layers
have one. Nothing is imported: what is not loaded in this process cannot be passed or expected.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from dfc.errors import DfcError
from dfc.ir import tree
from dfc.ir.tree import CACHE, PAIR_OF_CACHES, Named, Structure, Tree, children

_CACHES = (CACHE, PAIR_OF_CACHES)
_FIELDS = ["key_cache", "value_cache"]
_SIDES = ["self", "cross"]  # of an encoder-decoder's pair of caches


def register_caches() -> None:
    """Make transformers' caches known to torch's pytrees and to `dfc.ir.tree`, once."""
    if "transformers" not in sys.modules or tree.is_known(CACHE):
        return
    import torch.utils._pytree as pytree
    from transformers import DynamicCache, EncoderDecoderCache
    from transformers.integrations.executorch import register_dynamic_cache_export_support

    if DynamicCache not in pytree.SUPPORTED_NODES:
        register_dynamic_cache_export_support()  # type: ignore[no-untyped-call]
    if EncoderDecoderCache not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            EncoderDecoderCache,
            lambda c: ([c.self_attention_cache, c.cross_attention_cache], _SIDES),
            lambda children, _: EncoderDecoderCache(*children),
            serialized_type_name=PAIR_OF_CACHES,
            flatten_with_keys_fn=lambda c: (
                [
                    (pytree.GetAttrKey("self_attention_cache"), c.self_attention_cache),
                    (pytree.GetAttrKey("cross_attention_cache"), c.cross_attention_cache),
                ],
                _SIDES,
            ),
        )

    def taken_apart(cache: Any) -> tuple[Sequence[object], str]:
        refuse_forgetful(cache)
        parts, (_, windows) = pytree.SUPPORTED_NODES[DynamicCache].flatten_fn(cache)
        return list(parts), cache_context(windows)

    def put_together(parts: Sequence[Any], context: str) -> object:
        found = json.loads(context)
        known = found["windows"] if isinstance(found, dict) else []
        windows = known or [None] * len(parts[0])
        return pytree.SUPPORTED_NODES[DynamicCache].unflatten_fn(parts, [_FIELDS, windows])

    tree.register(DynamicCache, Structure(CACHE, taken_apart, put_together))
    tree.register(
        EncoderDecoderCache,
        Structure(
            PAIR_OF_CACHES,
            lambda c: ([c.self_attention_cache, c.cross_attention_cache], json.dumps(_SIDES)),
            lambda parts, _: EncoderDecoderCache(*parts),
        ),
    )


@contextlib.contextmanager
def hollow_caches() -> Iterator[None]:
    """Within the block a rebuilt cache is a shell around its parts.

    Why:  torch.export traces a program again by calling it, and a cache that is put together there
          concatenates its tensors with empty ones, which are constants whose names collide.
    """
    register_caches()
    import torch.utils._pytree as pytree

    before = {
        t: d
        for t, d in pytree.SUPPORTED_NODES.items()
        if f"{t.__module__}.{t.__qualname__}" in _CACHES
    }
    for cls, definition in before.items():
        pytree.SUPPORTED_NODES[cls] = _hollow(cls, definition)
    try:
        yield
    finally:
        pytree.SUPPORTED_NODES.update(before)


def _hollow(cls: Any, definition: Any) -> Any:
    def taken_apart(cache: Any) -> tuple[list[Any], Any]:
        shell: Any = vars(cache).get("_dfc_parts")
        return shell or definition.flatten_fn(cache)  # type: ignore[no-any-return]

    def taken_apart_by_keys(cache: Any) -> tuple[list[Any], Any]:
        if "_dfc_parts" not in vars(cache):
            return definition.flatten_with_keys_fn(cache)  # type: ignore[no-any-return]
        parts, context = taken_apart(cache)
        return list(zip(_keys(context), parts, strict=True)), context

    def put_together(parts: Any, context: Any) -> Any:
        shell = cls.__new__(cls)
        shell.__dict__["_dfc_parts"] = (list(parts), context)
        return shell

    return definition._replace(
        flatten_fn=taken_apart,
        flatten_with_keys_fn=taken_apart_by_keys,
        unflatten_fn=put_together,
    )


def _keys(context: list[Any]) -> list[Any]:
    """How torch's pytrees call the parts of a cache, which inputs of a program are named after."""
    from torch.utils._pytree import GetAttrKey, MappingKey

    if context == _SIDES:
        return [GetAttrKey(f"{side}_attention_cache") for side in context]
    return [MappingKey(field) for field in context[0]]


def cache_context(windows: Sequence[int | None]) -> str:
    """What a tree keeps of a cache beside its tensors: its fields, and its layers' windows."""
    if any(w is not None for w in windows):
        return json.dumps({"fields": _FIELDS, "windows": list(windows)})
    return json.dumps(_FIELDS)


def check_example(value: Any) -> None:
    """What cannot be traced of an argument that is a cache.

    Raises:  DfcError T033 (exit status 2) for a class of caches that torch.export does not carry,
             and what `refuse_forgetful` raises.
    """
    import torch.utils._pytree as pytree

    kind: Any = getattr(sys.modules.get("transformers.cache_utils"), "Cache", None)
    if kind and isinstance(value, kind) and type(value) not in pytree.SUPPORTED_NODES:
        raise DfcError(
            "T033",
            f"a {type(value).__name__} cannot be an argument: torch.export does not know how many "
            "of its tokens count",
            help="give a DynamicCache, or let transformers' TorchExportableModuleWithStaticCache "
            "hold the cache as buffers",
            status=2,
        )
    refuse_forgetful(value)


def refuse_forgetful(cache: Any) -> None:
    """A layer with a window counts tokens that it no longer holds, and that count is no tensor.

    Raises:  DfcError K017 (exit status 2) for a cache that has seen more tokens than it holds.
    """
    for i, layer in enumerate(getattr(cache, "layers", ())):
        seen, keys = getattr(layer, "cumulative_length", None), layer.keys
        if isinstance(seen, int) and keys is not None and keys.dim() and seen > keys.shape[-2]:
            raise DfcError(
                "K017",
                f"layer {i} of the cache has seen {seen} tokens and holds the last "
                f"{keys.shape[-2]}: how many there were is no tensor, so that positions and masks "
                f"would be those of {keys.shape[-2]} tokens",
                help="start from `past_key_values=DynamicCache()`, without a config, where the "
                "prompt is read: its layers hold all tokens, and the model masks those outside of "
                "the window",
                status=2,
            )


def know_outputs(structure: Tree) -> None:
    """Make the classes of transformers' outputs in a tree known, where this process has them."""
    outputs: Any = getattr(sys.modules.get("transformers.utils"), "ModelOutput", None)
    pending = [structure] if outputs else []
    while pending:
        found = pending.pop()
        pending += children(found)
        if isinstance(found, Named) and not tree.is_known(found.name):
            module, _, name = found.name.rpartition(".")
            cls = getattr(sys.modules.get(module), name, None)
            if isinstance(cls, type) and issubclass(cls, outputs):
                tree.register(cls, _output(cls, found.name))


def _output(cls: Any, name: str) -> Structure:
    return Structure(
        name,
        lambda value: (list(value.values()), json.dumps(list(value))),
        lambda parts, context: cls(**dict(zip(json.loads(context), parts, strict=True))),
    )


def forgetful_note(structure: Tree) -> list[str]:
    """What to tell of a cache with windows among the results: it does not say what it forgot."""
    pending = [structure]
    while pending:
        found = pending.pop()
        pending += children(found)
        if isinstance(found, Named) and found.name == CACHE:
            context = json.loads(found.context)
            if isinstance(context, dict):
                window = next(w for w in context["windows"] if w is not None)
                return [
                    f"layers of the returned cache hold the last {window - 1} tokens and not how "
                    "many there were: count them yourself, or trace with "
                    "`past_key_values=DynamicCache()`, whose layers hold all tokens"
                ]
    return []
