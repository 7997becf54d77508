"""What a manifest says, and its text: canonical JSON, of which every field is checked."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, NoReturn, TypedDict, cast

from dfc.errors import DfcError
from dfc.manifest.files import MAX_FILES, NAME, is_path, path_of
from dfc.publish import AnyPath

SCHEMA = 1
CHUNK_BYTES = 1 << 20
MAX_FILE_BYTES = 1 << 46

KIND = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


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


def canonical(value: object) -> bytes:
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def parse(data: bytes, folder: AnyPath) -> Manifest:
    """Bytes to a manifest that is canonical, intact and of a schema that this version knows."""

    def damaged(why: str) -> DfcError:
        return DfcError("D021", f"`{path_of(folder, NAME)}` is damaged: {why}")

    def constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is not allowed")

    try:
        manifest = json.loads(
            data.decode("ascii"), object_pairs_hook=_without_twins, parse_constant=constant
        )
        if not isinstance(manifest, dict):
            raise damaged("it is not a JSON object")
        if canonical(manifest) != data:
            raise damaged("it is not in canonical form")
        rest = {key: value for key, value in manifest.items() if key != "self_sha256"}
        digest = hashlib.sha256(canonical(rest)).hexdigest()
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
            f"`{path_of(folder, NAME)}` has schema {schema}, this version reads {SCHEMA}",
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
    if not isinstance(kind, str) or not KIND.fullmatch(kind):
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
        is_path(entry["path"])
        and entry["path"] != NAME
        and type(size) is int
        and 0 <= size <= MAX_FILE_BYTES
        and isinstance(chunks, list)
        and len(chunks) == -(-size // CHUNK_BYTES)
        and all(isinstance(d, str) and _DIGEST.fullmatch(d) for d in [entry["sha256"], *chunks])
    )
