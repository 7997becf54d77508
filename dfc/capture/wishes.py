"""What the user said of sizes, and the examples and specs that torch.export is given for it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import Dim

from dfc.capture.call_structure import flat_leaves
from dfc.capture.refusal import bad_call, first_line
from dfc.errors import DfcError
from dfc.ir.expr import Size, symbol
from dfc.ir.types import DTYPES
from dfc.ops.symbolic import identifier

DynamicShapes = Mapping[str, Any] | Sequence[Any] | None
_RESERVED = frozenset({"inf", "nan", "True", "False", "None", "in"})


@dataclass(frozen=True)
class DimWish:
    """What the user said of one dimension of one input."""

    name: str | None
    low: int = 1
    high: int | None = None
    size: Size | None = None  # for a derived dimension such as `4*h`: the size in terms of `h`


@dataclass
class Request:
    """One tracing: the model, flat examples, and the wishes for their dimensions."""

    model: torch.nn.Module
    leaves: list[Any]
    spec: Any
    wishes: list[dict[int, DimWish]]
    notes: list[str] = field(default_factory=list)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = self.spec.unflatten(self.leaves)
        return args, kwargs


def wishes_of(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], shapes: DynamicShapes
) -> list[dict[int, DimWish]]:
    """The wishes for each flat leaf."""
    leaves, _ = flat_leaves(args, dict(kwargs))
    found: list[dict[int, DimWish]] = [{} for _ in leaves]
    if not shapes:
        return found
    from torch.export.dynamic_shapes import _combine_args, _tree_map_with_path

    try:
        combined: Any = _combine_args(model, tuple(args), dict(kwargs))
    except (TypeError, ValueError) as e:
        raise bad_call(model, e) from e
    if isinstance(shapes, Mapping) and "args" not in shapes:
        unknown = [k for k in shapes if k not in combined]
        if unknown and len(combined) and not (set(combined) & set(shapes)):
            raise DfcError(
                "T031",
                f"dynamic_shapes names `{unknown[0]}`, the arguments are {', '.join(combined)}",
                status=2,
            )  # fmt: skip
        shapes = {k: shapes.get(k) for k in combined}
    elif not isinstance(shapes, Mapping):
        combined = type(shapes)(combined.values())  # type: ignore[call-arg]
    by_id = {id(x): i for i, x in reversed(list(enumerate(leaves))) if isinstance(x, torch.Tensor)}
    taken: list[int] = []

    def visit(path: Any, leaf: Any, spec: Any) -> None:
        if isinstance(leaf, torch.Tensor) and spec:
            at = by_id[id(leaf)]
            # the same tensor passed twice keeps one entry a place
            while at in taken and any(x is leaf for x in leaves[at + 1 :]):
                at = next(i for i in range(at + 1, len(leaves)) if leaves[i] is leaf)
            taken.append(at)
            found[at] = _tensor_wishes(leaf, spec)
        elif isinstance(leaf, int) and spec is not None and not isinstance(leaf, bool):
            at = next(i for i, x in enumerate(leaves) if x is leaf and i not in taken)
            taken.append(at)
            found[at] = {-1: _wish(spec) or DimWish(None)}

    try:
        _tree_map_with_path(visit, combined, shapes, tree_name="inputs")
    except DfcError:
        raise
    except Exception as e:  # torch raises its own UserError class among others
        raise DfcError(
            "T031", f"dynamic_shapes does not fit the arguments: {first_line(e)}",
            help="give the same nesting as the arguments, with {dimension: Dim} at each tensor",
            status=2,
        ) from e  # fmt: skip
    return found


def _tensor_wishes(x: torch.Tensor, spec: Any) -> dict[int, DimWish]:
    items = spec.items() if isinstance(spec, Mapping) else enumerate(spec)
    found: dict[int, DimWish] = {}
    for dim, wish in items:
        if not isinstance(dim, int) or not -x.dim() <= dim < x.dim():
            raise DfcError(
                "T031",
                f"dynamic_shapes names dimension {dim} of a tensor of rank {x.dim()}",
                status=2,
            )
        made = _wish(wish)
        if made is not None:
            found[dim % x.dim()] = made
    return found


def _wish(wish: Any) -> DimWish | None:
    if wish is None or isinstance(wish, int):
        return None
    if isinstance(wish, str):
        return DimWish(_safe(wish))
    if type(wish).__name__ == "_DimHint":
        if "STATIC" in repr(wish):
            return None
        return DimWish(None, wish.min if wish.min is not None else 1, wish.max)
    name = getattr(wish, "__name__", None)
    if not isinstance(name, str):
        raise DfcError("T031", f"dynamic_shapes holds {wish!r}, which is no dimension", status=2)
    low, high = getattr(wish, "min", 1), getattr(wish, "max", None)
    root = getattr(wish, "root", None)
    if root is not None:  # a derived dimension, `2*B`
        inner = _wish(root)
        assert inner is not None and inner.name is not None
        return DimWish(inner.name, inner.low, inner.high, wish.fn(symbol(inner.name)))
    high = None if high is None or not isinstance(high, int) or high >= 2**62 else high
    return DimWish(_safe(name), max(int(low), 1), high)


def _safe(name: str) -> str:
    name = identifier(name)
    reserved = name in _RESERVED or name in DTYPES or re.match(r"u[fb]?\d+\Z", name)
    return f"{name}_" if reserved else name


def enlarge(request: Request) -> Request:
    """Examples in which no dynamic dimension has size 1: torch would take the 1 for a constant."""
    small: dict[str, DimWish] = {}
    used = {int(s) for x in request.leaves if isinstance(x, torch.Tensor) for s in x.shape}
    plan: list[tuple[int, int, str]] = []
    for i, wishes in enumerate(request.wishes):
        for dim, wish in wishes.items():
            key = wish.name or f"{i}.{dim}"
            if (
                wish.size is None
                and dim >= 0
                and request.leaves[i].shape[dim] == 1
                and (wish.high is None or wish.high > 1)
            ):
                small[key] = wish
                plan.append((i, dim, key))
    if not plan:
        return request
    sizes: dict[str, int] = {}
    for key, wish in small.items():
        free = [n for n in range(max(2, wish.low), 64) if n not in used]
        fits = [n for n in free if wish.high is None or n <= wish.high]
        sizes[key] = fits[0] if fits else wish.high or 2
        used.add(sizes[key])
    leaves = list(request.leaves)
    for i, dim, key in plan:
        leaves[i] = leaves[i].detach().repeat_interleave(sizes[key], dim)
    return Request(request.model, leaves, request.spec, request.wishes, request.notes)


def torch_shapes(request: Request) -> Any:
    """The wishes in torch's form, every dimension AUTO."""
    specs: list[Any] = []
    for x, wishes in zip(request.leaves, request.wishes, strict=True):
        if -1 in wishes:
            specs.append(Dim.DYNAMIC)
        elif not isinstance(x, torch.Tensor) or not wishes:
            specs.append(None)
        else:
            specs.append(
                {
                    d: Dim.AUTO(min=w.low if w.low > 1 else None, max=w.high)
                    if w.size is None
                    else Dim.AUTO
                    for d, w in wishes.items()
                }
            )
    if not any(s is not None for s in specs):
        return None
    args, kwargs = _spec_tree(request.spec, iter(specs))
    return _combined(request, args, kwargs)


def _spec_tree(spec: Any, leaves: Iterator[Any]) -> Any:
    """Specs in the nesting of the arguments; torch wants instances of classes as lists."""
    if spec.is_leaf():
        return next(leaves)
    parts = [_spec_tree(child, leaves) for child in spec.children()]
    if spec.type is dict:
        return dict(zip(spec.context, parts, strict=True))
    return tuple(parts) if spec.type is tuple else parts


def _combined(request: Request, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Specs by argument name; a `*args` tuple under its own name."""
    from torch.export.dynamic_shapes import _combine_args

    example_args, example_kwargs = request.arguments()
    names = list(_combine_args(request.model, example_args, example_kwargs))
    signature = inspect.signature(request.model.forward)
    found: dict[str, Any] = {}
    pending = list(args)
    for p in signature.parameters.values():
        if p.kind is p.VAR_POSITIONAL and p.name in names:
            found[p.name] = tuple(pending)
            pending = []
        elif p.name in names and pending and p.name not in kwargs:
            found[p.name] = pending.pop(0)
    for k, v in kwargs.items():
        found[k] = v
    return {n: found.get(n) for n in names}
