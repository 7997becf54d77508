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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from dfc.errors import DfcError, Diagnostic
from dfc.manifest.digests import hashed
from dfc.manifest.files import (
    NAME,
    is_path,
    listing,
    open_below,
    opened,
    over,
    path_of,
    stat_below,
)
from dfc.manifest.text import CHUNK_BYTES, KIND, SCHEMA, FileEntry, Manifest, canonical, parse
from dfc.publish import AnyPath
from dfc.publish.faults import fault_point

MAX_MANIFEST_BYTES = 16 << 20

_SHOWN = 20  # problems reported at once, and ranges of one file


def write_manifest(folder: AnyPath, kind: str, extra: dict[str, Any] | None = None) -> Manifest:
    """List every file of a finished folder in its `manifest.json`, which must not exist yet.

    Needs:   `extra` is plain JSON with string keys; the folder is a temp of `dfc.publish`,
             which does the syncing.
    Raises:  DfcError D023, D025, D028, D030.
    """
    extra = extra or {}
    assert KIND.fullmatch(kind), kind
    assert json.loads(canonical(extra)) == extra, "extra does not survive JSON"
    with opened(folder) as root:
        paths, problems = listing(root, folder)
        _raise_all(problems.values())
        files = list(hashed(root, folder, sorted(paths)))
        rest: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": kind,
            "chunk_bytes": CHUNK_BYTES,
            "extra": extra,
            "files": files,
        }
        manifest = rest | {"self_sha256": hashlib.sha256(canonical(rest)).hexdigest()}
        data = canonical(manifest)
        if len(data) > MAX_MANIFEST_BYTES:
            raise over(folder, NAME, "bytes", len(data), MAX_MANIFEST_BYTES)
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
    with opened(folder) as root:
        manifest = parse(_read_manifest(root, folder), folder)
        if kind is not None and manifest["kind"] != kind:
            raise DfcError("D022", f"`{folder}` is a {manifest['kind']}, not a {kind}")
        if expect is not None and manifest["self_sha256"] != expect:
            raise DfcError(
                "D022", f"`{folder}` has the digest {manifest['self_sha256']}, not {expect}"
            )
        listed = {entry["path"]: entry for entry in manifest["files"]}
        paths, problems = listing(root, folder)
        for path in paths:
            if path not in listed:
                shown = path_of(folder, path)
                problems[path] = Diagnostic("D023", f"`{shown}` is not listed in the manifest")
        for path in listed.keys() - paths:
            if not problems.keys() & {path, path.partition("/")[0]}:
                problems[path] = Diagnostic("D024", f"`{path_of(folder, path)}` is missing")
        whole = []
        for path in sorted(paths & listed.keys()):
            size = stat_below(root, path).st_size
            if size == listed[path]["size"]:
                whole.append(path)
            else:
                problems[path] = _wrong_size(folder, path, size, listed[path]["size"])
        for found in hashed(root, folder, whole):
            if damage := _damage(folder, found, listed[found["path"]]):
                problems[found["path"]] = damage
        _raise_all(problems.values())
    return manifest


def read_file(folder: AnyPath, manifest: Manifest, path: str) -> bytes:
    """The bytes of a listed file, checked themselves: nothing can be swapped in between."""
    entry = next((e for e in manifest["files"] if e["path"] == path), None)
    if entry is None:
        raise DfcError("D024", f"`{path_of(folder, path)}` is not listed in the manifest")
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
    if not is_path(path):
        raise DfcError("D023", f"`{path}` cannot be the name of a file in a package")
    with opened(folder) as root:
        return open_below(root, folder, path)


def read_manifest(folder: AnyPath) -> Manifest:
    """What a folder lists; the files themselves are not looked at.

    Raises:  DfcError D020..D022, D028.
    """
    with opened(folder) as root:
        return parse(_read_manifest(root, folder), folder)


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
        fd = open_below(root, folder, NAME)
    except DfcError as error:
        if error.code == "D024":
            raise DfcError("D020", f"`{folder}` is not a package: it has no {NAME}") from None
        raise
    with open(fd, "rb") as source:
        data = source.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise over(folder, NAME, "bytes", os.stat(NAME, dir_fd=root).st_size, MAX_MANIFEST_BYTES)
    return data


def _damage(folder: AnyPath, found: FileEntry, listed: FileEntry) -> Diagnostic | None:
    shown = path_of(folder, found["path"])
    if found["size"] != listed["size"]:
        return Diagnostic("D029", f"`{shown}` changed while it was read")
    pairs = zip(found["chunks"], listed["chunks"], strict=True)
    bad = [number for number, (one, other) in enumerate(pairs) if one != other]
    if bad:
        ranges = ", ".join(_ranges(bad, listed["size"]))
        help = "a folder that was damaged or edited by hand is written anew"
        return Diagnostic("D027", f"`{shown}` is damaged in bytes {ranges}", help=help)
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
    shown = path_of(folder, path)
    if size < listed:
        return Diagnostic("D026", f"`{shown}` ends at byte {size} of {listed}")
    return Diagnostic("D026", f"`{shown}` has {size} bytes, {listed} are listed")


def _raise_all(problems: Iterable[Diagnostic]) -> None:
    if found := sorted(problems, key=lambda problem: problem.message):
        raise DfcError.of(found[:_SHOWN])
