"""The code that made a result, as digests: with another, what is remembered is made anew."""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dfc.ir.graph import Graph

_NAMESPACES = ("aten", "torch", "prims", "dfc")


def versions() -> list[str]:
    """dfc with the digest of its code, torch, Python and the machine."""
    import torch

    import dfc

    machine = (platform.python_version(), platform.machine())
    return [dfc.__version__, dfcs_code(), torch.__version__, *machine]


def code_of(graph: Graph) -> list[str]:
    """What decides the results of a graph besides its text and weights."""
    names = {node.op for node in graph.walk()}
    return [*versions(), *([own_code() or this_process()] if is_of_users(names) else [])]


def is_of_users(ops: Iterable[str]) -> bool:
    """Whether an op is declared elsewhere than in dfc and PyTorch."""
    from dfc.ir.op import declared_ops

    own = {op.name for op in declared_ops() if not op.cls.__module__.startswith("dfc.")}
    return any(n in own or ("." in n and n.split(".")[0] not in _NAMESPACES) for n in ops)


@cache
def this_process() -> str:
    """Stands for code without files, as that of a prompt or a notebook: nobody else has it."""
    return secrets.token_hex(16)


@cache
def dfcs_code() -> str:
    import dfc

    root = Path(dfc.__file__).parent
    parts = (root, root / "passes", root / "runtime")  # links, which are not followed from the root
    return _digest(sorted(p for part in parts for p in part.rglob("*.py"))) or ""


def own_code() -> str | None:
    """The digest of every loaded module that neither Python, dfc nor a library brought, and of the
    rules and recipes beside them.

    None when one has no file, as the classes of a prompt or a notebook.
    """
    main = sys.modules.get("__main__")
    if main is None or not getattr(main, "__file__", None):
        return None
    loaded = dict(sys.modules)
    # What a library calls a module of its own may be anything: `torch.ops` has the file `_ops.py`.
    tops = {n.partition(".")[0] for n in loaded}
    library = {t for t in tops if _is_library(getattr(loaded.get(t), "__file__", None) or "")}
    files = {
        getattr(m, "__file__", None)
        for n, m in loaded.items()
        if n.partition(".")[0] not in library
    }
    own = {Path(f) for f in files if f and f.endswith(".py") and not _is_library(f)}
    texts = {p for folder in {f.parent for f in own} for p in folder.glob("*.dfc")}
    return _digest(sorted(own | texts))


def code_of_package(module: str) -> str | None:
    """The digest of the installed package that brings a module; nothing for dfc and the user's own,
    None where it cannot be read."""
    import dfc

    top = sys.modules.get(module.partition(".")[0])
    file = getattr(top, "__file__", None) or ""
    if top is dfc or not _is_library(file):
        return ""
    path = Path(file)
    return _digest(sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path])


@cache
def _libraries() -> tuple[str, ...]:
    import sysconfig

    import dfc

    paths = sysconfig.get_paths()
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return (*(paths[n] + os.sep for n in names), str(Path(dfc.__file__).parent) + os.sep)


def _is_library(file: str) -> bool:
    return file.startswith(_libraries())


def _digest(files: list[Path]) -> str | None:
    found = hashlib.sha256()
    for path in files:
        try:
            data = path.read_bytes()
        except OSError:
            return None
        found.update(f"{path} {len(data)}\n".encode() + data)
    return found.hexdigest()
