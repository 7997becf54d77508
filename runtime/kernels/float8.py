"""Linear layers in eight-bit floats on GPUs whose tensor cores multiply them: torch._scaled_mm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dfc.emit.kernels import KernelCall, Kernels
from dfc.ir.graph import Node, Value

if TYPE_CHECKING:
    from torch import Tensor

FIRST_CAPABILITY = (8, 9)  # Ada and Hopper
_STEP = 16  # rows and columns of a weight are multiples of this


def float8_kernels(device: str) -> Kernels:
    """By op, what a CUDA device runs in eight-bit floats; nothing where it cannot."""
    import torch

    if not torch.cuda.is_available():
        return {}
    if torch.cuda.get_device_capability(torch.device(device)) < FIRST_CAPABILITY:
        return {}
    return {"dfc.linear_f8": _kernel}


def _kernel(node: Node) -> KernelCall | None:
    """The kernel for layers that round their rows; None for others, and for odd sizes."""
    x, weight, scale, bias = node.inputs
    assert isinstance(x, Value) and isinstance(weight, Value) and isinstance(scale, Value)
    assert bias is None or isinstance(bias, Value)
    n, k = weight.tensor_type.shape
    fits = isinstance(n, int) and isinstance(k, int) and n % _STEP == k % _STEP == 0
    if node.attributes["activations"] != "f8" or not fits or x.tensor_type.dtype.name == "f64":
        return None
    return KernelCall(linear_f8, (x, weight, scale, bias))


def linear_f8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """What `dfc.linear_f8` means with activations="f8", its products summed in float32."""
    import torch

    from dfc.ops.linear_f8 import round_rows_f8

    codes, rows = round_rows_f8(x.float().reshape(-1, x.shape[-1]))
    one = torch.ones((), device=x.device)
    y = torch._scaled_mm(codes, weight.t(), one, one, out_dtype=torch.float32)
    y = y * rows * scale.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])
