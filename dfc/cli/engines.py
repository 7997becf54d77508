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


def check_device(device: str) -> None:
    """Refuse a device that torch does not know or does not see.

    Raises:  DfcError Q007 (status 2) for a wrong word, K004 (7) for a missing device.
    """
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise DfcError("Q007", f"unknown device `{device}`: there are cpu and cuda")
    if kind == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise DfcError("K004", "torch sees no CUDA device", help="see `dfc doctor`", status=7)
