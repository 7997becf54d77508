"""Attention: ONNX's own op from opset 23 on, where it means what PyTorch means; else spelled out.

What ONNX Runtime's kernel does otherwise than PyTorch, and what is done about it:
- A mask must have all rows and columns: it is expanded, once for all layers.
- Sizes of zero are refused: calls whose sizes may be zero are spelled out.
- A scale must be positive; causal is aligned in two ways when rows and keys differ in number: such
  calls are spelled out.
- A row of `finfo.min` counts as masked and gives zeros, where PyTorch gives the mean of the values:
  such numbers are raised to -3.4e38.
- Older runtimes give NaN or a mean for a row that sees nothing: files of standard operators set
  those rows to zero themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dfc.emit.onnx_builder import Builder, Call, Val
from dfc.emit.onnx_ops.registry import translates
from dfc.emit.onnx_types import D
from dfc.ir.expr import Expr

_NEARLY_LOWEST = -3.4e38  # absorbs every score, and is above the kernel's "masked"


@translates("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu")
def attention(
    b: Builder, query: Val, key: Val, value: Val, attn_mask: Val | None, dropout_p: float,
    is_causal: bool, scale: Any, call: Call,
) -> Any:  # fmt: skip
    """Softmax of scaled scores; a row with nothing to attend to gives zeros, as PyTorch does."""
    if dropout_p:
        raise b.refuse("attention with dropout draws random numbers")
    fused = fused_attention(b, query, key, value, attn_mask, scale, is_causal)
    if fused is not None:
        return fused if len(call.results) == 1 else [fused, None]
    shape_q, shape_k = b.type(query).shape, b.type(key).shape
    if call.attributes.get("enable_gqa") and shape_q[-3] != shape_k[-3]:
        key, value = (_repeat_heads(b, v, shape_q[-3]) for v in (key, value))
    width: Any = shape_q[-1]
    if scale is None and isinstance(width, Expr):
        root = b.op("Sqrt", b.const(width, query.dtype))  # type: ignore[arg-type]
        query = b.op("Div", query, root)
    else:
        factor = scale if scale is not None else 1.0 / math.sqrt(width) if width else 1.0
        double = query.dtype == D.DOUBLE and isinstance(width, int)
        # ONNX Runtime would fold one number into the product as a float32
        query = b.op("Mul", query, b.like([factor] * width if double else factor, query))
    rank = len(shape_k)
    turned = b.transpose(key, [*range(rank - 2), rank - 1, rank - 2])
    scores = b.op("MatMul", query, turned)
    if is_causal:
        keep = causal_mask(b, shape_q[-2], shape_k[-2])
        scores = b.op("Where", keep, scores, b.like(-math.inf, scores))
    if attn_mask is not None:
        if attn_mask.dtype == D.BOOL:
            scores = b.op("Where", attn_mask, scores, b.like(-math.inf, scores))
        else:
            scores = b.op("Add", scores, b.cast(attn_mask, scores.dtype))  # type: ignore[arg-type]
    weights = b.op("Softmax", scores, axis=-1)
    if attn_mask is not None:
        empty = _empty_rows(b, attn_mask, False)
        weights = b.op("Where", empty, b.like(0.0, weights), weights)
    found = b.op("MatMul", weights, value)
    return found if len(call.results) == 1 else [found, None]


def causal_mask(b: Builder, rows: Any, columns: Any) -> Val:
    """True where the column is not after the row; shared by all attentions of these sizes."""
    key = ("causal", rows, columns)
    found: Val | None = b.lookup(key)
    if found is None:
        r = b.unsqueeze(b.arange(rows), 1)
        found = b.shared[key] = b.op("GreaterOrEqual", r, b.arange(columns))
    assert found is not None
    return found


def _repeat_heads(b: Builder, x: Val, heads: Any) -> Val:
    """Each key head once for every query head of its group."""
    shape = list(b.type(x).shape)
    times = heads // shape[-3]
    wide = b.unsqueeze(x, len(shape) - 2)
    ones = [1] * (len(shape) + 1)
    ones[len(shape) - 2] = times
    wide = b.op("Expand", wide, ones)
    shape[-3] = heads
    return b.op("Reshape", wide, b.sizes.vector(b, shape))


def fused_attention(
    b: Builder, query: Val, key: Val, value: Val, mask: Val | None, scale: float | None,
    is_causal: bool, heads: tuple[int, int] | None = None,
) -> Val | None:  # fmt: skip
    """The Attention node for heads in the second dimension, or, with `heads`, in the last.

    None where the opset lacks it or the kernel means something else.
    """
    rank, at = (4, 2) if heads is None else (3, 1)
    types = [b.type(v) for v in (query, key, value)]
    if b.root.opset < 23 or query.dtype != D.FLOAT or any(t.rank != rank for t in types):
        return None
    rows, columns = types[0].shape[at], types[1].shape[at]
    sizes = [s for t in types for s in t.shape]
    if len({t.shape[0] for t in types}) > 1 or not all(_positive(s, b.root.ranges) for s in sizes):
        return None
    if (is_causal and (rows != columns or mask is not None)) or (scale is not None and scale <= 0):
        return None
    empty = None
    if mask is not None:
        if b.rank(mask) > 4:
            return None
        if not b.root.contrib:
            empty = _empty_rows(b, mask, heads is not None)
            if empty is None:
                return None
        mask = _full_mask(b, mask, rows, columns)
    h, g = heads or (None, None)
    found = b.op(
        "Attention", query, key, value, mask, q_num_heads=h, kv_num_heads=g, scale=scale,
        is_causal=int(is_causal) or None,
    )  # fmt: skip
    return found if empty is None else b.op("Where", empty, b.like(0.0, found), found)


def _positive(size: Any, ranges: Mapping[str, tuple[int, int | None]]) -> bool:
    """Whether a size is never zero, as far as a sum of products of symbols tells."""
    if isinstance(size, int):
        return size > 0
    least = 0
    for monomial, c in size.terms:
        if c < 0 or not all(isinstance(atom, str) for atom, _ in monomial):
            return False
        least += c * math.prod(ranges.get(atom, (0, None))[0] ** power for atom, power in monomial)
    return least > 0


def _full_mask(b: Builder, mask: Val, rows: Any, columns: Any) -> Val:
    """The mask with all its rows and columns; what is nearly lowest is not masked away."""
    key = ("attention mask", id(mask), rows, columns)
    found: Val | None = b.lookup(key)
    if found is not None:
        return found
    shape = b.type(mask).shape
    lead = shape[:-2]
    found = mask
    if mask.dtype != D.BOOL:
        found = b.cast(found, D.FLOAT)
        raised = b.op("Max", found, b.like(_NEARLY_LOWEST, found))
        found = b.op("Where", b.is_inf(found), found, raised)
    if shape[-2:] != (rows, columns):
        found = b.expand(found, [*lead, rows, columns])
    if len(shape) == 3:
        found = b.unsqueeze(found, 0)
    b.shared[key] = found
    return found


def _empty_rows(b: Builder, mask: Val, flat: bool) -> Val | None:
    """Which rows see nothing, to broadcast to the result; None if heads differ in a flat one."""
    shape = b.type(mask).shape
    if flat and len(shape) > 2 and shape[-3] != 1:
        return None
    key = ("empty rows", id(mask), flat)
    found: Val | None = b.lookup(key)
    if found is None:
        if mask.dtype == D.BOOL:
            seen = b.op("ReduceMax", b.cast(mask, D.INT32), [-1], keepdims=1)
            found = b.op("Equal", seen, b.like(0, seen))
        else:  # not by the largest number: that of a row of -inf is finfo.min in OpenVINO
            hidden = b.cast(b.is_inf(mask), D.INT32)
            all_hidden = b.op("ReduceMin", hidden, [-1], keepdims=1)
            found = b.op("Equal", all_hidden, b.like(1, all_hidden))
        if flat and len(shape) > 2:
            found = b.squeeze(found, -3)
        b.shared[key] = found
    return found
