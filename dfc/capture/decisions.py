"""Where a model turns data into a Python number, the example decides, and a check is left behind.

torch would take the number for a constant and forget where it came from. Here every such place
(`if tensor:`, `int(tensor)`, `int(tensor.item())`, `range(n)` with `n` from a tensor) first puts
an assertion on the tensor into the graph: other data end in an error, not in a wrong answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch

from dfc.errors import DfcError

_ITEM = torch.Tensor.item


@contextlib.contextmanager
def decisions() -> Iterator[None]:
    """Watch conversions to Python numbers; needs fake tensors that know their real values."""
    sources: dict[Any, torch.Tensor] = {}
    with contextlib.ExitStack() as stack:
        for name in ("__bool__", "__int__", "__float__", "__index__"):
            _patch(stack, torch.Tensor, name, _tensor_number)
        _patch(stack, torch.Tensor, "item", lambda f: _remembering(f, sources))
        for kind, name in (
            (torch.SymInt, "__int__"),
            (torch.SymInt, "__index__"),
            (torch.SymFloat, "__float__"),
            (torch.SymBool, "__bool__"),
            (torch.SymInt, "__bool__"),
        ):
            if hasattr(kind, name):
                _patch(stack, kind, name, lambda f: _checked_symbol(f, sources))
        yield


def _patch(stack: contextlib.ExitStack, owner: Any, name: str, wrap: Callable[..., Any]) -> None:
    own = name in vars(owner)
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    if own:
        stack.callback(setattr, owner, name, original)
    else:
        stack.callback(delattr, owner, name)


def _tensor_number(original: Callable[..., Any]) -> Callable[..., Any]:
    def convert(tensor: torch.Tensor) -> Any:
        real = getattr(tensor, "real_tensor", None)
        if real is None:
            return original(tensor)
        value = original(real)
        if isinstance(value, bool):
            _assert(tensor.to(torch.bool) == value, value)
        else:
            _check(tensor, real)
        return value

    return convert


def _remembering(
    original: Callable[..., Any], sources: dict[Any, torch.Tensor]
) -> Callable[..., Any]:
    """`tensor.item()` that remembers which tensor a symbol came from."""

    def item(tensor: torch.Tensor) -> Any:
        value = original(tensor)
        for s in _symbols(value):
            sources[s] = tensor
        return value

    return item


def _checked_symbol(
    original: Callable[..., Any], sources: dict[Any, torch.Tensor]
) -> Callable[..., Any]:
    """A symbol that is about to become a Python number: its tensor is checked from now on."""

    def convert(value: Any) -> Any:
        expression = value.node.expr
        decided = not isinstance(value, torch.SymBool) or expression.atoms(sympy.Eq, sympy.Ne)
        for s in _symbols(value) if decided else ():
            if not value.node.shape_env.is_unbacked_symint(s):
                continue
            tensor = sources.get(s)
            if tensor is None:
                raise DfcError(
                    "T026",
                    "the model turns a tensor into Python numbers that cannot be checked",
                    help="use `.item()` on one element, or keep the computation in tensors",
                )
            _check(tensor, tensor.real_tensor)  # type: ignore[attr-defined]
        return original(value)

    return convert


def _symbols(value: Any) -> list[Any]:
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return []
    return sorted(value.node.expr.free_symbols, key=str)


def _check(tensor: torch.Tensor, real: torch.Tensor) -> None:
    """Assert at run time that a one-element tensor has the value it has now."""
    value = _ITEM(real)  # nothing that tracing would see may touch the real tensor
    _assert(tensor.isnan() if value != value else tensor == value, value)


def _assert(holds: torch.Tensor, value: object) -> None:
    message = f"the model was traced for {value} here, and decides by it"
    torch.ops.aten._assert_async.msg(holds.reshape(()), message)
