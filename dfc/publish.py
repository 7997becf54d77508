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
    D014  7  DFC_FAULT cannot be read

Fault points, for tests: DFC_FAULT="NAME:N:ACTION[,...]" makes the N-th pass of a fault point
kill the process (`kill`), terminate it (`term`), interrupt it (`int`), wait a second (`delay`)
or fail with an errno (`ENOSPC`, `EIO`, ...). An empty DFC_FAULT only counts, in `HITS`.

Source:  trust.md 9 and 11
Limits:  SIGTERM and SIGHUP clean up only in the main thread and where the program left them at
         their default; elsewhere the next publish sweeps.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import signal
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from types import FrameType

from dfc.errors import DfcError

AnyPath = str | os.PathLike[str]

_PACKAGE_MARK = "manifest.json"  # what tells a folder of ours from the user's own
_LEFTOVER = re.compile(
    r"\.(tmp|old)-(\d{1,10})-(\d{1,20})-([0-9a-f]{8})([0-9a-f]{8})[A-Za-z0-9._-]*"
)
_in_use: set[str] = set()  # the random part of what this process is writing now
_FOREIGN_AGE_S = 24 * 3600  # a process of another boot or machine cannot be asked; this old is dead
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
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF}


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
    if not os.access(target.parent, os.W_OK | os.X_OK):
        where = os.path.dirname(final) or "."
        raise DfcError(
            "D013", f"cannot write `{os.fspath(final)}`: nothing can be written in `{where}`",
            help="write somewhere else", status=7,
        )  # fmt: skip


def require_space(folder: AnyPath, need_bytes: int) -> None:
    """Refuse a large write before it starts, saying how many bytes are missing."""
    if need_bytes <= 0:
        return
    free = _free_bytes(folder)
    if free < need_bytes:
        raise DfcError(
            "D012",
            f"not enough space in `{os.fspath(folder)}`: {need_bytes} bytes are needed, "
            f"{free} are free, {need_bytes - free} are missing",
            help="free some space, or write somewhere else",
            status=7,
        )


def sweep(folder: AnyPath) -> None:
    """Remove what dead processes of this user left in a folder, and put back what they moved."""
    with suppress(OSError):
        for name in sorted(os.listdir(folder), reverse=True):  # `.tmp-` before `.old-`
            path = Path(folder, name)
            with suppress(OSError):
                if _is_leftover(path):
                    fault_point("publish.sweep")
                    _recover(path) if name.startswith(".old-") else _discard(path)


# ---- fault points --------------------------------------------------------------------------

HITS: Counter[str] = Counter()  # how often each fault point was passed while DFC_FAULT was set


def fault_point(name: str) -> None:
    """A place where a test may make this process die, or the operation that follows fail."""
    plan = os.environ.get("DFC_FAULT")
    if plan is None:
        return
    HITS[name] += 1
    for point, number, action in _fault_plan(plan):
        if point == name and number == HITS[name]:
            _strike(action)


@cache
def _fault_plan(text: str) -> tuple[tuple[str, int, str], ...]:
    steps = []
    for step in filter(None, text.split(",")):
        match = re.fullmatch(r"([a-z_.]+):(\d{1,9}):(\w+)", step)
        if match is None or not (match[3] in _ACTIONS or match[3] in _ERRNO):
            raise DfcError(
                "D014",
                f"DFC_FAULT has `{step}`",
                help=f"write NAME:N:ACTION, the action one of {', '.join(_ACTIONS)} or an errno",
                status=7,
            )
        steps.append((match[1], int(match[2]), match[3]))
    return tuple(steps)


def _strike(action: str) -> None:
    if action in _ERRNO:
        raise OSError(_ERRNO[action], os.strerror(_ERRNO[action]))
    _ACTIONS[action]()


def _interrupt() -> None:
    raise KeyboardInterrupt


_ERRNO = {name: number for number, name in errno.errorcode.items()}
_ACTIONS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "int": _interrupt,
    "delay": partial(time.sleep, 1.0),
}


# ---- the protocol --------------------------------------------------------------------------


@contextmanager
def _publish(final: AnyPath, *, folder: bool, force: bool, expect_bytes: int) -> Iterator[Path]:
    target = Path(final).absolute()
    _require_usable(final, target, folder, force)
    token = secrets.token_hex(4)
    ticket = f"{os.getpid()}-{_start_time(os.getpid())}-{_here()}{token}"
    plain = not folder and re.fullmatch(r"\.[A-Za-z0-9_]{1,16}", target.suffix)
    suffix = target.suffix if plain else ""
    temp = target.with_name(f".tmp-{ticket}{suffix}")
    aside = target.with_name(f".old-{ticket}")
    owner = os.getpid()
    ours = True
    with _ending() as ending:
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
            ending.cleaning = True
            if os.getpid() == owner:  # a forked child that unwinds leaves its parent's work alone
                _discard(temp)
                _recover(aside)
            _in_use.discard(token)


def _require_usable(final: AnyPath, target: Path, folder: bool, force: bool) -> None:
    if target.name in ("", "..") or target.name.startswith((".tmp-", ".old-")):
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
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(temp, flags, 0o666))
    mode = stat.S_IMODE(os.lstat(temp).st_mode)  # what the user's umask left
    os.chmod(temp, mode & 0o700)
    return mode


