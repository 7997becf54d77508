"""Which float32 products a CUDA device takes with 10 bits of mantissa (TF32).

PyTorch does so for convolutions unless it is told otherwise, and for matrices where it is told so.
These settings are the user's, and eager mode follows them too: engines are held to what eager mode
gives there, and the report says so.

Source:  NVIDIA's white paper on Ampere (TF32 has 8 bits of exponent and 10 of mantissa); PyTorch's
         notes on CUDA semantics.
"""

from __future__ import annotations

from typing import Any

from dfc.ir.graph import Graph, Value
from dfc.ir.types import TensorType
from dfc.planning.kinds import KINDS
from dfc.rewrite.agree import ULPS

RTOL = ULPS * 2.0**-10  # what eager mode may give there, of the largest element
_FIRST = (8, 0)  # the first devices that have such products
_CUDNN = "(torch.backends.cudnn.allow_tf32)"
_WORDS = {
    "conv": f"convolutions {_CUDNN}",
    "rnn": f"recurrent layers {_CUDNN}",
    "matmul": "products of matrices (torch.set_float32_matmul_precision)",
}
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def short_products(graph: Graph, device: str) -> list[str]:
    """What is short of float32 on a device, with the setting that says so; nothing on others."""
    if not device.startswith("cuda"):
        return []
    found = {_kind(n.op) for n in graph.walk() if any(_is_float32(v) for v in n.operands)}
    return [words for kind, words in _WORDS.items() if kind in found & _allowed(device)]


def _kind(op: str) -> str:
    name = op.split(".")[1]
    if "conv" in name:
        return "conv"
    if name in _RECURRENT:
        return "rnn"
    return "matmul" if KINDS.get(name) in ("matmul", "attention") else ""


def _is_float32(v: Value) -> bool:
    return isinstance(v.type, TensorType) and v.type.dtype.name == "f32"


def _allowed(device: str) -> set[str]:
    """The kinds of operators that PyTorch lets a device shorten."""
    import torch

    if torch.cuda.get_device_capability(device) < _FIRST:
        return set()
    backends: Any = torch.backends
    cudnn = backends.cudnn
    settings = {"conv": cudnn.conv, "rnn": cudnn.rnn, "matmul": backends.cuda.matmul}
    return {kind for kind, s in settings.items() if s.fp32_precision == "tf32"}
