"""Where a node comes from: Python files relative to their package, the same on every machine."""

from __future__ import annotations

import re
from pathlib import Path

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in ')


def user_frame(trace: str) -> tuple[str, int]:
    """The innermost frame of a stack trace that is not PyTorch's own, relative to its package."""
    frames = _FRAME.findall(trace)
    for file, line in reversed(frames):
        short = package_path(file)
        if not short.startswith(("torch/", "functorch/", "<")):
            return short, int(line)
    return "", 0


def package_path(file: str) -> str:
    """A file relative to where its package is installed, or to its package's parent folder."""
    for mark in ("/site-packages/", "/dist-packages/"):
        if mark in file:
            return file.split(mark, 1)[1]
    path = Path(file)
    if not path.is_absolute():
        return file
    top = path.parent
    while (top / "__init__.py").exists() and top != top.parent:
        top = top.parent
    try:
        return path.relative_to(top).as_posix()
    except ValueError:
        return path.name
