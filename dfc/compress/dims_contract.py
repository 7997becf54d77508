"""How products of matrices, convolutions and attention treat dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dfc.compress.axes import Axis, find, freeze, leaf, product, quotient, refine, unite
from dfc.compress.dimensions import Analysis, Dims, place, rule, short
from dfc.ir.graph import Node, Value


def _linear(a: Analysis, node: Node, x: Any, weight: Any, bias: Any) -> Dims:
    xs, (out, inside) = a.of(x), a.of(weight)
    unite(xs[-1], inside, short(node.op) + place(node))
    a.makes(out, node, weight, 0)
    a.reads(inside, node, weight, 1, x, len(xs) - 1)
    if bias is not None and find(a.of(bias)[-1]).size != 1:
        unite(out, a.of(bias)[-1])
    return (*xs[:-1], out)


@rule("linear", "dfc.linear_gelu")
def linear(a: Analysis, node: Node) -> Sequence[Dims] | None:
    x, weight, bias = node.inputs
    if len(a.of(weight)) != 2:
        return None
    return [_linear(a, node, x, weight, bias)]


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(a: Analysis, node: Node) -> Sequence[Dims] | None:
    return [_product(a, node, node.inputs[0], node.inputs[1])]


@rule("transformers.grouped_mm_fallback", "_grouped_mm")
def grouped_product(a: Analysis, node: Node) -> Sequence[Dims] | None:
    """Rows in runs, each run with a matrix of its own: what the experts of a mixture are."""
    x, weight, ends = node.inputs[:3]
    if ends is None or len(a.of(x)) != 2 or len(a.of(weight)) != 3:
        return None
    (rows, xs), (groups, inside, out) = a.of(x), a.of(weight)
    for axis in (groups, *a.of(ends)):
        freeze(axis, f"each of its matrices is chosen by its number{place(node)}")
    unite(xs, inside, short(node.op) + place(node))
    if weight in a.constant:
        a.reads(inside, node, weight, 1, x, 1)
        a.makes(out, node, weight, 2)
    return [(rows, out)]


@rule("addmm", "baddbmm", "addbmm")
def add_product(a: Analysis, node: Node) -> Sequence[Dims] | None:
    if node.op.startswith("aten.addbmm"):
        return None
    made = _product(a, node, node.inputs[1], node.inputs[2])
    added = a.of(node.inputs[0])
    for x, y in zip(reversed(added), reversed(made), strict=False):
        if find(x).size != 1 or find(y).size == 1:
            unite(x, y)
    return [made]


def _product(a: Analysis, node: Node, left: Any, right: Any) -> Dims:
    xs, ys = a.of(left), a.of(right)
    inside = (ys[0] if len(ys) == 1 else ys[-2], len(ys) - 1 if len(ys) == 1 else len(ys) - 2)
    unite(xs[-1], inside[0], short(node.op) + place(node))
    out = (*xs[-2:-1], *(ys[-1:] if len(ys) > 1 else ()))
    batch = _broadcast(xs[:-2], ys[:-2])
    if right in a.constant and left not in a.constant:
        a.reads(inside[0], node, right, inside[1], left, len(xs) - 1)
        if len(ys) > 1:
            a.makes(ys[-1], node, right, len(ys) - 1)
    elif left in a.constant and right not in a.constant:
        a.reads(xs[-1], node, left, len(xs) - 1, right, inside[1])
        if len(xs) > 1:
            a.makes(xs[-2], node, left, len(xs) - 2)
    else:
        a.batches.append(batch)
        a.rows.append(xs[-2:-1])
        for axis in (xs[-1], *out):
            _inside_head(axis)
    return (*batch, *out)


def _inside_head(axis: Axis) -> None:
    from dfc.compress.axes import mark

    mark(axis, "inside a head")


def _broadcast(xs: Dims, ys: Dims) -> Dims:
    n = max(len(xs), len(ys))
    made = []
    for i in range(-n, 0):
        x = xs[i] if -i <= len(xs) else None
        y = ys[i] if -i <= len(ys) else None
        if x is None or y is None:
            made.append(x if y is None else y)
        elif find(x).size == 1:
            made.append(y)
        else:
            if find(y).size != 1:
                unite(x, y)
            made.append(x)
    return tuple(m for m in made if m is not None)


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d",
      "conv_transpose3d")  # fmt: skip
def convolution(a: Analysis, node: Node) -> Sequence[Dims] | None:
    x, weight, bias = node.inputs
    xs, ws = a.of(x), a.of(weight)
    groups = node.attributes["groups"]
    transposed = "transpose" in node.op or node.attributes.get("transposed", False)
    at = 1 if len(xs) == len(ws) else 0
    for axis in (*xs[at + 1 :], *ws[2:]):
        freeze(axis, f"`{short(node.op)}` slides over it{place(node)}")
    made, inside = (ws[1], ws[0]) if transposed else (ws[0], ws[1])
    if groups == 1:
        unite(xs[at], inside, short(node.op) + place(node))
        a.reads(inside, node, weight, 0 if transposed else 1, x, at)
        out = made
    else:
        out = _grouped(a, node, xs[at], made, inside, groups, transposed)
    if bias is not None:
        unite(out, a.of(bias)[0])
    a.makes(out, node, weight, 1 if transposed else 0)
    reason = f"`{short(node.op)}` slides over it{place(node)}"
    spatial = [leaf(s, reason) for s in node.result.tensor_type.shape[at + 1 :]]
    return [(*xs[:at], out, *spatial)]


def _grouped(
    a: Analysis, node: Node, x: Axis, made: Axis, inside: Axis, groups: int, transposed: bool
) -> Axis:
    """Groups are the outer factor of both sides; what lies inside is the weight's own."""
    count, mine = refine(x, (groups, _over(find(x).size, groups)))
    if transposed:
        count_in, inner = refine(inside, (groups, _over(find(inside).size, groups)))
        unite(count, count_in)
        unite(mine, inner)
        out = product([count, made])
    else:
        unite(mine, inside)
        count_out, _ = refine(made, (groups, _over(find(made).size, groups)))
        unite(count, count_out)
        out = made
    a.edit(node, [count], lambda size: {"groups": size(count)})
    return out


