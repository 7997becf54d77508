"""Pairs of layers between which a channel's scale is free, and the scales that balance them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.compress.region import source_of
from dfc.ir.graph import Graph, Node, Parameter, Value

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LAYERS = frozenset(f"aten.{n}.default" for n in ("conv1d", "conv2d", "conv3d", "linear"))
_MARGIN = 1.02  # values may exceed by a little what calibration has seen
_ENOUGH = 1e-3  # scales of a round that change no more than this


@dataclass(frozen=True)
class Pair:
    """The layer that makes some channels, the one that reads them, and what clips them between."""

    first: Node
    second: Node
    high: float | None  # None: nothing, or a ReLU

    @property
    def axis(self) -> int:
        """The dimension of the first layer's result that counts its channels."""
        rank, weight = self.first.results[0].tensor_type.rank, _weight(self.first)
        return rank - 1 - (weight.tensor_type.rank - 2)

    @property
    def channels(self) -> int:
        return int(_weight(self.first).tensor_type.shape[0])  # type: ignore[arg-type]

    @property
    def groups(self) -> int:
        return int(self.second.attributes.get("groups", 1))

    def columns(self, w: Tensor) -> Tensor:
        """The second layer's weights by the channel that they read: [channels, others]."""
        grouped = w.reshape(self.groups, -1, w.shape[1], *w.shape[2:])
        return grouped.movedim(2, 1).reshape(self.channels, -1)

    def scaled(self, w: Tensor, scale: Tensor) -> Tensor:
        """The second layer's weights with those of channel i multiplied by scale[i]."""
        grouped = w.reshape(self.groups, -1, w.shape[1], *w.shape[2:])
        s = scale.reshape(self.groups, 1, w.shape[1], *[1] * (w.dim() - 2))
        return (grouped * s).reshape(w.shape)


class ChannelPeak:
    """The largest value of each channel."""

    def __init__(self, axis: int) -> None:
        import torch

        self.axis = axis
        self.peak = torch.zeros(0)

    def update(self, x: Tensor) -> None:
        import torch

        found = x.movedim(self.axis, 0).flatten(1).amax(1)
        self.peak = torch.maximum(self.peak, found) if len(self.peak) else found

    def state(self) -> dict[str, Tensor]:
        return {"peak": self.peak}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.peak = state["peak"].clone()


def pairs_of(graph: Graph, kept: Callable[[Node, str], None]) -> Iterator[Pair]:
    """Every pair, in the order of the first layers; `kept` is told why others are none."""
    written = {m.target for m in graph.mutations}
    for node in graph.nodes:
        if node.op in LAYERS:
            found = _pair(graph, node, written)
            if isinstance(found, Pair):
                yield found
            else:
                kept(node, found)


def _weight(layer: Node) -> Parameter:
    weight = layer.inputs[1]
    assert isinstance(weight, Parameter)
    return weight


def _pair(graph: Graph, first: Node, written: set[Value]) -> Pair | str:
    value, high = first.results[0], None
    while True:
        if graph.is_output(value):
            return f"%{value.name} is an output"
        if value.use_count != 1:
            return f"%{value.name} is read by {value.use_count} nodes"
        (reader,) = value.users
        if reader.op in LAYERS:
            break
        if source_of(reader.results[0]) is not reader.results[0] and reader.results[0].use_count:
            value = reader.results[0]  # a padding with zeros
            continue
        bound = _clips(reader)
        if bound is None:
            return f"%{value.name} is read by {reader.op}, which a scale cannot pass"
        high = min(bound, high or bound)
        value = reader.results[0]
    for layer in (first, reader):
        problem = _constant(layer, written)
        if problem:
            return problem
    if reader.inputs[0] is not value:
        return f"%{value.name} is no input of %{reader.results[0].name}"
    found = Pair(first, reader, None if high in (None, float("inf")) else high)
    width = found.groups * int(_weight(reader).tensor_type.shape[1])  # type: ignore[arg-type]
    return found if width == found.channels else f"%{value.name} changes its channels"


def _clips(node: Node) -> float | None:
    """Where an activation that is linear above 0 clips; None for others."""
    a = node.attributes
    if node.op == "aten.relu.default":
        return float("inf")
    if node.op == "aten.relu6.default":
        return 6.0
    if node.op == "aten.hardtanh.default" and a["min_val"] == 0 and a["max_val"] > 0:
        return float(a["max_val"])
    return None


def _constant(layer: Node, written: set[Value]) -> str | None:
    """Why a layer's weights cannot be changed."""
    name = layer.results[0].name
    for v in layer.inputs[1:3]:
        if v is None:
            continue
        if not isinstance(v, Parameter):
            return f"%{name} has weights that are computed"
        if v.data is None:
            return f"!{v.name} has no numbers: the model has no weights"
        if v in written:
            return f"the model writes to !{v.name}"
        if v.use_count != 1:
            return f"!{v.name} is read by others as well, and would be stored twice"
    return None


def balanced(
    pairs: Sequence[Pair], peaks: Mapping[Pair, Tensor], rounds: int
) -> dict[Pair, torch.Tensor]:
    """What each pair's channels are divided by: repeated, as layers stand in two pairs."""
    import torch

    weights: dict[Node, Tensor] = {}
    for pair in pairs:
        for layer in (pair.first, pair.second):
            data = _weight(layer).data
            assert data is not None
            weights[layer] = data.tensor().double()
    found = {p: torch.ones(p.channels, dtype=torch.float64) for p in pairs}
    for _ in range(rounds):
        moved = 0.0
        for pair in pairs:
            scale = _scale(pair, weights, peaks.get(pair), found[pair])
            first = weights[pair.first]
            weights[pair.first] = first / scale.reshape(-1, *[1] * (first.dim() - 1))
            weights[pair.second] = pair.scaled(weights[pair.second], scale)
            found[pair] = found[pair] * scale
            moved = max(moved, float((scale - 1).abs().max()))
        if moved < _ENOUGH:
            break
    return found


def _scale(
    pair: Pair, weights: Mapping[Node, Tensor], peak: Tensor | None, done: Tensor
) -> torch.Tensor:
    import torch

    made = weights[pair.first].flatten(1).abs().amax(1)
    read = pair.columns(weights[pair.second]).abs().amax(1)
    alive = (made > 0) & (read > 0)
    scale = torch.where(alive, (made / torch.where(alive, read, 1.0)).sqrt(), 1.0)
    if peak is None or pair.high is None:
        return scale
    # nothing that was seen may come to be clipped, and what was clipped stays as it was
    free = peak * _MARGIN < pair.high
    least = peak.double().clamp(min=0) * _MARGIN / pair.high / done
    return torch.where(free, torch.maximum(scale, least), 1.0)
