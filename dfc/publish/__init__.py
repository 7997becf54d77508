"""The only way that anything durable appears: written beside its place, synced, then renamed.

    with publish_folder("m.dfcpkg", force=force, expect_bytes=n) as temp:
        ...write plain files and folders below `temp`...

A clean exit of the block puts the result in its place; any other exit leaves what was there
before. After a kill, a crash or a power cut the place holds nothing, all of the old or all of
the new, and perhaps a leftover beside it, which the next publish in that folder sweeps up:

    .tmp-<pid>-<starttime>-<random>   being written, or being removed
    .old-<pid>-<starttime>-<random>   moved aside to be replaced; put back if nothing replaced it

Codes (DfcError):

    D010  2  the target exists and `force` was not given
    D011  2  the target cannot be one: bad name, no such folder, or `force` would destroy
             something that dfc did not write
    D012  7  not enough free space; says how many bytes are missing
    D013  7  writing failed (disk full, quota, I/O, read-only, permission); says path and bytes

Source:  trust.md 9 and 11
Limits:  SIGTERM and SIGHUP clean up only in the main thread and where the program left them at
         their default; elsewhere the next publish sweeps.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from dfc.counting import counted
from dfc.ending import ending
from dfc.errors import DfcError
from dfc.publish.durable import exchange, fsync_file, fsync_folder, rename_new
from dfc.publish.faults import fault_point
from dfc.publish.owner import here, start_time

AnyPath = str | os.PathLike[str]

_PACKAGE_MARK = "manifest.json"  # what tells a folder of ours from the user's own
_LEFTOVER = re.compile(
    r"\.(tmp|old)-(\d{1,10})-(\d{1,20})-([0-9a-f]{8})([0-9a-f]{8})[A-Za-z0-9._-]*"
)
_in_use: set[str] = set()  # the random part of what this process is writing now
_FOREIGN_AGE_S = 24 * 3600  # a process of another boot or machine cannot be asked; this old is dead
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_ENVIRONMENT = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
}


# ---- what callers use ----------------------------------------------------------------------


@contextmanager
def publish_folder(final: AnyPath, *, force: bool = False, expect_bytes: int = 0) -> Iterator[Path]:
    """Yield an empty folder to fill; on clean exit it stands at `final`, complete and synced.

    Needs:   plain files and folders only below it; the folder of `final` exists.
    Raises:  DfcError D010-D013; whatever the block raises.
    Why:     `force` replaces only a folder that is empty or holds a manifest.json, so that
             `--force -o .` cannot remove somebody's work.
    """
    with _publish(final, folder=True, force=force, expect_bytes=expect_bytes) as temp:
        yield temp


@contextmanager
def publish_file(final: AnyPath, *, force: bool = False, expect_bytes: int = 0) -> Iterator[Path]:
    """Yield the path of an empty file to write; on clean exit it stands at `final`.

    Keeps:   the suffix of `final`, since some writers look at it or add their own.
    Raises:  DfcError D010-D013; whatever the block raises.
    """
    with _publish(final, folder=False, force=force, expect_bytes=expect_bytes) as temp:
        yield temp


def require_usable(final: AnyPath, *, folder: bool, force: bool = False) -> None:
    """Refuse before the work what could not be put in place after it.

    Raises:  DfcError D010, D011; D013 where nothing can be written.
    """
    target = Path(final).absolute()
    if not os.fspath(final):
        raise DfcError("D011", "the path of an output is empty", help="name a file or a folder")
    _require_usable(final, target, folder, force)
    trial = target.with_name(f".tmp-{_ticket(secrets.token_hex(4))}")
    try:  # permissions do not tell: root has them all, and /proc or a full disk takes no file
        os.close(os.open(trial, _NEW_FILE, 0o600))
        os.unlink(trial)
    except OSError as error:
        where = os.path.dirname(final) or "."
        reason = (error.strerror or str(error)).lower()
        raise DfcError(
            "D013",
            f"cannot write `{os.fspath(final)}`: nothing can be written in `{where}`: {reason}",
            help="write somewhere else", status=7,
        ) from error  # fmt: skip


def require_space(folder: AnyPath, need_bytes: int) -> None:
    """Refuse a large write before it starts, saying how many bytes are missing."""
    if need_bytes <= 0:
        return
    free = _free_bytes(folder)
    if free < need_bytes:
        raise DfcError(
            "D012",
            f"not enough space in `{os.fspath(folder)}`: {_mb(need_bytes)} are needed, "
            f"{_mb(free)} are free, {_mb(need_bytes - free)} are missing",
            help="free some space, or write somewhere else",
            status=7,
        )


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.2f} MB"


def sweep(folder: AnyPath) -> None:
    """Remove what dead processes of this user left in a folder, and put back what they moved."""
    with suppress(OSError):
        for name in sorted(os.listdir(folder), reverse=True):  # `.tmp-` before `.old-`
            path = Path(folder, name)
            with suppress(OSError):
                if _is_leftover(path):
                    fault_point("publish.sweep")
                    _recover(path) if name.startswith(".old-") else _discard(path)


# ---- the protocol --------------------------------------------------------------------------


@contextmanager
def _publish(final: AnyPath, *, folder: bool, force: bool, expect_bytes: int) -> Iterator[Path]:
    target = Path(final).absolute()
    _require_usable(final, target, folder, force)
    token = secrets.token_hex(4)
    ticket = _ticket(token)
    plain = not folder and re.fullmatch(r"\.[A-Za-z0-9_]{1,16}", target.suffix)
    suffix = target.suffix if plain else ""
    temp = target.with_name(f".tmp-{ticket}{suffix}")
    aside = target.with_name(f".old-{ticket}")
    owner = os.getpid()
    ours = True
    with ending() as state:
        try:
            _in_use.add(token)
            sweep(target.parent)
            require_space(target.parent, expect_bytes)
            mode = _create(temp, folder)
            ours = False  # errors of the block are its own, unless the disk is to blame
            yield temp
            ours = True
            _seal(temp, mode)
            _put_in_place(temp, aside, final, target, force)
        except BaseException as error:
            number = _errno_of(error)
            if number in _ENVIRONMENT or (ours and isinstance(error, OSError)):
                raise _cannot_write(final, temp, error, number) from error
            raise
        finally:
            state.cleaning = True
            if os.getpid() == owner:  # a forked child that unwinds leaves its parent's work alone
                _discard(temp)
                _recover(aside)
            _in_use.discard(token)


def _ticket(token: str) -> str:
    """Whose a temporary file is, so that another process knows whether it is a leftover."""
    return f"{os.getpid()}-{start_time(os.getpid())}-{here()}{token}"


def _require_usable(final: AnyPath, target: Path, folder: bool, force: bool) -> None:
    nameless = Path(os.fsdecode(final)).name == ""  # "", "." and "/"
    if nameless or target.name in ("", "..") or target.name.startswith((".tmp-", ".old-")):
        raise DfcError("D011", f"`{os.fspath(final)}` cannot be the name of an output")
    try:
        if not stat.S_ISDIR(os.stat(target.parent).st_mode):
            raise DfcError("D011", f"`{target.parent}` is not a folder")
        os.lstat(target)
    except FileNotFoundError:
        if not os.path.isdir(target.parent):
            where = os.path.dirname(os.fspath(final))
            raise DfcError(
                "D011", f"there is no folder `{where}`", help="create it first"
            ) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise DfcError("D011", f"cannot write to `{os.fspath(final)}`: {reason}") from error
    else:
        if not force:
            raise _exists(final)
        _require_replaceable(final, target, folder)


def _require_replaceable(final: AnyPath, target: Path, folder: bool) -> None:
    mode = os.lstat(target).st_mode
    if folder and not stat.S_ISDIR(mode):
        raise DfcError("D011", f"`{os.fspath(final)}` is not a folder and is not replaced by one")
    if not folder and not stat.S_ISREG(mode):
        raise DfcError("D011", f"`{os.fspath(final)}` is not a plain file and is not replaced")
    if folder and (names := os.listdir(target)) and _PACKAGE_MARK not in names:
        raise DfcError(
            "D011",
            f"the folder `{os.fspath(final)}` was not written by dfc: it has no {_PACKAGE_MARK}",
            help="remove it yourself, or write somewhere else",
        )


def _create(temp: Path, folder: bool) -> int:
    """Make the temporary folder or file, closed to others; return the mode it will end with."""
    fault_point("publish.create")
    if folder:
        os.mkdir(temp, 0o777)
    else:
        os.close(os.open(temp, _NEW_FILE, 0o666))
    mode = stat.S_IMODE(os.lstat(temp).st_mode)  # what the user's umask left
    os.chmod(temp, mode & 0o700)
    return mode


def _seal(temp: Path, mode: int) -> None:
    """Sync every file, then every folder, innermost first. An error is final: no second try."""
    if not stat.S_ISDIR(os.lstat(temp).st_mode):
        os.chmod(temp, mode)
        fsync_file(temp)
        return
    for folder, subfolders, files in os.walk(temp, topdown=False):
        for name in sorted(files):
            fsync_file(Path(folder, name))
        for name in subfolders:
            assert not os.path.islink(Path(folder, name)), f"{name}: a link in what is published"
        if Path(folder) == temp:
            os.chmod(temp, mode)
        fault_point("publish.fsync_folder")
        fsync_folder(Path(folder))


def _put_in_place(temp: Path, aside: Path, final: AnyPath, target: Path, force: bool) -> None:
    fault_point("publish.rename")
    undo: Callable[[], object]
    if rename_new(temp, target):
        undo = partial(os.rename, target, temp)
    elif not force:
        raise _exists(final)
    else:
        _require_replaceable(final, target, stat.S_ISDIR(os.lstat(temp).st_mode))
        if exchange(temp, target):
            undo = partial(exchange, temp, target)
        else:
            _move_aside(temp, aside, final, target)
            undo = partial(os.rename, target, temp)
    try:
        fault_point("publish.fsync_parent")
        fsync_folder(target.parent)
    except OSError:  # an error must mean that nothing was published
        undo()
        raise


def _move_aside(temp: Path, aside: Path, final: AnyPath, target: Path) -> None:
    """Replace in two renames, where the file system cannot exchange; `_recover` undoes half."""
    fault_point("publish.mkdir_aside")
    os.mkdir(aside, 0o700)
    fault_point("publish.move_aside")
    os.rename(target, aside / target.name)
    fault_point("publish.rename_after_aside")
    if not rename_new(temp, target):
        raise _exists(final)


def _discard(path: Path) -> None:
    with suppress(OSError):
        mode = os.lstat(path).st_mode
        fault_point("publish.remove")
        if stat.S_ISDIR(mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)


def _recover(aside: Path) -> None:
    """Put back what was moved aside; when something stands in its place, remove it instead.

    Why:  a half-removed thing must never come back, so removing starts with a rename to `.tmp-`.
    """
    with suppress(OSError):
        if not stat.S_ISDIR(os.lstat(aside).st_mode):  # a link that somebody put there
            return _discard(aside)
        for name in os.listdir(aside):
            fault_point("publish.recover")
            rename_new(aside / name, aside.with_name(name))
        doomed = aside.with_name(aside.name.replace(".old-", ".tmp-", 1))
        os.rename(aside, doomed)
        _discard(doomed)


# ---- errors --------------------------------------------------------------------------------


def _exists(final: AnyPath) -> DfcError:
    return DfcError(
        "D010", f"`{os.fspath(final)}` exists", help="`--force` (in Python force=True) replaces it"
    )


def _errno_of(error: BaseException) -> int:
    """The errno behind an error; safetensors writes in Rust and tells it in its text."""
    if isinstance(error, OSError):
        return error.errno or 0
    if type(error).__name__ == "SafetensorError":
        match = re.search(r"\(os error (\d{1,4})\)", str(error))
        return int(match[1]) if match else 0
    return 0


def _cannot_write(final: AnyPath, temp: Path, error: BaseException, number: int) -> DfcError:
    reason = os.strerror(number).lower() if number else str(error)
    written = _size_bytes(temp)
    try:
        room = f"{_free_bytes(temp.parent)} bytes are free"
    except OSError:
        room = "the free space is unknown"
    notes = []
    name = getattr(error, "filename", None)
    if isinstance(name, str | os.PathLike) and temp not in (Path(name), *Path(name).parents):
        notes.append(f"the error was met at `{os.fspath(name)}`")
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return DfcError(
        "D013",
        f"cannot write `{os.fspath(final)}`: {reason}, after {counted(written, 'byte')}; {room}",
        help="free some space, or write somewhere else" if full else None,
        notes=notes,
        status=7,
    )


def _size_bytes(path: Path) -> int:
    total = 0
    with suppress(OSError):
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            return os.lstat(path).st_size
        for folder, _, files in os.walk(path):
            for name in files:
                with suppress(OSError):
                    total += os.lstat(os.path.join(folder, name)).st_size
    return total


def _free_bytes(folder: AnyPath) -> int:
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize


def _is_leftover(path: Path) -> bool:
    """Ours by name and owner, and the process that wrote it is gone."""
    match = _LEFTOVER.fullmatch(path.name)
    if match is None:
        return False
    found = os.lstat(path)
    if found.st_uid != os.geteuid():
        return False
    if match[4] != here():
        return time.time() - found.st_mtime > _FOREIGN_AGE_S
    pid, start = int(match[2]), int(match[3])
    if pid == os.getpid() and start_time(pid) == start:
        return match[5] not in _in_use  # what this very process could not remove
    return start_time(pid) != start
