"""Which nodes of a graph the kernels take, and what is called in their place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from dfc.emit.kernels import Kernel, KernelCall, Kernels
from dfc.ir.graph import Node, Parameter, Value
from dfc.ir.types import DTYPES
from dfc.runtime.kernels.unpacked import UNPACKED, experts, linear

if TYPE_CHECKING:
    from torch import Tensor

_COMPUTED = ("f32", "bf16", "f16")  # rows of experts: the kernels' f32, and what is widened to it


def kernels(device: str, *, traced: bool = False) -> Kernels:
    """By op, what torch's engines may call on this device.

    `traced`: what torch.compile can see through, which costs more for each call.
    """
    if device.startswith("cuda"):
        from dfc.runtime.kernels.cuda import cuda_kernels

        return cuda_kernels(device)
    if device != "cpu":
        return {}
    return {**UNPACKED, **(_compiled_kernels(traced) if are_built() else {})}


def unpacked_kernels(device: str) -> Kernels:
    """As `kernels`, but quantized weights that meet floats are unpacked once, on any device."""
    stored = kernels(device)

    def unpacked_first(op: str) -> Kernel:
        other = stored.get(op)
        return lambda node: linear(node) or (other(node) if other is not None else None)

    return {**stored, **{op: unpacked_first(op) for op in UNPACKED if op.startswith("dfc.linear")}}


def are_built() -> bool:
    from dfc.runtime.kernels.library import library

    return library() is not None


def _compiled_kernels(traced: bool) -> Kernels:
    from dfc.runtime.kernels.linear import register

    register()
    return {
        "dfc.linear_w4": partial(_linear_w4, traced=traced),
        "dfc.linear_w8": partial(_linear_w8, traced=traced),
        "dfc.grouped_linear_w4": partial(_experts, bits=4, traced=traced),
        "dfc.grouped_linear_w8": partial(_experts, bits=8, traced=traced),
        **kernels_between(traced),
    }


def kernels_between(traced: bool = False) -> Kernels:
    """Those of the processor for what stands between layers of codes.

    Needs:   `are_built()`.
    """
    from dfc.runtime.kernels import attention_bf16, norm

    found: dict[str, Kernel] = {}
    if attention_bf16.can_run():
        found[attention_bf16.NAME] = partial(attention_bf16.kernel, traced=traced)
    if not traced:  # what traces fuses more than that
        found[norm.NAME] = norm.kernel
    return found


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
    return linear(node) if why_not(node) else _call(node, 4, traced)


def _linear_w8(node: Node, traced: bool) -> KernelCall | None:
    return linear(node) if why_not(node) else _call(node, 8, traced)


class Packing(NamedTuple):
    """What a weight is packed from, and how: the arguments of `packed_weight`."""

    digests: tuple[str, ...]
    bits: int
    n: int
    k: int
    group: int
    pack: Callable[[], Tensor]


def packing(node: Node, bits: int) -> Packing | None:
    """How the kernels have the weight of a node; None for sizes that they do not take.

    Needs:   `why_not(node)` is None.
    """
    from dfc.runtime.kernels.linear import pack_w4, pack_w8, packed_bytes

    weights = [v for v in _given(node)[1:] if isinstance(v, Parameter) and v is not node.inputs[-1]]
    n, k, group = node.result.tensor_type.shape[-1], _depth(node), node.attributes["group"] or 0
    assert isinstance(n, int)
    if packed_bytes(bits, n, k, group) is None:
        return None
    codes, scale = _tensor(node.inputs[1]), _tensor(node.inputs[2])
    if bits == 4:
        zero = node.inputs[3]
        points = None if zero is None else _tensor(zero)
        pack = partial(pack_w4, codes, scale, points, k, group)
    else:
        pack = partial(pack_w8, codes, scale, node.attributes["group"])
    digests = tuple(w.data.sha256() for w in weights if w.data is not None)
    return Packing(digests, bits, n, k, group, pack)


def _depth(node: Node) -> int:
    k = _given(node)[0].tensor_type.shape[-1]
    assert isinstance(k, int)  # the op's own rule
    return k


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Parameter) and value.data is not None
    return value.data.tensor()


def _call(node: Node, bits: int, traced: bool) -> KernelCall | None:
    import torch

    from dfc.runtime.kernels.linear import Bound
    from dfc.runtime.kernels.packed import packed_weight

    found = packing(node, bits)
    if found is None:
        return None
    made = packed_weight(*found)
    x, before = rounded_by(node)
    bias = node.inputs[-1]
    assert bias is None or isinstance(bias, Value)
    if not traced:
        return KernelCall(Bound(made, found.n, found.k, before).run, (x, bias))
    function = getattr(torch.ops.dfc, f"linear_w{bits}").default
    return KernelCall(function, (x, made, bias, found.n, found.group, before))


def _experts(node: Node, bits: int, traced: bool) -> KernelCall | None:
    """Rows of experts on packed weights; what kernels do not take is left to `experts`."""
    x, ends, *weights = node.inputs
    assert isinstance(x, Value) and isinstance(ends, Value)
    count = ends.tensor_type.shape[0]
    made = None
    if (
        node.attributes["activations"] == "int8" and x.tensor_type.dtype.name in _COMPUTED
        and all(w is None or (isinstance(w, Parameter) and w.data is not None) for w in weights)
        and isinstance(count, int)
    ):  # fmt: skip
        made = _packed_experts(node, bits, count)
    if made is None or not isinstance(count, int):
        return experts(node)
    from dfc.runtime.kernels.grouped import BoundExperts, register

    n, k = node.result.tensor_type.shape[-1], x.tensor_type.shape[-1]
    assert isinstance(n, int) and isinstance(k, int)
    if traced:
        import torch

        register()
        return KernelCall(torch.ops.dfc.grouped_linear_packed.default, (x, ends, made, n))
    return KernelCall(BoundExperts(made, count, n, k).run, (x, ends))


def _packed_experts(node: Node, bits: int, count: int) -> Tensor | None:
    from dfc.runtime.kernels.grouped import in_one_piece
    from dfc.runtime.kernels.linear import pack_w4, pack_w8, packed_bytes
    from dfc.runtime.kernels.packed import packed_weight

    n, k, group = node.result.tensor_type.shape[-1], _depth(node), node.attributes["group"]
    assert isinstance(n, int)
    if packed_bytes(bits, n, k, group or 0) is None:
        return None
    held = [w for w in node.inputs[2:] if isinstance(w, Parameter) and w.data is not None]

    def pack() -> Tensor:
        codes, scale, *zero = (_tensor(w) for w in held)
        return in_one_piece([
            pack_w4(codes[e], scale[e], zero[0][e] if zero else None, k, group) if bits == 4
            else pack_w8(codes[e], scale[e], group) for e in range(count)
        ])  # fmt: skip

    digests = tuple(w.data.sha256() for w in held if w.data is not None)
    return packed_weight(digests, bits, n, k, group or 0, pack, experts=count)


def rounded_by(node: Node) -> tuple[Value, int]:
    """What a layer of codes reads, and what it computes of that before rounding: 0 or GELU."""
    from dfc.runtime.kernels.linear import GELU

    x = _given(node)[0]
    source = _of_gelu(x)
    return (x, 0) if source is None else (source, GELU)


def _of_gelu(x: Value) -> Value | None:
    """What a value is the GELU of, where nothing else reads that: it is computed row by row, just
    before the row is rounded, and never written to memory.
    """
    made = x.node
    if made is None or made.op != "aten.gelu.default" or x.use_count > 1:
        return None
    (source,) = made.operands
    return source if made.attributes["approximate"] == "none" and source.node is not None else None
