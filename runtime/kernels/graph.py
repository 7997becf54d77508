"""Which nodes of a graph the kernels take, and what is called in their place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from dfc.emit.kernels import KernelCall, Kernels
from dfc.ir.graph import Node, Parameter, Value
from dfc.ir.types import DTYPES
from dfc.runtime.kernels.float8 import float8_kernels
from dfc.runtime.kernels.unpacked import UNPACKED, linear

if TYPE_CHECKING:
    from torch import Tensor


def kernels(device: str, *, traced: bool = False) -> Kernels:
    """By op, what torch's engines may call on this device.

    `traced`: what torch.compile can see through, which costs more for each call.
    """
    if device.startswith("cuda"):
        return float8_kernels(device)
    if device != "cpu":
        return {}
    return {**UNPACKED, **(_integer_kernels(traced) if _are_built() else {})}


def _are_built() -> bool:
    from dfc.runtime.kernels.library import library

    return library() is not None


def _integer_kernels(traced: bool) -> Kernels:
    from dfc.runtime.kernels.linear import register

    register()
    return {
        "dfc.linear_w4": partial(_linear_w4, traced=traced),
        "dfc.linear_w8": partial(_linear_w8, traced=traced),
    }


def why_not(node: Node) -> str | None:
    """None, or the reason why a node with quantized weights is left to the engine."""
    if node.attributes["activations"] != "int8":
        return "its activations are floats"
    x, *weights = _given(node)
    if x.tensor_type.dtype != DTYPES["f32"]:
        return f"x is {x.tensor_type.dtype.name}, kernels take f32"
    held = weights[:-1] if _has_bias(node) else weights
    if not all(isinstance(w, Parameter) and w.data is not None for w in held):
        return "its weight is computed"
    return None


def _given(node: Node) -> list[Value]:
    return [v for v in node.inputs if isinstance(v, Value)]


def _has_bias(node: Node) -> bool:
    return node.inputs[-1] is not None


def _linear_w4(node: Node, traced: bool) -> KernelCall | None:
    if why_not(node):
        return linear(node)
    from dfc.runtime.kernels.linear import pack_w4

    _, packed, scale, zero, _ = node.inputs
    k, group = _depth(node), node.attributes["group"]
    points = None if zero is None else _tensor(zero)
    pack = partial(pack_w4, _tensor(packed), _tensor(scale), points, k, group)
    return _call(node, 4, group, pack, traced)


def _linear_w8(node: Node, traced: bool) -> KernelCall | None:
    if why_not(node):
        return linear(node)
    from dfc.runtime.kernels.linear import pack_w8

    _, weight, scale, _ = node.inputs
    group = node.attributes["group"]
    pack = partial(pack_w8, _tensor(weight), _tensor(scale), group)
    return _call(node, 8, group or 0, pack, traced)


def _depth(node: Node) -> int:
    k = _given(node)[0].tensor_type.shape[-1]
    assert isinstance(k, int)  # the op's own rule
    return k


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Parameter) and value.data is not None
    return value.data.tensor()


def _call(
    node: Node, bits: int, group: int, pack: Callable[[], Tensor], traced: bool
) -> KernelCall | None:
    import torch

    from dfc.runtime.kernels.linear import Bound, packed_bytes
    from dfc.runtime.kernels.packed import packed_weight

    n, k = node.result.tensor_type.shape[-1], _depth(node)
    assert isinstance(n, int)
    if packed_bytes(bits, n, k, group) is None:
        return None
    weights = [v for v in _given(node)[1:] if isinstance(v, Parameter) and v is not node.inputs[-1]]
    digests = tuple(w.data.sha256() for w in weights if w.data is not None)
    made = packed_weight(digests, bits, n, k, group, pack)
    bias = node.inputs[-1]
    assert bias is None or isinstance(bias, Value)
    if not traced:
        return KernelCall(Bound(made, n, k).run, (_given(node)[0], bias))
    function = getattr(torch.ops.dfc, f"linear_w{bits}").default
    return KernelCall(function, (_given(node)[0], made, bias, n, group))
