"""Engines and devices as the command line names them, refused before the work."""

from __future__ import annotations

from dfc.errors import DfcError


def check_engine(name: str) -> None:
    """Refuse an engine that there is not, alone or among several; `auto` is none but allowed.

    Raises:  DfcError K001 (status 2), K002 (7) when its library is missing.
    """
    from dfc.runtime.engines import find_engine

    if name != "auto":
        for one in name.split(","):
            find_engine(one)


def chosen_engines(text: str) -> list[str]:
    """`eager,onnxruntime` or `all`, those of dfc's own that are installed, as names, each once.

    Raises:  DfcError Q010, K001, K002.
    """
    from dfc.runtime.engines import engine_names, find_engine, installed_engines

    if text == "all":
        return installed_engines()
    names = [n.strip() for n in text.split(",") if n.strip()]
    if not names:
        known = f"there are {', '.join(engine_names())}"
        raise DfcError("Q010", "--engine names no engine", help=known)
    for name in names:
        find_engine(name)
    return list(dict.fromkeys(names))
