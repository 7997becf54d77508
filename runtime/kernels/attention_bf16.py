"""`torch.ops.dfc.attention_bf16`, in place of PyTorch's attention on CPUs that multiply bf16.

It computes what PyTorch's kernel does, products of bf16 that are added up in f32 and a softmax of
f32, and reads f32 where a graph casts it first: rounded on the way, the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from struct import Struct
from typing import Any

import torch
from torch import Tensor

from dfc.emit.kernels import KernelCall
from dfc.ir.graph import Node, Value
from dfc.ir.types import DTYPES, TensorType
from dfc.runtime.kernels.library import library

NAME = "aten.scaled_dot_product_attention.default"
_CAST = "aten._to_copy.default"
_FLOATS, _FLOATS_OUT, _CAUSAL, _ADDED = 1, 2, 4, 8  # attention.h
_LARGEST_HEAD = 256
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal, bool wide) -> Tensor"
)
_BF16, _F32, _BOOL = DTYPES["bf16"], DTYPES["f32"], DTYPES["bool"]


# DfcAttention of attention.h: pointers, sizes, strides, scale and flags.
_CALL = Struct("@5P 7q 15q f I")


def can_run() -> bool:
    """Whether the kernel is there, and this CPU multiplies bf16 in registers and not in tiles.

    Why:  where PyTorch has tiles (AMX) for it, nobody has measured which is faster.
    """
    from dfc.planning.host import cpu_features

    found = library()
    return found is not None and bool(found.c.dfc_attends()) and "amx_bf16" not in cpu_features()


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, wide: bool
) -> Tensor:
    """[B, H, S, D], [B, G, T, D], [B, G, T, E] to [B, H, S, E], whose heads lie side by side.

    `wide`: the result is f32, all the same rounded to bf16.
    Needs:   q, k and v all f32 or all bf16, on the CPU, with sizes that agree (`_agree`).
    Raises:  RuntimeError for heads that are too large.
    """
    found = library()
    assert found is not None
    batch, heads, rows, depth = q.shape
    keys, width = v.shape[-2:]
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    y = _empty(q, v, wide)
    flags = _FLOATS * (q.dtype is torch.float32) | _FLOATS_OUT * wide | _CAUSAL * causal
    if mask is not None:
        if mask.dtype is not torch.bool:
            flags |= _ADDED
            mask = mask.to(torch.float32)
        mask = mask.expand(batch, heads, rows, keys)
        if mask.stride(-1) != 1 and keys > 1:
            mask = mask.contiguous()
    masks, at = ((0, 0, 0), 0) if mask is None else (mask.stride()[:3], mask.data_ptr())
    call = _CALL.pack(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), at, y.data_ptr(), batch, heads,
        heads // k.shape[1], rows, keys, depth, width, *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], *masks, *y.stride()[:3], scale, flags,
    )  # fmt: skip
    status = found.c.dfc_attention(call, torch.get_num_threads())
    if status:
        raise RuntimeError(f"dfc attention: status {status}, 1 means that sizes do not fit")
    return y


def _agree(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if q.dim() != 4 or k.dim() != 4 or q.dtype not in (torch.float32, torch.bfloat16):
        return False
    same = q.dtype == k.dtype == v.dtype and q.is_cpu and k.is_cpu and v.is_cpu
    return same and q.shape[::3] == k.shape[::3] and k.shape[:3] == v.shape[:3]


def _empty(q: Tensor, v: Tensor, wide: bool) -> Tensor:
    batch, heads, rows, _ = q.shape
    kind = torch.float32 if wide else torch.bfloat16
    return q.new_empty((batch, rows, heads, v.shape[-1]), dtype=kind).transpose(1, 2)


@cache
def register() -> torch.library.Library:
    """Make `torch.ops.dfc.attention_bf16` known; the library keeps it alive."""
    ops: Any = torch.library.Library("dfc", "FRAGMENT")  # type: ignore[no-untyped-call]
    # Any layout will do: where it is asked for, inductor copies the mask for each call.
    ops.define("attention_bf16" + _SCHEMA, tags=torch.Tag.flexible_layout)
    ops.impl("attention_bf16", _checked, "CPU")
    ops.impl("attention_bf16", _shape, "Meta")
    return ops  # type: ignore[no-any-return]


def _checked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, wide: bool
) -> Tensor:
    if not _agree(q, k, v):
        raise RuntimeError("dfc attention: types, devices or sizes do not fit")
    return attention(q, k, v, mask, scale, causal, wide)


def _shape(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, wide: bool
) -> Tensor:
    return _empty(q, v, wide)


def kernel(node: Node, traced: bool) -> KernelCall | None:
    """The call in place of a node that attends in bf16; casts of f32 around it are left out."""
    q, k, v, mask = (*node.inputs, None)[:4]
    given = [x for x in (q, k, v) if isinstance(x, Value)]
    if len(given) < 3 or not _fits(node, given, mask):
        return None
    register()
    sources = [_source(x) for x in given]
    operands: Sequence[Value] = given
    if all(s is not None for s in sources):
        operands = [s for s in sources if s is not None]
    depth = given[0].tensor_type.shape[-1]
    assert isinstance(depth, int) and (mask is None or isinstance(mask, Value))
    scale = node.attributes["scale"]
    function = torch.ops.dfc.attention_bf16.default if traced else attention
    wide = all(_is_cast(u, _F32) for u in node.result.users)
    rest = (depth**-0.5 if scale is None else float(scale), node.attributes["is_causal"], wide)
    also = tuple(u.result for u in node.result.users) if wide else ()
    return KernelCall(function, (*operands, mask, *rest), also)


def _fits(node: Node, given: Sequence[Value], mask: object) -> bool:
    """Whether the kernel has a form for what a node reads."""
    types = [x.tensor_type for x in given]
    if any(t.rank != 4 or t.dtype != _BF16 for t in types) or node.attributes["dropout_p"]:
        return False
    q, k, v = types
    heads, shared, sizes = q.shape[1], k.shape[1], (q.shape[3], v.shape[3])
    if not all(isinstance(s, int) and 0 < s <= _LARGEST_HEAD for s in sizes):
        return False
    if not isinstance(heads, int) or not isinstance(shared, int) or shared == 0 or heads % shared:
        return False
    if heads != shared and not node.attributes["enable_gqa"]:
        return False
    same = q.shape[0] == k.shape[0] == v.shape[0] and k.shape[:3] == v.shape[:3]
    masked = mask is None or (
        isinstance(mask, Value) and mask.tensor_type.dtype in (_BOOL, _BF16, _F32)
    )
    return same and masked and q.shape[3] == k.shape[3]


def _source(x: Value) -> Value | None:
    """The f32 that a value is a cast of, where the graph computes it."""
    if x.node is None or not _is_cast(x.node, _BF16):
        return None
    (source,) = x.node.operands
    return source if source.node is not None and source.tensor_type.dtype == _F32 else None


def _is_cast(node: Node, to: object) -> bool:
    if node.op != _CAST or node.attributes["dtype"] != to:
        return False
    result = node.result.type
    return isinstance(result, TensorType) and all(
        v in (None, False) for k, v in node.attributes.items() if k != "dtype"
    )
