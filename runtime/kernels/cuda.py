"""Which kernel a CUDA device runs a quantized linear layer with, by its rows and sizes.

Few rows are bound by reading weights, hundreds by multiplying: the first read codes and unpack them
in registers; very many rows are multiplied by cuBLAS, with floats that are unpacked for that call.
Without Triton, and for what kernels do not take, weights are unpacked once (unpacked.py).
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from dfc.emit.kernels import KernelCall, Kernels
from dfc.errors import DfcError
from dfc.ir.graph import Node, Parameter, Value
from dfc.runtime.kernels.unpacked import UNPACKED
from dfc.runtime.kernels.unpacked import linear as unpacked

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FIRST_CAPABILITY = (8, 0)  # Ampere: bf16 on tensor cores, and what Triton supports
FIRST_FLOAT8 = (8, 9)  # Ada and Hopper multiply eight-bit floats
ONE_BY_ONE = 2  # up to so many rows, each reads the weights for itself
MOST_ROWS = 256  # from here on floats are unpacked once for all of them
_FLOATS = ("f16", "bf16", "f32")
_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group, "
    "int rounded) -> Tensor"
)


class Kind(NamedTuple):
    """What one device runs, and why not more."""

    kernels: bool
    float8: bool
    reason: str


@cache
def kind(device: str) -> Kind:
    import torch

    if not torch.cuda.is_available():
        return Kind(False, False, "no CUDA device")
    if importlib.util.find_spec("triton") is None:
        words = "Triton is not installed: weights of linear layers are unpacked to floats"
        return Kind(False, False, words)
    capability = torch.cuda.get_device_capability(torch.device(device))
    name = "{}.{}".format(*capability)
    if capability < FIRST_CAPABILITY:
        words = f"compute capability {name} is below 8.0: weights are unpacked to floats"
        return Kind(False, False, words)
    float8 = capability >= FIRST_FLOAT8
    more = "and f8 " if float8 else ""
    without = "" if float8 else ", f8 rows as floats"
    return Kind(True, float8, f"Triton: int4, int8 {more}weights as they are stored{without}")


def cuda_kernels(device: str) -> Kernels:
    """By op, what torch's engines call on a CUDA device."""
    found = kind(device)
    if not found.kernels:
        return UNPACKED
    register()
    return {
        **UNPACKED, "dfc.linear_w4": _linear_w4, "dfc.linear_w8": _linear_w8,
        "dfc.linear_f8": _linear_f8 if found.float8 else unpacked,
    }  # fmt: skip


def why_not(node: Node) -> str | None:
    """None, or why a linear layer with quantized weights is left to PyTorch."""
    x = node.inputs[0]
    assert isinstance(x, Value)
    if x.tensor_type.dtype.name not in _FLOATS:
        return f"x is {x.tensor_type.dtype.name}, kernels take {', '.join(_FLOATS)}"
    if not isinstance(node.result.tensor_type.shape[-1], int):
        return "the number of outputs is not known"
    if (node.attributes.get("group") or 0) > 256:
        return f"groups of {node.attributes['group']} are too long for exact sums"
    return None


def _linear_w4(node: Node) -> KernelCall | None:
    x, packed, scale, zero, bias = node.inputs
    return _call(node, (x, packed, scale, zero, bias), 4)


def _linear_w8(node: Node) -> KernelCall | None:
    x, weight, scale, bias = node.inputs
    return _call(node, (x, weight, scale, None, bias), 8)


def _linear_f8(node: Node) -> KernelCall | None:
    """Eight-bit floats; one scale of the whole weight becomes one for each output."""
    x, weight, scale, bias = node.inputs
    assert isinstance(scale, Value) and isinstance(weight, Value)
    by: Any = scale
    if scale.tensor_type.rank == 0:
        if not isinstance(scale, Parameter) or scale.data is None:
            return unpacked(node)
        by = scale.data.tensor().expand(node.result.tensor_type.shape[-1]).contiguous()  # type: ignore[arg-type]
    if node.attributes["activations"] == "f8" and weight.tensor_type.dtype.name != "f8e4m3fn":
        return None
    return _call(node, (x, weight, by, None, bias), 8)


def _call(node: Node, operands: tuple[Any, ...], bits: int) -> KernelCall | None:
    import torch

    if why_not(node):
        return unpacked(node)
    rounded = int(node.attributes["activations"] != "float")
    group = node.attributes.get("group") or 0
    assert isinstance(group, int)
    function = torch.ops.dfc.linear_cuda.default
    return KernelCall(function, (*operands, bits, group, rounded))


@cache
def register() -> torch.library.Library:
    """Make `torch.ops.dfc.linear_cuda` known; the library keeps it alive."""
    import torch

    ops: Any = torch.library.Library("dfc", "FRAGMENT")  # type: ignore[no-untyped-call]
    ops.define("linear_cuda" + _SCHEMA)
    ops.impl("linear_cuda", linear, "CUDA")
    ops.impl("linear_cuda", _shape, "Meta")
    return ops  # type: ignore[no-any-return]


def _shape(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
    bits: int, group: int, rounded: int,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
    bits: int, group: int, rounded: int,
) -> Tensor:  # fmt: skip
    """What `dfc.linear_w4`, `linear_w8` and `linear_f8` mean, with sums in f32.

    With `rounded` rows are codes as the weights are, whose products are summed without error.
    Needs:   all on the device of x; zero points and bias contiguous.
    Raises:  DfcError K003 where a kernel does not compile, or takes more than the device has.
    """
    from dfc.runtime.kernels.launch import FAILURES, reason

    try:
        return _linear(x, weight, scale, zero, bias, bits, group, rounded)
    except FAILURES as e:
        raise DfcError(
            "K003", f"the kernel for quantized weights does not run on this device: {reason(e)}",
            help="the engine `eager:floats` unpacks weights that meet floats, and needs no kernel",
            status=7,
        ) from e  # fmt: skip


def _linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
    bits: int, group: int, rounded: int,
) -> Tensor:  # fmt: skip
    import torch

    from dfc.runtime.kernels.launch import Layer

    n, k = weight.shape[0], x.shape[-1]
    rows = x.reshape(-1, k)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    layer = Layer(weight.contiguous(), scale.contiguous(), zero, bias, bits, group, n, k)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        if rows.shape[0] > MOST_ROWS and not rounded:
            return torch.nn.functional.linear(x, layer.floats(x.dtype), bias)
        y = x.new_empty((*x.shape[:-1], n))
        out = y.view(-1, n)
        if not y.numel():
            return y
        if rounded:
            layer.rounded(rows, out)
        elif out.shape[0] <= ONE_BY_ONE:
            layer.few(rows, out)
        else:
            layer.many(rows, None, out)
    return y
