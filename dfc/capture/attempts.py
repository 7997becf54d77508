"""The ways to call torch.export, in the order in which they are tried."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram

from dfc.capture.decisions import decisions
from dfc.capture.wishes import Request, torch_shapes
from dfc.errors import DfcError


@dataclass(frozen=True)
class Attempt:
    """One way to call torch.export, and what to tell the user when it was the one that worked."""

    name: str
    run: Callable[[Request], ExportedProgram]
    note: str | None = None


def _plain(request: Request, **options: Any) -> ExportedProgram:
    args, kwargs = request.arguments()
    with quiet(), _no_scalar_trap(), _no_useless_casts(), _open_one_hot():
        return torch.export.export(
            request.model, args, kwargs, dynamic_shapes=torch_shapes(request), **options
        )


def _decided(request: Request) -> ExportedProgram:
    """Let the example's values decide where Python needs a number, and check them at run time."""
    import torch._functorch.config

    with decisions(), torch._functorch.config.patch(fake_tensor_propagate_real_tensors=True):
        return _plain(request)


def _below_autograd(request: Request, *, sizes: bool, functionalize: bool) -> Any:
    from dfc.capture.below_autograd import trace_below_autograd

    dynamic = [{d for d in w if d >= 0} if sizes else set() for w in request.wishes]
    with quiet(), _no_useless_casts():
        return trace_below_autograd(
            request.model, request.leaves, request.spec, dynamic, functionalize
        )


def _draft(request: Request) -> ExportedProgram:
    args, kwargs = request.arguments()
    with quiet(), decisions():
        return torch.export.draft_export(
            request.model, args, kwargs, dynamic_shapes=torch_shapes(request)
        )


def _eager_attention(request: Request) -> ExportedProgram:
    config = getattr(request.model, "config", None)
    if config is None or getattr(config, "_attn_implementation", "eager") == "eager":
        raise DfcError("T002", "the model has no other attention implementation")
    before = config._attn_implementation
    request.model.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        return _plain(request)
    finally:
        request.model.set_attn_implementation(before)  # type: ignore[operator]


def _batched_experts(request: Request) -> ExportedProgram:
    """Experts as batched products: the loop over the experts that were hit depends on data."""
    config = getattr(request.model, "config", None)
    before = getattr(config, "_experts_implementation", None)
    choose = getattr(request.model, "set_experts_implementation", None)
    if config is None or choose is None or before == "batched_mm":
        raise DfcError("T002", "the model has no other implementation of its experts")
    choose("batched_mm")
    try:
        return _plain(request)
    finally:
        choose(before or "eager")


def _static(request: Request) -> ExportedProgram:
    fixed = Request(request.model, request.leaves, request.spec, [{} for _ in request.wishes])
    try:
        return _plain(fixed)
    except Exception:  # noqa: BLE001 - torch.export raises many unrelated classes
        return _draft(fixed)


ATTEMPTS = (
    Attempt("plain", _plain),
    # Guards that torch cannot prove become assertions, which may be over-strict and are dropped.
    Attempt("deferred", lambda r: _plain(r, prefer_deferred_runtime_asserts_over_guards=True)),
    Attempt(
        "eager attention",
        _eager_attention,
        "captured with the `eager` attention implementation: torch.export refuses the other",
    ),
    Attempt(
        "batched experts",
        _batched_experts,
        "captured with the `batched_mm` implementation of the experts: the other depends on data",
    ),
    Attempt("strict", lambda r: _plain(r, strict=True), "captured in strict mode"),
    Attempt(
        "decided",
        _decided,
        "a decision of the model depends on data: it was taken as the example takes it, "
        "and is checked at run time",
    ),
    Attempt(
        "draft",
        _draft,
        "a decision of the model depends on data: it was taken as the example takes it, "
        "and is checked at run time",
    ),
    *(
        Attempt(
            "below autograd",
            partial(_below_autograd, sizes=sizes, functionalize=functionalize),
            "captured below autograd, where composite operators are already taken apart: "
            "torch.export refuses transforms inside forward",
        )
        for sizes in (True, False)
        for functionalize in (False, True)
    ),
    Attempt(
        "static",
        _static,
        "captured with every size fixed to the example's: torch.export refuses dynamic ones",
    ),
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's warnings and logs off the user's terminal: what matters is reported by us."""
    loggers = [logging.getLogger(n) for n in ("torch", "torch.export", "torch.fx", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            with (
                contextlib.redirect_stderr(io.StringIO()),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def _no_useless_casts() -> Iterator[None]:
    """`module.to(dtype)` inside forward does nothing when the module has that dtype already."""
    original = torch.nn.Module.to

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], torch.dtype) and not kwargs:
            tensors = [*self.parameters(), *self.buffers()]
            if all(x.dtype == args[0] or not x.is_floating_point() for x in tensors):
                return self
        return original(self, *args, **kwargs)

    torch.nn.Module.to = to  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.to = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _open_one_hot() -> Iterator[None]:
    """`one_hot(x)` without a number of classes: torch refuses it, its definition traces."""
    original = torch.nn.functional.one_hot

    def one_hot(tensor: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
        if num_classes != -1:
            return original(tensor, num_classes)
        classes = torch.arange(int(tensor.max().item()) + 1, device=tensor.device)
        return (tensor.unsqueeze(-1) == classes).to(torch.long)

    torch.nn.functional.one_hot = one_hot
    try:
        yield
    finally:
        torch.nn.functional.one_hot = original


@contextlib.contextmanager
def _no_scalar_trap() -> Iterator[None]:
    import torch._dynamo

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        yield
