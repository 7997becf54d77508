"""How concats, splits, slices, pads and shuffles treat dimensions: parts that lie side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dfc.compress.axes import Axis, cut, find, freeze, leaf, product, quotient, refine, total, unite
from dfc.compress.dimensions import Analysis, Dims, place, rule, short
from dfc.ir.expr import Size
from dfc.ir.graph import Node


@rule("cat", "concat", "concatenate")
def cat(a: Analysis, node: Node) -> Sequence[Dims] | None:
    (values,) = node.inputs
    assert isinstance(values, tuple)
    parts = [a.of(v) for v in values if v is not None]
    rank = node.result.tensor_type.rank
    if any(len(p) != rank for p in parts):
        return None
    d = node.attributes["dim"] % rank
    first = list(parts[0])
    for p in parts[1:]:
        for i, (x, y) in enumerate(zip(first, p, strict=True)):
            if i != d:
                unite(x, y, short(node.op) + place(node))
    first[d] = _beside([p[d] for p in parts], node.result.tensor_type.shape[d], node)
    return [tuple(first)]


def _beside(axes: Sequence[Axis], size: Size, node: Node) -> Axis:
    kept = [x for x in axes if find(x).size != 0]
    if not all(isinstance(find(x).size, int) for x in kept):
        reason = f"it is laid beside a part of unknown size{place(node)}"
        for x in kept:
            freeze(x, reason)
        return leaf(size, reason)
    return total(kept) if kept else leaf(size)


@rule("stack")
def stack(a: Analysis, node: Node) -> Sequence[Dims] | None:
    (values,) = node.inputs
    assert isinstance(values, tuple)
    parts = [list(a.of(v)) for v in values if v is not None]
    for p in parts[1:]:
        for x, y in zip(parts[0], p, strict=True):
            unite(x, y, short(node.op) + place(node))
    made = parts[0]
    made.insert(
        node.attributes["dim"] % (len(made) + 1),
        leaf(len(parts), f"it counts what is stacked{place(node)}"),
    )
    return [tuple(made)]


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk",
      "unsafe_split_with_sizes", "tensor_split")  # fmt: skip
def split(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs, d = list(a.of(node.inputs[0])), node.attributes["dim"]
    sizes = [r.tensor_type.shape[d] for r in node.results]
    if not all(isinstance(s, int) for s in sizes) or not isinstance(find(xs[d]).size, int):
        reason = f"`{short(node.op)}` cuts it at sizes that are not known{place(node)}"
        freeze(xs[d], reason)
        pieces = [leaf(s, reason) for s in sizes]
    else:
        pieces = cut(xs[d], [s for s in sizes if isinstance(s, int)])
        a.edit(
            node, pieces,
            lambda size: {"split_sizes": tuple(size(p) for p in pieces), "dim": d},
            op="aten.split_with_sizes.default",
        )  # fmt: skip
    made = []
    for piece in pieces:
        dims = list(xs)
        dims[d] = piece
        made.append(tuple(dims))
    return made


@rule("glu")
def glu(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs, d = list(a.of(node.inputs[0])), node.attributes["dim"]
    half = quotient(find(xs[d]).size, 2)
    if not isinstance(half, int):
        return None
    xs[d], gate = cut(xs[d], (half, half))
    unite(xs[d], gate)
    return [tuple(xs)]


@rule("unbind", "select")
def pick(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs = list(a.of(node.inputs[0]))
    gone = xs.pop(node.attributes["dim"])
    freeze(gone, f"single indices of it are picked{place(node)}")
    return [tuple(xs) for _ in node.results]


@rule("slice", "narrow")
def slice_(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs, d = list(a.of(node.inputs[0])), node.attributes.get("dim", 0)
    size, new = find(xs[d]).size, node.result.tensor_type.shape[d]
    start, step = node.attributes.get("start") or 0, node.attributes.get("step", 1)
    if new == size:
        return [tuple(xs)]
    known = isinstance(size, int) and isinstance(new, int)
    if not known or not isinstance(start, int) or not isinstance(step, int):
        return _sliced(xs, d, new, node)
    assert isinstance(size, int) and isinstance(new, int)
    if start < 0:
        start = max(0, start + size)
    if step != 1:
        return _strided(a, xs, d, (start, step, new), node)
    sizes = [s for s in (start, new, size - start - new) if s]
    pieces = cut(xs[d], sizes)
    at = 1 if start else 0
    before, middle = pieces[:at], pieces[at] if new else leaf(0)
    xs[d] = middle
    if "end" in node.attributes:

        def bounds(size: Any) -> dict[str, Any]:
            first = sum(size(p) for p in before)
            return {"start": first, "end": first + size(middle)}
    else:

        def bounds(size: Any) -> dict[str, Any]:
            return {"start": sum(size(p) for p in before), "length": size(middle)}

    a.edit(node, pieces, bounds)
    return [tuple(xs)]


def _sliced(xs: list[Axis], d: int, new: Size, node: Node) -> Sequence[Dims]:
    reason = f"`{short(node.op)}` takes a part of it{place(node)}"
    freeze(xs[d], reason)
    xs[d] = leaf(new, reason)
    return [tuple(xs)]


def _strided(
    a: Analysis, xs: list[Axis], d: int, bounds: tuple[int, int, int], node: Node
) -> Sequence[Dims]:
    """Every n-th: an outer factor, of which the inner one is picked from."""
    start, step, new = bounds
    if start >= step or new * step != find(xs[d]).size:
        return _sliced(xs, d, new, node)
    outer, inner = refine(xs[d], (new, step))
    freeze(inner, f"every {step}th index of it is taken{place(node)}")
    xs[d] = outer
    whole = [outer, inner]
    a.edit(node, whole, lambda size: {"end": size(outer) * step})
    return [tuple(xs)]


@rule("constant_pad_nd", "pad")
def pad(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs, shape = list(a.of(node.inputs[0])), node.result.tensor_type.shape
    amounts, mode = node.attributes["pad"], node.attributes.get("mode", "constant")
    ends: list[Axis | int] = list(amounts)
    for i in range(len(amounts) // 2):
        d, before, after = len(xs) - 1 - i, amounts[2 * i], amounts[2 * i + 1]
        if before == after == 0:
            continue
        whole = all(isinstance(n, int) and n >= 0 for n in (before, after, find(xs[d]).size))
        if not whole or mode != "constant":
            reason = f"`{short(node.op)}` adds to its ends{place(node)}"
            freeze(xs[d], reason)
            xs[d] = leaf(shape[d], reason)
            continue
        ends[2 * i], ends[2 * i + 1] = (leaf(n) if n else 0 for n in (before, after))
        parts = [ends[2 * i], xs[d], ends[2 * i + 1]]
        xs[d] = total([p for p in parts if isinstance(p, Axis)])
    given = [e for e in ends if isinstance(e, Axis)]
    a.edit(
        node, given,
        lambda size: {"pad": tuple(size(e) if isinstance(e, Axis) else e for e in ends)},
    )  # fmt: skip
    return [tuple(xs)]


@rule("pixel_shuffle")
def pixel_shuffle(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs, r, shape = a.of(node.inputs[0]), node.attributes["upscale_factor"], node.result.tensor_type
    channels, block = refine(xs[-3], (shape.shape[-3], r * r))
    reason = f"pixels are made of it{place(node)}"
    for axis in (block, *xs[-2:]):
        freeze(axis, reason)
    return [(*xs[:-3], channels, *(leaf(s, reason) for s in shape.shape[-2:]))]


@rule("pixel_unshuffle")
def pixel_unshuffle(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs, r = a.of(node.inputs[0]), node.attributes["downscale_factor"]
    reason = f"pixels are taken apart{place(node)}"
    for axis in xs[-2:]:
        freeze(axis, reason)
    shape = node.result.tensor_type.shape
    out = product([xs[-3], leaf(r * r, reason)])
    return [(*xs[:-3], out, *(leaf(s, reason) for s in shape[-2:]))]


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs, groups = list(a.of(node.inputs[0])), node.attributes["groups"]
    each = quotient(find(xs[1]).size, groups)
    if each is None:
        return None
    count, inside = refine(xs[1], (groups, each))
    xs[1] = product([inside, count])
    a.edit(node, [count], lambda size: {"groups": size(count)})
    return [tuple(xs)]
