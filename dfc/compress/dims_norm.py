"""How norms, reductions and softmax treat dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dfc.compress.axes import Axis, find, freeze, leaf, mark, quotient, refine, unite
from dfc.compress.dimensions import Analysis, Dims, place, rule, short
from dfc.ir.graph import Node, Value

# A statistic goes over it: that changes when indices go, so that removing them is not exact.
STATISTIC = "a statistic goes over it"


def _tie(a: Analysis, axes: Sequence[Axis], *vectors: Any) -> None:
    for v in vectors:
        if isinstance(v, Value):
            for x, y in zip(reversed(axes), reversed(a.of(v)), strict=False):
                unite(x, y)


@rule("batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def batch_norm(a: Analysis, node: Node) -> Sequence[Dims] | None:
    if node.attributes.get("training", False) or any(r.use_count for r in node.results[1:]):
        return None
    xs = a.of(node.inputs[0])
    _tie(a, [xs[1]], *node.inputs[1:5])
    rest = [tuple(leaf(s) for s in r.tensor_type.shape) for r in node.results[1:]]
    return [xs, *rest]


@rule("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def layer_norm(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs = a.of(node.inputs[0])
    n = len(node.attributes["normalized_shape"])
    over = xs[len(xs) - n :]
    _tie(a, over, *node.inputs[1:])
    for axis in over:
        mark(axis, STATISTIC)
    a.edit(node, over, lambda size: {"normalized_shape": tuple(size(x) for x in over)})
    statistics = (*xs[: len(xs) - n], *(leaf(1) for _ in over))
    return [xs, *(statistics for _ in node.results[1:])]


@rule("dfc.skip_layer_norm", "dfc.skip_rms_norm")
def skip_norm(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs = a.of(node.inputs[0])
    for x, y in zip(xs, a.of(node.inputs[1]), strict=True):
        unite(x, y)
    _tie(a, xs[-1:], *node.inputs[2:])
    mark(xs[-1], STATISTIC)
    return [xs for _ in node.results]


@rule("group_norm")
def group_norm(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs = a.of(node.inputs[0])
    groups = node.attributes["num_groups"]
    each = quotient(find(xs[1]).size, groups)
    if each is None:
        return None
    count, inside = refine(xs[1], (groups, each))
    mark(inside, STATISTIC)
    _tie(a, [xs[1]], *node.inputs[1:3])
    a.edit(node, [count], lambda size: {"num_groups": size(count)})
    return [xs]


@rule("instance_norm")
def instance_norm(a: Analysis, node: Node) -> Sequence[Dims] | None:
    if not node.attributes["use_input_stats"] and node.inputs[3] is None:
        return None
    xs = a.of(node.inputs[0])
    _tie(a, [xs[1]], *node.inputs[1:5])
    return [xs]


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp",
      "cummax", "flip", "roll", "softmin", "_safe_softmax")  # fmt: skip
def along(a: Analysis, node: Node) -> Sequence[Dims] | None:
    """What every index of a dimension has a part in: none can go."""
    xs = a.of(node.inputs[0])
    given = node.attributes.get("dim", node.attributes.get("dims"))
    for d in given if isinstance(given, tuple) else (given,):
        if xs:
            freeze(xs[d], f"`{short(node.op)}` goes over it{place(node)}")
    return [xs for _ in node.results]


_EXACT = {"sum", "nansum", "count_nonzero"}  # what is zero has no part in it
_STATISTIC = {"mean", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm", "nanmean"}


@rule(*_EXACT, *_STATISTIC, "amax", "amin", "prod", "any", "all", "argmax", "argmin", "logsumexp",
      "mode", "aten.max.dim", "aten.min.dim",
      "aten.median.dim")  # fmt: skip
def reduction(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs = a.of(node.inputs[0])
    given = node.attributes.get("dim")
    if given is None or given == ():
        given = tuple(range(len(xs)))
    over = {d % len(xs) for d in (given if isinstance(given, tuple) else (given,)) if xs}
    name = short(node.op)
    for d in over:
        if name in _STATISTIC:
            mark(xs[d], STATISTIC)
        elif name not in _EXACT:
            freeze(xs[d], f"`{name}` goes over it{place(node)}")
    keep = bool(node.attributes.get("keepdim", False))
    made = tuple(leaf(1) if d in over else x for d, x in enumerate(xs) if keep or d not in over)
    return [made for _ in node.results]


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(a: Analysis, node: Node) -> Sequence[Dims] | None:
    v, g = node.inputs[:2]
    vs, gs = a.of(v), a.of(g)
    if len(vs) != len(gs):
        return None
    for d, (x, y) in enumerate(zip(vs, gs, strict=True)):
        if find(y).size != 1:
            unite(x, y)
        if d != node.attributes["dim"] % len(vs):
            mark(x, STATISTIC)
    return [vs, *(gs for _ in node.results[1:])]


@rule("prelu")
def prelu(a: Analysis, node: Node) -> Sequence[Dims] | None:
    xs, (w,) = a.of(node.inputs[0]), a.of(node.inputs[1]) or (leaf(1),)
    if find(w).size != 1:
        unite(xs[1] if len(xs) > 1 else xs[0], w)
    return [xs]


_SPATIAL = {"1d": 1, "2d": 2, "3d": 3}


@rule(*(f"{kind}_pool{n}" for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp")
        for n in _SPATIAL),
      *(f"max_pool{n}_with_indices" for n in _SPATIAL), "_adaptive_avg_pool2d",
      *(f"upsample_{m}{n}" for m in ("nearest", "linear", "bilinear", "bicubic", "trilinear",
                                     "_bilinear", "_nearest_exact") for n in _SPATIAL),
      "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa")  # fmt: skip
def spatial(a: Analysis, node: Node) -> Sequence[Dims] | None:
    """Channels and batch pass; what a window slides over, or is resampled, stays."""
    xs = a.of(node.inputs[0])
    name = short(node.op)
    n = next((k for word, k in _SPATIAL.items() if word in name), len(xs) - 2)
    reason = f"`{name}` slides over it{place(node)}"
    for v in node.operands:
        for axis in a.of(v)[len(xs) - n if v is node.inputs[0] else 0 :]:
            freeze(axis, reason)
    lead = xs[: len(xs) - n]
    return [
        (*lead, *(leaf(s, reason) for s in r.tensor_type.shape[len(lead) :])) for r in node.results
    ]


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(a: Analysis, node: Node) -> Sequence[Dims] | None:
    """Channels pass; image i is sampled at the places of grid i."""
    images, grids = a.of(node.inputs[0]), a.of(node.inputs[1])
    reason = f"`{short(node.op)}` samples over it{place(node)}"
    unite(images[0], grids[0], reason)
    for axis in (*images[2:], *grids[1:]):
        freeze(axis, reason)
    return [(*images[:2], *(leaf(s, reason) for s in node.result.tensor_type.shape[2:]))]
