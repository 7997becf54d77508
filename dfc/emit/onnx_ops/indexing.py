"""Reading and writing by index: gathers, scatters, masks, searches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnxscript import ir

from dfc.emit.onnx_builder import Builder, Call, NoTranslation, Val
from dfc.emit.onnx_ops.arithmetic import operand, promoted, work_dtype
from dfc.emit.onnx_ops.registry import translates
from dfc.emit.onnx_types import D, onnx_dtype
from dfc.ir.expr import Expr

Index = tuple[Val | None, ...]


def _expanded_masks(b: Builder, indices: Sequence[Val | None]) -> list[tuple[Val | None, int]]:
    """Index tensors with their ranks; a boolean mask becomes one tensor for each of its axes."""
    found: list[tuple[Val | None, int]] = []
    for v in indices:
        if v is None:
            found.append((None, 0))
        elif v.dtype in (D.BOOL, D.UINT8):
            rank = b.rank(v)
            where = b.op("NonZero", b.cast(v, D.BOOL))  # rank x count
            found.extend((b.op("Gather", where, i, axis=0), 1) for i in range(rank))
        else:
            found.append((b.cast(v, D.INT64), b.rank(v)))
    return found


def _positive(b: Builder, at: Val, size: Any) -> Val:
    """Negative positions counted from the end."""
    return b.op("Where", b.op("Less", at, 0), b.op("Add", at, b.lift(size)), at)


@translates("index.Tensor", "_unsafe_index.Tensor")
@translates("index.Tensor", complex=True)
def index(b: Builder, x: Val, indices: Index, call: Call) -> Val:
    """Advanced indexing: the indexed axes, made neighbours, are read by GatherND."""
    if any(v is not None and v.dtype in (D.BOOL, D.UINT8) and b.rank(v) == 0 for v in indices):
        raise NoTranslation("")
    tensors = _expanded_masks(b, indices)
    rank = b.rank(x)
    used = [i for i, (v, _) in enumerate(tensors) if v is not None]
    if not used:
        return x
    if len(used) == 1:
        found = b.op("Gather", x, tensors[used[0]][0], axis=used[0])
        return found
    rest = [i for i in range(rank) if i not in used]
    tail = [rank] if b.is_complex(x) else []
    moved = b.transpose(x, [*used, *rest, *tail])
    parts = [(tensors[i][0], tensors[i][1]) for i in used]
    wide = max(r for _, r in parts)
    at = _joined(b, [v for v, _ in parts if v is not None])
    found = b.op("GatherND", moved, at)
    if used == list(range(used[0], used[-1] + 1)) and used[0] > 0:
        # neighbouring indices: their axes stay where they were
        lead = used[0]
        total = wide + len(rest)
        perm = [*range(wide, wide + lead), *range(wide), *range(wide + lead, total)]
        found = b.transpose(found, perm + ([total] if tail else []))
    return found


def _joined(b: Builder, parts: Sequence[Val]) -> Val:
    """Index tensors broadcast to one shape, side by side in a last axis."""
    shape = b.op("Shape", parts[0])
    total = parts[0]
    for p in parts[1:]:
        total = b.op("Add", total, p)
    shape = b.op("Shape", total)
    return b.op("Concat", *(b.unsqueeze(b.op("Expand", p, shape), -1) for p in parts), axis=-1)


@translates("index_put", "_unsafe_index_put", "_index_put_impl")
def index_put(b: Builder, x: Val, indices: Index, values: Val, accumulate: bool, call: Call) -> Val:
    rank = b.rank(x)
    if len(indices) == 1 and indices[0] is not None and indices[0].dtype == D.BOOL:
        mask = indices[0]
        if b.type(values).numel == 1 and not accumulate:
            extra = rank - b.rank(mask)
            if extra:
                mask = b.unsqueeze(mask, *range(b.rank(mask), rank))
            if b.rank(values):
                values = b.reshape(values, [])
            dtype = work_dtype(x.dtype)  # type: ignore[arg-type]
            return b.op("Where", mask, b.cast(values, dtype), b.cast(x, dtype))
    tensors = _expanded_masks(b, indices)
    used = [i for i, (v, _) in enumerate(tensors) if v is not None]
    shape = b.type(x).shape
    if not used:
        raise NoTranslation("")
    neighbours = used == list(range(used[0], used[-1] + 1))
    rest = [i for i in range(rank) if i not in used]
    perm = [*used, *rest]
    at = _joined(b, [_positive(b, tensors[i][0], shape[i]) for i in used])  # type: ignore[arg-type]
    wide = max(tensors[i][1] for i in used)
    # the shape of what is written, as indexing would give it
    index_shape = b.op("Slice", b.op("Shape", at), [0], [wide], [0])
    moved = b.transpose(x, perm)
    rest_shape = b.op("Slice", b.op("Shape", moved), [len(used)], [rank], [0])
    lead = used[0] if neighbours else 0
    if lead:
        front = b.op("Slice", rest_shape, [0], [lead], [0])
        back = b.op("Slice", rest_shape, [lead], [rank], [0])
        given = b.op("Expand", values, b.op("Concat", front, index_shape, back, axis=0))
        total = wide + len(rest)
        given = b.transpose(
            given, [*range(lead, lead + wide), *range(lead), *range(lead + wide, total)]
        )
    else:
        given = b.op("Expand", values, b.op("Concat", index_shape, rest_shape, axis=0))
    moved, given = _scatter_ready(b, moved, accumulate), _scatter_ready(b, given, accumulate)
    found = b.op("ScatterND", moved, at, given, reduction="add" if accumulate else None)
    back_perm = [perm.index(i) for i in range(rank)]
    return b.cast(b.transpose(found, back_perm), onnx_dtype(call.result))


def _scatter_ready(b: Builder, x: Val, reducing: bool) -> Val:
    """ONNX Runtime adds in few types while scattering."""
    return b.cast(x, work_dtype(x.dtype)) if reducing else x  # type: ignore[arg-type]


@translates("gather")
def gather(b: Builder, x: Val, dim: int, index: Val) -> Val:
    if b.rank(x) == 0:
        return x if b.rank(index) == 0 else b.op("Expand", b.reshape(x, [1]), b.op("Shape", index))
    return b.op("GatherElements", x, index, axis=dim % b.rank(x))


@translates("take_along_dim")
def take_along_dim(b: Builder, x: Val, indices: Val, dim: Any, call: Call) -> Val:
    if dim is None:
        return b.op("Gather", b.reshape(x, [-1]), b.reshape(indices, [-1]), axis=0)
    axis = dim % b.rank(x)
    rank = b.rank(x)
    sx, si = list(b.type(x).shape), list(b.type(indices).shape)
    ax = [call.result.shape[i] if i != axis else sx[i] for i in range(rank)]
    ai = [call.result.shape[i] if i != axis else si[i] for i in range(rank)]
    wide_x = x if ax == sx else b.expand(x, ax)
    wide_i = indices if ai == si else b.expand(indices, ai)
    return b.op("GatherElements", wide_x, wide_i, axis=axis)


@translates("take")
def take(b: Builder, x: Val, index: Val) -> Val:
    return b.op("Gather", b.reshape(x, [-1]), index, axis=0)


@translates("index_select")
@translates("index_select", complex=True)
def index_select(b: Builder, x: Val, dim: int, index: Val) -> Val:
    if b.rank(x) == 0:
        return x
    if b.rank(index) == 0:
        index = b.reshape(index, [1])
    return b.op("Gather", x, index, axis=dim % b.rank(x))


_REDUCTIONS = {"sum": "add", "add": "add", "prod": "mul", "multiply": "mul", "amax": "max",
               "amin": "min"}  # fmt: skip


@translates("scatter.src", "scatter.value", "scatter_add", "scatter.reduce",
            "scatter.value_reduce", "scatter_reduce.two")  # fmt: skip
def scatter(b: Builder, x: Val, dim: int, index: Val, call: Call) -> Val:
    a = call.attributes
    rank = b.rank(x)
    src = call.operands[2] if len(call.operands) > 2 else None
    dtype = onnx_dtype(call.result)
    kind = a.get("reduce")
    if call.op == "aten.scatter_add.default":
        kind = "sum"
    reduction = _REDUCTIONS.get(kind) if kind else None
    if kind and reduction is None and kind != "mean":
        raise NoTranslation("")
    if kind == "mean":
        return _scatter_mean(b, x, dim, index, call)
    shape_i = b.type(index).shape
    if src is None:
        src = b.op("Expand", operand(b, a["value"], dtype), b.op("Shape", index))
    else:
        assert not isinstance(src, tuple)
        shape_s = b.type(src).shape
        if shape_s != shape_i:  # only the part that the index covers is read
            src = b.op("Slice", src, [0] * rank, b.op("Shape", index), list(range(rank)))
    zero_d = rank == 0
    if zero_d:
        x, index, src = b.reshape(x, [1]), b.reshape(index, [1]), b.reshape(src, [1])
    axis = dim % max(rank, 1)
    work = work_dtype(dtype) if reduction else dtype
    x, src = b.cast(x, work), b.cast(src, work)
    if a.get("include_self") is False and reduction:
        neutral = _neutral(b, reduction, call, work)
        blank = b.op("Expand", neutral, b.op("Shape", index))
        x = b.op("ScatterElements", x, index, blank, axis=axis)
    found = b.op("ScatterElements", x, index, src, axis=axis, reduction=reduction)
    return b.reshape(found, []) if zero_d else found


def _neutral(b: Builder, reduction: str, call: Call, work: ir.DataType) -> Val:
    import torch

    dtype = call.result.dtype
    if reduction in ("add", "mul"):
        return b.const(0 if reduction == "add" else 1, work)
    if dtype.is_float:
        return b.const(float("-inf") if reduction == "max" else float("inf"), work)
    info = torch.iinfo(dtype.to_torch())
    return b.const(info.min if reduction == "max" else info.max, work)


def _scatter_mean(b: Builder, x: Val, dim: int, index: Val, call: Call) -> Val:
    """Sums and counts of the same scatter."""
    a = call.attributes
    src = call.operands[2]
    assert not isinstance(src, tuple) and src is not None
    rank = b.rank(x)
    axis = dim % max(rank, 1)
    if not call.result.dtype.is_float or rank == 0:
        raise NoTranslation("")
    if b.type(src).shape != b.type(index).shape:
        src = b.op("Slice", src, [0] * rank, b.op("Shape", index), list(range(rank)))
    one = b.op("Expand", b.like(1.0, x), b.op("Shape", index))
    zero = b.op("Expand", b.like(0.0, x), b.op("Shape", index))
    start = x
    count = b.op("Expand", b.like(1.0, x), b.op("Shape", x))
    if a.get("include_self") is False:
        start = b.op("ScatterElements", x, index, zero, axis=axis)
        count = b.op("ScatterElements", count, index, zero, axis=axis)
    total = b.op("ScatterElements", start, index, src, axis=axis, reduction="add")
    count = b.op("ScatterElements", count, index, one, axis=axis, reduction="add")
    return b.op("Div", total, b.op("Max", count, b.like(1.0, x)))


@translates("index_add", "index_copy", "index_fill.int_Scalar", "index_fill.int_Tensor")
def index_add(b: Builder, x: Val, dim: int, index: Val, call: Call) -> Val:
    """A scatter whose index is the same along the other axes."""
    a = call.attributes
    rank = b.rank(x)
    if rank == 0:
        raise NoTranslation("")
    axis = dim % rank
    dtype = onnx_dtype(call.result)
    base = call.op.split(".")[1]
    line = b.reshape(b.cast(index, D.INT64), [-1 if i == axis else 1 for i in range(rank)])
    if base == "index_fill":
        value = call.operands[2] if len(call.operands) > 2 else None
        value = a["value"] if value is None else value
        shape = list(b.type(x).shape)
        shape[axis] = b.type(index).shape[0] if b.rank(index) else 1
        src = b.expand(operand(b, value, dtype), shape)
    else:
        found = call.operands[2]
        assert not isinstance(found, tuple) and found is not None
        src = found
    if base == "index_add" and a.get("alpha", 1) != 1:
        src = b.op("Mul", src, b.like(a["alpha"], src))
    spread = b.op("Expand", line, b.op("Shape", src))
    if base != "index_add":
        return b.op("ScatterElements", x, spread, src, axis=axis)
    work = work_dtype(dtype)
    return b.op(
        "ScatterElements", b.cast(x, work), spread, b.cast(src, work), axis=axis, reduction="add"
    )


@translates("select_scatter", "slice_scatter")
def slice_scatter(b: Builder, x: Val, src: Val, dim: int, call: Call) -> Val:
    """Everything before, what is written, everything after; with a step, by position."""
    a = call.attributes
    rank = b.rank(x)
    axis = dim % rank
    size = b.type(x).shape[axis]
    if "select" in call.op:
        at = a["index"]
        at = (
            b.op(
                "Where",
                b.op("Less", b.lift(at), 0),
                b.op("Add", b.lift(at), b.lift(size)),
                b.lift(at),
            )
            if isinstance(at, Expr)
            else (at + size if at < 0 else at)
        )
        src = b.unsqueeze(src, axis)
        here = b.op("Equal", b.arange(size), b.lift(at))
        mask = b.reshape(here, [-1 if i == axis else 1 for i in range(rank)])
        work = work_dtype(x.dtype)  # type: ignore[arg-type]
        return b.op("Where", mask, b.cast(src, work), b.cast(x, work))
    start, end, step = a.get("start"), a.get("end"), a.get("step", 1)
    start = 0 if start is None else start
    end = 2**63 - 1 if end is None else end
    positions = b.op("Slice", b.arange(size), b.vec(start), b.vec(end), [0], b.vec(step))
    line = b.reshape(positions, [-1 if i == axis else 1 for i in range(rank)])
    spread = b.op("Expand", line, b.op("Shape", src))
    return b.op("ScatterElements", x, spread, b.cast(src, x.dtype), axis=axis)  # type: ignore[arg-type]


@translates("masked_scatter")
def masked_scatter(b: Builder, x: Val, mask: Val, source: Val, call: Call) -> Val:
    """The n-th true place takes the source's n-th element."""
    shape = call.result.shape
    if b.type(mask).shape != shape:
        mask = b.expand(mask, shape)
    if b.type(x).shape != shape:
        x = b.expand(x, shape)
    flat = b.reshape(mask, [-1])
    order = b.op("CumSum", b.cast(flat, D.INT64), 0)
    at = b.op("Max", b.op("Sub", order, 1), 0)
    # an element where the source may be empty
    padded = b.op("Concat", b.reshape(source, [-1]), b.reshape(b.like(0, source), [1]), axis=0)
    taken = b.op("Reshape", b.op("Gather", padded, at, axis=0), b.op("Shape", x))
    work = work_dtype(x.dtype)  # type: ignore[arg-type]
    return b.op("Where", mask, b.cast(taken, work), b.cast(x, work))


