"""Attention of a differentiated graph, on CUDA devices.

A graph is differentiated on the processor, where PyTorch writes attention as the pair of operators
that it has there: one that also gives the logarithms of the sums, and its backward pass. On a
device they are the memory-efficient pair, which needs the same and gives the same.

Source:  `_scaled_dot_product_efficient_attention`; rows of its logarithms are padded to 32 by
         infinity, a mask's rows lie 16 elements apart at least, heads are multiples of 8 wide.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = f"{_FORWARD}_backward"
_ROWS, _MASK, _HEAD = 32, 16, 8  # what sizes are padded to multiples of


@cache
def register() -> Any:
    """Give the processor's pair its meaning on CUDA devices too, where PyTorch gives it none."""
    import torch

    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for name, function in ((_FORWARD, forward), (_BACKWARD, backward)):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA"):
            library.impl(name, function, "CUDA")
    return library  # it ends with what holds it


def forward(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
    *, attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[B, H, M, E], [B, H, N, E], [B, H, N, V] to [B, H, M, V] and f32[B, H, M]."""
    import torch

    out, sums, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        *(_padded(x, _HEAD) for x in (query, key, value)), _bias(attn_mask, query, key), True, 0.0,
        is_causal, scale=_scale(scale, query),
    )  # fmt: skip
    return out[..., : value.shape[-1]], sums[..., : query.shape[-2]]


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
    dropout_p: float, is_causal: bool, *, attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value."""
    import torch

    seeds = torch.zeros(2, dtype=torch.int64, device=query.device)  # of a dropout that is off
    bias = _bias(attn_mask, query, key)
    grad, q, k, v, o = (_padded(x, _HEAD) for x in (grad_out, query, key, value, out))
    found = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, bias, o, _padded(logsumexp, _ROWS, float("inf")), seeds[0], seeds[1], 0.0,
        [True, True, True, False], is_causal, scale=_scale(scale, query),
    )  # fmt: skip
    dq, dk, dv = (
        x[..., : like.shape[-1]] for x, like in zip(found[:3], (query, key, value), strict=True)
    )
    return dq, dk, dv


def _scale(scale: float | None, query: Tensor) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _padded(x: Tensor, to: int, value: float = 0.0) -> Tensor:
    """The last dimension as a multiple of `to`."""
    import torch

    missing = -x.shape[-1] % to
    return torch.nn.functional.pad(x, (0, missing), value=value) if missing else x


def _bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    if mask is None:
        return None
    size = key.shape[-2]
    return _padded(mask, _MASK)[..., :size].expand(*query.shape[:-1], size)
