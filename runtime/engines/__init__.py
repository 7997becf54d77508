"""Engines, one file each: a file's name, without a trailing underscore, is the engine's name.

Besides: what `@dfc.engine` made, and the entry points of the group `dfc.engines`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from dfc.errors import DfcError, did_you_mean
from dfc.planning.custom import ENGINES
from dfc.planning.engine import Engine

_INSTALL = {"openvino": "'dfc-compiler[openvino]'"}  # engines whose library is an extra


def engine_names() -> list[str]:
    """Every engine that dfc has, whether or not its library is installed."""
    own = {m.name.rstrip("_") for m in pkgutil.iter_modules(__path__)}
    return sorted(own | set(ENGINES.names()))


def find_engine(name: str) -> Engine:
    """The engine of this name.

    Raises:  DfcError K001 for an unknown name, K002 when its library is missing, Q003 when two
             bring it, Q041 when its package does not load.
    """
    base, colon, variant = name.partition(":")
    if colon:
        return _variant(name, base, variant)
    found = ENGINES.get(name)
    if found is not None:
        return found
    known = engine_names()
    if name not in known:
        raise DfcError(
            "K001",
            f"unknown engine `{name}`: there are {', '.join(known)}",
            help=did_you_mean(name, known),
            status=2,
        )
    return _shipped(name)


@cache
def _variant(name: str, base: str, variant: str) -> Engine:
    """An engine that runs the same graph in another form: `eager:channels_last`."""
    engine = find_engine(base)
    forms: Mapping[str, Engine] = getattr(engine, "variants", {})
    if variant not in forms:
        there = f"there are {', '.join(forms)}" if forms else "it has none"
        raise DfcError(
            "K001", f"engine `{base}` has no form `{variant}`: {there}", status=2,
            help=did_you_mean(variant, list(forms)),
        )  # fmt: skip
    return forms[variant]


def installed_engines() -> list[str]:
    """The engines of dfc's own whose library is here."""
    found = []
    for name in sorted(m.name.rstrip("_") for m in pkgutil.iter_modules(__path__)):
        try:
            _shipped(name)
        except DfcError:
            continue
        found.append(name)
    return found


@cache
def _shipped(name: str) -> Engine:
    modules = {m.name.rstrip("_"): m.name for m in pkgutil.iter_modules(__path__)}
    try:
        module = importlib.import_module(f"{__name__}.{modules[name]}")
    except ImportError as e:
        help = f"pip install {_INSTALL[name]}" if name in _INSTALL else None
        message = f"engine `{name}` needs a library: {e}"
        raise DfcError("K002", message, help=help, status=7) from e
    engine: Engine = module.ENGINE
    return engine
