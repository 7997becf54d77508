"""AWQ: weights that meet large activations are made larger before they are rounded, and so finer.

For the layers that read one value, each channel's weights are multiplied by `mean|x|^alpha`, with
the alpha that leaves the least error in the layers' outputs; what makes the value is divided by
the same numbers. Then each group's range is shrunk where that makes the error less.

Source:  Lin et al., arXiv 2306.00978: the search for scales, section 3.2, and for clipping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dfc.compress.grid import (
    Grid,
    Rounded,
    on_grid,
    round_to_nearest,
    rounded_of,
    rounded_state,
)
from dfc.compress.hessian import Hessian
from dfc.compress.producers import Producer, change_constant, divide, producer_of
from dfc.compress.sequential import Group, State, groups_of, layer_by_layer
from dfc.ir.graph import Parameter
from dfc.rewrite.pass_ import Context

if TYPE_CHECKING:
    from torch import Tensor

    from dfc.compress.weighted import Weighted
    from dfc.ir.graph import Graph, Node

_WIDE = 128  # the widest group whose range is judged by its whole Hessian
ALPHAS = tuple(i / 20 for i in range(20))  # 0 leaves the weights as they are


@dataclass(frozen=True)
class Scaling:
    """What the search found: numbers for the channels, and the errors of the outputs."""

    scale: Tensor  # [K]
    alpha: float
    plain: float  # the error without scales
    error: float


def search_scale(weights: Sequence[Tensor], hessian: Hessian, grid: Grid) -> Scaling:
    """The scale of each channel with which rounding these weights [N, K] costs least.

    Cost:  one product of the weights with the Hessian for each alpha.
    """
    import torch

    w = torch.cat([t.float() for t in weights])
    h = hessian.sum.float()
    size = hessian.mean_magnitude.float().clamp(min=1e-5)
    best = None
    for alpha in ALPHAS:
        scale = size**alpha
        scale = scale / (scale.max() * scale.min()).sqrt()
        change = round_to_nearest(w * scale, grid).weight / scale - w
        error = float(((change @ h) * change).sum())
        if best is None:
            best = Scaling(scale, alpha, error, error)
        elif error < best.error:
            best = Scaling(scale, alpha, best.plain, error)
    assert best is not None
    return best


def clipped(weight: Tensor, hessian: Hessian, grid: Grid, scale: Tensor | None = None) -> Rounded:
    """The weights [N, K], times the scale, on a grid whose ranges leave the least output error."""
    w = weight.float()
    h = hessian.sum
    if scale is not None:
        w = w * scale
        h = h / scale / scale[:, None]
    if grid.width(w.shape[1]) > _WIDE:
        h = h.diagonal()  # the Hessian of a whole row, for each shrink, would cost as much as GPTQ
    return on_grid(w, grid, *grid.fit_groups(w, h.float()))


def encode(
    graph: Graph, layers: Sequence[Weighted], grid: Grid, ctx: Context, data: str | None
) -> Mapping[Parameter, Rounded]:
    """The weights of linear layers [N, K] on the grid; scales are folded into what they read.

    Each layer sees what the quantized layers before it give.
    Raises:  DfcError D080..D084 for data that does not fit, D090 for activations that are NaN.
    """
    from dfc.compress.calibrate import batches_of

    assert data is not None, "the pass asks for data"
    groups = groups_of(graph, (u.node for w in layers for u in w.uses))
    run = _Scaled(graph, grid, ctx)
    layer_by_layer(graph, groups, batches_of(ctx, data, graph), ctx, run)
    run.fold()
    return run.found


class _Scaled:
    """Codes as they are found; scales are folded when all are known, for the runs of the batches
    go on with the graph as it was."""

    key: str

    def __init__(self, graph: Graph, grid: Grid, ctx: Context) -> None:
        self.graph = graph
        self.grid = grid
        self.ctx = ctx
        self.key = f"{grid} {ALPHAS} {_WIDE}"
        self.found: dict[Parameter, Rounded] = {}
        self.scales: dict[Group, Tensor] = {}
        self.producers: dict[Group, Producer] = {}
        self.told: dict[Group, tuple[str, str]] = {}

    def solve(self, group: Group, hessian: Hessian) -> None:
        weights = {p: p.data.tensor() for p in group.weights.values() if p.data}
        scale = self._scale(group, hessian, list(weights.values()))
        for p, w in weights.items():
            self.found[p] = clipped(w, hessian, self.grid, scale)

    def weights(self, group: Group) -> dict[str, Tensor]:
        given, scale = {}, self.scales.get(group)
        for p in group.weights.values():
            value = self.found[p].weight
            value = value if scale is None else value / scale
            given[p.name] = value.to(p.tensor_type.dtype.to_torch())
        return given

    def state(self, group: Group) -> State:
        tensors: dict[str, Tensor] = {}
        for p in group.weights.values():
            tensors |= rounded_state(p.name, self.found[p])
        if group in self.scales:
            tensors["scale"] = self.scales[group]
        outcome, reason = self.told[group]
        return {"outcome": outcome, "reason": reason}, tensors

    def load(self, group: Group, state: State) -> None:
        words, tensors = state
        for p in group.weights.values():
            self.found[p] = rounded_of(p.name, self.grid, tensors)
        if "scale" in tensors:
            producer = self._producer(group)
            assert isinstance(producer, Producer)
            self.scales[group], self.producers[group] = tensors["scale"], producer
        self._tell(group, words["outcome"], words["reason"])

    def _producer(self, group: Group) -> Producer | str:
        if any(n not in group.layers for p in group.weights.values() for n in p.users):
            return "its weight is read by others as well"
        return producer_of(self.graph, group.x, group.layers)

    def _scale(self, group: Group, hessian: Hessian, weights: list[Tensor]) -> Tensor | None:
        """The scale of a group's channels, when there is where to fold it and it helps."""
        producer = self._producer(group)
        if not isinstance(producer, Producer):
            self._tell(group, "clipped", f"not scaled: {producer}")
            return None
        made = search_scale(weights, hessian, self.grid)
        if made.alpha == 0:
            self._tell(group, "clipped", "no scale makes the error less")
            return None
        gain = f"{100 * (1 - made.error / made.plain):.0f} % less error"
        where = f"folded into %{producer.node.results[0].name}"
        self._tell(group, "scaled", f"by mean|x|^{made.alpha:g}, {gain}; {where}")
        self.scales[group], self.producers[group] = made.scale, producer
        return made.scale

    def _tell(self, group: Group, outcome: str, reason: str) -> None:
        self.told[group] = outcome, reason
        for layer in group.layers:
            self.ctx.decided(layer, outcome, reason)

    def fold(self) -> None:
        """Divide what makes the channels: floats, or the scales of codes that were just found."""
        for group, scale in self.scales.items():
            producer = self.producers[group]
            node = producer.node
            weight = node.inputs[1] if producer.dim == 0 else None
            if isinstance(weight, Parameter) and weight in self.found:
                self._fold_codes(node, weight, scale)
            else:
                divide(self.graph, producer, scale, "awq")

    def _fold_codes(self, node: Node, weight: Parameter, scale: Tensor) -> None:
        rounded = self.found[weight]
        self.found[weight] = replace(rounded, scale=rounded.scale / scale[:, None])
        if node.inputs[2] is not None:
            change_constant(self.graph, node, 2, "awq", lambda t: t / scale.double())
