"""How reshapes, orders, broadcasts, lookups and creation treat dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dfc.compress.axes import Axis, cut, find, freeze, leaf, product, quotient, refine, unite
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