def _seal(temp: Path, mode: int) -> None:
    """Sync every file, then every folder, innermost first. An error is final: no second try."""
    if not stat.S_ISDIR(os.lstat(temp).st_mode):
        os.chmod(temp, mode)
        _fsync_file(temp)
        return
    for folder, subfolders, files in os.walk(temp, topdown=False):
        for name in sorted(files):
            _fsync_file(Path(folder, name))
        for name in subfolders:
            assert not os.path.islink(Path(folder, name)), f"{name}: a link in what is published"
        if Path(folder) == temp:
            os.chmod(temp, mode)
        fault_point("publish.fsync_folder")
        _fsync_folder(Path(folder))


def _put_in_place(temp: Path, aside: Path, final: AnyPath, target: Path, force: bool) -> None:
    fault_point("publish.rename")
    undo: Callable[[], object]
    if _rename_new(temp, target):
        undo = partial(os.rename, target, temp)
    elif not force:
        raise _exists(final)
    else:
        _require_replaceable(final, target, stat.S_ISDIR(os.lstat(temp).st_mode))
        if _exchange(temp, target):
            undo = partial(_exchange, temp, target)
        else:
            _move_aside(temp, aside, final, target)
            undo = partial(os.rename, target, temp)
    try:
        fault_point("publish.fsync_parent")
        _fsync_folder(target.parent)
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
    if not _rename_new(temp, target):
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
            _rename_new(aside / name, aside.with_name(name))
        doomed = aside.with_name(aside.name.replace(".old-", ".tmp-", 1))
        os.rename(aside, doomed)
        _discard(doomed)


# ---- errors --------------------------------------------------------------------------------


def _exists(final: AnyPath) -> DfcError:
    return DfcError("D010", f"`{os.fspath(final)}` exists", help="`--force` replaces it")


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
        f"cannot write `{os.fspath(final)}`: {reason}, after {written} bytes; {room}",
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


# ---- who is alive --------------------------------------------------------------------------


def _is_leftover(path: Path) -> bool:
    """Ours by name and owner, and the process that wrote it is gone."""
    match = _LEFTOVER.fullmatch(path.name)
    if match is None:
        return False
    found = os.lstat(path)
    if found.st_uid != os.geteuid():
        return False
    if match[4] != _here():
        return time.time() - found.st_mtime > _FOREIGN_AGE_S
    pid, start = int(match[2]), int(match[3])
    if pid == os.getpid() and _start_time(pid) == start:
        return match[5] not in _in_use  # what this very process could not remove
    return _start_time(pid) != start


def _start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 if unknowable, -1 if it is gone."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (ProcessLookupError, OverflowError):
        return -1
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # no /proc on this system
        return 0
    return -1 if fields[0] in "ZX" else int(fields[19])


@cache
def _here() -> str:
    """Eight digits for this boot of this machine and its process numbers (a container's own)."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


# ---- signals -------------------------------------------------------------------------------


class _Ended(BaseException):
    """Unwinds the stack after SIGTERM or SIGHUP."""


class _Ending:
    cleaning = False


@contextmanager
def _ending() -> Iterator[_Ending]:
    """Let SIGTERM and SIGHUP unwind the stack, so that no temp stays, then end the process."""
    state = _Ending()
    if threading.current_thread() is not threading.main_thread():
        yield state
        return
    caught: list[int] = []

    def unwind(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if not state.cleaning:
            raise _Ended(number)

    signals = (signal.SIGTERM, signal.SIGHUP)
    taken = [number for number in signals if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in taken:
            signal.signal(number, unwind)
        yield state
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
        if caught:
            os.kill(os.getpid(), caught[0])


# ---- system calls --------------------------------------------------------------------------


def _fsync_file(path: Path) -> None:
    fault_point("publish.fsync_file")
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        assert stat.S_ISREG(os.fstat(fd).st_mode), f"{path.name}: not a plain file"
        os.fsync(fd)
    finally:
        os.close(fd)


def _fsync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(fd)


def _rename_new(source: Path, target: Path) -> bool:
    """Rename to a name that is free; False when it is taken. Atomic wherever it can be."""
    try:
        if _rename_with("noreplace", source, target):
            return True
        if not stat.S_ISDIR(os.lstat(source).st_mode) and _link_new(source, target):
            return True
        if os.path.lexists(target):
            return False
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            return False
        raise
    return True


def _link_new(source: Path, target: Path) -> bool:
    """Rename a file by a second name: fails if the target exists, on any POSIX file system."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.EEXIST:
            raise
        return False  # no hard links here
    os.unlink(source)
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the file system cannot."""
    return _rename_with("exchange", one, other)


def _rename_with(how: str, source: Path, target: Path) -> bool:
    rename = _system_rename()
    if rename is None:
        return False
    number = rename(how, os.fsencode(source), os.fsencode(target))
    if number == 0:
        return True
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), os.fspath(source), None, os.fspath(target))


@cache
def _system_rename() -> Callable[[str, bytes, bytes], int] | None:
    """renameat2 of Linux or renamex_np of macOS, returning an errno; None where there is none."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd = -100
    linux = {"noreplace": 1, "exchange": 2}
    macos = {"noreplace": 4, "exchange": 2}
    if hasattr(libc, "renameat2"):
        libc.renameat2.argtypes = (
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_uint,
        )

        def rename(how: str, source: bytes, target: bytes) -> int:
            failed = libc.renameat2(at_cwd, source, at_cwd, target, linux[how])
            return ctypes.get_errno() if failed else 0

        return rename
    if hasattr(libc, "renamex_np"):
        libc.renamex_np.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint)

        def rename_macos(how: str, source: bytes, target: bytes) -> int:
            failed = libc.renamex_np(source, target, macos[how])
            return ctypes.get_errno() if failed else 0

        return rename_macos
    return None
