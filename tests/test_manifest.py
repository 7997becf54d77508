"""Every changed byte of a package is found, and the file that holds it is named."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dfc import manifest
from dfc.errors import DfcError
from dfc.manifest import (
    CHUNK_BYTES,
    NAME,
    check_manifest,
    files,
    open_file,
    read_file,
    text,
    write_manifest,
)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A small package: graph, weights, one stage, an empty file; a little under 2 KiB."""
    folder = tmp_path / "m.dfcpkg"
    (folder / "stages").mkdir(parents=True)
    (folder / "graph.dfc").write_bytes(b"graph @f(%x: f32[2]) -> (f32[2])\n" * 4)
    (folder / "weights.safetensors").write_bytes(bytes(range(256)) * 2)
    (folder / "stages" / "0.onnx").write_bytes(b"\x08\x0a onnx" * 20)
    (folder / "empty").write_bytes(b"")
    write_manifest(folder, "package", {"dfc": "0.1.0", "tolerance": 1e-3})
    return folder


def files_of(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def refusal(folder: Path) -> DfcError:
    with pytest.raises(DfcError) as caught:
        check_manifest(folder)
    assert caught.value.status == 2
    return caught.value


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and make its own digest right again."""
    content = json.loads((folder / NAME).read_bytes())
    del content["self_sha256"]
    change(content)
    digest = hashlib.sha256(text.canonical(content)).hexdigest()
    (folder / NAME).write_bytes(text.canonical(content | {"self_sha256": digest}))


# ---- whole packages --------------------------------------------------------------------------


def test_a_written_package_is_accepted(package: Path) -> None:
    found = check_manifest(package, kind="package")
    assert [entry["path"] for entry in found["files"]] == [
        "empty",
        "graph.dfc",
        "stages/0.onnx",
        "weights.safetensors",
    ]
    assert found["extra"] == {"dfc": "0.1.0", "tolerance": 1e-3}
    weights = (package / "weights.safetensors").read_bytes()
    assert found["files"][3]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert check_manifest(package, expect=found["self_sha256"]) == found


def test_the_same_content_gives_the_same_manifest(package: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(package, again, ignore=shutil.ignore_patterns(NAME))
    write_manifest(again, "package", {"tolerance": 1e-3, "dfc": "0.1.0"})
    assert (again / NAME).read_bytes() == (package / NAME).read_bytes()


def test_another_kind_or_digest_than_expected_is_refused(package: Path) -> None:
    with pytest.raises(DfcError, match=r"D022.*is a package, not a checkpoint"):
        check_manifest(package, kind="checkpoint")
    with pytest.raises(DfcError, match="D022"):
        check_manifest(package, expect="0" * 64)


def test_a_folder_without_manifest_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        assert refusal(path).code == "D020"


# ---- damage ----------------------------------------------------------------------------------


def test_every_flipped_bit_is_found_and_its_file_named(package: Path) -> None:
    flips = 0
    for path in files_of(package):
        data = path.read_bytes()
        with path.open("r+b", buffering=0) as file:
            for at, byte in enumerate(data):
                for bit in range(8):
                    os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), at)
                    error = refusal(package)
                    assert f"`{path}`" in error.message, (at, bit)
                    if path.name != NAME:
                        assert f"damaged in bytes 0-{len(data) - 1}" in error.message
                        assert len(error.diagnostics) == 1
                    flips += 1
                os.pwrite(file.fileno(), bytes([byte]), at)
    assert flips > 12_000
    check_manifest(package)


def test_every_truncation_is_found_and_its_file_named(package: Path) -> None:
    for path in files_of(package):
        data = path.read_bytes()
        for size in reversed(range(len(data))):
            os.truncate(path, size)
            error = refusal(package)
            assert f"`{path}`" in error.message, size
            if path.name != NAME:
                assert f"ends at byte {size} of {len(data)}" in error.message
        path.write_bytes(data)
    check_manifest(package)


def test_every_deleted_or_doubled_byte_of_the_manifest_is_found(package: Path) -> None:
    path = package / NAME
    data = path.read_bytes()
    for at in range(len(data)):
        for changed in (data[:at] + data[at + 1 :], data[: at + 1] + data[at:]):
            path.write_bytes(changed)
            assert refusal(package).code == "D021"


def test_damage_is_located_to_the_chunk(tmp_path: Path) -> None:
    size = 5 * CHUNK_BYTES + 100
    with (tmp_path / "weights").open("wb") as out:
        out.truncate(size)
    write_manifest(tmp_path, "package")
    check_manifest(tmp_path)
    with (tmp_path / "weights").open("r+b") as out:
        for at in (CHUNK_BYTES, 2 * CHUNK_BYTES + 7, size - 1):
            out.seek(at)
            out.write(b"\1")
    last = f"{CHUNK_BYTES}-{3 * CHUNK_BYTES - 1}, {5 * CHUNK_BYTES}-{size - 1}"
    assert f"`{tmp_path / 'weights'}` is damaged in bytes {last}" in refusal(tmp_path).message


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_sizes_around_a_chunk(tmp_path: Path, size: int) -> None:
    (tmp_path / "w").write_bytes(b"x" * size)
    entry = write_manifest(tmp_path, "package")["files"][0]
    assert (entry["size"], len(entry["chunks"])) == (size, -(-size // CHUNK_BYTES))
    assert read_file(tmp_path, check_manifest(tmp_path), "w") == b"x" * size


def test_all_damaged_files_are_reported_at_once(package: Path) -> None:
    (package / "graph.dfc").write_bytes(b"!" + (package / "graph.dfc").read_bytes()[1:])
    (package / "weights.safetensors").unlink()
    (package / "stages" / "0.onnx").write_bytes(b"")
    (package / "extra").write_bytes(b"")
    codes = [(d.code, d.message.split("`")[1]) for d in refusal(package).diagnostics]
    assert codes == [
        ("D023", str(package / "extra")),
        ("D027", str(package / "graph.dfc")),
        ("D026", str(package / "stages/0.onnx")),
        ("D024", str(package / "weights.safetensors")),
    ]


def swap(package: Path) -> None:
    os.rename(package / "graph.dfc", package / "t")
    os.rename(package / "weights.safetensors", package / "graph.dfc")
    os.rename(package / "t", package / "weights.safetensors")


def replace_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(package: Path) -> None:
        (package / "graph.dfc").unlink()
        make(package / "graph.dfc")

    return change


def link_folder(package: Path) -> None:
    os.rename(package / "stages", package.parent / "stages")
    (package / "stages").symlink_to(package.parent / "stages")


def nest(package: Path) -> None:
    (package / "stages" / "deep").mkdir()
    (package / "stages" / "deep" / "x").write_text("")


def replace_manifest_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(package: Path) -> None:
        os.rename(package / NAME, package.parent / NAME)
        make(package / NAME)

    return change


CHANGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "extra file": (lambda p: (p / "more").write_text(""), "D023", "more"),
    "extra file below": (lambda p: (p / "stages" / "1.onnx").write_text(""), "D023", "1.onnx"),
    "dot file": (lambda p: (p / ".DS_Store").write_text(""), "D023", ".DS_Store"),
    "odd name": (lambda p: (p / "a b").write_text(""), "D023", "a b"),
    "line break in a name": (lambda p: (p / "a\nb").write_text(""), "D023", "a\nb"),
    "empty folder": (lambda p: (p / "more").mkdir(), "D025", "more"),
    "deep folder": (nest, "D025", "stages/deep"),
    "missing file": (lambda p: (p / "empty").unlink(), "D024", "empty"),
    "missing folder": (lambda p: shutil.rmtree(p / "stages"), "D024", "stages/0.onnx"),
    "swapped files": (swap, "D026", "graph.dfc"),
    "symlink": (replace_by(lambda f: f.symlink_to("empty")), "D025", "graph.dfc"),
    "broken symlink": (replace_by(lambda f: f.symlink_to("gone")), "D025", "graph.dfc"),
    "hard link": (replace_by(lambda f: f.hardlink_to(f.parent / "empty")), "D025", "graph.dfc"),
    "folder": (replace_by(lambda f: f.mkdir()), "D025", "graph.dfc"),
    "FIFO": (replace_by(os.mkfifo), "D025", "graph.dfc"),
    "linked folder": (link_folder, "D025", "stages"),
    "linked manifest": (
        replace_manifest_by(lambda f: f.symlink_to(f.parent.parent / NAME)),
        "D025",
        NAME,
    ),
    "manifest FIFO": (replace_manifest_by(os.mkfifo), "D025", NAME),
    "manifest folder": (replace_manifest_by(Path.mkdir), "D025", NAME),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_folder_that_is_not_as_listed_is_refused(package: Path, name: str) -> None:
    change, code, named = CHANGES[name]
    change(package)
    error = refusal(package)
    assert code in {diagnostic.code for diagnostic in error.diagnostics}
    assert f"{named}`" in str(error)
    assert len(error.diagnostics) <= 2


def test_two_generations_mixed_are_refused(package: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(package, other, ignore=shutil.ignore_patterns(NAME))
    (other / "graph.dfc").write_bytes((package / "graph.dfc").read_bytes().replace(b"@f", b"@g"))
    write_manifest(other, "package")
    shutil.copy(other / NAME, package / NAME)
    assert refusal(package).code == "D027"


# ---- hostile manifests -------------------------------------------------------------------------

TEXTS = {
    "empty": b"",
    "not JSON": b"hello",
    "a list": b"[]\n",
    "a number": b"1\n",
    "NaN": b'{\n "a": NaN\n}\n',
    "infinity": b'{\n "a": 1e999\n}\n',
    "twins": b'{\n "a": 1,\n "a": 1\n}\n',
    "huge integer": b'{\n "a": ' + b"9" * 5000 + b"\n}\n",
    "BOM": b"\xef\xbb\xbf{}\n",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "deep": b"[" * 100_000,
    "deep and closed": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_manifest_that_is_not_canonical_json_is_refused(package: Path, name: str) -> None:
    (package / NAME).write_bytes(TEXTS[name])
    assert refusal(package).code == "D021"


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer schema": (lambda m: m.update(schema=2), "D022"),
    "older schema": (lambda m: m.update(schema=0), "D022"),
    "schema of another type": (lambda m: m.update(schema=True), "D021"),
    "float schema": (lambda m: m.update(schema=1.0), "D021"),
    "another field": (lambda m: m.update(more=1), "D021"),
    "a field missing": (lambda m: m.pop("extra"), "D021"),
    "kind": (lambda m: m.update(kind="../x"), "D021"),
    "chunk size": (lambda m: m.update(chunk_bytes=1), "D021"),
    "files": (lambda m: m.update(files={}), "D021"),
    "entry": (lambda m: m["files"].append("x"), "D021"),
    "entry field": (lambda m: m["files"][0].update(mode=7), "D021"),
    "order": (lambda m: m["files"].reverse(), "D021"),
    "listed twice": (lambda m: m["files"].insert(0, m["files"][0]), "D021"),
    "float size": (lambda m: m["files"][1].update(size=132.0), "D021"),
    "huge size": (lambda m: m["files"][1].update(size=1 << 62), "D021"),
    "negative size": (lambda m: m["files"][0].update(size=-1), "D021"),
    "chunk count": (lambda m: m["files"][1]["chunks"].append("0" * 64), "D021"),
    "digest": (lambda m: m["files"][1].update(sha256="A" * 64), "D021"),
    "digests that disagree": (lambda m: m["files"][1].update(sha256="0" * 64), "D021"),
    "wrong digest": (lambda m: m["files"][1].update(chunks=["0" * 64]), "D027"),
    "another size": (lambda m: m["files"][1].update(size=7), "D026"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_manifest_is_refused(package: Path, name: str) -> None:
    change, code = FORGERIES[name]
    forge(package, change)
    assert refusal(package).code == code


PATHS = ["../x", "/etc/passwd", "..", ".", "", "a/b/c", "a//b", "a/", "a\\b", "a b", "ä", "a\0b"]


@pytest.mark.parametrize("path", [*PATHS, "x" * 129, NAME, "stages/..", 7, None])
def test_a_path_that_leads_elsewhere_is_refused(package: Path, path: object) -> None:
    forge(package, lambda m: m["files"][0].update(path=path))
    assert refusal(package).code == "D021"


def test_a_manifest_over_its_limit_is_refused_unread(package: Path) -> None:
    os.truncate(package / NAME, manifest.MAX_MANIFEST_BYTES + 1)
    error = refusal(package)
    assert error.code == "D028"
    assert str(manifest.MAX_MANIFEST_BYTES) in error.message


def test_too_many_files_are_refused(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in (files, text):
        monkeypatch.setattr(part, "MAX_FILES", 3)
    assert refusal(package).code == "D021"
    forge(package, lambda m: m["files"].pop())
    assert refusal(package).code == "D028"


# ---- writing and opening ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, code",
    [
        (lambda p: (p / "a b").write_text(""), "D023"),
        (lambda p: (p / "a").symlink_to("/etc/passwd"), "D025"),
        (lambda p: os.mkfifo(p / "a"), "D025"),
        (lambda p: (p / "a" / "b").mkdir(parents=True), "D025"),
        (lambda p: (p / "a").mkdir(), "D025"),
    ],
    ids=["name", "symlink", "FIFO", "depth", "empty folder"],
)
def test_what_could_not_be_read_back_is_not_written(
    tmp_path: Path, make: Callable[[Path], object], code: str
) -> None:
    make(tmp_path)
    with pytest.raises(DfcError) as caught:
        write_manifest(tmp_path, "package")
    assert caught.value.code == code
    assert not (tmp_path / NAME).exists()


def test_read_file_checks_the_bytes_it_returns(package: Path) -> None:
    listed = check_manifest(package)
    assert read_file(package, listed, "stages/0.onnx") == b"\x08\x0a onnx" * 20
    (package / "stages" / "0.onnx").write_bytes(b"\x08\x0a ONNX" * 20)
    with pytest.raises(DfcError, match=r"D027.*0\.onnx"):
        read_file(package, listed, "stages/0.onnx")
    (package / "stages" / "0.onnx").write_bytes(b"\x08\x0a onnx")
    with pytest.raises(DfcError, match=r"D026.*0\.onnx"):
        read_file(package, listed, "stages/0.onnx")
    with pytest.raises(DfcError, match="D024"):
        read_file(package, listed, "stages/1.onnx")


@pytest.mark.parametrize("path", PATHS)
def test_open_file_stays_inside(package: Path, path: str) -> None:
    with pytest.raises(DfcError) as caught:
        open_file(package, path)
    assert caught.value.code in ("D023", "D024")


def test_open_file_follows_no_link(package: Path) -> None:
    link_folder(package)
    for path in ("stages/0.onnx", "stages"):
        with pytest.raises(DfcError) as caught:
            open_file(package, path)
        assert caught.value.code in ("D025", "D030")


def test_nothing_stays_open(package: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("counts descriptors in /proc")
    gc.collect()  # what other tests left
    before = len(os.listdir("/proc/self/fd"))
    check_manifest(package)
    (package / "graph.dfc").write_bytes(b"")
    for _ in range(5):
        refusal(package)
    assert len(os.listdir("/proc/self/fd")) <= before
