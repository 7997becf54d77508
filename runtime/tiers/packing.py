"""Linear layers on kernels: what stays or is streamed is the kernels' own layout, in files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from dfc.emit.kernels import KernelCall
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.types import DTYPES, TensorType
from dfc.runtime.kernels.graph import (
    Packing,
    are_built,
    kernels_between,
    packing,
    rounded_by,
    why_not,
)
from dfc.runtime.kernels.packed import packed_file
from dfc.runtime.tiers.files import FileData

if TYPE_CHECKING:
    from torch import Tensor

_BITS = {"dfc.linear_w4": 4, "dfc.linear_w8": 8}


def packed_calls(graph: Graph) -> dict[Node, KernelCall]:
    """What runs in place of nodes with int4 or int8 weights, one weight in one file each, and of
    what stands between them: the kernels of the eager engine.

    Weights are packed one after the other. Where one is too small for a file its codes are brought;
    where the kernels do not take a node, it is left as it is.
    """
    if not are_built():
        return {}
    between = kernels_between()
    calls = {}
    for n in graph.nodes:
        if n.op in _BITS and not why_not(n):
            calls[n] = _call(n, _BITS[n.op])
        elif n.op in between:
            calls[n] = between[n.op](n)
    return {node: call for node, call in calls.items() if call is not None}


def _call(node: Node, bits: int) -> KernelCall | None:
    found = packing(node, bits)
    if found is None:
        return None
    from dfc.runtime.kernels.linear import linear

    n, path = found.n, packed_file(*found)
    x, before = rounded_by(node)
    bias = node.inputs[-1]
    assert bias is None or isinstance(bias, Value)
    if path is None:
        return _of_codes(node, bits, found)
    size = path.stat().st_size
    name = next(v.name for v in node.inputs[1:] if isinstance(v, Parameter))
    weight = Parameter(name, TensorType(DTYPES["u8"], (size,)), data=FileData(path))

    def run(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, packed, bias, n, before)

    return KernelCall(run, (x, weight, bias))


def _of_codes(node: Node, bits: int, found: Packing) -> KernelCall:
    """Codes that are packed at each call.

    Why:  results are the engine's, to the bit: kernels add groups up in an order of their own, and
          GELU has other bits in them than beside them.
    """
    from dfc.runtime.kernels.linear import linear, pack_w4, pack_w8

    x, before = rounded_by(node)
    *weights, bias = (cast("Value | None", v) for v in node.inputs[1:])

    def run(x: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor, *zero: Any) -> Tensor:
        packed = (
            pack_w4(codes, scale, zero[0], found.k, found.group) if bits == 4
            else pack_w8(codes, scale, found.group or None)
        )  # fmt: skip
        return linear(x, packed, bias, found.n, before)

    return KernelCall(run, (x, bias, *weights))
