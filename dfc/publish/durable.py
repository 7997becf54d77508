"""Files made durable, and renames that never replace what they should not.

Source:  trust.md 9
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path

from dfc.publish.faults import fault_point

_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF}


def fsync_file(path: Path) -> None:
    fault_point("publish.fsync_file")
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        assert stat.S_ISREG(os.fstat(fd).st_mode), f"{path.name}: not a plain file"
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(fd)


def rename_new(source: Path, target: Path) -> bool:
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


def exchange(one: Path, other: Path) -> bool:
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
