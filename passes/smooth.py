"""Make activations easier to round: their outliers are moved into the weights that read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.compress.calibrate import batches_of, observe
from dfc.compress.producers import Producer, change_constant, divide, producer_of
from dfc.compress.selection import linear_layers
from dfc.compress.sequential import Group, described, groups_of
from dfc.compress.smoothing import Peaks, smoothing
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Value
from dfc.lang.selectors import Selector
from dfc.ops.builder import Builder
from dfc.rewrite.pass_ import KEPT, Context, Data, Pass, Quota, close

if TYPE_CHECKING:
    from torch import Tensor

_SAME = 1e-3  # scales so close to 1 are not worth new constants


@dataclass(frozen=True)
class Smooth(Pass):
    """Divide each channel that linear layers read by a number, and multiply their weights by it.

    The numbers are `max|x|^alpha / max|w|^(1 - alpha)`: with alpha 0.5 activations and weights of a
    channel become equally large. The division is folded into what makes the channels: the weight
    of a norm, or the rows of a linear layer. Where nothing there can take it (what a residual reads
    as well, what an activation function makes), `multiply` writes it as a product in front of the
    layers. Results stay what they were, up to rounding; int8 activations lose less. Run it before
    `quantize`.

    Needs:    data to see the activations on; linear layers with constant weights.
    Ensures:  a group of layers that read one value is smooth, or there is a reason why not.
    Keeps:    the graph's nodes and their number, without `multiply`; constants that something else
              reads.
    Cost:     one run of the data; a copy of each weight that changes.
    Raises:   DfcError D080..D084 for data that does not fit, D090 for activations that are NaN,
              D093 when there is no linear layer, D094 for an alpha outside 0..1.
    Source:   Xiao et al., SmoothQuant, arXiv 2211.10438.
    """

    name = "smooth"
    numerics = close(1e-5)
    phrases = {"": "select", "except": "exclude", "using": "data"}  # noqa: RUF012

    data: Data
    select: Selector | None = None  # only layers in this part of the model
    exclude: Selector | None = None  # and not in this
    alpha: float = 0.5  # how much of the difficulty is moved into the weights: 0 to 1
    multiply: bool = False  # where nothing can take the division, too: one more operator
    limit: int | None = None  # smooth at most this many groups; bisects a miscompile
    skip: tuple[int, ...] = ()  # groups by number that are left out: those found to be wrong

    def run(self, graph: Graph, ctx: Context) -> int:
        if not 0 <= self.alpha <= 1:
            raise DfcError("D094", f"`alpha` is a number from 0 to 1, got {self.alpha:g}")
        producers = self._producers(graph, ctx)
        peaks = self._peaks(graph, producers, ctx)
        quota = Quota(self.limit, self.skip)
        # From the last to the first: a scale changes the rows of what makes the channels, and so
        # the weights that the scale of an earlier group is fitted to.
        for group, producer in reversed(producers.items()):
            seen = peaks[group.x].peaks
            if seen is None:
                _keep(ctx, group, "calibration never reached it")
                continue
            weights = [w.data.tensor() for w in group.weights.values() if w.data]
            scale = smoothing(seen, weights, self.alpha)
            if bool(((scale - 1).abs() < _SAME).all()):
                _keep(ctx, group, "its channels are smooth already")
            elif quota.allows(group.layers[0]):
                _apply(graph, group, producer, scale, ctx)
        return quota.done

    def _producers(self, graph: Graph, ctx: Context) -> dict[Group, Producer | None]:
        """The groups that can be smooth, and where their scale is folded; None: a product."""
        layers, left = linear_layers(self.name, graph, self.select, self.exclude, ctx)
        for layer, reason in left.items():
            ctx.decided(layer, KEPT, reason)
        found: dict[Group, Producer | None] = {}
        for group in groups_of(graph, layers):
            tied = _tied(group)
            producer = tied or producer_of(graph, group.x, group.layers)
            if isinstance(producer, Producer):
                found[group] = producer
            elif self.multiply and not tied:
                found[group] = None
            else:
                more = "" if tied else "; `multiply=yes` writes a product"
                _keep(ctx, group, f"{producer}{more}")
        return found

    def _peaks(
        self, graph: Graph, producers: Mapping[Group, Producer | None], ctx: Context
    ) -> dict[Value, Peaks]:
        peaks = {group.x: _Named(group) for group in producers}
        observe(graph, batches_of(ctx, self.data, graph), peaks, ctx, "smooth")
        return {**peaks}


def _tied(group: Group) -> str | None:
    """Why a group's weights cannot change without being stored twice."""
    for weight in group.weights.values():
        others = [n for n in weight.users if n not in group.layers]
        if others:
            name = others[0].results[0].name if others[0].results else others[0].op
            return f"!{weight.name} is read by %{name} as well, and would be stored twice"
    return None


class _Named(Peaks):
    """Peaks whose errors name the layer."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def update(self, x: Tensor) -> None:
        try:
            super().update(x)
        except DfcError as e:
            where = described(self.group.layers[0])
            raise DfcError(e.code, f"{where}: {e.message}") from e


def _keep(ctx: Context, group: Group, reason: str) -> None:
    for layer in group.layers:
        ctx.decided(layer, KEPT, reason)


def _apply(
    graph: Graph, group: Group, producer: Producer | None, scale: Tensor, ctx: Context
) -> None:
    if producer is None:
        where = f"by %{_multiply(graph, group, scale).name}"
    else:
        divide(graph, producer, scale, "smooth")
        where = f"folded into %{producer.node.result.name}"
    low, high = float(scale.min()), float(scale.max())
    for layer in group.layers:
        ctx.decided(layer, "smoothed", f"channels divided by {low:.3g} to {high:.3g}, {where}")
        change_constant(graph, layer, 1, "smooth", lambda w: w * scale)


def _multiply(graph: Graph, group: Group, scale: Tensor) -> Value:
    """What the layers read, divided in front of them."""
    dtype = group.x.tensor_type.dtype.to_torch()
    factor = graph.add_constant(f"{group.x.name}.smooth", (1 / scale).to(dtype))
    divided = Builder(graph, group.layers[0])("aten.mul.Tensor", group.x, factor)
    for layer in group.layers:
        graph.set_inputs_of(layer, [divided, *layer.inputs[1:]])
    return divided
