"""Layer norm, and that of a sum in one pass over memory: what stands behind a residual connection.

It stands in for PyTorch's where a layer rounds what it makes; elsewhere eager has PyTorch's bits. A
norm has the same bits with and without the addition, so that a graph may be cut between them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dfc.emit.kernels import KernelCall
from dfc.ir.graph import Node, Value
from dfc.ir.types import DTYPES
from dfc.runtime.kernels.library import library

NAME = "aten.layer_norm.default"
_F32 = DTYPES["f32"]


class AddNorm:
    """`layer_norm(x + r)` over the last dimension, or of x alone."""

    def __init__(self, eps: float) -> None:
        found = library()
        assert found is not None
        self.eps = eps
        self._call, self._path = found.c.dfc_add_norm, found.path.encode()

    def run(self, x: Tensor, r: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
        r = None if r is None else r.contiguous()
        y, n = torch.empty_like(x), x.shape[-1]
        status = self._call(
            x.data_ptr(), None if r is None else r.data_ptr(), weight.data_ptr(),
            bias.data_ptr(), y.data_ptr(), x.numel() // n, n, self.eps,
            torch.get_num_threads(), self._path,
        )  # fmt: skip
        if status:
            raise RuntimeError(f"dfc norm: status {status}")
        return y


def kernel(node: Node) -> KernelCall | None:
    """The call in place of a layer norm that a layer rounds, and of an addition before it that
    nothing else reads.
    """
    if not any(u.attributes.get("activations") == "int8" for u in node.result.users):
        return None
    x, weight, bias = (*node.inputs, None, None)[:3]
    if not all(isinstance(v, Value) and v.tensor_type.dtype == _F32 for v in (x, weight, bias)):
        return None
    assert isinstance(x, Value) and isinstance(weight, Value) and isinstance(bias, Value)
    last = x.tensor_type.shape[-1] if x.tensor_type.shape else None
    if list(node.attributes["normalized_shape"]) != [last] or not isinstance(last, int) or not last:
        return None
    run = AddNorm(float(node.attributes["eps"])).run
    return KernelCall(run, (*(_terms(x) or (x, None)), weight, bias))


def _terms(x: Value) -> tuple[Value, Value] | None:
    """The two values of one shape that a value is the sum of, where one norm alone reads it."""
    made = x.node
    if made is None or made.op != "aten.add.Tensor" or made.attributes["alpha"] != 1:
        return None
    terms = [v for v in made.inputs if isinstance(v, Value) and v.tensor_type == x.tensor_type]
    if len(terms) != 2 or x.use_count > 1 or any(v.node is None for v in terms):
        return None
    return terms[0], terms[1]
