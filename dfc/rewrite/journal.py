"""What long work has done so far, on disk: after a kill it goes on from there.

An entry is one file of the user's own cache, named by a key: a digest of all that decides the
result. A *state* is tensors and a few words, replaced as a whole; *records* are lines of JSON, one
for each finished measurement, appended. Both are synced before they count; what was being written
when the process died is not there, or is the last line, which is dropped.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfc.publish import publish_file

if TYPE_CHECKING:
    from torch import Tensor

MAX_BYTES = 2 << 30  # of all entries: the oldest go first
_WORTH_IT = 20  # a state is written again after this many times what writing it took


@dataclass
class Journal:
    """The entries of one folder. `every_s` says how much work may be lost: 0 for none at all."""

    folder: Path
    every_s: float = 2.0
    _next: dict[str, float] = field(default_factory=dict)  # key -> when its state is written again

    # States

    def read(self, key: str) -> tuple[dict[str, str], dict[str, Tensor]] | None:
        """The words and tensors of an entry, None where there is none that can be read."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._state(key), framework="pt") as f:
                tensors = {k: f.get_tensor(k).clone() for k in f.keys()}  # noqa: SIM118
                return dict(f.metadata() or {}), tensors
        except (OSError, SafetensorError):
            return None

    def is_due(self, key: str) -> bool:
        """Whether enough was done since the state was last written."""
        now = time.monotonic()
        return now >= self._next.setdefault(key, now + self.every_s)

    def write(self, key: str, words: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
        """Put a state in the place of the entry's last one, whole or not at all.

        Raises:  DfcError D012, D013 where it cannot be written.
        """
        from safetensors.torch import save_file

        start = time.monotonic()
        with publish_file(self._state(key), force=True) as temp:
            save_file({k: t.detach().contiguous() for k, t in tensors.items()}, temp, dict(words))
        end = time.monotonic()
        rest = max(self.every_s, _WORTH_IT * (end - start)) if self.every_s else 0.0
        self._next[key] = end + rest
        self._tidy(key)

    # Records

    def records(self, key: str) -> list[dict[str, Any]]:
        """Every record that was appended, in order."""
        try:
            lines = self._records(key).read_bytes().split(b"\n")
        except OSError:
            return []
        return [json.loads(line) for line in lines[:-1]]  # behind the last newline: half a line

    def append(self, key: str, record: Mapping[str, Any]) -> None:
        """Add a record; it is on the disk when this returns."""
        line = json.dumps(record, sort_keys=True).encode() + b"\n"
        path = self._records(key)
        with path.open("ab") as out:
            _drop_half_line(path)
            out.write(line)
            out.flush()
            os.fsync(out.fileno())

    def drop(self, key: str) -> None:
        """Forget an entry."""
        for path in (self._state(key), self._records(key)):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        self._next.pop(key, None)

    def _state(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _records(self, key: str) -> Path:
        return self.folder / f"{key}.jsonl"

    def _tidy(self, kept: str) -> None:
        """Remove the entries that were not touched for longest, above MAX_BYTES."""
        found = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):
                if path.stem != kept and path.suffix in (".safetensors", ".jsonl"):
                    found.append((path.stat().st_mtime, path.stat().st_size, path))
        total = 0
        for _, size, path in sorted(found, reverse=True):
            total += size
            if total > MAX_BYTES:
                with contextlib.suppress(OSError):
                    path.unlink()


def _drop_half_line(path: Path) -> None:
    """Cut what a process wrote of a line before it died."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        os.truncate(path, whole)


def user_journal() -> Journal | None:
    """The journal in the user's own cache, None where there can be none."""
    from dfc.rewrite.proofs import cache_folder

    folder = cache_folder("journal")
    return Journal(folder) if folder is not None else None
