"""Views and rearrangements: nothing is computed, elements only move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dfc.emit.onnx_builder import Builder, Call, NoTranslation, Val
from dfc.emit.onnx_ops.registry import translates
from dfc.ir.expr import Expr
from dfc.ir.graph import Value
from dfc.ir.types import TensorType

INT_MAX = 2**63 - 1


def reshape_to(b: Builder, x: Val, shape: Sequence[Any], tail: Sequence[int] = ()) -> Val:
    """Reshape to a type's sizes; `tail` is added for complex tensors.

    Sizes stay constants where they can: 0 copies a size that did not change, -1 stands for the
    one that is left. Neither is used where a size may be 0 at run time.
    """
    shape = [*shape, *tail]
    symbolic = [i for i, s in enumerate(shape) if isinstance(s, Expr)]
    if not symbolic:
        return b.reshape(x, shape)
    if not any(isinstance(s, int) and s == 0 for s in shape):
        known = x.meta.get("type")
        sizes = known.shape if isinstance(known, TensorType) else ()
        left = [i for i in symbolic if not (i < len(sizes) and sizes[i] == shape[i])]
        never_zero = all(_positive(b, shape[i]) for i in symbolic)
        if len(symbolic) == 1 and len(left) <= 1:
            return b.op("Reshape", x, [-1 if isinstance(s, Expr) else s for s in shape])
        if len(left) <= 1 and never_zero:
            plain = [
                s if not isinstance(s, Expr) else -1 if i in left else 0
                for i, s in enumerate(shape)
            ]
            return b.op("Reshape", x, plain)
    return b.op("Reshape", x, b.sizes.vector(b, shape), allowzero=1)


def _positive(b: Builder, size: Any) -> bool:
    from dfc.ir.expr import symbol_kind

    return isinstance(size, Expr) and all(
        not s.startswith("u") or (symbol_kind(s) == "int" and not s[1:].isdigit())
        for s in size.symbols
    )


def tail(b: Builder, x: Val) -> tuple[int, ...]:
    return (2,) if b.is_complex(x) else ()


_RESHAPES = (
    "view", "reshape", "_unsafe_view", "flatten.using_ints", "unflatten.int", "view_as",
    "squeeze", "squeeze.dim", "squeeze.dims", "unsqueeze", "ravel", "_reshape_alias",
    "atleast_1d", "atleast_2d", "atleast_3d", "reshape_as", "view_copy",
)  # fmt: skip


@translates(*_RESHAPES)
@translates(*_RESHAPES, complex=True)
def reshape(b: Builder, x: Val, call: Call) -> Val:
    if isinstance(call.operands[0], tuple):
        raise NoTranslation("")
    base = call.op.split(".")[1]
    if base == "unsqueeze":
        dim = call.attributes["dim"] % call.result.rank
        return b.unsqueeze(x, dim)
    if base == "squeeze":
        before = b.type(x).shape
        dims = call.attributes.get("dim", tuple(range(len(before))))
        dims = dims if isinstance(dims, tuple) else (dims,)
        if any(isinstance(before[d], Expr) for d in dims if before):
            return _squeeze_at_run_time(b, x, dims, len(before), call)
        gone = sorted({d % len(before) for d in dims if before and before[d] == 1})
        if len(before) - len(gone) == call.result.rank:
            return b.squeeze(x, *gone) if gone else x
    if b.type(x).shape == call.result.shape:
        return x
    return reshape_to(b, x, call.result.shape, tail(b, x))


def _squeeze_at_run_time(b: Builder, x: Val, dims: Sequence[int], rank: int, call: Call) -> Val:
    """An axis that has size 1 in some call is gone in that call, as in PyTorch."""
    size = b.op("Shape", x)
    axes = b.array(np.array(sorted(d % rank for d in dims), np.int64))
    ones = b.op("Equal", b.op("Gather", size, axes, axis=0), 1)
    keep = b.op("Not", b.op("ScatterElements", b.op("Equal", size, -1), axes, ones, axis=0))
    found = b.op("Reshape", x, b.op("Compress", size, keep, axis=0), allowzero=1)
    found.meta["type"] = call.result
    return found


@translates("permute", "transpose.int", "t", "movedim.int", "swapaxes", "numpy_T", "mT", "adjoint",
            "movedim.intlist", "permute_copy")  # fmt: skip
@translates("permute", "transpose.int", "t", "movedim.int", "swapaxes", "numpy_T", "mT",
            "movedim.intlist", complex=True)  # fmt: skip
def permute(b: Builder, x: Val, call: Call) -> Val:
    import torch

    rank = b.rank(x)
    info = call.graph_node.info if call.graph_node is not None else None
    if info is None:
        raise NoTranslation("")
    # torch itself says which axis goes where: sizes 0, 1, 2.. tell the axes apart
    probe = torch.empty(tuple(range(2, rank + 2)), device="meta")
    args, kwargs = info.bind([probe], call.attributes, None)
    (result,) = (info.kernel(*args, **kwargs),)
    perm = [s - 2 for s in result.shape]
    return b.transpose(x, perm + [rank] * b.is_complex(x))


@translates("expand", "expand_as", "broadcast_to", "expand_copy")
@translates("expand", "expand_as", "broadcast_to", complex=True)
def expand(b: Builder, x: Val, call: Call) -> Val:
    if b.type(x).shape == call.result.shape:
        return x
    extra = call.result.rank - b.rank(x)
    if b.is_complex(x) and extra:
        wide: list[Any] = [*[1] * extra, *b.type(x).shape, 2]
        return b.expand(b.reshape(x, wide), [*call.result.shape, 2])
    shape: list[Any] = [*call.result.shape, *tail(b, x)]
    # 1 keeps a size in ONNX's two-way broadcasting, which saves computing it
    before: list[Any] = [*[1] * extra, *b.type(x).shape, *tail(b, x)]
    shape = [1 if s == t else s for s, t in zip(shape, before, strict=True)]
    return b.expand(x, shape)


@translates("clone", "contiguous", "alias", "detach", "lift_fresh_copy", "alias_copy", "dropout",
            "resolve_conj", "resolve_neg", "_conj_physical", "real", "positive",
            "feature_dropout", "alpha_dropout", "native_dropout", "lift", "detach_copy",
            "feature_alpha_dropout")  # fmt: skip
def identity(b: Builder, x: Val, call: Call) -> Val:
    if call.attributes.get("train") and call.attributes.get("p"):
        raise NoTranslation("")
    if len(call.results) > 1:
        raise NoTranslation("")
    return x


@translates("clone", "contiguous", "alias", "detach", "lift_fresh_copy", "resolve_conj",
            "resolve_neg", "positive", complex=True)  # fmt: skip
def identity_complex(b: Builder, x: Val) -> Val:
    return x


@translates("cat", "concat", "concatenate")
@translates("cat", complex=True)
def cat(b: Builder, x: tuple[Val, ...], dim: int, call: Call) -> Val:
    rank = call.result.rank
    parts = [v for v in x if not (b.rank(v) == 1 and b.type(v).shape == (0,) and rank != 1)]
    from dfc.emit.onnx_types import onnx_dtype

    wanted = onnx_dtype(call.result)
    parts = [b.cast(v, wanted) if not b.is_complex(v) and not tail_of(call) else v for v in parts]
    if len(parts) == 1:
        return parts[0]
    return b.op("Concat", *parts, axis=dim % rank)


def tail_of(call: Call) -> bool:
    return call.result.dtype.is_complex


@translates("stack")
@translates("stack", complex=True)
def stack(b: Builder, x: tuple[Val, ...], dim: int, call: Call) -> Val:
    from dfc.emit.onnx_types import onnx_dtype

    axis = dim % call.result.rank
    wanted = onnx_dtype(call.result)
    parts = [b.unsqueeze(b.cast(v, wanted), axis) for v in x]
    return parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=axis)


@translates("slice.Tensor", "slice_copy.Tensor")
@translates("slice.Tensor", complex=True)
def slice_(b: Builder, x: Val, dim: int, start: Any, end: Any, step: Any) -> Val:
    rank = b.rank(x)
    size = b.type(x).shape[dim]
    start = 0 if start is None else start
    end = INT_MAX if end is None else end
    if (
        type(start) is int
        and start == 0
        and step == 1
        and (
            end == size
            or (isinstance(end, int) and end >= (size if isinstance(size, int) else INT_MAX))
        )
    ):
        return x
    if isinstance(start, int) and isinstance(end, int) and isinstance(size, int):
        start, end = _clip(start, size), _clip(end, size)
    return b.op("Slice", x, b.vec(start), b.vec(end), [dim % rank], b.vec(step))


def _clip(i: int, size: int) -> int:
    return min(max(i + size if i < 0 else i, 0), size)


@translates("narrow")
@translates("narrow", complex=True)
def narrow(b: Builder, x: Val, dim: int, start: Any, length: Any) -> Val:
    if isinstance(start, int) and start < 0:
        start = start + b.type(x).shape[dim]
    return b.slice(x, dim % b.rank(x), start, start + length)


@translates("select.int", "select_copy.int")
@translates("select.int", complex=True)
def select(b: Builder, x: Val, dim: int, index: Any) -> Val:
    return b.op("Gather", x, b.lift(index), axis=dim % b.rank(x))


@translates("split.Tensor", "split_with_sizes", "chunk", "unsafe_split.Tensor", "split.sizes",
            "tensor_split.sections", "unsafe_chunk", "tensor_split.indices",
            "split_with_sizes_copy")  # fmt: skip
@translates("split.Tensor", "split_with_sizes", "chunk", complex=True)
def split(b: Builder, x: Val, dim: int, call: Call) -> Any:
    axis = dim % b.rank(x)
    sizes = [t.shape[axis] for t in call.results if isinstance(t, TensorType)]
    if len(sizes) == 1:
        return [x]
    return b.op("Split", x, b.sizes.vector(b, sizes), axis=axis, out=len(sizes))


@translates("unbind.int")
@translates("unbind.int", complex=True)
def unbind(b: Builder, x: Val, dim: int, call: Call) -> list[Val]:
    axis = dim % b.rank(x)
    return [b.op("Gather", x, i, axis=axis) for i in range(len(call.results))]


@translates("repeat", "tile")
@translates("repeat", complex=True)
def repeat(b: Builder, x: Val, call: Call) -> Val:
    times = next(v for v in call.attributes.values() if isinstance(v, tuple))
    extra = len(times) - b.rank(x)
    if extra < 0:
        times, extra = (1,) * -extra + tuple(times), 0
    if extra:
        x = reshape_to(b, x, [1] * extra + list(b.type(x).shape), tail(b, x))
    repeats = [*times, *([1] if tail_of(call) else [])]
    return b.op("Tile", x, b.sizes.vector(b, repeats)) if repeats else x


@translates("flip")
@translates("flip", complex=True)
def flip(b: Builder, x: Val, dims: Sequence[int]) -> Val:
    axes = [d % b.rank(x) for d in dims]
    if not axes:
        return x
    ends = [-INT_MAX] * len(axes)
    return b.op("Slice", x, [-1] * len(axes), ends, axes, [-1] * len(axes))


@translates("roll")
@translates("roll", complex=True)
def roll(b: Builder, x: Val, shifts: Sequence[Any], dims: Sequence[int], call: Call) -> Val:
    shape, has_tail = b.type(x).shape, tail(b, x)
    flat = not dims
    if flat:
        x = b.reshape(x, [-1, *has_tail])
        dims, sizes = (0,), {0: b.type(call.operands[0]).numel}  # type: ignore[arg-type]
    else:
        sizes = {d % len(shape): shape[d] for d in dims}
    for shift, d in zip(shifts, dims, strict=True):
        axis = d % max(len(shape), 1)
        size = sizes[axis]
        at = (-shift) % size if size != 0 else 0
        if type(at) is int and at == 0:
            continue
        head = b.slice(x, axis, at, INT_MAX)
        x = b.op("Concat", head, b.slice(x, axis, 0, at), axis=axis)
    return reshape_to(b, x, shape, has_tail) if flat else x


@translates("unfold")
def unfold(b: Builder, x: Val, dimension: int, size: int, step: int, call: Call) -> Val:
    """Windows of an axis, gathered: window w holds the elements w*step .. w*step + size - 1."""
    if b.rank(x) == 0:
        return b.reshape(x, [1])
    axis = dimension % b.rank(x)
    windows = b.op("Mul", b.arange(call.result.shape[axis]), step)
    at = b.op("Add", b.unsqueeze(windows, 1), b.arange(size))
    found = b.op("Gather", x, at, axis=axis)
    rank = b.rank(x) + 1
    perm = [i for i in range(rank) if i != axis + 1] + [axis + 1]
    return b.transpose(found, perm)


@translates("as_strided")
def as_strided(b: Builder, x: Val, size: Any, stride: Any, storage_offset: Any, call: Call) -> Val:
    """Elements by flat position, for a tensor that lies in memory as its shape says."""
    if not _is_dense(call):
        raise b.refuse("it reads a rearranged tensor by its strides, which are no part of a value")
    flat = b.reshape(x, [-1])
    return b.op("Gather", flat, _positions(b, size, stride, storage_offset), axis=0)


_REARRANGE = frozenset(
    [
        "transpose",
        "permute",
        "t",
        "expand",
        "slice",
        "select",
        "unfold",
        "diagonal",
        "as_strided",
        "movedim",
        "swapaxes",
    ]
)
_FRESH = frozenset(
    [
        "linear",
        "matmul",
        "mm",
        "bmm",
        "addmm",
        "cat",
        "stack",
        "embedding",
        "clone",
        "conv1d",
        "conv2d",
    ]
)


def _is_dense(call: Call) -> bool:
    """Whether nothing on the way to the operand made its strides differ from its shape's."""
    node = call.graph_node
    while node is not None and node.inputs and isinstance(node.inputs[0], Value):
        node = node.inputs[0].node
        if node is None:
            return True
        base = node.op.split(".")[1]
        if base in _FRESH:
            return True
        if base in _REARRANGE:
            return False
    return True


