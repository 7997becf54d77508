"""Engines, one file each: a file's name, without a trailing underscore, is the engine's name."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from dfc.errors import DfcError, did_you_mean
from dfc.planning.engine import Engine


def engine_names() -> list[str]:
    """Every engine that dfc has, whether or not its library is installed."""
    return sorted(m.name.rstrip("_") for m in pkgutil.iter_modules(__path__))


@cache
def find_engine(name: str) -> Engine:
    """The engine of this name.

    Raises:  DfcError K001 for an unknown name, K002 when its library is missing.
    """
    modules = {m.name.rstrip("_"): m.name for m in pkgutil.iter_modules(__path__)}
    if name not in modules:
        raise DfcError(
            "K001",
            f"unknown engine `{name}`: there are {', '.join(sorted(modules))}",
            help=did_you_mean(name, list(modules)),
            status=2,
        )
    try:
        module = importlib.import_module(f"{__name__}.{modules[name]}")
    except ImportError as e:
        raise DfcError("K002", f"engine `{name}` needs a library: {e}", status=7) from e
    engine: Engine = module.ENGINE
    return engine
