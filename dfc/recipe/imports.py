"""Files that a recipe imports: `std/...` as shipped, and the folder of the importing file.

Q030  a path that may not be imported      Q032  a circle of imports
Q031  a file that is not there             Q033  too many files, or too deep
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from dfc.errors import DfcError, Diagnostic, did_you_mean
from dfc.lang import syntax as s
from dfc.lang.reader import Reading, read_document
from dfc.lang.source import MAX_BYTES, Source

MAX_FILES = 64
MAX_DEPTH = 8


@dataclass
class File:
    """One file that was read, with what it imports."""

    name: str
    source: Source
    document: s.Document
    imports: list[File] = field(default_factory=list)
    shipped: bool = False
    reading: Reading | None = None

    def all(self) -> Iterator[File]:
        """This file and all it imports, each once, imported ones first."""
        seen: set[int] = set()
        stack: list[tuple[File, bool]] = [(self, False)]
        while stack:
            file, done = stack.pop()
            if done:
                yield file
            elif id(file) not in seen:
                seen.add(id(file))
                stack.append((file, True))
                stack += [(f, False) for f in reversed(file.imports)]


def std_folder() -> Path:
    import dfc.passes

    return Path(next(iter(dfc.passes.__path__))) / "std"


def rules_folder() -> Path:
    import dfc.passes

    return Path(next(iter(dfc.passes.__path__))) / "rules"


@cache
def std_files() -> tuple[File, ...]:
    """The shipped presets."""
    reader = Reader()
    files = tuple(reader.path(p, p.name) for p in sorted(std_folder().glob("*.dfc")))
    for file in files:
        file.shipped = True
    return files


class Reader:
    """Reads a file and its imports; collects what is wrong with any of them."""

    def __init__(self) -> None:
        self.problems: list[Diagnostic] = []
        self.files: dict[Path, File] = {}

    def text(self, source: Source) -> File:
        """A text, which may import from its folder when it has one."""
        path = Path(source.file)
        try:
            folder = path.parent if path.is_file() else None
        except OSError:  # no name that a file could have
            folder = None
        return self._file(source, path.stem, folder, (path,) if folder else ())

    def path(self, path: Path, shown: str, chain: tuple[Path, ...] = ()) -> File:
        if path in self.files:
            return self.files[path]
        with path.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise DfcError("P007", f"the file is larger than {MAX_BYTES} bytes")
        source = Source.of_bytes(data, shown)
        file = self._file(source, path.stem, path.parent, (*chain, path))
        self.files[path] = file
        return file

    def _file(
        self, source: Source, name: str, folder: Path | None, chain: tuple[Path, ...]
    ) -> File:
        reading: Reading = read_document(source)
        self.problems += reading.problems
        file = File(name, source, reading.document, reading=reading)
        for entry in reading.document.entries:
            if isinstance(entry, s.Import):
                found = self._import(entry, source, folder, chain)
                if found is not None:
                    file.imports.append(found)
        return file

    def _import(
        self, entry: s.Import, source: Source, folder: Path | None, chain: tuple[Path, ...]
    ) -> File | None:
        """The file that is imported; what is wrong with the path or the file is told."""
        try:
            path, shipped = _find(entry.path, folder)
            self._bound(path, chain)
            file = self.path(path, entry.path if shipped else str(path), chain)
        except _Refused as e:
            self.problems.append(Diagnostic(e.code, e.message, source.span(*entry.at), e.help))
            return None
        except (OSError, DfcError) as e:
            why = e.message if isinstance(e, DfcError) else (e.strerror or str(e)).lower()
            message = f'"{_short(entry.path)}" cannot be read: {why}'
            self.problems.append(Diagnostic("Q031", message, source.span(*entry.at)))
            return None
        file.shipped = shipped
        return file

    def _bound(self, path: Path, chain: tuple[Path, ...]) -> None:
        """Refuse circles, depth and number."""
        if path in chain or path.resolve() in {c.resolve() for c in chain}:
            names = " -> ".join(p.name for p in (*chain, path))
            raise _Refused("Q032", f"the imports go in a circle: {names}")
        if len(chain) >= MAX_DEPTH:
            raise _Refused("Q033", f"imports are more than {MAX_DEPTH} deep")
        if len(self.files) >= MAX_FILES and path not in self.files:
            raise _Refused("Q033", f"more than {MAX_FILES} files are imported")


class _Refused(Exception):
    """What may not be imported, and why."""

    def __init__(self, code: str, message: str, help: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.help = code, message, help


def _find(text: str, folder: Path | None) -> tuple[Path, bool]:
    """The path that an import names, and whether the file is a shipped one.

    Raises:  _Refused, OSError.
    """
    shipped = text.startswith(("std/", "rules/"))
    head, _, rest = text.partition("/")
    base = {"std": std_folder, "rules": rules_folder}[head]() if shipped else folder
    inside = rest if shipped else text
    shown = _short(text)
    if not inside.endswith(".dfc") or "\\" in text or "\x00" in text:
        raise _Refused("Q030", f'"{shown}" is no .dfc file')
    parts = Path(inside).parts
    if Path(inside).is_absolute() or ".." in parts or any(p.startswith("~") for p in parts):
        help = "import from std/, or from this file's folder"
        raise _Refused("Q030", f'"{shown}" lies outside', help)
    if base is None:
        raise _Refused("Q030", "a text without a file can import from std/ and rules/ only")
    path = base / inside
    if not path.resolve().is_relative_to(base.resolve()):
        raise _Refused("Q030", f'"{shown}" is a link that leads outside')
    if not path.is_file():
        raise _Refused("Q031", f'there is no "{shown}"', _near(path))
    return path, shipped


def _near(path: Path) -> str | None:
    known = sorted(p.name for p in path.parent.glob("*.dfc"))[:100]
    there = f"there are {', '.join(known[:8])}" if known else None
    return did_you_mean(path.name, known) or there


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
