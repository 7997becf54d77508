"""Paths that a command will write to, refused before the work instead of after it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dfc.errors import DfcError


def require_writable(path: str | Path | None, force: bool, *, folder: bool = False) -> None:
    """Refuse a target that cannot be put in place; `dfc.publish` checks again.

    Raises:  DfcError D010, D011, D013.
    """
    if path is not None:
        from dfc.publish import require_usable

        require_usable(path, folder=folder, force=force)


def require_suffix(what: str, path: str | Path | None, *suffixes: str) -> None:
    """Refuse a file whose name promises another format than what is written.

    Raises:  DfcError D056.
    """
    if path is not None and Path(path).suffix not in suffixes:
        kind = f"no `{Path(path).suffix}` file" if Path(path).suffix else "a file with an ending"
        message = f"`{what}` writes {kind}, got `{path}`"
        raise DfcError("D056", message, help=f"name a file that ends in {' or '.join(suffixes)}")


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


def require_sources_kept(
    read: Iterable[str | None], *outputs: tuple[str, str | Path | None]
) -> None:  # fmt: skip
    """Refuse an output that would replace a file which is read, `--force` or not: models, recipes
    and data are the user's own. A package may be replaced by what is made of it.

    `read` are names as the command line has them: `net.py:build`, `val=data.py:val`, `r.dfc`.
    Raises:  DfcError D011.
    """
    kept = {path.resolve() for name in read if name is not None for path in _files_of(name)}
    for what, output in outputs:
        if output is not None and Path(output).is_file() and Path(output).resolve() in kept:
            message = f"`{what}` would replace `{output}`, which is read"
            raise DfcError("D011", message, help="write to a path of its own")


def _files_of(name: str) -> list[Path]:
    own = [name, name.partition("=")[2], name.rpartition(":")[0]]
    own.append(own[1].rpartition(":")[0])
    return [path for x in own if x and (path := Path(x)).is_file()]


def write_text(path: str, text: str, force: bool) -> None:
    """A small file, all or nothing.

    Raises:  DfcError D010..D013.
    """
    from dfc.publish import publish_file

    with publish_file(path, force=force) as temp:
        temp.write_text(text, encoding="utf-8")
