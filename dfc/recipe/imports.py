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
from dfc.lang.source import Source

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
        folder = path.parent if path.is_file() else None
        return self._file(source, path.stem, folder, (path,) if folder else ())

    def path(self, path: Path, shown: str, chain: tuple[Path, ...] = ()) -> File:
        if path in self.files:
            return self.files[path]
        source = Source.of_bytes(path.read_bytes(), shown)
        file = self._file(source, path.stem, path.parent, (*chain, path))
        self.files[path] = file
        return file

    def _file(
        self, source: Source, name: str, folder: Path | None, chain: tuple[Path, ...]
    ) -> File:
        reading: Reading = read_document(source)
        self.problems += reading.problems
        file = File(name, source, reading.document)
        for entry in reading.document.entries:
            if isinstance(entry, s.Import):
                found = self._import(entry, source, folder, chain)
                if found is not None:
                    file.imports.append(found)
        return file

    def _import(
        self, entry: s.Import, source: Source, folder: Path | None, chain: tuple[Path, ...]
    ) -> File | None:
        def problem(code: str, message: str, help: str | None = None) -> None:
            self.problems.append(Diagnostic(code, message, source.span(*entry.at), help))

        text = entry.path
        shipped = text.startswith(("std/", "rules/"))
        head, _, rest = text.partition("/")
        base = {"std": std_folder, "rules": rules_folder}[head]() if shipped else folder
        inside = rest if shipped else text
        parts = Path(inside).parts
        if not inside.endswith(".dfc") or "\\" in text or "\x00" in text:
            problem("Q030", f'"{text}" is no .dfc file')
            return None
        if Path(inside).is_absolute() or ".." in parts or any(p.startswith("~") for p in parts):
            problem(
                "Q030", f'"{text}" lies outside', "import from std/, or from this file's folder"
            )
            return None
        if base is None:
            problem("Q030", "a text without a file can import from std/ only")
            return None
        path = base / inside
        if not path.is_file():
            known = sorted(p.name for p in path.parent.glob("*.dfc"))
            there = f"there are {', '.join(known)}" if known else None
            help = did_you_mean(path.name, known) or there
            problem("Q031", f'there is no "{text}"', help)
            return None
        real = path.resolve()
        if not real.is_relative_to(base.resolve()):
            problem("Q030", f'"{text}" is a link that leads outside')
            return None
        if path in chain or real in chain:
            names = " -> ".join(p.name for p in (*chain, path))
            problem("Q032", f"the imports go in a circle: {names}")
            return None
        if len(chain) >= MAX_DEPTH:
            problem("Q033", f"imports are more than {MAX_DEPTH} deep")
            return None
        if len(self.files) >= MAX_FILES:
            problem("Q033", f"more than {MAX_FILES} files are imported")
            return None
        try:
            file = self.path(path, text if shipped else str(path), chain)
        except (OSError, DfcError) as e:
            problem("Q031", f'"{text}" cannot be read: {getattr(e, "message", e)}')
            return None
        file.shipped = shipped
        return file
