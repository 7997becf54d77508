"""How reshapes, concats, splits, slices, lookups and creation treat dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dfc.compress.axes import Axis, cut, find, freeze, leaf, product, quotient, refine, total, unite
from dfc.compress.dimensions import Analysis, Dims, Sizes, place, pointwise, rule, short
from dfc.ir.expr import Size
from dfc.ir.graph import Node, Value


@rule("clone", "contiguous", "_to_copy", "to", "type_as", "alias", "detach", "dropout",
      "native_dropout", "lift_fresh_copy", "feature_dropout", "alpha_dropout", "zeros_like",
      "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "nan_to_num", "bernoulli",
      "positive")  # fmt: skip
def same(a: Analysis, node: Node) -> Sequence[Dims] | None:
    """The results are laid out as the first operand."""
    return [a.of(node.inputs[0]) for _ in node.results]


@rule("where", "masked_fill", "copy", "lerp", "addcmul", "addcdiv", "clamp", "expand_as")
def elementwise(a: Analysis, node: Node) -> Sequence[Dims] | None:
    return pointwise(a, node)


@rule("_assert_tensor_metadata")
def asserted(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs = a.of(node.inputs[0])
    for name in ("size", "stride"):
        if node.attributes.get(name) is not None:
            for axis in xs:
                freeze(axis, "the model asserts its size")
    return []


@rule("_assert_scalar", "_assert_async", "sym_constrain_range", "sym_constrain_range_for_size")
def asserted_number(a: Analysis, node: Node) -> Sequence[Dims] | None:
    return []


# Reshapes


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as",
      "ravel")  # fmt: skip
def reshape(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs, shape = a.of(node.inputs[0]), node.result.tensor_type.shape
    if node.op == "aten.view.dtype":
        return None
    made = _regrouped(xs, shape, short(node.op) + place(node))
    key = next((k for k in ("shape", "size", "sizes") if k in node.attributes), None)
    if key is not None:
        old = node.attributes[key]
        first = node.attributes["dim"] % len(xs) if "unflatten" in node.op else 0
        named = made[first : first + len(old)]
        a.edit(
            node, named,
            lambda size: {
                key: tuple(o if o == -1 else size(m) for o, m in zip(old, named, strict=True))
            },
        )  # fmt: skip
    return [made]


def _regrouped(xs: Dims, shape: Sequence[Size], why: str) -> Dims:
    """The axes of a reshape: dimensions between two places that both shapes have are regrouped."""
    olds = [find(x).size for x in xs]
    if any(s == 0 for s in (*olds, *shape)):
        return _lost(xs, shape, f"it is empty at {why}")
    made: list[Axis] = []
    i = j = 0
    for i_end, j_end in _meetings(olds, shape):
        made += _group(xs[i:i_end], shape[j:j_end], why)
        i, j = i_end, j_end
    made += _group(xs[i:], shape[j:], why)
    return tuple(made)


def _meetings(olds: Sequence[Size], news: Sequence[Size]) -> list[tuple[int, int]]:
    """Where the products of the first sizes are equal on both sides, in order."""
    found: list[tuple[int, int]] = []
    left = right = 0
    prefix_of_new: list[Size] = [1]
    for s in news:
        prefix_of_new.append(prefix_of_new[-1] * s)
    so_far: Size = 1
    for left, s in enumerate(olds, 1):
        so_far = so_far * s
        for j in range(right + 1, len(prefix_of_new)):
            if prefix_of_new[j] == so_far:
                found.append((left, j))
                right = j
                break
    return found


def _group(xs: Sequence[Axis], shape: Sequence[Size], why: str) -> list[Axis]:
    if not xs:
        return [leaf(s) for s in shape]
    if not shape:
        return []
    if len(shape) == 1:
        return [product(xs) if len(xs) > 1 else xs[0]]
    merged = product(xs) if len(xs) > 1 else xs[0]
    if find(merged).size == 1:
        return [leaf(1) for _ in shape]
    return _refined(merged, shape, why)


def _refined(axis: Axis, shape: Sequence[Size], why: str) -> list[Axis]:
    rest = find(axis).size
    for s in shape:
        left = quotient(rest, s)
        if left is None:
            return list(_lost([axis], shape, f"its indices are regrouped by {why}"))
        rest = left
    return refine(axis, shape)


def _lost(xs: Sequence[Axis], shape: Sequence[Size], reason: str) -> Dims:
    for x in xs:
        freeze(x, reason)
    return tuple(leaf(s, reason) for s in shape)


# Orders


@rule("permute")
def permute(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs = a.of(node.inputs[0])
    return [tuple(xs[d] for d in node.attributes["dims"])]


@rule("transpose", "swapaxes", "swapdims")
def transpose(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs = list(a.of(node.inputs[0]))
    d, e = (v for k, v in node.attributes.items())
    if xs:
        xs[d], xs[e] = xs[e], xs[d]
    return [tuple(xs)]


@rule("t", "numpy_T", "mT", "adjoint")
def turn(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs = a.of(node.inputs[0])
    return [(*xs[:-2], *xs[-2:][::-1])] if len(xs) < 3 or "numpy" not in node.op else [xs[::-1]]


@rule("unsqueeze")
def unsqueeze(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs = list(a.of(node.inputs[0]))
    xs.insert(node.attributes["dim"] % (len(xs) + 1), leaf(1))
    return [tuple(xs)]


@rule("squeeze")
def squeeze(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs, kept = a.of(node.inputs[0]), []
    given = node.attributes.get("dim")
    dims = range(len(xs)) if given is None else given if isinstance(given, tuple) else (given,)
    wanted = {d % len(xs) for d in dims if xs}
    for d, x in enumerate(xs):
        if d not in wanted or find(x).size != 1:
            kept.append(x)
    return [tuple(kept)] if len(kept) == node.result.tensor_type.rank else None


# Broadcasts and copies


@rule("expand", "broadcast_to")
def expand(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs, shape = a.of(node.inputs[0]), node.result.tensor_type.shape
    lead = len(shape) - len(xs)
    made = [
        leaf(s) if d < lead or find(xs[d - lead]).size != s else xs[d - lead]
        for d, s in enumerate(shape)
    ]
    old = node.attributes["size"]
    a.edit(
        node, made,
        lambda size: {
            "size": tuple(o if o == -1 else size(m) for o, m in zip(old, made, strict=True))
        },
    )  # fmt: skip
    return [tuple(made)]


@rule("repeat", "tile")
def repeat(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs, shape = a.of(node.inputs[0]), node.result.tensor_type.shape
    key = "repeats" if "repeats" in node.attributes else "dims"
    counts = node.attributes[key]
    xs = (*(leaf(1) for _ in range(len(shape) - len(xs))), *xs)
    counts = (*(1 for _ in range(len(shape) - len(counts))), *counts)
    times = [leaf(n) for n in counts]
    a.edit(node, times, lambda size: {key: tuple(size(t) for t in times)})
    return [tuple(product([t, x]) for t, x in zip(times, xs, strict=True))]


@rule("aten.repeat_interleave.self_int")
def repeat_interleave(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs, d = list(a.of(node.inputs[0])), node.attributes["dim"]
    if d is None:
        return None
    times = leaf(node.attributes["repeats"])
    xs[d] = whole = product([xs[d], times])

    def repeated(size: Sizes) -> dict[str, Any]:
        named = node.attributes.get("output_size") is not None
        return {"repeats": size(times), **({"output_size": size(whole)} if named else {})}

    a.edit(node, [times, whole], repeated)
    return [tuple(xs)]


# Side by side


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


# Lookups: an index is a place, so what is looked into keeps its places


@rule("embedding")
def embedding(a: Analysis, node: Node) -> Sequence[Dims] | None:
    table, indices = node.inputs[:2]
    rows, width = a.of(table)
    freeze(rows, f"indices point into it{place(node)}")
    a.makes(width, node, table, 1)
    return [(*a.of(indices), width)]


@rule("index_select")
def index_select(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs, d = list(a.of(node.inputs[0])), node.attributes["dim"]
    if not xs:
        return None
    freeze(xs[d], f"indices point into it{place(node)}")
    xs[d] = (a.of(node.inputs[1]) or (leaf(1),))[0]
    return [tuple(xs)]


@rule("aten.index.Tensor", "_unsafe_index")
def index(a: Analysis, node: Node) -> Sequence[Dims] | None:
    x, places = node.inputs
    xs = a.of(x)
    assert isinstance(places, tuple)
    at = [i for i, p in enumerate(places) if p is not None]
    if at != list(range(at[0], at[0] + len(at))):
        return None
    taken = [p for p in places if isinstance(p, Value)]
    if any(p.tensor_type.dtype.name == "bool" for p in taken):
        return None
    for i in at:
        freeze(xs[i], f"indices point into it{place(node)}")
    made: Dims = ()
    for p in taken:
        made = _broadcast(made, a.of(p))
    return [(*xs[: at[0]], *made, *xs[at[-1] + 1 :])]


def _broadcast(xs: Dims, ys: Dims) -> Dims:
    from dfc.compress.dims_contract import _broadcast as both

    return both(xs, ys)


@rule("tril", "triu")
def triangle(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs = a.of(node.inputs[0])
    for axis in xs[-2:]:
        freeze(axis, f"`{short(node.op)}` counts its places{place(node)}")
    return [xs]


# Creation


@rule("full", "zeros", "ones", "empty")
def created(a: Analysis, node: Node) -> Sequence[Dims] | None:
    made = tuple(leaf(s) for s in node.result.tensor_type.shape)
    a.edit(node, made, lambda size: {"size": tuple(size(m) for m in made)})
    return [made]


@rule("new_zeros", "new_ones", "new_full", "new_empty")
def created_like(a: Analysis, node: Node) -> Sequence[Dims] | None:
    return created(a, node)


@rule("arange", "scalar_tensor", "eye", "linspace", "rand", "randn", "randint", "dfc.iota")
def counted(a: Analysis, node: Node) -> Sequence[Dims] | None:
    reason = f"`{short(node.op)}` makes it{place(node)}"
    return [tuple(leaf(s, reason) for s in r.tensor_type.shape) for r in node.results]


@rule("sym_size", "sym_numel")
def asked_for_size(a: Analysis, node: Node) -> Sequence[Dims] | None:
    for axis in a.of(node.inputs[0]):
        freeze(axis, f"the model computes with its size{place(node)}")
    return [()]


@rule("dfc.rotary_embedding")
def rotary(a: Analysis, node: Node) -> Sequence[Dims] | None:
    x, cos, sin, positions = node.inputs
    xs, cs = list(a.of(x)), a.of(cos)
    half = find(cs[-1]).size
    for axis, other in zip(cs, a.of(sin), strict=True):
        unite(axis, other)
    if positions is not None:
        freeze(cs[0], f"positions point into it{place(node)}")
    size = find(xs[3]).size
    if not isinstance(half, int) or not isinstance(size, int):
        freeze(xs[3], f"rotary embedding turns pairs of it{place(node)}")
        return [tuple(xs)]
    rest = (size - 2 * half,) if size != 2 * half else ()
    if node.attributes["interleaved"]:
        pairs = cut(xs[3], (2 * half, *rest))[0]
        outer, two = refine(pairs, (half, 2))
        freeze(two, f"rotary embedding turns pairs of it{place(node)}")
        unite(outer, cs[-1])
    else:
        first, second = cut(xs[3], (half, half, *rest))[:2]
        unite(first, second)
        unite(first, cs[-1])
    return [tuple(xs)]
