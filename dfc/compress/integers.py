"""Weights as int8 codes for integer kernels, and what a processor's instructions allow of them.

Processors without dot products of 8-bit integers (VNNI on x86) add pairs of products u8 x i8 in 16
bits, which saturate: 255 * 127 twice is 64 770, above 32 767. `pairs` makes weights that cannot:
each channel's scale is the finest at which no two neighbours can add up to more. `seven` gives up a
bit of all weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.compress.processor import Processor, this_processor
from dfc.compress.weighted import described
from dfc.ir.graph import Graph, Node, Parameter, Value

if TYPE_CHECKING:
    from torch import Tensor

FULL = 127
SEVEN = 64  # 2 * 255 * 64 is 32 640
_PAIR = 128  # 255 * 128 is 32 640


@dataclass(frozen=True)
class Codes:
    """`codes * scale` is the weight, about; a scale for each output channel, or one."""

    codes: Tensor  # i8, the weight's shape
    scale: Tensor  # f32 [N] or []

    @property
    def weight(self) -> Tensor:
        if self.scale.dim() == 0:
            return self.codes.float() * self.scale
        return self.codes.float() * self.scale.reshape(-1, *[1] * (self.codes.dim() - 1))


def scales_of(w: Tensor, bits: str, per_channel: bool) -> Tensor:
    """The scales at which a weight [N, ...] fits: of every channel, or of all.

    `bits`: `full`, `seven` or `pairs`. All-zero channels have the scale 1.
    """
    import torch

    rows = w.float().flatten(1)
    largest = rows.abs().amax(1) / (SEVEN if bits == "seven" else FULL)
    if bits == "pairs":
        largest = torch.maximum(largest, pair_scales(w))
    if not per_channel:
        largest = largest.amax()
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def pair_scales(w: Tensor) -> Tensor:
    """The finest scale of each channel [N, ...] at which neighbours' codes fit pairs."""
    # codes round, so that two of them may be 1 more than their sum: 127 leaves room for it
    return _pair_sums(w) / (_PAIR - 1)


def _pair_sums(w: Tensor) -> Tensor:
    """The largest sum of two neighbours of one sign in each channel [N].

    Kernels read a channel's weights by input channel first or last: neighbours of both orders.
    """
    import torch

    w = w.float()
    orders = [w.flatten(1)]
    if w.dim() > 2 and w.shape[1] > 1:
        orders.append(w.movedim(1, -1).flatten(1))
    found = torch.zeros(w.shape[0])
    for rows in orders:
        if rows.shape[1] % 2:
            rows = torch.nn.functional.pad(rows, (0, 1))
        for sign in (rows.clamp(min=0), (-rows).clamp(min=0)):
            found = torch.maximum(found, (sign[:, 0::2] + sign[:, 1::2]).amax(1))
    return found


def saturating(graph: Graph) -> str:
    """Where calibrated layers saturate in runtimes on this machine, and what to do; or nothing."""
    if this_processor().computes("i8"):
        return ""
    for node in graph.nodes:
        read = [v.node for v in node.inputs[:2] if isinstance(v, Value) and v.node is not None]
        if [n.op for n in read] != ["dfc.dequantize"] * 2 or is_depthwise(node):
            continue
        codes = read[1].inputs[0]
        if not isinstance(codes, Parameter) or codes.data is None:
            continue
        if float(_pair_sums(codes.data.tensor()).max()) > _PAIR:
            return (
                f"{this_processor().words} adds products of 8-bit integers in 16 bits, which those "
                f"of {described(node)} overflow: `codes=auto` or `codes=pairs` keeps them small"
            )
    return ""


def is_depthwise(node: Node) -> bool:
    """One input channel for each group."""
    shape = node.inputs[1].tensor_type.shape  # type: ignore[union-attr]
    return len(shape) > 2 and shape[1] == 1 and node.attributes.get("groups", 1) > 1


def encoded(w: Tensor, scale: Tensor) -> Codes:
    """A weight rounded to nearest at these scales."""
    import torch

    fitted = scale.reshape(-1, *[1] * (w.dim() - 1)) if scale.dim() else scale
    codes = torch.round(w.float() / fitted).clamp(-FULL, FULL)
    return Codes(codes.to(torch.int8), scale.float())


def weight_bits(asked: str, depthwise: bool, device: Processor) -> tuple[str, str]:
    """Which codes to make for a layer, and why."""
    if asked != "auto":
        return asked, "as the step says"
    if device.computes("i8"):
        return "full", f"{device.words} adds products of 8-bit integers in 32 bits"
    if depthwise:
        return "full", "kernels for depthwise convolutions widen before they multiply"
    return "pairs", f"{device.words} adds pairs of products in 16 bits, which would saturate"