@translates("masked_select")
def masked_select(b: Builder, x: Val, mask: Val, call: Call) -> Val:
    if b.type(x).shape != b.type(mask).shape:
        total = (
            b.op("Add", b.cast(mask, D.INT32), b.op("Mul", b.cast(b.op("Equal", x, x), D.INT32), 0))
            if False
            else None
        )
        del total
        one = b.op("Expand", b.const(True, D.BOOL), b.op("Shape", x))
        mask = b.op("And", mask, one)
        x = b.op("Expand", x, b.op("Shape", mask))
    return b.op("Compress", b.reshape(x, [-1]), b.reshape(mask, [-1]), axis=0)


@translates("nonzero")
def nonzero(b: Builder, x: Val) -> Val:
    if b.rank(x) == 0:
        flat = b.op("NonZero", b.reshape(b.cast(x, D.BOOL), [1]))
        return b.op("Slice", b.transpose(flat, [1, 0]), [0], [0], [1])
    return b.transpose(b.op("NonZero", b.cast(x, D.BOOL)), [1, 0])


@translates("nonzero_numpy")
def nonzero_numpy(b: Builder, x: Val, call: Call) -> list[Val]:
    found = b.op("NonZero", b.cast(x, D.BOOL))
    return [b.op("Gather", found, i, axis=0) for i in range(len(call.results))]


