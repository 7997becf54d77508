"""Gradients that code defines itself: a graph of its forward pass knows nothing of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

_PARTS = ("torch.nn.", "torch.optim.", "torch.distributions.")  # of which models are made


def hooks_of(model: torch.nn.Module) -> list[str]:
    """What waits for the gradients of modules and parameters, in words."""
    found = []
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            found.append(f"a backward hook of {f'`{name}`' if name else 'the model'}")
    for name, p in model.named_parameters():
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            found.append(f"a hook of the parameter `{name}`")
    return found


@contextmanager
def own_gradients() -> Iterator[list[str]]:
    """While code is traced: its functions with a backward of their own, and hooks of tensors.

    Why:  each function's `forward` is watched, since code may have kept its `apply` before.
    """
    found: list[str] = []
    functions = [c for c in _below(torch.autograd.Function) if "forward" in vars(c)]
    forwards = {c: vars(c)["forward"] for c in functions if not _of_torch(c)}
    hook = torch.Tensor.register_hook

    def registered(self: torch.Tensor, made: Any) -> Any:
        if not _of_torch(made):
            found.append("a hook that the code registers on a tensor")
        return hook(self, made)  # type: ignore[no-untyped-call]

    torch.Tensor.register_hook = registered  # type: ignore[method-assign]
    for function in forwards:
        said = f"`{function.__name__}`, a torch.autograd.Function"
        function.forward = staticmethod(_noting(function.forward, found, said))
    try:
        yield found
    finally:
        for function, forward in forwards.items():
            function.forward = forward
        torch.Tensor.register_hook = hook  # type: ignore[method-assign]


@contextmanager
def without_gradients() -> Iterator[list[str]]:
    """While code is traced below autograd: whether the model's own switches gradients off, which
    nothing in such a graph says."""
    found: list[str] = []
    entered = torch.no_grad.__enter__

    def enter(self: torch.no_grad) -> None:
        if _is_the_models(_caller()):
            found.append("code under `torch.no_grad()`, in a model that differentiates in forward")
        entered(self)

    torch.no_grad.__enter__ = enter  # type: ignore[method-assign]
    try:
        yield found
    finally:
        torch.no_grad.__enter__ = entered  # type: ignore[method-assign]


@contextmanager
def plain_gradients() -> Iterator[None]:
    """While code is traced: what is checkpointed is computed as it stands, and inference mode is
    `no_grad`.

    Why:  torch.export hides a reentrant checkpoint's gradients, and does not see inference mode.
    """
    from torch.utils.checkpoint import CheckpointFunction

    entered, left = torch.inference_mode.__enter__, torch.inference_mode.__exit__

    def enter(self: Any) -> None:
        self.instead = torch.no_grad() if self.mode else torch.enable_grad()
        self.instead.__enter__()

    def leave(self: Any, *error: Any) -> None:
        self.instead.__exit__(*error)

    def apply(run: Callable[..., Any], keeps_random_state: bool, *args: Any) -> Any:
        return run(*args)

    torch.inference_mode.__enter__ = enter  # type: ignore[method-assign]
    torch.inference_mode.__exit__ = leave  # type: ignore[method-assign]
    CheckpointFunction.apply = staticmethod(apply)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del CheckpointFunction.apply
        torch.inference_mode.__enter__ = entered  # type: ignore[method-assign]
        torch.inference_mode.__exit__ = left  # type: ignore[method-assign]


def _caller() -> str:
    """The module whose code enters a context, or calls what is decorated with it."""
    frame = sys._getframe(2)
    while frame.f_back and frame.f_globals.get("__name__") == "torch.utils._contextlib":
        frame = frame.f_back
    return str(frame.f_globals.get("__name__"))


def _is_the_models(module: str) -> bool:
    """Whether code belongs to models, not to what traces them."""
    return not module.startswith(("torch.", "dfc.")) or module.startswith(_PARTS)


def _below(kind: Any) -> Iterator[Any]:
    for function in kind.__subclasses__():
        yield function
        yield from _below(function)


def _of_torch(x: Any) -> bool:
    return (getattr(x, "__module__", None) or "").startswith("torch.")


def _noting(run: Callable[..., Any], found: list[str], what: str) -> Callable[..., Any]:
    @wraps(run)
    def noted(*args: Any, **kwargs: Any) -> Any:
        found.append(what)
        return run(*args, **kwargs)

    return noted
