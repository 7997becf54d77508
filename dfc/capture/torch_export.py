"""Model to graph by `torch.export`: the way in, with what is known to help when it refuses.

Dynamic dimensions are traced as `Dim.AUTO`, so that a size the model's own code bakes in is
reported as a restriction instead of refusing the model; the user's names are put back afterwards.
Examples of size 1 in a dynamic dimension are enlarged first, because torch would bake the 1 in.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dfc.capture.attempts import ATTEMPTS
from dfc.capture.call_structure import flat_leaves, register_example
from dfc.capture.original import Original
from dfc.capture.own_gradients import (
    hooks_of,
    own_gradients,
    plain_gradients,
    without_gradients,
)
from dfc.capture.program import build_graph
from dfc.capture.refusal import bad_call, counting_norm, raised_by_user_code, refusal, user_error
from dfc.capture.wishes import DynamicShapes, Request, enlarge, wishes_of
from dfc.errors import DfcError
from dfc.ir.caches import check_example, register_caches
from dfc.ir.graph import Graph


def trace(
    model: torch.nn.Module | Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: DynamicShapes = None,
) -> Graph:
    """Capture a model as a graph.

    Shapes:  `dynamic_shapes` is torch.export's: by argument name or position, then by dimension,
             a `Dim`, a name, `Dim.AUTO`/`Dim.DYNAMIC`, or None.
    Raises:  DfcError T001..T029 (exit status 3) when the model cannot be captured, T030.. (2) for
             arguments that make no sense.
    """
    module = model if isinstance(model, torch.nn.Module) else _FunctionModule(model)
    if not isinstance(args, (tuple, list)):
        raise DfcError(
            "T030", f"`args` must be a tuple of the model's arguments, got a {type(args).__name__}",
            help="write `(x,)` for one argument", status=2,
        )  # fmt: skip
    given = dict(kwargs or {})
    try:
        inspect.signature(module.forward).bind(*args, **given)
    except TypeError as e:
        raise bad_call(module, e) from e
    register_example([*args, given])
    register_caches()
    for value in (*args, *given.values()):
        check_example(value)
    leaves, spec = flat_leaves(args, given)
    leaves = apart(leaves)
    args, given = spec.unflatten(leaves)
    request = Request(module, leaves, spec, wishes_of(module, args, given, dynamic_shapes))
    graph = _capture(request)
    graph.original = Original(module, leaves, spec, graph)
    return graph


def apart(leaves: Sequence[Any]) -> list[Any]:
    """Examples without repetition, which torch.export would take for one input, and without a
    history of their own: a cache that the model has just filled has one, and cannot be copied."""
    seen: set[int] = set()
    found: list[Any] = []
    for x in leaves:
        repeated = isinstance(x, torch.Tensor) and id(x) in seen
        seen.add(id(x))
        if repeated:
            x = x.detach().clone()
        elif isinstance(x, torch.Tensor) and not x.is_leaf:
            x = x.detach()
        found.append(x)
    return found


class _FunctionModule(torch.nn.Module):
    """A plain function as a module, so that torch.export takes it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._function = function
        self.__signature__ = inspect.signature(function)
        self.forward = function


def _capture(request: Request) -> Graph:
    """Try the plain way, then what helps, and report the first refusal when nothing does."""
    used = enlarge(request)
    first: Exception | None = None
    for attempt in ATTEMPTS:
        before = list(request.notes)
        example = request if attempt.name == "static" else used
        try:
            with own_gradients() as found, without_gradients() as switched, plain_gradients():
                program = attempt.run(example)
            graph = build_graph(request, program, example)
            if attempt.name == "below autograd":
                found += switched
            graph.own_gradients = tuple(dict.fromkeys([*found, *hooks_of(request.model)]))
        except Exception as e:
            request.notes[:] = before
            if first is None and raised_by_user_code(e) and _fails_eagerly(example):
                if example is request or _fails_eagerly(request):
                    raise user_error(e) from e
                used = request  # the model takes size 1 alone
            first = first or e
            continue
        if attempt.note:
            graph.notes.insert(0, attempt.note)
        return graph
    assert first is not None
    raise counting_norm(request.model) or refusal(first) from first


def _expanded(buffer: torch.Tensor) -> bool:
    """Whether several of its elements are one number in memory."""
    return buffer.layout == torch.strided and any(
        step == 0 and size > 1 for step, size in zip(buffer.stride(), buffer.shape, strict=True)
    )


def _fails_eagerly(request: Request) -> bool:
    """Whether the model itself fails on the example, without any tracing."""
    if any(p.is_meta for p in request.model.parameters()):
        return False
    args, kwargs = copy.deepcopy(request.arguments())
    state = {k: v.clone() for k, v in request.model.named_buffers()}
    try:
        with torch.no_grad():
            request.model(*args, **kwargs)
    except Exception:  # noqa: BLE001 - any failure of the user's code is the answer
        return True
    finally:
        with torch.no_grad():
            for name, buffer in request.model.named_buffers():
                before = state.get(name)
                if before is None or buffer.shape != before.shape:
                    continue
                if not _expanded(buffer):  # no model can have written to those
                    buffer.copy_(before)
    return False