def _over(size: Any, n: int) -> Any:
    found = quotient(size, n)
    assert found is not None
    return found


@rule("scaled_dot_product_attention")
def attention(a: Analysis, node: Node) -> Sequence[Dims] | None:
    q, k, v, mask = node.inputs[:4]
    qs, ks, vs = a.of(q), a.of(k), a.of(v)
    if not len(qs) == len(ks) == len(vs):
        return None
    reason = f"softmax goes over it{place(node)}"
    unite(qs[-1], ks[-1])
    unite(ks[-2], vs[-2])
    freeze(ks[-2], reason)
    lead = list(_broadcast(qs[:-3], _broadcast(ks[:-3], vs[:-3])))
    if len(qs) > 2:
        lead.append(_heads(a, qs[-3], ks[-3], vs[-3]))
    _fix_scale(a, node, qs[-1])
    if isinstance(mask, Value):
        scores = (*lead, qs[-2], ks[-2])
        for m, s in zip(reversed(a.of(mask)), reversed(scores), strict=False):
            if find(m).size != 1:
                unite(m, s)
    for axis in (qs[-1], vs[-1]):
        _inside_head(axis)
    return [(*lead, qs[-2], vs[-1])]


def _heads(a: Analysis, q: Axis, k: Axis, v: Axis) -> Axis:
    """Query heads, in groups that share a key head."""
    unite(k, v)
    heads, groups = find(q).size, find(k).size
    if heads == groups or groups == 1:
        if groups != 1:
            unite(q, k)
        a.heads.append(q)
        return q
    count, each = refine(q, (groups, _over(heads, groups)))  # type: ignore[arg-type]
    unite(count, k)
    a.heads.append(count)
    _inside_head(each)
    return q


def _fix_scale(a: Analysis, node: Node, head: Axis) -> None:
    """A scale that follows from the head's size is written down before that shrinks."""
    size = find(head).size
    if node.attributes.get("scale") is None and isinstance(size, int):
        a.edit(node, [head], lambda new: {"scale": 1.0 / math.sqrt(size)})


@rule("dfc.multi_head_attention")
def fused_attention(a: Analysis, node: Node) -> Sequence[Dims] | None:
    q, k, v, mask = node.inputs
    h, g = node.attributes["num_heads"], node.attributes["num_kv_heads"]
    qs, ks, vs = a.of(q), a.of(k), a.of(v)
    unite(qs[0], ks[0])
    unite(ks[0], vs[0])
    unite(ks[1], vs[1])
    freeze(ks[1], f"softmax goes over it{place(node)}")
    query_heads, d = refine(qs[2], (h, _over(find(qs[2]).size, h)))
    key_heads, d_of_k = refine(ks[2], (g, _over(find(ks[2]).size, g)))
    value_heads, e = refine(vs[2], (g, _over(find(vs[2]).size, g)))
    unite(d, d_of_k)
    heads = _heads(a, query_heads, key_heads, value_heads)
    if isinstance(mask, Value):
        for m, s in zip(reversed(a.of(mask)), (ks[1], qs[1], heads, qs[0]), strict=False):
            if find(m).size != 1:
                unite(m, s)
    _fix_scale(a, node, d)
    for axis in (d, e):
        _inside_head(axis)
    a.edit(
        node, [heads, key_heads],
        lambda size: {"num_heads": size(heads), "num_kv_heads": size(key_heads)},
    )  # fmt: skip
    return [(qs[0], qs[1], product([heads, e]))]


@rule("einsum")
def einsum(a: Analysis, node: Node) -> Sequence[Dims] | None:
    equation = node.attributes["equation"].replace(" ", "")
    if "." in equation or "->" not in equation:
        return None
    left, _, result = equation.partition("->")
    values = list(node.operands)
    named: dict[str, Axis] = {}
    for word, v in zip(left.split(","), values, strict=True):
        for letter, axis in zip(word, a.of(v), strict=True):
            if letter in named and find(named[letter]).size == find(axis).size:
                unite(named[letter], axis)
            elif letter not in named or find(named[letter]).size == 1:
                named[letter] = axis
    _einsum_uses(a, node, left.split(","), result, values)
    return [tuple(named[x] for x in result)]


def _einsum_uses(
    a: Analysis, node: Node, words: list[str], result: str, values: list[Value]
) -> None:
    if len(words) != 2 or all(v not in a.constant for v in values):
        if len(words) == 2:
            shared = set(words[0]) & set(words[1]) & set(result)
            first = a.of(values[0])
            a.batches.append(tuple(first[words[0].index(x)] for x in words[0] if x in shared))
            own = [x for x in words[0] if x not in words[1] and x in result]
            a.rows.append(tuple(first[words[0].index(x)] for x in own))
            for word, v in zip(words, values, strict=True):
                for x, axis in zip(word, a.of(v), strict=True):
                    if x not in shared:
                        _inside_head(axis)
        return
    w = 0 if values[0] in a.constant else 1
    for dim, letter in enumerate(words[w]):
        axis, other = a.of(values[w])[dim], words[1 - w]
        if letter not in result and letter in other:
            a.reads(axis, node, values[w], dim, values[1 - w], other.index(letter))
        elif letter in result and letter not in other:
            a.makes(axis, node, values[w], dim)
