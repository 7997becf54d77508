"""Which units of which groups go: a share of each, or the least important of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dfc.compress.groups import Group

if TYPE_CHECKING:
    from torch import Tensor

Scores = Mapping[Group, "Tensor"]
_MOST = 0.9  # of a group's units may go when all are ranked together


def aligned(group: Group, kept: float, align: int) -> int:
    """The multiple nearest to what is wanted, at least one; heads are whole already."""
    step = 1 if group.kind == "heads" else align
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


def keep_best(score: Tensor, count: int) -> list[bool]:
    """The most important units; among equals the first."""
    import torch

    order = torch.sort(score, descending=True, stable=True).indices[:count]
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[order] = True
    return [bool(x) for x in mask]
