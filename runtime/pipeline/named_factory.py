"""A function of another process's, told by its module and name: no code travels."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from importlib import import_module
from operator import attrgetter
from typing import Any

from dfc.errors import DfcError

_HELP = (
    "give a class, functools.partial(torch.optim.AdamW, lr=1e-3), or a function of a module that "
    "can be imported: not of this script or notebook"
)


def told(make: Callable[..., Any]) -> dict[str, Any]:
    """What `found` finds it by.

    Raises:  DfcError N077 (exit status 2) for what other processes cannot find by its name.
    """
    args: list[Any] = []
    named: dict[str, Any] = {}
    inner: Any = make
    while isinstance(inner, functools.partial):
        args, named = [*inner.args, *args], {**inner.keywords, **named}
        inner = inner.func
    if args:
        raise _refused("a partial has its first arguments, which are the parameters: name them")
    module, name = getattr(inner, "__module__", ""), getattr(inner, "__qualname__", "")
    if "<lambda>" in name:
        raise _refused("a lambda has no name")
    if "<" in name:
        raise _refused(f"`{inner.__name__}` is made inside of a function")
    if module == "__main__":
        raise _refused(f"`{name}` is of this script, which other processes do not run")
    if not module or not name:
        raise _refused(f"a {type(inner).__name__} has no name in a module")
    said = {"module": module, "name": name, "args": args, "named": named}
    try:
        json.dumps(said)
    except TypeError as e:
        raise _refused(str(e)) from e
    return said


def found(said: dict[str, Any]) -> Callable[..., Any]:
    """The function that `told` told of; lists are tuples, as options of optimizers are."""
    inner = attrgetter(said["name"])(import_module(said["module"]))
    args = [tupled(x) for x in said["args"]]
    return functools.partial(inner, *args, **{k: tupled(x) for k, x in said["named"].items()})


def tupled(x: Any) -> Any:
    """Lists as tuples, which JSON does not know."""
    return tuple(x) if isinstance(x, list) else x


def _refused(why: str) -> DfcError:
    message = f"the optimizer cannot travel to other processes: {why}"
    return DfcError("N077", message, help=_HELP, status=2)
