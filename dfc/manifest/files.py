"""A folder that is not trusted: what lies in it is listed and opened without following a link."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from dfc.errors import DfcError, Diagnostic
from dfc.publish import AnyPath

NAME = "manifest.json"
MAX_FILES = 100_000

_COMPONENT = re.compile(r"[A-Za-z0-9._-]{1,128}")


@contextmanager
def opened(folder: AnyPath) -> Iterator[int]:
    """A descriptor of the folder that the user named; links on the way there are the user's."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        help = None
        if ":" in os.fspath(folder):  # a model
            help = "a package is wanted: `dfc compile MODEL -o NAME.dfcpkg` makes one"
        raise DfcError("D020", f"there is no `{os.fspath(folder)}`", help=help) from None
    except NotADirectoryError:
        raise DfcError(
            "D020", f"`{os.fspath(folder)}` is not a package: it is not a folder"
        ) from None
    except OSError as error:
        raise unreadable(folder, "", error) from error
    try:
        yield fd
    finally:
        os.close(fd)


def listing(root: int, folder: AnyPath) -> tuple[set[str], dict[str, Diagnostic]]:
    """Every plain file but the manifest; and, by path, what a package cannot hold."""
    files: set[str] = set()
    problems: dict[str, Diagnostic] = {}
    entries = 0

    def note(path: str, found: os.stat_result) -> None:
        nonlocal entries
        entries += 1
        if entries > MAX_FILES:
            raise over(folder, "", "or more entries", entries, MAX_FILES)
        shown = path_of(folder, path)
        if not is_path(path):
            problems[path] = Diagnostic("D023", f"`{shown}` has a name that a package cannot hold")
        elif what := _not_plain(found):
            problems[path] = Diagnostic("D025", f"`{shown}` is {what}")
        else:
            files.add(path)

    try:
        for name, found in _scan(root):
            if not stat.S_ISDIR(found.st_mode):
                note(name, found)
                continue
            before = entries
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            sub = os.open(name, flags, dir_fd=root)
            try:
                for below, detail in _scan(sub):
                    note(f"{name}/{below}", detail)
            finally:
                os.close(sub)
            if entries == before:  # nothing that is listed can be in it
                note(name, found)
    except OSError as error:
        raise unreadable(folder, "", error) from error
    return files - {NAME}, problems


def _scan(fd: int) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(fd) as entries:
        for entry in entries:
            yield entry.name, os.stat(entry.name, dir_fd=fd, follow_symlinks=False)


def _not_plain(found: os.stat_result) -> str | None:
    mode = found.st_mode
    if stat.S_ISREG(mode):
        return None if found.st_nlink == 1 else f"a hard link, it has {found.st_nlink} names"
    if stat.S_ISLNK(mode):
        return "a symbolic link"
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a FIFO" if stat.S_ISFIFO(mode) else "not a plain file"


def open_below(root: int, folder: AnyPath, path: str) -> int:
    """Open below a descriptor, component by component; only a plain file comes back."""
    above, _, name = path.rpartition("/")
    inside = root
    try:
        if above:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            inside = os.open(above, flags, dir_fd=root)
        what = _not_plain(os.stat(name, dir_fd=inside, follow_symlinks=False))
        if what is None:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(name, flags, dir_fd=inside)
            what = _not_plain(os.fstat(fd))
            if what is None:
                return fd
            os.close(fd)
        raise DfcError("D025", f"`{path_of(folder, path)}` is {what}")
    except FileNotFoundError:
        raise DfcError("D024", f"`{path_of(folder, path)}` is missing") from None
    except OSError as error:
        raise unreadable(folder, path, error) from error
    finally:
        if inside != root:
            os.close(inside)


def stat_below(root: int, path: str) -> os.stat_result:
    return os.stat(path, dir_fd=root, follow_symlinks=False)


def is_path(path: object) -> bool:
    """At most one folder deep, each component a plain name."""
    if not isinstance(path, str) or path.count("/") > 1:
        return False
    return all(_is_name(part) for part in path.split("/"))


def _is_name(name: str) -> bool:
    return bool(_COMPONENT.fullmatch(name)) and name not in (".", "..")


def over(folder: AnyPath, path: str, unit: str, found: int, limit: int) -> DfcError:
    shown = path_of(folder, path)
    return DfcError("D028", f"`{shown}` has {found} {unit}, the limit is {limit}")


def unreadable(folder: AnyPath, path: str, error: OSError) -> DfcError:
    reason = (error.strerror or str(error)).lower()
    return DfcError("D030", f"cannot read `{path_of(folder, path)}`: {reason}", status=7)


def path_of(folder: AnyPath, path: str) -> str:
    return os.path.join(os.fspath(folder), path) if path else os.fspath(folder)