def _positions(b: Builder, size: Any, stride: Any, storage_offset: Any) -> Val:
    at: Val = b.lift(storage_offset or 0)  # type: ignore[assignment]
    rank = len(size)
    for axis, (n, s) in enumerate(zip(size, stride, strict=True)):
        steps = b.op("Mul", b.arange(n), b.lift(s))
        at = b.op("Add", at, b.reshape(steps, [-1 if i == axis else 1 for i in range(rank)]))
    return at


@translates("as_strided_scatter", "prims.as_strided_scatter.default")
def as_strided_scatter(
    b: Builder, x: Val, src: Val, size: Any, stride: Any, storage_offset: Any
) -> Val:
    at = b.reshape(_positions(b, size, stride, storage_offset), [-1])
    flat = b.op("ScatterElements", b.reshape(x, [-1]), at, b.reshape(src, [-1]), axis=0)
    return b.op("Reshape", flat, b.op("Shape", x))


@translates("unfold_backward")
def unfold_backward(
    b: Builder, x: Val, input_sizes: Any, dim: int, size: int, step: int, call: Call
) -> Val:
    """Windows added back where they were cut from."""
    rank = call.result.rank
    axis = dim % rank
    windows = b.type(x).shape[axis]
    whole = [*call.result.shape, size]
    whole[axis] = windows
    if list(b.type(x).shape) != whole:  # one set of windows for all
        x = b.expand(x, whole)
    at = b.op("Add", b.unsqueeze(b.op("Mul", b.arange(windows), step), 1), b.arange(size))
    back = [i for i in range(rank + 1) if i not in (axis, rank)]
    perm = [*back[:axis], axis, rank, *back[axis:]]
    shape = list(call.result.shape)
    shape[axis] = windows * size
    flat = b.op("Reshape", b.transpose(x, perm), b.sizes.vector(b, shape))
    line = b.reshape(at, [-1 if i == axis else 1 for i in range(rank)])
    index = b.op("Expand", line, b.op("Shape", flat))
    blank = b.expand(b.like(0, x), call.result.shape)
    return b.op("ScatterElements", blank, index, flat, axis=axis, reduction="add")


