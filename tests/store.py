"""A small store to publish into, and what may be found there after any accident.

    python -m tests.store WHAT FINAL GENERATION RENAMES [ROUNDS]

is the process that tests kill: it publishes one generation of a file or a folder, as often as
asked, and prints how often it passed each fault point. It imports no torch, so it starts fast.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from dfc.manifest import check_manifest, write_manifest
from dfc.publish import durable, faults, owner, publish_file, publish_folder

ROOT = Path(__file__).resolve().parent.parent
DEAD_PID = 4_194_305  # above the largest pid that Linux gives
_BULK = 70_000
_LEFTOVER = re.compile(r"\.(tmp|old)-\d+-\d+-[0-9a-f]{16}(\.bin)?")


def write(what: str, final: Path, generation: str) -> None:
    """Publish one generation of a folder or a file, replacing what is there."""
    payload = generation.encode() * _BULK
    if what == "file":
        with publish_file(final, force=True) as temp, temp.open("r+b") as out:
            faults.fault_point("test.write")
            out.write(payload)
        return
    with publish_folder(final, force=True) as temp:
        (temp / "graph.dfc").write_bytes(payload[:1000])
        faults.fault_point("test.write")
        (temp / "stages").mkdir()
        (temp / "stages" / "a.onnx").write_bytes(payload)
        write_manifest(temp, "package", {"generation": generation})


def state(what: str, final: Path) -> str:
    """The generation that stands at `final`, whole, or "absent"; anything else is a failure."""
    if not os.path.lexists(final):
        return "absent"
    if what == "folder":
        return str(check_manifest(final, kind="package")["extra"]["generation"])
    data = final.read_bytes()
    generation = data[:3].decode()
    assert data == generation.encode() * _BULK
    return generation


def litter(folder: Path) -> list[str]:
    """What an interrupted publish left; every such name must be recognisable."""
    names = sorted(name for name in os.listdir(folder) if name.startswith("."))
    assert all(_LEFTOVER.fullmatch(name) for name in names), names
    return names


def leave_dead(folder: Path) -> None:
    """Make what a process that is gone left behind."""
    path = folder / f".tmp-{DEAD_PID}-1-{owner.here()}01234567"
    path.mkdir(exist_ok=True)
    (path / "half").write_bytes(b"half")


def spawn(
    what: str,
    final: Path,
    generation: str,
    renames: str = "system",
    rounds: int = 1,
    fault: str = "",
) -> subprocess.Popen[str]:
    """Start a process that publishes; `plain` renames are those of an old file system."""
    command = [sys.executable, "-m", "tests.store", what, str(final), generation, renames]
    return subprocess.Popen(
        [*command, str(rounds)],
        cwd=ROOT,
        env={**os.environ, "DFC_FAULT": fault},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def main(what: str, final: str, generation: str, renames: str, rounds: str) -> None:
    if renames == "plain":
        durable._system_rename = lambda: None  # type: ignore[assignment]
    print("ready", flush=True)
    for _ in range(int(rounds)):
        write(what, Path(final), generation)
    print(json.dumps(faults.HITS))


if __name__ == "__main__":
    main(*sys.argv[1:])