@translates("count_nonzero", "count_nonzero.dim_IntList")
def count_nonzero(b: Builder, x: Val, call: Call) -> Val:
    from dfc.emit.onnx_ops.reduction import axes_of, reduce

    flags = b.cast(b.cast(x, D.BOOL), D.INT64)
    return reduce(b, "ReduceSum", flags, axes_of(call.attributes.get("dim"), b.rank(x)), False)


@translates("item", "_local_scalar_dense")
def item(b: Builder, x: Val) -> Val:
    return b.reshape(x, []) if b.rank(x) else b.op("Identity", x)


@translates("one_hot")
def one_hot(b: Builder, x: Val, num_classes: Any, call: Call) -> Val:
    if isinstance(num_classes, int) and num_classes < 0:
        top = b.op("ReduceMax", x, keepdims=0)
        classes = b.op("Range", 0, b.op("Add", top, 1), 1)
    else:
        classes = b.arange(num_classes)
    return b.cast(b.op("Equal", b.unsqueeze(x, -1), classes), D.INT64)


@translates("bucketize.Tensor", "searchsorted.Tensor", "bucketize.Scalar", "searchsorted.Scalar")
def bucketize(b: Builder, x: Any, call: Call) -> Val:
    """How many boundaries lie below (or at) each value."""
    a = call.attributes
    from dfc.emit.onnx_nodes import onnx_info

    given: dict[str, Any] = {
        **a,
        **{k: v for k, v in zip(onnx_info(call.op), call.operands, strict=True) if v is not None},
    }
    values: Any = given["self"]
    edges: Any = given["boundaries" if "bucketize" in call.op else "sorted_sequence"]
    edge_rank = b.rank(edges)
    if given.get("sorter") is not None:
        edges = b.op("GatherElements", edges, given["sorter"], axis=-1)
    right = bool(a.get("right")) or a.get("side") == "right"
    dtype = work_dtype(promoted(b, edges, values))
    edges, values = b.cast(edges, dtype), operand(b, values, dtype)
    if edge_rank > 1:
        edges = b.unsqueeze(edges, -2)  # one row of edges for each row of values
    passed = b.op("LessOrEqual" if right else "Less", edges, b.unsqueeze(values, -1))
    if dtype in (D.FLOAT, D.DOUBLE):
        passed = b.op("Or", passed, b.op("IsNaN", b.unsqueeze(values, -1)))
    return b.op("ReduceSum", b.cast(passed, D.INT64), [-1], keepdims=0)


