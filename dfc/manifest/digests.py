"""The digests of files: of each as a whole and of its chunks, taken by several threads."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from dfc.errors import DfcError
from dfc.manifest.files import open_below, path_of, unreadable
from dfc.manifest.text import CHUNK_BYTES, FileEntry
from dfc.publish import AnyPath

_Digests = Callable[[], tuple[str, list[str]]]  # of a whole file and of its chunks


def hashed(root: int, folder: AnyPath, paths: Iterable[str]) -> Iterator[FileEntry]:
    """Each file with its digests, in order. The digest of a whole large file and those of its
    chunks are taken by two threads, so that two cores read a gigabyte a second."""
    stop = threading.Event()
    with ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2))) as pool:
        waiting: list[tuple[str, int, _Digests]] = []
        try:
            for path in paths:
                fd = open_below(root, folder, path)
                waiting.append((path, fd, _start(pool, fd, stop)))
                if len(waiting) == 16:
                    yield _finish(folder, *waiting.pop(0))
            while waiting:
                yield _finish(folder, *waiting.pop(0))
        finally:
            stop.set()  # an interrupt does not wait for gigabytes
            pool.shutdown(cancel_futures=True)
            for _, fd, _ in waiting:
                os.close(fd)


def _start(pool: ThreadPoolExecutor, fd: int, stop: threading.Event) -> _Digests:
    if os.fstat(fd).st_size <= CHUNK_BYTES:
        return lambda: _at_once(fd)
    whole, chunks = pool.submit(_whole, fd, stop), pool.submit(_chunks, fd, stop)

    def both() -> tuple[str, list[str]]:
        futures: list[Future[Any]] = [whole, chunks]
        wait(futures)  # both are done with the descriptor, even if one failed
        return whole.result(), chunks.result()

    return both


def _finish(folder: AnyPath, path: str, fd: int, digests: _Digests) -> FileEntry:
    try:
        whole, chunks = digests()
        size = os.fstat(fd).st_size
    except OSError as error:
        raise unreadable(folder, path, error) from error
    finally:
        os.close(fd)
    if len(chunks) != -(-size // CHUNK_BYTES):
        raise DfcError("D029", f"`{path_of(folder, path)}` changed while it was read")
    return FileEntry(path=path, size=size, sha256=whole, chunks=chunks)


def _at_once(fd: int) -> tuple[str, list[str]]:
    """A file of at most one chunk: one digest is both."""
    with open(fd, "rb", closefd=False) as source:
        data = source.read(CHUNK_BYTES)
    digest = hashlib.sha256(data).hexdigest()
    return digest, [digest] if data else []


def _whole(fd: int, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    for block in _blocks(fd, stop):
        digest.update(block)
    return digest.hexdigest()


def _chunks(fd: int, stop: threading.Event) -> list[str]:
    return [hashlib.sha256(block).hexdigest() for block in _blocks(fd, stop)]


def _blocks(fd: int, stop: threading.Event) -> Iterator[memoryview]:
    """The file in pieces of CHUNK_BYTES, in one buffer that the next piece overwrites.

    Why:  a mapped file would be faster by a little, and SIGBUS if somebody truncates it.
    """
    view = memoryview(bytearray(CHUNK_BYTES))
    at = 0
    while not stop.is_set():
        filled = 0
        while filled < CHUNK_BYTES:
            got = os.preadv(fd, [view[filled:]], at + filled)
            if got == 0:
                break
            filled += got
        if filled:
            yield view[:filled]
        if filled < CHUNK_BYTES:
            return
        at += filled
