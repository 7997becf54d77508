"""ATen's operators by PyTorch's own functions, and weights as plain attributes: less Python.

Why:  an operator's object of `torch.ops` takes a microsecond or two more than the function of the
      same name, a module's buffer half a microsecond more than an attribute. Of small models that
      is a twentieth of the time, and Python is what two lanes of a pipeline cannot run at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import fx

# Overloads whose arguments the function of their name takes as they are, and calls just them with.
_OVERLOADS = {
    "default": """
        _log_softmax _log_softmax_backward_data _softmax _softmax_backward_data abs addmm
        addmm_ amax avg_pool2d baddbmm bmm cat chunk clamp clone conv1d conv2d conv3d
        convolution cos cumsum detach dropout embedding erf exp expand gather gelu
        group_norm hardsigmoid hardswish hardtanh layer_norm linear log matmul max_pool2d
        maximum minimum mm native_layer_norm neg permute relu reshape rms_norm rsqrt
        scaled_dot_product_attention sigmoid silu sin split_with_sizes sqrt stack t tanh
        unsqueeze view
        """,
    "Scalar": "masked_fill",
    "Tensor": "add add_ div eq gt le lt mul sub",
    "Tensor_Scalar": "pow",
    "dim": "mean squeeze",
    "dim_IntList": "sum",
    "int": "select softmax transpose",
    "self": "where",
    "using_ints": "flatten",
}


@cache
def functions() -> dict[Any, Callable[..., Any]]:
    """What runs each of ATen's overloads without its object."""
    import torch

    found = {}
    for kind, names in _OVERLOADS.items():
        for name in names.split():
            place = next(p for p in (torch, torch._C._nn, torch.Tensor) if hasattr(p, name))
            found[getattr(getattr(torch.ops.aten, name), kind)] = getattr(place, name)
    return found


def call_directly(module: fx.GraphModule) -> None:
    """Let a module that stays where it is, and its parts, call functions and read attributes."""
    from torch import fx

    for part in module.modules():
        if not isinstance(part, fx.GraphModule):
            continue
        for node in part.graph.nodes:
            if node.op == "call_function":
                node.target = functions().get(node.target, node.target)
        part.recompile()
        part.__dict__.update(part.named_buffers(recurse=False))
