"""How much each unit of a group matters: by its weights, by its gradient, by what it carries.

  magnitude   the squared norms of the unit in each weight that makes or reads it, each weight's
              units scaled to mean 1, and summed: a group L2 in which no wide weight drowns others
  activation  mean square of what the unit carries, times the squared norm of the weights that read
              it: how much the readers' results change when it is gone
  taylor      expected square of how much the outputs change, to first order, when the unit is gone:
              (sum of w * dL/dw over the weights that read it)^2 with L = outputs * random signs;
              it needs data, but neither labels nor a loss
  reconstruction  how much the outputs change when those that stay are solved for again: the module
              of that name
Source:  taylor: Molchanov et al. 2019 (arXiv 1906.10771), with the Gauss-Newton matrix in place of
         the loss: for a trained model the loss's own gradient is noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dfc.compress.axes import Axis, find
from dfc.compress.calibrate import observe
from dfc.compress.groups import Group, Groups
from dfc.ir.graph import Parameter, Value
from dfc.ir.interpret import interpret
from dfc.rewrite.pass_ import Context

if TYPE_CHECKING:
    from torch import Tensor


def per_unit(axis: Axis, along: Tensor, unit: Axis) -> Tensor:
    """What each unit of a leaf has, from numbers for each index of an axis that it is in."""
    import torch

    root = find(axis)
    if root is unit:
        return along
    total = torch.zeros(int(unit.size), dtype=along.dtype)  # type: ignore[arg-type]
    if root.form == "leaf":
        return total
    sizes = [int(find(p).size) for p in root.parts]  # type: ignore[arg-type]
    if root.form == "sum":
        pieces = list(torch.split(along, sizes))
    else:
        block = along.reshape(sizes)
        rest = [[e for e in range(len(sizes)) if e != d] for d in range(len(sizes))]
        pieces = [block.sum(r) if r else block for r in rest]
    for part, piece in zip(root.parts, pieces, strict=True):
        total = total + per_unit(part, piece, unit)
    return total


def squares(tensor: Tensor, dim: int) -> Tensor:
    """The squared norm of each index of a dimension."""
    t = tensor.float().square()
    return t.sum([d for d in range(t.dim()) if d != dim]) if t.dim() > 1 else t


def by_magnitude(groups: Groups, chosen: Sequence[Group]) -> dict[Group, Tensor]:
    """Scores from weights alone."""
    return {g: _magnitude(groups, g) for g in chosen}


def _magnitude(groups: Groups, g: Group) -> Tensor:
    import torch

    weights = {(u.parameter, u.dim) for u in (*g.makers, *g.readers) if u.parameter is not None}
    score = torch.zeros(g.size)
    for p, dim in _in_order(weights or set(g.members), groups):
        assert p is not None and p.data is not None
        norms = per_unit(groups.analysis.dims[p][dim], squares(p.data.tensor(), dim), g.axis)
        mean = norms.mean()
        score += norms / mean if mean > 0 else norms
    return score


def _in_order(weights: Iterable[Any], groups: Groups) -> list[tuple[Parameter, int]]:
    place = {p: i for i, p in enumerate(groups.analysis.graph.parameters.values())}
    return sorted(weights, key=lambda w: (place[w[0]], w[1]))


class MeanSquare:
    """The mean square of each index of a value's dimension."""

    def __init__(self, dim: int) -> None:
        self.dim = dim  # counted from the end, so that it holds where padding was taken out
        self.sum: Tensor | None = None
        self.count = 0

    def update(self, x: Tensor) -> None:
        import torch

        rows = x.movedim(self.dim, -1).reshape(-1, x.shape[self.dim]).double()
        found = rows.square().sum(0)
        self.sum = found if self.sum is None else torch.add(self.sum, found)
        self.count += rows.shape[0]

    def state(self) -> dict[str, Tensor]:
        import torch

        if self.sum is None:
            return {}
        return {"sum": self.sum, "count": torch.tensor(self.count)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        if state:
            self.sum, self.count = state["sum"], int(state["count"])

    @property
    def mean(self) -> Tensor:
        assert self.sum is not None
        return (self.sum / max(self.count, 1)).float()


def by_activation(
    groups: Groups, chosen: Sequence[Group], batches: Any, ctx: Context
) -> dict[Group, Tensor]:
    """Scores from what flows through each unit; magnitude where no weight reads it."""
    import torch

    analysis = groups.analysis
    observers: dict[Value, MeanSquare] = {}
    for g in chosen:
        for u in g.readers:
            if u.parameter is not None and u.source is not None:
                rank = u.source.tensor_type.rank
                observers.setdefault(u.source, MeanSquare(u.source_dim - rank))
    observe(analysis.graph, batches, observers, ctx, "mean squares for pruning")
    scores = {}
    for g in chosen:
        known = [u for u in g.readers if u.parameter is not None and u.source is not None]
        if not known:
            scores[g] = _magnitude(groups, g)
            continue
        total = torch.zeros(g.size)
        for u in known:
            assert u.parameter is not None and u.parameter.data is not None
            norms = squares(u.parameter.data.tensor(), u.dim)
            mean = observers[u.source].mean  # type: ignore[index]
            total = total + per_unit(analysis.dims[u.parameter][u.dim], norms * mean, g.axis)
        scores[g] = total
    return scores


def by_taylor(
    groups: Groups, chosen: Sequence[Group], batches: Any, ctx: Context
) -> dict[Group, Tensor]:
    """Scores from gradients of the outputs; magnitude where no weight reads a unit."""
    import torch

    analysis, graph = groups.analysis, groups.analysis.graph
    read = {u.parameter for g in chosen for u in g.readers if u.parameter is not None}
    leaves = {
        p.name: p.data.tensor().detach().clone().requires_grad_(True)
        for p in graph.parameters.values()
        if p in read and p.data is not None and p.tensor_type.dtype.is_float
    }
    scores = {g: torch.zeros(g.size) for g in chosen}
    random = torch.Generator().manual_seed(0)
    total = getattr(batches, "count", None) or 0
    for done, batch in enumerate(batches, 1):
        with torch.enable_grad():  # whatever the caller does with theirs
            results = interpret(graph, batch, parameters=leaves, grad=True)[: len(graph.outputs)]
            loss = sum(signed(y, random) for y in results if y.requires_grad)
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)  # type: ignore[arg-type]
        change = {
            n: t.detach() * g
            for (n, t), g in zip(leaves.items(), grads, strict=True)
            if g is not None
        }
        for g in chosen:
            scores[g] += _gate(analysis.dims, g, change).square()
        ctx.progress(done, total)
    return {
        g: s if g.readers and bool(s.any()) else _magnitude(groups, g) for g, s in scores.items()
    }


def signed(y: Tensor, random: Any) -> Tensor:
    import torch

    signs = torch.randint(0, 2, y.shape, generator=random).to(y.dtype) * 2 - 1
    return (y * signs).sum()


def _gate(dims: Any, g: Group, change: Mapping[str, Tensor]) -> Tensor:
    """How much the outputs move when each unit is let through a little more."""
    import torch

    total = torch.zeros(g.size)
    for u in g.readers:
        found = change.get(u.parameter.name) if u.parameter is not None else None
        if u.parameter is not None and found is not None:
            rest = [d for d in range(found.dim()) if d != u.dim]
            along = found.float().sum(rest) if rest else found.float()
            total += per_unit(dims[u.parameter][u.dim], along, g.axis)
    return total
