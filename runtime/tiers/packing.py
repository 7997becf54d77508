"""Linear layers on kernels: what stays or is streamed is the kernels' own layout, in files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dfc.emit.kernels import KernelCall
from dfc.ir.graph import Graph, Node, Parameter, Value
from dfc.ir.types import DTYPES, TensorType
from dfc.runtime.kernels.graph import are_built, packing, why_not
from dfc.runtime.kernels.packed import packed_file
from dfc.runtime.tiers.files import FileData

if TYPE_CHECKING:
    from torch import Tensor

_BITS = {"dfc.linear_w4": 4, "dfc.linear_w8": 8}


def packed_calls(graph: Graph) -> dict[Node, KernelCall]:
    """What runs in place of nodes with int4 or int8 weights, one weight in one file each.

    Weights are packed one after the other. A node is left as it is where the kernels do not take
    it, or where its weight is too small for a file.
    """
    if not are_built():
        return {}
    calls = {n: _call(n, _BITS[n.op]) for n in graph.nodes if n.op in _BITS and not why_not(n)}
    return {node: call for node, call in calls.items() if call is not None}


def _call(node: Node, bits: int) -> KernelCall | None:
    found = packing(node, bits)
    path = None if found is None else packed_file(*found)
    if found is None or path is None:
        return None
    from dfc.runtime.kernels.linear import linear

    n = found.n
    size = path.stat().st_size
    name = next(v.name for v in node.inputs[1:] if isinstance(v, Parameter))
    weight = Parameter(name, TensorType(DTYPES["u8"], (size,)), data=FileData(path))
    x, bias = node.inputs[0], node.inputs[-1]
    assert isinstance(x, Value) and (bias is None or isinstance(bias, Value))

    def run(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, packed, bias, n)

    return KernelCall(run, (x, weight, bias))
