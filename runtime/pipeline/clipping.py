"""Gradients that are too long are shortened, all of them together, wherever their stages are.

Norms are the same to the bit on any number of threads and ranks: parts are small enough that
PyTorch adds them up in one thread, and their sum is exact.

Source:  torch.nn.utils.clip_grad_norm_
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PART = 1 << 14  # numbers: fewer than PyTorch shares out among threads


def norms(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, float]:
    """The norm of each parameter's gradient, where it has one."""
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    found = {name: _norm(g) for name, g in gradients.items() if g.is_cpu}
    away = {name: g for name, g in gradients.items() if not g.is_cpu}
    found.update(zip(away, _norms_away(list(away.values())), strict=True))
    return {name: found[name] for name in gradients}


def _norm(gradient: torch.Tensor) -> float:
    import torch

    return together(map(float, torch._foreach_norm(torch.split(gradient.reshape(-1), _PART))))


def _norms_away(gradients: Sequence[torch.Tensor]) -> list[float]:
    """Of tensors on other devices, fetched at once."""
    import torch

    if not gradients:
        return []
    first = gradients[0].device
    found = [x.to(first) for x in torch._foreach_norm(list(gradients))]
    numbers: list[float] = torch.stack(found).tolist()
    return numbers


def together(each: Iterable[float]) -> float:
    """The norm of all as one vector, whatever their order."""
    squares = [x * x for x in each]
    return math.sqrt(math.fsum(squares)) if all(map(math.isfinite, squares)) else sum(squares)


def shorten(parameters: Iterable[torch.nn.Parameter], norm: float, most: float) -> None:
    """Scale gradients whose norm together is more than `most`; one that is no number spoils all."""
    import torch

    scale = most / (norm + 1e-6)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients and not scale >= 1:  # a rank need not have any
        torch._foreach_mul_(gradients, scale)
