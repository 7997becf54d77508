"""Weights that are multiplied as floats: unpacked once, when a module is built, and shared.

The codes make a model small on disk. Unpacked at every call they would cost more than the product
that follows; as floats in memory they cost what the original did, which is never slower than it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dfc.emit.kernels import KernelCall, Kernels
from dfc.ir.graph import Node, Parameter, Value

if TYPE_CHECKING:
    from torch import Tensor

_held: weakref.WeakValueDictionary[tuple[object, ...], Tensor] = weakref.WeakValueDictionary()


def linear(node: Node) -> KernelCall | None:
    """A linear layer with quantized weights as one with floats; None where it rounds what it
    reads, or its weights are computed.
    """
    if node.attributes["activations"] != "float":
        return None
    x, *weights, bias = node.inputs
    held = _constants(weights)
    if held is None:
        return None
    import torch

    assert isinstance(x, Value) and (bias is None or isinstance(bias, Value))
    dtype, k = x.tensor_type.dtype, int(x.tensor_type.shape[-1])  # type: ignore[arg-type]
    group: Any = node.attributes.get("group")

    def unpack() -> Tensor:
        from dfc.ops.codes import weight4, weight8

        codes, scale, *zero = (None if p is None else _tensor(p) for p in held)
        assert codes is not None and scale is not None
        if node.op == "dfc.linear_w4":
            return weight4(codes, scale, zero[0], group, k, dtype.to_torch())
        if not scale.dim():
            return codes.to(dtype.to_torch()) * scale.to(dtype.to_torch())
        return weight8(codes, scale, group, dtype.to_torch())

    made = _shared((node.op, group, k, dtype.name), held, unpack)
    return KernelCall(torch.ops.aten.linear.default, (x, made, bias))


def dequantize(node: Node) -> KernelCall | None:
    """Constant codes as the floats that they stand for."""
    held = _constants(node.inputs)
    if held is None or not node.result.tensor_type.is_static:
        return None
    import torch

    from dfc.ir.op import DeclaredOp

    assert isinstance(node.info, DeclaredOp)
    reference = node.info.instance(node.attributes).reference

    def unpack() -> Tensor:
        made = reference(*(None if p is None else _tensor(p) for p in held))
        assert not isinstance(made, tuple)
        return made

    made = _shared((node.op, *sorted(map(str, node.attributes.items()))), held, unpack)
    return KernelCall(torch.ops.aten.alias.default, (made,))


def experts(node: Node) -> KernelCall:
    """Rows in runs, each with an expert's weights: floats, or what the op says where it rounds."""
    import torch

    from dfc.runtime.kernels.grouped import register

    register()
    x, ends, *weights = node.inputs
    assert isinstance(x, Value) and isinstance(ends, Value)
    held = _constants(weights)
    bits = 4 if node.op.endswith("4") else 8
    group: Any = node.attributes["group"]
    if node.attributes["activations"] != "float" or held is None:
        operands: Any = (x, ends, *weights, *([None] if bits == 8 else []), bits, group or 0)
        rounded = int(node.attributes["activations"] != "float")
        return KernelCall(torch.ops.dfc.grouped_linear_codes.default, (*operands, rounded))
    dtype, k = x.tensor_type.dtype.to_torch(), int(x.tensor_type.shape[-1])  # type: ignore[arg-type]

    def unpack() -> Tensor:
        from dfc.ops.codes import weight4, weight8

        codes, scale, *zero = (None if p is None else _tensor(p) for p in held)
        assert codes is not None and scale is not None
        if bits == 4:
            return weight4(codes, scale, zero[0], group, k, dtype)
        return weight8(codes, scale, group, dtype)

    made = _shared((node.op, group, k, str(dtype)), held, unpack)
    return KernelCall(torch.ops.dfc.grouped_linear_floats.default, (x, ends, made))


UNPACKED: Kernels = {
    "dfc.linear_w4": linear, "dfc.linear_w8": linear, "dfc.linear_f8": linear,
    "dfc.grouped_linear_w4": experts, "dfc.grouped_linear_w8": experts,
    "dfc.dequantize": dequantize,
}  # fmt: skip


def _constants(weights: Sequence[object]) -> list[Parameter | None] | None:
    """The operands as parameters with numbers; None where one of them is computed."""
    found: list[Parameter | None] = []
    for w in weights:
        if w is not None and (not isinstance(w, Parameter) or w.data is None):
            return None
        found.append(w)
    return found


def _tensor(p: Parameter) -> Tensor:
    assert p.data is not None
    return p.data.tensor()


def _shared(
    how: tuple[object, ...], weights: Sequence[Parameter | None], unpack: Callable[[], Tensor]
) -> Tensor:
    """What is unpacked of these weights: as long as a module has it, for all modules."""
    digests = [p.data.sha256() if p is not None and p.data is not None else "" for p in weights]
    key = (*how, *digests)
    found = _held.get(key)
    if found is None:
        found = _held[key] = unpack()
    return found
