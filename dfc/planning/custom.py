"""`@dfc.engine`: a class of the user's becomes an engine, found by its name.

Q043  a definition that cannot be an engine, with the line
"""

from __future__ import annotations

from typing import Any, TypeVar

from dfc.errors import DfcError, Diagnostic
from dfc.origin import origin_of
from dfc.planning.engine import Engine
from dfc.registry import Plugin, Registry

C = TypeVar("C", bound=type)


def _shipped() -> list[str]:
    import pkgutil

    from dfc.runtime import engines

    return [m.name.rstrip("_") for m in pkgutil.iter_modules(engines.__path__)]


def _of_package(plugin: Plugin, loaded: Any) -> Engine:
    made = loaded() if isinstance(loaded, type) else loaded
    lacking = [n for n in ("name", "devices", "supports", "build") if not hasattr(made, n)]
    wrong = f"has no {', '.join(lacking)}" if lacking else None
    if not wrong and made.name != plugin.name:
        wrong = f"calls itself `{made.name}`"
    if wrong:
        help = "an entry point names an engine's class, and has the engine's own name"
        raise DfcError("Q041", f"`{plugin.name}` of {plugin} {wrong}", help=help, status=7)
    return made  # type: ignore[no-any-return]


ENGINES: Registry[Engine] = Registry("engine", "dfc.engines", _shipped, _of_package)


def engine(cls: C) -> C:
    """Make an engine of a class with `name`, `devices`, `supports(node)` and `build(graph, ...)`.

    It is chosen by its name, as in `dfc.compile(..., engine="mine")`; `auto` measures dfc's own.
    Raises:  DfcError Q043 with the line of what is wrong; Q003 when the name is taken.
    """
    origin = origin_of(cls)
    problems: list[Diagnostic] = []
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        help = 'write `name = "mine"`'
        problems.append(Diagnostic("Q043", "the engine has no name", origin.span("name"), help))
    if not isinstance(getattr(cls, "devices", None), tuple):
        help = 'write `devices = ("cpu",)`'
        problems.append(Diagnostic("Q043", "the engine names no devices", origin.span(), help))
    for what in ("supports", "build"):
        if not callable(getattr(cls, what, None)):
            problems.append(Diagnostic("Q043", f"the engine has no `{what}`", origin.span()))
    if problems:
        raise DfcError.of(problems)
    ENGINES.add(str(name), cls(), origin, cls.__module__)
    return cls