@translates("repeat_interleave.self_int", "repeat_interleave.self_Tensor",
            "repeat_interleave.Tensor")  # fmt: skip
def repeat_interleave(b: Builder, x: Val, repeats: Any, dim: Any, call: Call) -> Val:
    """Element i is written as often as its count: read by the position among the running totals."""
    if call.op == "aten.repeat_interleave.Tensor":
        counts, data = x, None
    else:
        counts, data = repeats, x
    if data is not None and dim is None:
        data, dim = b.reshape(data, [-1]), 0
    if not isinstance(counts, ir.Value):
        assert data is not None
        rank = b.rank(x) if call.attributes.get("dim") is not None else 1
        axis = dim % rank
        size = b.op("Shape", data, start=axis, end=axis + 1)
        total = b.op("Squeeze", b.op("Mul", size, b.vec(counts)), [0])
        at = b.op("Div", b.op("Range", 0, total, 1), b.lift(counts))
        return b.op("Gather", data, at, axis=axis)
    counts = b.cast(counts, D.INT64)
    if data is not None and b.type(repeats).numel == 1:
        rank = b.rank(x) if call.attributes.get("dim") is not None else 1
        size = b.op("Shape", data, start=dim % rank, end=dim % rank + 1)
        counts = b.op("Expand", b.reshape(counts, [1]), size)
    ends = b.op("CumSum", counts, 0)
    total = b.op("ReduceSum", counts, keepdims=0)
    places = b.op("Range", 0, total, 1)
    before = b.op("LessOrEqual", ends, b.unsqueeze(places, 1))
    at = b.op("ReduceSum", b.cast(before, D.INT64), [1], keepdims=0)
    if data is None:
        return at
    rank = b.rank(x) if call.attributes.get("dim") is not None else 1
    return b.op("Gather", data, at, axis=dim % rank)


