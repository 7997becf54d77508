"""How much each unit matters when what reads it is refitted to those that stay.

A unit that others can stand for costs little, however much it carries. The units of a group are
taken out one after the other, the one first whose loss is least when the readers' weights have been
solved for again, as in Optimal Brain Surgeon: with H = X X^T + l I of what a reader with weights W
reads, unit u costs sum_j g_j W_ju^2 / (H^-1)_uu, g_j being the squared gradients of the
outputs by the reader's channel j: losses of all groups are squared changes of the outputs.
Source:  Hassibi and Stork 1992 for weights; Kurtic et al. 2023 (ZipLM, arXiv 2302.04089) for units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dfc.compress.calibrate import observe
from dfc.compress.groups import Group, Groups
from dfc.compress.importance import by_taylor, signed
from dfc.compress.refit import Layer, layers_of
from dfc.ir.graph import Graph, Node
from dfc.ir.interpret import interpret
from dfc.rewrite.pass_ import Context

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_DAMPING = 1e-4  # of the mean of the diagonal; more where rows are few for so many units
_TOGETHER = 32  # units that are gone before what is left is made smaller


class Covariance:
    """Mean of X X^T over the rows that a layer reads, with a row of ones below."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.sum: Tensor | None = None
        self.count = 0

    def update(self, x: Tensor) -> None:
        import torch

        rows = self.layer.rows(x).float()
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        found = (rows.T @ rows).double()
        self.sum = found if self.sum is None else self.sum + found
        self.count += len(rows)

    def state(self) -> dict[str, Tensor]:
        import torch

        return {} if self.sum is None else {"sum": self.sum, "count": torch.tensor(self.count)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        if state:
            self.sum, self.count = state["sum"], int(state["count"])


def by_reconstruction(
    groups: Groups, chosen: Sequence[Group], batches: Any, ctx: Context
) -> dict[Group, Tensor]:
    """Scores that rise in the order in which units go; Taylor's where nothing is refitted."""
    graph = groups.analysis.graph
    layers = {g: [x for x in layers_of(graph, [g]) if x.width == g.size] for g in chosen}
    every = list(dict.fromkeys(x for mine in layers.values() for x in mine))
    seen = {x.x: Covariance(x) for x in every}
    observe(graph, batches, seen, ctx, "covariances for pruning")
    weight = _sensitivities(graph, every, batches)
    scores = {}
    for g in chosen:
        known = [(x, seen[x.x], weight[x.node]) for x in layers[g] if x.node in weight]
        if known:
            scores[g] = _taken_out(g, known)
    rest = [g for g in chosen if g not in scores]
    return {**scores, **(by_taylor(groups, rest, batches, ctx) if rest else {})}


def _sensitivities(graph: Graph, layers: Sequence[Layer], batches: Any) -> dict[Node, Tensor]:
    """Of each layer's channels: squared gradients of the outputs, under random signs, summed."""
    import torch

    if not layers:
        return {}
    random = torch.Generator().manual_seed(0)
    total: dict[Node, Tensor] = {}
    for batch in batches:
        for layer, grad in _gradients(graph, layers, batch, random):
            along = layer.columns(grad.double().square()).sum(0)
            total[layer.node] = total[layer.node] + along if layer.node in total else along
    return total


def _gradients(
    graph: Graph, layers: Sequence[Layer], batch: Any, random: torch.Generator
) -> list[tuple[Layer, Tensor]]:
    """Of what each layer makes."""
    import torch

    made: dict[Node, Tensor] = {}
    wanted = {x.node for x in layers}

    def keep(node: Node, results: Sequence[Any]) -> None:
        if node in wanted:
            made[node] = results[0]

    leaves = {
        x.weight.name: x.weight.data.tensor().detach().clone().requires_grad_(True)
        for x in layers
        if x.weight.data is not None
    }
    with torch.enable_grad():  # whatever the caller does with theirs
        results = interpret(graph, batch, parameters=leaves, observe=keep, grad=True)
        signs = [signed(y, random) for y in results[: len(graph.outputs)] if y.requires_grad]
        values = [made[x.node] for x in layers]
        grads = torch.autograd.grad(sum(signs, torch.zeros(())), values, allow_unused=True)
    return [(x, g) for x, g in zip(layers, grads, strict=True) if g is not None]


def _taken_out(g: Group, readers: Sequence[tuple[Layer, Covariance, Tensor]]) -> Tensor:
    import torch

    systems = []
    for layer, seen, weight in readers:
        assert seen.sum is not None
        h = seen.sum / seen.count
        if layer.bias is None:
            h = h[:-1, :-1]
        h.diagonal().add_(max(_DAMPING, len(h) / seen.count) * h.diagonal().mean())
        systems.append(_System(layer, torch.linalg.inv(h), weight))
    scores = torch.full((g.size,), torch.inf, dtype=torch.float64)
    left = torch.arange(g.size)  # by their numbers in the systems, which shrink now and then
    highest = 0.0
    for number in range(g.size - 1):
        costs = torch.stack([s.costs() for s in systems]).sum(0)
        at = int(costs.argmin())
        highest = max(highest, float(costs[at]))
        scores[left[at]] = highest * (1 + 1e-9 * number)  # in the order in which they go
        for s in systems:
            s.take_out(at)
        if (number + 1) % _TOGETHER == 0:
            stay = (scores[left] == torch.inf).nonzero().flatten()
            left = left[stay]
            for s in systems:
                s.keep(stay)
    return scores.nan_to_num(posinf=2 * highest)  # the last one


class _System:
    """One reader's weights and inverse covariance; those of units that are gone cost infinity."""

    def __init__(self, layer: Layer, inverse: Tensor, weight: Tensor) -> None:
        import torch

        assert layer.weight.data is not None
        w = layer.weight.data.tensor().flatten(1).double()
        if layer.bias is not None:
            assert layer.bias.data is not None
            w = torch.cat([w, layer.bias.data.tensor().double()[:, None]], 1)
        self.units = layer.width
        self.w, self.inverse = w * weight.sqrt()[:, None], inverse
        self.gone = torch.zeros(self.units, dtype=torch.bool)

    def costs(self) -> Tensor:
        import torch

        costs = self.w[:, : self.units].square().sum(0) / self.inverse.diagonal()[: self.units]
        return torch.where(self.gone, torch.inf, costs)

    def take_out(self, at: int) -> None:
        """Solve for the others' weights; what is left of the unit's row and column is zero."""
        row = self.inverse[at] / self.inverse[at, at]
        self.w.addr_(self.w[:, at].clone(), row, alpha=-1)
        self.inverse.addr_(self.inverse[:, at].clone(), row, alpha=-1)
        self.gone[at] = True

    def keep(self, stay: Tensor) -> None:
        import torch

        rest = torch.arange(self.units, self.w.shape[1])  # the bias
        every = torch.cat([stay, rest])
        self.w, self.inverse = self.w[:, every], self.inverse[every][:, every]
        self.units, self.gone = len(stay), self.gone[stay]
