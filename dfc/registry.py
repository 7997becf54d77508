"""One name, one thing: passes, ops and engines of dfc, of the user and of other packages.

Q003  two bring something of one name        Q041  what a package brings cannot be loaded (status 7)
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

from dfc.errors import DfcError
from dfc.origin import Origin

T = TypeVar("T")


@dataclass(frozen=True)
class Plugin:
    """What an installed package offers: an entry point, not loaded yet."""

    group: str
    name: str
    value: str
    package: str
    entry: importlib.metadata.EntryPoint

    def __str__(self) -> str:
        return f"the package `{self.package}` ({self.value})"

    def load(self) -> Any:
        """The object that the entry point names.

        Raises:  DfcError Q041, which names the package, when importing it fails.
        """
        try:
            return self.entry.load()
        except DfcError:
            raise
        except Exception as e:
            reason = f"{type(e).__name__}: {e}"
            raise DfcError(
                "Q041",
                f"`{self.name}` of {self} cannot be loaded: {reason}",
                help=f"reinstall or remove `{self.package}`; nothing else depends on it",
                status=7,
            ) from e


@cache
def plugins(group: str) -> tuple[Plugin, ...]:
    """The entry points of a group, by name and package."""
    found = []
    for entry in importlib.metadata.entry_points(group=group):
        package = entry.dist.name if entry.dist else "unknown"
        found.append(Plugin(group, entry.name, entry.value, package, entry))
    return tuple(sorted(dict.fromkeys(found), key=lambda p: (p.name, p.package)))


class Registry(Generic[T]):
    """Things of one kind by name. A name is given once: who comes second is told of the first."""

    def __init__(
        self,
        kind: str,
        group: str,
        shipped: Callable[[], Iterable[str]],
        loaded: Callable[[Plugin, Any], T],
    ) -> None:
        """`shipped` gives dfc's own names; `loaded` checks what an entry point gave."""
        self.kind, self.group = kind, group
        self._shipped, self._loaded = shipped, loaded
        self._own: dict[str, tuple[T, Origin]] = {}
        self._from: dict[str, T] = {}

    def add(self, name: str, thing: T, origin: Origin, module: str = "") -> None:
        """Give a thing a name. The same definition, run again, takes its own place.

        Raises:  DfcError Q003 that names both places.
        """
        known = self._own.get(name)
        if name in self._shipped():
            raise self.twice(name, "dfc itself", origin)
        if known is not None and not origin.is_rerun_of(known[1]):
            raise self.twice(name, str(known[1]), origin)
        for plugin in plugins(self.group):
            if plugin.name == name and plugin.entry.module.split(".")[0] != module.split(".")[0]:
                raise self.twice(name, str(plugin), origin)
        self._own[name] = (thing, origin)

    def twice(self, name: str, first: str, second: Origin | None = None) -> DfcError:
        span = second.span() if second else None
        return DfcError(
            "Q003",
            f"{self.kind} `{name}` exists already: {first} brings it",
            span=span,
            help="choose another name for this one"
            if span
            else f"remove one, or rename its {name}",
        )

    def names(self) -> list[str]:
        """All names, without loading anything that another package brings."""
        return sorted({*self._own, *(p.name for p in plugins(self.group))})

    def get(self, name: str) -> T | None:
        """What was registered, or what a package brings, which is loaded now.

        Raises:  DfcError Q003 when several packages bring it, Q041 when it does not load.
        """
        offers = [p for p in plugins(self.group) if p.name == name]
        if len({p.package for p in offers}) > 1:
            raise self.twice(name, f"{offers[0]}, but also {offers[1]}")
        if offers and name in self._shipped():
            raise self.twice(name, f"dfc itself, but also {offers[0]}")
        if name in self._own:
            return self._own[name][0]
        if not offers:
            return None
        if name not in self._from:
            self._from[name] = self._loaded(offers[0], offers[0].load())
        return self._from[name]

    def origin(self, name: str) -> str:
        """Who brings a name: a package, a file and line, or dfc."""
        package = next((p.package for p in plugins(self.group) if p.name == name), None)
        own = self._own.get(name)
        return package or (str(own[1]) if own else "dfc")

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Forget at the end what was added meanwhile: tests define many things."""
        kept = dict(self._own)
        try:
            yield
        finally:
            self._own.clear()
            self._own.update(kept)