@translates("diagonal", "diagonal_copy")
def diagonal(b: Builder, x: Val, offset: int, dim1: int, dim2: int, call: Call) -> Val:
    """Move both axes to the end, flatten them, and gather the diagonal's positions."""
    rank = b.rank(x)
    d1, d2 = dim1 % rank, dim2 % rank
    shape = b.type(x).shape
    rest = [i for i in range(rank) if i not in (d1, d2)]
    moved = b.transpose(x, [*rest, d1, d2])
    length = call.result.shape[-1]
    columns = shape[d2]
    start = offset if offset >= 0 else -offset * columns
    at = b.op("Add", b.op("Mul", b.arange(length), b.lift(columns + 1)), b.lift(start))
    flat = (
        b.reshape(moved, [*(shape[i] for i in rest), -1])
        if all(isinstance(shape[i], int) for i in rest)
        else b.op(
            "Reshape", moved, b.sizes.vector(b, [*(shape[i] for i in rest), shape[d1] * columns])
        )
    )
    return b.op("Gather", flat, at, axis=len(rest))


@translates("meshgrid", "meshgrid.indexing", "broadcast_tensors")
def meshgrid(b: Builder, x: tuple[Val, ...], call: Call) -> list[Val]:
    if "meshgrid" not in call.op:
        return [
            b.expand(v, t.shape)
            for v, t in zip(x, call.results, strict=True)
            if isinstance(t, TensorType)
        ]
    rank = len(x)
    axes = list(range(rank))
    if call.attributes.get("indexing") == "xy" and rank > 1:
        axes[0], axes[1] = 1, 0
    found = []
    for v, axis, t in zip(x, axes, call.results, strict=True):
        assert isinstance(t, TensorType)
        line = b.reshape(v, [-1 if i == axis else 1 for i in range(rank)])
        found.append(b.expand(line, t.shape))
    return found
