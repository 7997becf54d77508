"""The closed list of what a folder holds, so that any changed byte is found and named.

`write_manifest` lists a finished folder in its `manifest.json`; `check_manifest` refuses the
folder unless it holds exactly those files with exactly those bytes. The manifest is canonical
JSON (ASCII, sorted keys, one space of indent, no NaN, no duplicate keys) and carries its own
digest: `self_sha256` is the sha256 of the canonical text without that field. It names the
whole package, so it is what `--expect sha256:...` compares.

    {"schema": 1, "kind": "package", "chunk_bytes": 1048576, "extra": {...}, "self_sha256": "...",
     "files": [{"path": "graph.dfc", "size": 9, "sha256": "...", "chunks": ["..."]}, ...]}

Codes (DfcError; all have exit status 2 but D030):

    D020  no manifest here            D026  a file has another size
    D021  the manifest is damaged     D027  a file has other bytes; says in which range
    D022  another schema, kind or     D028  over a limit
          digest than expected        D029  a file changed while it was read
    D023  a file that is not listed   D030  a file cannot be read (exit status 7)
    D024  a listed file is missing
    D025  not a plain file: a link, a folder, a FIFO, a device

Source:  trust.md 7 (C2, C3) and 11.4
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypedDict, cast

from dfc.errors import DfcError, Diagnostic
from dfc.publish import AnyPath
from dfc.publish.faults import fault_point

NAME = "manifest.json"
SCHEMA = 1
CHUNK_BYTES = 1 << 20
MAX_MANIFEST_BYTES = 16 << 20
MAX_FILE_BYTES = 1 << 46
MAX_FILES = 100_000

_COMPONENT = re.compile(r"[A-Za-z0-9._-]{1,128}")
_KIND = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHOWN = 20  # problems reported at once, and ranges of one file


_Digests = Callable[[], tuple[str, list[str]]]  # of a whole file and of its chunks


class FileEntry(TypedDict):
    """One listed file. `chunks` holds a digest for each CHUNK_BYTES, the last one shorter."""

    path: str
    size: int
    sha256: str
    chunks: list[str]


class Manifest(TypedDict):
    schema: int
    kind: str
    chunk_bytes: int
    extra: dict[str, Any]
    files: list[FileEntry]
    self_sha256: str


# ---- what callers use ----------------------------------------------------------------------


def write_manifest(folder: AnyPath, kind: str, extra: dict[str, Any] | None = None) -> Manifest:
    """List every file of a finished folder in its `manifest.json`, which must not exist yet.

    Needs:   `extra` is plain JSON with string keys; the folder is a temp of `dfc.publish`,
             which does the syncing.
    Raises:  DfcError D023, D025, D028, D030.
    """
    extra = extra or {}
    assert _KIND.fullmatch(kind), kind
    assert json.loads(_canonical(extra)) == extra, "extra does not survive JSON"
    with _folder(folder) as root:
        paths, problems = _listing(root, folder)
        _raise_all(problems.values())
        files = list(_hashed(root, folder, sorted(paths)))
        rest: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": kind,
            "chunk_bytes": CHUNK_BYTES,
            "extra": extra,
            "files": files,
        }
        manifest = rest | {"self_sha256": hashlib.sha256(_canonical(rest)).hexdigest()}
        data = _canonical(manifest)
        if len(data) > MAX_MANIFEST_BYTES:
            raise _over(folder, NAME, "bytes", len(data), MAX_MANIFEST_BYTES)
        fault_point("manifest.write")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(NAME, flags, 0o666, dir_fd=root), "wb") as out:
            out.write(data)
    return cast(Manifest, manifest)


def check_manifest(
    folder: AnyPath, *, kind: str | None = None, expect: str | None = None
) -> Manifest:
    """Return the manifest of a folder whose every file is as listed; otherwise raise.

    Needs:   `expect`, if given, is the `self_sha256` that the folder must have.
    Raises:  DfcError D020-D030: one that names every damaged file, up to twenty.
    Cost:    reads every byte once for its chunk and once for its file, on two or more threads.
    """
    with _folder(folder) as root:
        manifest = _parse(_read_manifest(root, folder), folder)
        if kind is not None and manifest["kind"] != kind:
            raise DfcError("D022", f"`{folder}` is a {manifest['kind']}, not a {kind}")
        if expect is not None and manifest["self_sha256"] != expect:
            raise DfcError(
                "D022", f"`{folder}` has the digest {manifest['self_sha256']}, not {expect}"
            )
        listed = {entry["path"]: entry for entry in manifest["files"]}
        paths, problems = _listing(root, folder)
        for path in paths:
            if path not in listed:
                shown = _shown(folder, path)
                problems[path] = Diagnostic("D023", f"`{shown}` is not listed in the manifest")
        for path in listed.keys() - paths:
            if not problems.keys() & {path, path.partition("/")[0]}:
                problems[path] = Diagnostic("D024", f"`{_shown(folder, path)}` is missing")
        whole = []
        for path in sorted(paths & listed.keys()):
            size = _stat(root, path).st_size
            if size == listed[path]["size"]:
                whole.append(path)
            else:
                problems[path] = _wrong_size(folder, path, size, listed[path]["size"])
        for found in _hashed(root, folder, whole):
            if damage := _damage(folder, found, listed[found["path"]]):
                problems[found["path"]] = damage
        _raise_all(problems.values())
    return manifest


def read_file(folder: AnyPath, manifest: Manifest, path: str) -> bytes:
    """The bytes of a listed file, checked themselves: nothing can be swapped in between."""
    entry = next((e for e in manifest["files"] if e["path"] == path), None)
    if entry is None:
        raise DfcError("D024", f"`{_shown(folder, path)}` is not listed in the manifest")
    with open(open_file(folder, path), "rb") as source:
        size = os.fstat(source.fileno()).st_size
        if size != entry["size"]:
            raise DfcError.of([_wrong_size(folder, path, size, entry["size"])])
        data = source.read(size)
    spans = range(0, len(data), CHUNK_BYTES)
    found = FileEntry(
        path=path,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        chunks=[hashlib.sha256(data[at : at + CHUNK_BYTES]).hexdigest() for at in spans],
    )
    if damage := _damage(folder, found, entry):
        raise DfcError.of([damage])
    return data


def open_file(folder: AnyPath, path: str) -> int:
    """A descriptor of a plain file inside a folder, no link followed on the way; C3 of trust.md.

    Raises:  DfcError D023 (bad name), D024, D025, D030.
    """
    if not _is_path(path):
        raise DfcError("D023", f"`{path}` cannot be the name of a file in a package")
    with _folder(folder) as root:
        return _open(root, folder, path)


# ---- the text ------------------------------------------------------------------------------


def _canonical(value: object) -> bytes:
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def kind_of(folder: AnyPath) -> str | None:
    """What a folder says that it is, None where it says nothing; nothing is checked."""
    path = Path(folder) / NAME
    try:
        if not path.is_file():  # a pipe is waited for without end
            return None
        with path.open("rb") as file:
            found = json.loads(file.read(MAX_MANIFEST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    kind = found.get("kind") if isinstance(found, dict) else None
    return kind if isinstance(kind, str) else None


def _read_manifest(root: int, folder: AnyPath) -> bytes:
    try:
        fd = _open(root, folder, NAME)
    except DfcError as error:
        if error.code == "D024":
            raise DfcError("D020", f"`{folder}` is not a package: it has no {NAME}") from None
        raise
    with open(fd, "rb") as source:
        data = source.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise _over(folder, NAME, "bytes", os.stat(NAME, dir_fd=root).st_size, MAX_MANIFEST_BYTES)
    return data


def _parse(data: bytes, folder: AnyPath) -> Manifest:
    """Bytes to a manifest that is canonical, intact and of a schema that this version knows."""

    def damaged(why: str) -> DfcError:
        return DfcError("D021", f"`{_shown(folder, NAME)}` is damaged: {why}")

    def constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is not allowed")

    try:
        manifest = json.loads(
            data.decode("ascii"), object_pairs_hook=_without_twins, parse_constant=constant
        )
        if not isinstance(manifest, dict):
            raise damaged("it is not a JSON object")
        if _canonical(manifest) != data:
            raise damaged("it is not in canonical form")
        rest = {key: value for key, value in manifest.items() if key != "self_sha256"}
        digest = hashlib.sha256(_canonical(rest)).hexdigest()
    except UnicodeDecodeError as error:
        raise damaged(f"byte {error.start} is not ASCII") from None
    except (ValueError, RecursionError) as error:
        raise damaged(f"it is not JSON ({str(error).splitlines()[0].lower()})") from None
    if manifest.get("self_sha256") != digest:
        raise damaged("its own digest does not match")
    schema = manifest.get("schema")
    if type(schema) is int and schema != SCHEMA:
        raise DfcError(
            "D022",
            f"`{_shown(folder, NAME)}` has schema {schema}, this version reads {SCHEMA}",
            help="use the version of dfc that wrote it",
        )
    if why := _malformed(manifest):
        raise damaged(why)
    return cast(Manifest, manifest)


def _without_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice")
    return value


def _malformed(manifest: dict[str, Any]) -> str | None:
    """Why this is not what `write_manifest` writes, or None."""
    if manifest.keys() != Manifest.__annotations__.keys():
        return "it has other fields"
    kind, extra, files = manifest["kind"], manifest["extra"], manifest["files"]
    if type(manifest["schema"]) is not int or manifest["chunk_bytes"] != CHUNK_BYTES:
        return "schema or chunk_bytes is wrong"
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        return "kind is wrong"
    if not isinstance(extra, dict) or not isinstance(files, list):
        return "extra or files is wrong"
    if len(files) > MAX_FILES:
        return f"it lists {len(files)} files, the limit is {MAX_FILES}"
    before = ""
    for number, entry in enumerate(files):
        if not _is_entry(entry):
            return f"entry {number} of files is wrong"
        if entry["path"] <= before:
            return f"entry {number} of files is out of order"
        before = entry["path"]
    return None


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or entry.keys() != FileEntry.__annotations__.keys():
        return False
    size, chunks = entry["size"], entry["chunks"]
    return (
        _is_path(entry["path"])
        and entry["path"] != NAME
        and type(size) is int
        and 0 <= size <= MAX_FILE_BYTES
        and isinstance(chunks, list)
        and len(chunks) == -(-size // CHUNK_BYTES)
        and all(isinstance(d, str) and _DIGEST.fullmatch(d) for d in [entry["sha256"], *chunks])
    )


def _is_path(path: object) -> bool:
    """At most one folder deep, each component a plain name."""
    if not isinstance(path, str) or path.count("/") > 1:
        return False
    return all(_is_name(part) for part in path.split("/"))


def _is_name(name: str) -> bool:
    return bool(_COMPONENT.fullmatch(name)) and name not in (".", "..")


# ---- the folder ----------------------------------------------------------------------------


@contextmanager
def _folder(folder: AnyPath) -> Iterator[int]:
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
        raise _unreadable(folder, "", error) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _listing(root: int, folder: AnyPath) -> tuple[set[str], dict[str, Diagnostic]]:
    """Every plain file but the manifest; and, by path, what a package cannot hold."""
    files: set[str] = set()
    problems: dict[str, Diagnostic] = {}
    entries = 0

    def note(path: str, found: os.stat_result) -> None:
        nonlocal entries
        entries += 1
        if entries > MAX_FILES:
            raise _over(folder, "", "or more entries", entries, MAX_FILES)
        shown = _shown(folder, path)
        if not _is_path(path):
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
        raise _unreadable(folder, "", error) from error
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


def _open(root: int, folder: AnyPath, path: str) -> int:
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
        raise DfcError("D025", f"`{_shown(folder, path)}` is {what}")
    except FileNotFoundError:
        raise DfcError("D024", f"`{_shown(folder, path)}` is missing") from None
    except OSError as error:
        raise _unreadable(folder, path, error) from error
    finally:
        if inside != root:
            os.close(inside)


def _stat(root: int, path: str) -> os.stat_result:
    return os.stat(path, dir_fd=root, follow_symlinks=False)


# ---- the bytes -----------------------------------------------------------------------------


def _hashed(root: int, folder: AnyPath, paths: Iterable[str]) -> Iterator[FileEntry]:
    """Each file with its digests, in order. The digest of a whole large file and those of its
    chunks are taken by two threads, so that two cores read a gigabyte a second."""
    stop = threading.Event()
    with ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2))) as pool:
        waiting: list[tuple[str, int, _Digests]] = []
        try:
            for path in paths:
                fd = _open(root, folder, path)
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
        raise _unreadable(folder, path, error) from error
    finally:
        os.close(fd)
    if len(chunks) != -(-size // CHUNK_BYTES):
        raise DfcError("D029", f"`{_shown(folder, path)}` changed while it was read")
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


# ---- what is wrong -------------------------------------------------------------------------


def _damage(folder: AnyPath, found: FileEntry, listed: FileEntry) -> Diagnostic | None:
    shown = _shown(folder, found["path"])
    if found["size"] != listed["size"]:
        return Diagnostic("D029", f"`{shown}` changed while it was read")
    pairs = zip(found["chunks"], listed["chunks"], strict=True)
    bad = [number for number, (one, other) in enumerate(pairs) if one != other]
    if bad:
        ranges = ", ".join(_ranges(bad, listed["size"]))
        return Diagnostic("D027", f"`{shown}` is damaged in bytes {ranges}")
    if found["sha256"] != listed["sha256"]:
        return Diagnostic("D021", f"the manifest gives `{shown}` two digests that disagree")
    return None


def _ranges(chunks: list[int], size: int) -> Iterator[str]:
    """Neighbouring chunks joined to `first-last` byte ranges."""
    joined: list[list[int]] = []
    for number in chunks:
        if joined and number == joined[-1][1] + 1:
            joined[-1][1] = number
        else:
            joined.append([number, number])
    for first, last in joined[:_SHOWN]:
        yield f"{first * CHUNK_BYTES}-{min((last + 1) * CHUNK_BYTES, size) - 1}"
    if len(joined) > _SHOWN:
        yield f"and {len(joined) - _SHOWN} more ranges"


def _wrong_size(folder: AnyPath, path: str, size: int, listed: int) -> Diagnostic:
    shown = _shown(folder, path)
    if size < listed:
        return Diagnostic("D026", f"`{shown}` ends at byte {size} of {listed}")
    return Diagnostic("D026", f"`{shown}` has {size} bytes, {listed} are listed")


def _raise_all(problems: Iterable[Diagnostic]) -> None:
    if found := sorted(problems, key=lambda problem: problem.message):
        raise DfcError.of(found[:_SHOWN])


def _over(folder: AnyPath, path: str, unit: str, found: int, limit: int) -> DfcError:
    shown = _shown(folder, path)
    return DfcError("D028", f"`{shown}` has {found} {unit}, the limit is {limit}")


def _unreadable(folder: AnyPath, path: str, error: OSError) -> DfcError:
    reason = (error.strerror or str(error)).lower()
    return DfcError("D030", f"cannot read `{_shown(folder, path)}`: {reason}", status=7)


def _shown(folder: AnyPath, path: str) -> str:
    return os.path.join(os.fspath(folder), path) if path else os.fspath(folder)
