"""Paths that a command will write to, refused before the work instead of after it."""

from __future__ import annotations

from pathlib import Path

from dfc.errors import DfcError


def require_writable(path: str | Path | None, force: bool, *, folder: bool = False) -> None:
    """Refuse a target that cannot be put in place; `dfc.publish` checks again.

    Raises:  DfcError D010, D011, D013.
    """
    if path is not None:
        from dfc.publish import require_usable

        require_usable(path, folder=folder, force=force)


def require_apart(*outputs: tuple[str, str | Path | None]) -> None:
    """Refuse two outputs of one path, each told with what names it: `--html`, `emit onnx`.

    Raises:  DfcError D011.
    """
    taken: dict[Path, str] = {}
    for what, path in outputs:
        if path is None:
            continue
        first = taken.setdefault(Path(path).absolute(), what)
        if first != what:
            message = f"`{first}` and `{what}` both write `{path}`"
            raise DfcError("D011", message, help="give each a path of its own")


def write_text(path: str, text: str, force: bool) -> None:
    """A small file, all or nothing.

    Raises:  DfcError D010..D013.
    """
    from dfc.publish import publish_file

    with publish_file(path, force=force) as temp:
        temp.write_text(text, encoding="utf-8")
