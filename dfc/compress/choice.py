"""Which units of which groups go: a share of each, the least important of all, or the dearest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfc.compress.axes import Axis
from dfc.compress.groups import Group

if TYPE_CHECKING:
    from torch import Tensor

Scores = Mapping[Group, "Tensor"]
_MOST = 0.9  # of a group's units may go when all are ranked together


@dataclass(frozen=True)
class Part:
    """What takes time, and the axes whose sizes that grows with."""

    seconds: float
    axes: frozenset[Axis]


def _step(group: Group, align: int) -> int:
    return 1 if group.kind == "heads" else align


def aligned(group: Group, kept: float, align: int) -> int:
    """The multiple nearest to what is wanted, at least one; heads are whole already."""
    step = _step(group, align)
    count = max(int(kept / step + 0.5), 1) * step
    return min(count, group.size)


def counts(scores: Scores, ratio: float, align: int, scope: str) -> dict[Group, int]:
    """How many units of each group stay."""
    if scope == "layer":
        return {g: aligned(g, g.size * (1 - ratio), align) for g in scores}
    return _together(scores, ratio, align)


def _together(scores: Scores, ratio: float, align: int) -> dict[Group, int]:
    """Rank all units together, each group's scores scaled to mean 1."""
    import torch

    scaled = {g: s / s.mean() if s.mean() > 0 else s for g, s in scores.items()}
    ranked = torch.cat(list(scaled.values())).sort().values
    going = round(ratio * ranked.numel())
    limit = ranked[going] if going < ranked.numel() else ranked[-1] + 1
    found = {}
    for g, s in scaled.items():
        stay = max(int((s >= limit).sum()), (1 - _MOST) * g.size)
        found[g] = aligned(g, stay, align)
    return found


def counts_by_time(
    scores: Scores, ratio: float, align: int, parts: Sequence[Part]
) -> dict[Group, int]:
    """How many units of each group stay when a ratio of the time goes, at the least loss.

    The least important units of one group go after those of another, so many that a multiple is
    left, from where the sum of their scores is the least for the time that it saves.
    Needs:  scores of different groups in one unit.
    """
    import torch

    lost = {g: torch.cat([s.new_zeros(1), s.sort().values.cumsum(0)]) for g, s in scores.items()}
    size = {g: g.size for g in scores}
    times = [p.seconds for p in parts]
    mine = {g: [i for i, p in enumerate(parts) if g.axis in p.axes] for g in scores}
    goal = (1 - ratio) * sum(times)

    def price(g: Group) -> float:
        left = _fewer(size[g], _step(g, align))
        saved = sum(times[i] for i in mine[g]) * (1 - left / size[g])
        loss = float(lost[g][g.size - left] - lost[g][g.size - size[g]])
        return loss / saved if saved > 0 else float("inf")

    def can_go(g: Group) -> bool:
        return _fewer(size[g], _step(g, align)) >= max((1 - _MOST) * g.size, 1) and bool(mine[g])

    while sum(times) > goal and (able := [g for g in scores if can_go(g)]):
        best = min(able, key=price)
        left = _fewer(size[best], _step(best, align))
        for i in mine[best]:
            times[i] *= left / size[best]
        size[best] = left
    return size


def _fewer(size: int, step: int) -> int:
    """The next multiple below a size."""
    return (size - 1) // step * step


def keep_best(score: Tensor, count: int) -> list[bool]:
    """The most important units; among equals the first."""
    import torch

    order = torch.sort(score, descending=True, stable=True).indices[:count]
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[order] = True
    return [bool(x) for x in mask]
