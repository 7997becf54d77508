"""GPTQ: weights are rounded column by column, and the columns that follow make good the error.

Source:  Frantar et al., arXiv 2210.17323. Columns by falling importance ("act-order") with the
         groups of the columns' own places, so that the result is stored like any other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.compress.grid import Grid, Rounded, below_one_another, rounded_of, rounded_state
from dfc.compress.hessian import DAMPING, Factor, Hessian, factor
from dfc.compress.rtn import nearest
from dfc.compress.sequential import Group, State, groups_of, layer_by_layer, lies_turned
from dfc.compress.sweep import BLOCK, sweep
from dfc.compress.weighted import weight_read
from dfc.counting import counted
from dfc.errors import DfcError
from dfc.rewrite.pass_ import Context

if TYPE_CHECKING:
    from torch import Tensor

    from dfc.compress.weighted import Weighted
    from dfc.ir.graph import Graph, Parameter


_FEW = 8  # an expert that fewer rows reach than an eighth of its inputs is rounded to nearest


@dataclass(frozen=True)
class Gptq:
    """The method's options.

    `by_importance`  columns in the order of their falling Hessian diagonal; ranges are then fitted
                     to the weights as they were, not as earlier columns left them.
    `search`         ranges are shrunk where that makes the weighted squared error less.
    """

    damping: float = DAMPING
    by_importance: bool = True
    search: bool = True
    block: int = BLOCK


def gptq(
    weight: Tensor, hessian: Hessian, grid: Grid, options: Gptq = Gptq()
) -> tuple[Rounded, Factor]:
    """The weights [N, K] on a grid, and the factor it was done with.

    Raises:  DfcError D091, D092.
    Cost:    N K^2 multiplications for the weights, K^3 for the factor.
    """
    found = factor(hessian, options.damping, options.by_importance)
    alive = weight.float().masked_fill(hessian.dead, 0)
    importance = hessian.sum.diagonal().float() if options.search else None
    ahead = options.by_importance or grid.group is None
    change = _Rounding(grid, alive, importance, found.order, ahead)
    block = options.block
    if not ahead:  # whole groups: a range is fitted to what is in the block
        block = max(block // grid.width(0), 1) * grid.width(0)
    sweep(alive, found, change, block)
    return change.rounded(), found


def encode(
    graph: Graph, layers: Sequence[Weighted], grid: Grid, ctx: Context, data: str | None
) -> Mapping[Parameter, Rounded]:
    """The weights of linear layers and experts on the grid; each sees what those before it give.

    Layers whose inputs are all 0, and experts that few rows reach, are rounded to nearest.
    Raises:  DfcError D080..D084 for data that does not fit; D090, D092, with the layer's name, for
             activations that are NaN, and a Hessian that has no inverse.
    Memory:  a float copy of the weights that are done, and one Hessian; of experts two, whatever
             their number: batches wait while one expert after the other is solved.
    """
    from dfc.compress.calibrate import batches_of

    assert data is not None, "the pass asks for data"
    groups = groups_of(graph, (u.node for w in layers for u in w.uses))
    run = _Solved(grid, ctx)
    layer_by_layer(graph, groups, batches_of(ctx, data, graph), ctx, run)
    return run.found


class _Solved:
    """The codes of each weight, as they are found; of experts, one below the other."""

    def __init__(self, grid: Grid, ctx: Context) -> None:
        self.grid = grid
        self.ctx = ctx
        self.key = f"{grid} {Gptq()} {_FEW}"
        self.found: dict[Parameter, Rounded] = {}
        self.told: dict[Parameter, str] = {}
        self.experts: dict[Parameter, list[tuple[Rounded, int, bool]]] = {}  # rows; by gptq or not
        self.latest: dict[Parameter, tuple[Rounded, int, bool]] = {}

    def solve(self, group: Group, hessian: Hessian) -> None:
        for p in group.weights.values():
            if group.ends is not None:
                self._add(group, p, *self._expert(group.matrix(p), hessian))
                continue
            if bool(hessian.dead.all()):  # as the first values that a decoder of DETR attends to
                self.found[p] = nearest(group.matrix(p).float(), self.grid)
                told = f"to nearest: all its inputs were 0 on {counted(hessian.tokens, 'token')}"
                self._tell(group, p, told)
                continue
            self.found[p], used = gptq(group.matrix(p), hessian, self.grid)
            self._tell(group, p, _told(hessian, used))

    def _expert(self, w: Tensor, hessian: Hessian) -> tuple[Rounded, int, bool]:
        """What few rows reach, or none that can be solved for, is rounded to nearest."""
        if hessian.tokens >= hessian.inputs / _FEW:
            with contextlib.suppress(DfcError):
                return gptq(w, hessian, self.grid)[0], hessian.tokens, True
        return nearest(w.float(), self.grid), hessian.tokens, False

    def _add(self, group: Group, weight: Parameter, made: Rounded, rows: int, solved: bool) -> None:
        """One expert more of a weight."""
        parts = self.experts.setdefault(weight, [])
        self.latest[weight] = made, rows, solved
        parts.append(self.latest[weight])
        if group.is_last:
            self.found[weight] = below_one_another([p[0] for p in parts])
            self._tell(group, weight, _told_experts([p[1:] for p in parts]))
            del self.experts[weight]

    def weights(self, group: Group) -> dict[str, Tensor]:
        if not group.is_last:
            return {}
        given = {}
        for p in group.weights.values():
            sizes, w = p.tensor_type.shape, self.found[p].weight
            if group.ends is not None:
                w = w.reshape(int(sizes[0]), -1, w.shape[1])  # type: ignore[arg-type]
                w = w.transpose(1, 2).contiguous() if lies_turned(p, group.layers) else w
            given[p.name] = w.to(p.tensor_type.dtype.to_torch())
        return given

    def state(self, group: Group) -> State:
        words: dict[str, str] = {}
        tensors: dict[str, Tensor] = {}
        for p in group.weights.values():
            if group.ends is None:
                made, words[p.name] = self.found[p], self.told[p]
            else:
                made, rows, solved = self.latest[p]
                words[p.name] = f"{rows} {solved}"
            tensors |= rounded_state(p.name, made)
        return words, tensors

    def load(self, group: Group, state: State) -> None:
        words, tensors = state
        for p in group.weights.values():
            made = rounded_of(p.name, self.grid, tensors)
            if group.ends is not None:
                rows, solved = words[p.name].split()
                self._add(group, p, made, int(rows), solved == "True")
                continue
            self.found[p] = made
            self._tell(group, p, words[p.name])

    def _tell(self, group: Group, weight: Parameter, told: str) -> None:
        self.told[weight] = told
        for layer in group.layers:
            if weight_read(layer) is weight:
                self.ctx.decided(layer, "calibrated", told)


def _told_experts(parts: Sequence[tuple[int, bool]]) -> str:
    """On how many rows experts were rounded, and which were rounded to nearest instead."""
    solved = [rows for rows, by_gptq in parts if by_gptq]
    few = [rows for rows, by_gptq in parts if not by_gptq]
    told = f"{len(solved)} of {counted(len(parts), 'expert')}"
    if solved:
        told += f" on {min(solved)} to {max(solved)} rows each"
    if few:
        told += f"; {len(few)} to nearest, which at most {counted(max(few), 'row')} reached"
    return told


def _told(hessian: Hessian, used: Factor) -> str:
    """On what a layer was rounded, and what was unusual about it."""
    told = f"on {counted(hessian.tokens, 'token')}"
    if hessian.tokens < hessian.inputs:
        told += f", fewer than its {hessian.inputs} inputs"
    if used.damping != DAMPING:
        told += f", with a damping of {used.damping:g} instead of {DAMPING:g}"
    dead = int(hessian.dead.sum())
    return told + (f"; {counted(dead, 'input was', 'inputs were')} always 0" if dead else "")


class _Rounding:
    """Columns go to the grid; a group's scale is fitted when its first column is reached."""

    def __init__(
        self, grid: Grid, w: Tensor, importance: Tensor | None, order: Tensor, ahead: bool
    ) -> None:
        import torch

        self.grid = grid
        self.importance = importance
        self.order = order.tolist()
        self.width = grid.width(w.shape[1])
        self.codes = torch.empty(w.shape[1], w.shape[0])  # by column
        groups = -(-w.shape[1] // self.width)
        self.scale = torch.ones(w.shape[0], groups)
        self.zero = torch.zeros(w.shape[0], groups)
        self.ahead = ahead
        if ahead:
            self.scale, self.zero = grid.fit_groups(w, importance)

    def enter(self, start: int, block: Tensor, pivots: Tensor) -> None:
        """Nothing is decided for a block as a whole."""

    def column(self, j: int, i: int, block: Tensor) -> Tensor:
        place = self.order[j]
        group = place // self.width
        if not self.ahead and place % self.width == 0:
            some = None if self.importance is None else self.importance[j : j + self.width]
            fitted = self.grid.fit(block[i : i + self.width].T, some)
            self.scale[:, group], self.zero[:, group] = fitted
        scale, zero = self.scale[:, group], self.zero[:, group]
        code = self.grid.code(block[i], scale, zero)
        self.codes[place] = code
        return self.grid.value(code, scale, zero)

    def rounded(self) -> Rounded:
        import torch

        codes = self.codes.T.contiguous().to(torch.int32)
        return Rounded(self.grid, codes, self.scale, None if self.grid.symmetric else self.zero)
