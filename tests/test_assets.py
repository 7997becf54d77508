"""Assets: only the pinned file is unpacked, and of it only what is wanted."""

import hashlib
import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests import fetching
from tests.assets import ASSETS
from tests.fetching import AssetError, Download


def archive(path: Path) -> str:
    """A wheel, or a tar file that tries to write outside; its digest."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as out:
            out.writestr("pack/data/a.txt", "a")
            out.writestr("pack/code.py", "raise SystemExit('was run')")
    else:
        with tarfile.open(path, "w:gz") as out:
            for name in ("package/a.txt", "../outside.txt"):
                out.addfile(tarfile.TarInfo(name), io.BytesIO())
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def registry(monkeypatch, tmp_path):
    """The client gives the file that a test puts here."""
    monkeypatch.setattr(fetching, "_fetch", lambda what, to: shutil.copy(given(tmp_path), to))
    (tmp_path / "unpacked").mkdir()
    return tmp_path


def given(folder: Path) -> Path:
    return next(p for p in folder.iterdir() if p.is_file())


def test_only_wanted_members_are_unpacked(registry):
    digest = archive(registry / "pack-1.whl")
    what = Download("wheel", "pack", "1", digest, ("pack/data/*",))
    what.unpack_into(registry / "unpacked", registry / "download")
    files = [p.relative_to(registry) for p in (registry / "unpacked").rglob("*") if p.is_file()]
    assert files == [Path("unpacked/pack/data/a.txt")]


def test_another_file_than_the_pinned_one_is_refused(registry):
    archive(registry / "pack-1.whl")
    what = Download("wheel", "pack", "1", "0" * 64)
    with pytest.raises(AssetError, match="not the file that is pinned"):
        what.unpack_into(registry / "unpacked", registry / "download")
    assert not list((registry / "unpacked").iterdir())


def test_a_member_that_leads_outside_is_refused(registry):
    digest = archive(registry / "pack-1.tgz")
    what = Download("npm", "pack", "1", digest)
    with pytest.raises(tarfile.FilterError):
        what.unpack_into(registry / "unpacked", registry / "download")
    assert not (registry / "outside.txt").exists()


def test_what_ci_fetches_is_light():
    assert sum(a.megabytes for a in ASSETS.values() if a.default) <= 120
