"""Turns a `forward` written inside a builder into a case, for models of a few lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.zoo import Built, batch


def module(forward: Callable[..., Any], **state: Any) -> Any:
    """An nn.Module with this `forward(self, ...)`, and submodules, parameters and buffers."""
    import torch
    from torch import nn

    made = type(forward.__qualname__.split(".")[0], (nn.Module,), {"forward": forward})()
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            made.register_buffer(name, value)
        else:
            setattr(made, name, value)
    return made


def rows(forward: Any, make: Callable[[int], tuple[Any, ...]], **state: Any) -> Built:
    """`make(rows)` gives the arguments; the first dimension of every tensor is the batch."""
    import torch

    rows_first = [
        {0: batch()} if isinstance(value, torch.Tensor) and value.dim() else None
        for value in make(3)
    ]
    model = forward if isinstance(forward, torch.nn.Module) else module(forward, **state)
    return Built.of(model, make, (3,), (1,), (5,), dynamic_shapes=tuple(rows_first))


def fixed(forward: Any, make: Callable[[], tuple[Any, ...]], **state: Any) -> Built:
    """All sizes static; `make()` gives other values each time."""
    import torch

    model = forward if isinstance(forward, torch.nn.Module) else module(forward, **state)
    return Built.of(model, make, (), (), ())
