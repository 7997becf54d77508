"""Paths that a command will write to, refused before the work instead of after it."""

from __future__ import annotations

import os
from pathlib import Path

from dfc.errors import DfcError


def require_writable(path: str | None, force: bool) -> None:
    """Refuse a target that exists, or whose folder does not; `dfc.publish` checks again.

    Raises:  DfcError D010, D011.
    """
    if path is None:
        return
    target = Path(path).absolute()
    if os.path.lexists(target) and not force:
        raise DfcError("D010", f"`{path}` exists", help="`--force` replaces it")
    if not target.parent.is_dir():
        raise DfcError("D011", f"there is no folder `{os.path.dirname(path)}`")


def write_text(path: str, text: str, force: bool) -> None:
    """A small file, all or nothing.

    Raises:  DfcError D010..D013.
    """
    from dfc.publish import publish_file

    with publish_file(path, force=force) as temp:
        temp.write_text(text, encoding="utf-8")