@translates("bincount")
def bincount(b: Builder, x: Val, weights: Val | None, minlength: Any) -> Val:
    at = b.cast(x, D.INT64)
    size = b.op(
        "ReduceMax", b.op("Concat", b.op("Add", at, 1), b.vec(minlength), axis=0), keepdims=0
    )
    dtype = D.INT64 if weights is None else weights.dtype
    zeros = b.op("Expand", b.const(0, dtype), b.reshape(size, [1]))  # type: ignore[arg-type]
    given = (
        weights if weights is not None else b.op("Expand", b.const(1, D.INT64), b.op("Shape", at))
    )
    return b.op("ScatterElements", zeros, at, given, axis=0, reduction="add")


@translates("diagonal_scatter")
def diagonal_scatter(b: Builder, x: Val, src: Val, offset: int, dim1: int, dim2: int) -> Val:
    rank = b.rank(x)
    d1, d2 = dim1 % rank, dim2 % rank
    if rank != 2 or d1 > d2:
        raise NoTranslation("")
    n, m = b.type(x).shape
    r, c = b.unsqueeze(b.arange(n), 1), b.arange(m)
    mask = b.op("Equal", c, b.op("Add", r, offset))
    at = b.op("Sub", b.unsqueeze(b.arange(n), 1), max(-offset, 0))
    length = b.type(src).shape[0]
    at = b.op("Min", b.op("Max", at, 0), b.lift(length - 1))
    rows = b.op("Gather", src, b.squeeze(at, 1), axis=0)
    return b.op("Where", mask, b.unsqueeze(rows, 1), x)


@translates("diag_embed", "diag")
def diag_embed(b: Builder, x: Val, call: Call) -> Val:
    a = call.attributes
    offset = a.get("offset", a.get("diagonal", 0))
    rank = call.result.rank
    if call.op == "aten.diag.default" and b.rank(x) == 2:
        raise NoTranslation("")
    d1, d2 = a.get("dim1", -2) % rank, a.get("dim2", -1) % rank
    if (d1, d2) != (rank - 2, rank - 1):
        raise NoTranslation("")
    n = call.result.shape[-1]
    r, c = b.unsqueeze(b.arange(n), 1), b.arange(n)
    mask = b.op("Equal", c, b.op("Add", r, offset))
    wide = b.unsqueeze(x, -1 if offset >= 0 else -2)
    pads = abs(offset)
    if pads:
        zeros = [0] * (2 * rank)
        zeros[2 * rank - 2 if offset >= 0 else 2 * rank - 1] = pads
        wide = b.op("Pad", wide, zeros, b.like(0, x))
    work = work_dtype(x.dtype)  # type: ignore[arg-type]
    return b.op("Where", mask, b.cast(wide, work), b.const(0, work))
