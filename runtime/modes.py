"""The modes of the calling thread that a graph's arithmetic does not depend on."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any


def as_captured() -> AbstractContextManager[Any]:
    """Run PyTorch's operators as the graph has them: no gradients, no autocast.

    Why:  under the caller's `torch.autocast` a float32 graph would compute in bfloat16, unproved,
          and only on the engines that are PyTorch. A model's own autocast is casts in the graph.
    """
    import torch

    casting = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    if not casting:
        return torch.no_grad()
    modes = ExitStack()
    modes.enter_context(torch.no_grad())
    for kind in casting:
        modes.enter_context(torch.autocast(kind, enabled=False))
    return modes
