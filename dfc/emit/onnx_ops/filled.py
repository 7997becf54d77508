"""Pictures of three channels get a fourth of nothing, where a convolution of codes reads them.

ONNX Runtime's kernels add products of four channels at once and write codes; for other numbers of
channels it copies every patch, multiplies those, and rounds the sums in a pass of their own: the
first convolution of EfficientNet-Lite0 takes 145 us so and 67 with four channels (one thread,
AVX-512), and the fourth channel 8.
Source:  onnxruntime/core/mlas/lib/convsym.cpp, MlasConvSymPackWSize.
"""

from __future__ import annotations

from typing import Any

from dfc.emit.onnx_builder import Builder, Val
from dfc.emit.onnx_types import D

_TOGETHER = 4  # channels whose products a kernel adds at once; it makes a multiple of as many
_LEAST = 16  # channels that it makes at least


def fill_channels(b: Builder, x: Val, weight: Val, groups: int) -> tuple[Val, Val]:
    """What a convolution reads and its weight, with zeros for the channels that are missing."""
    out, channels, *kernel = b.type(weight).shape
    more = -channels % _TOGETHER if isinstance(channels, int) else 0
    fits = isinstance(out, int) and out >= _LEAST and out % _TOGETHER == 0
    if groups != 1 or not more or not fits or all(k == 1 for k in kernel):
        return x, weight
    pad = _made_by(x, "Pad")
    read = _codes(x if pad is None else pad.inputs[0])
    table = _codes(weight)
    if read is None or table is None or table.inputs[0].dtype != D.INT8:
        return x, weight
    codes, _, zero = read.inputs
    wide = b.derived(table.inputs[0], "filled", lambda t: _with_channels(t, more))
    if wide is None or codes.const_value is not None:
        return x, weight
    rest = [0 for _ in kernel]
    filled = b.op("Pad", codes, [0, 0, *rest, 0, more, *rest], zero, dtype=codes.dtype)
    x = _again(b, read, filled)
    return x if pad is None else _again(b, pad, x), _again(b, table, wide)


def _made_by(x: Any, kind: str) -> Any:
    node = x.producer()
    return node if node is not None and node.op_type == kind else None


def _codes(x: Any) -> Any:
    """The node that reads codes with a zero point, which stands for nothing."""
    node = _made_by(x, "DequantizeLinear")
    return node if node is not None and len(node.inputs) == 3 else None


def _with_channels(t: Any, more: int) -> Any:
    import torch

    return torch.cat([t, t.new_zeros(t.shape[0], more, *t.shape[2:])], 1)


def _again(b: Builder, node: Any, x: Val) -> Val:
    """The same of another value."""
    attributes = {a.name: a.value for a in node.attributes.values()}
    made: Val = b.op(node.op_type, x, *node.inputs[1:], dtype=node.outputs[0].dtype, **attributes)
    return made
