"""Starts the process of a rank on this machine: a fresh Python, nothing pickled, nothing forked."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dfc.errors import DfcError
from dfc.publish.owner import here, start_time
from dfc.runtime.pipeline.control import Door

_OWNER = "owner"  # the file that says whose a private folder is: names of sockets must be short
_TAIL = 12  # lines of what a process said before it ended


@dataclass
class Spawned:
    """A process of this machine, and where it writes."""

    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        self.process.kill()  # a stopped process ends too
        self.process.wait()

    def story(self) -> str:
        code = self.process.poll()
        if code is None:
            return "it does not answer"
        if code < 0:
            how = f"killed by {signal.Signals(-code).name}"
        else:
            how = f"it ended with status {code}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
        said = "\n".join(lines)
        return f"{how}, having said:\n{said}" if said and code > 0 else how


class Spawner:
    """Processes of this machine, each with a log in the folder.

    All see the same devices. `entry` is the module that is run, and what it is given before what
    `worker` takes.
    """

    shares_devices = True

    def __init__(
        self, folder: Path, threads: list[int], devices: Sequence[str] = (),
        entry: Sequence[str] = ("dfc.runtime.pipeline.worker",),
    ) -> None:  # fmt: skip
        self.folder, self.threads, self.entry = folder, threads, entry

    def start(self, rank: int, born: int, door: Door) -> Spawned:
        """A rank's process.

        Raises:  DfcError K056 when the system does not start it.
        """
        host, port = door.address
        command = [sys.executable, "-P", "-m", *self.entry,
                   str(self.folder), str(rank), str(born), host, str(port)]  # fmt: skip
        log = self.folder / f"rank_{rank}.{born}.log"
        try:
            with log.open("wb") as out:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                    env=self._environment(rank, door.key),
                )  # fmt: skip
        except OSError as e:
            message = f"the process of rank {rank} cannot be started: {e}"
            raise DfcError("K056", message, status=7) from e
        return Spawned(process, log)

    def close(self) -> None:
        """Nothing is kept beside the processes."""

    def _environment(self, rank: int, key: bytes) -> dict[str, str]:
        """This process's, so that the same modules are found, and the rank's threads."""
        path = os.pathsep.join(p or str(Path.cwd()) for p in sys.path)
        threads = str(self.threads[rank])
        own = {"PYTHONPATH": path, "DFC_RANK_KEY": key.hex(), "OMP_NUM_THREADS": threads}
        return {**os.environ, **own}


def private_folder(within: Path | None = None) -> tempfile.TemporaryDirectory[str]:
    """Where ranks find their stages: readable by this user alone, gone with the pipeline.

    Ensures: what processes that were killed left of such folders is gone as well.
    """
    if within is not None:
        return tempfile.TemporaryDirectory(prefix="l-", dir=within, ignore_cleanup_errors=True)
    for left in Path(tempfile.gettempdir()).glob("dfc-ranks-*"):
        if owner_is_gone(left):
            shutil.rmtree(left, ignore_errors=True)
    made = tempfile.TemporaryDirectory(prefix="dfc-ranks-", ignore_cleanup_errors=True)
    owner = f"{os.getpid()} {start_time(os.getpid())} {here()}"
    (Path(made.name) / _OWNER).write_text(owner, encoding="utf-8")
    return made


def owner_is_gone(folder: Path) -> bool:
    """Whether a folder is a private one of this user's, and the process that made it has ended."""
    with suppress(OSError, ValueError):  # it is no such folder, or another user's
        pid, began, where = (folder / _OWNER).read_text(encoding="utf-8").split()
        own = folder.lstat().st_uid == os.geteuid() and where == here()
        return own and start_time(int(pid)) != int(began)
    return False
