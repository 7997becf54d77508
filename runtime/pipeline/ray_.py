"""Ranks as actors of Ray: placed together by a placement group, supervised like other processes.

    with Processes(graph, stage_of, launcher=RayLauncher) as pipeline:
        results = pipeline(*inputs)

An actor runs what `worker.py` runs, and answers over the same control channel; one that is lost is
replaced by a new actor in the same bundle. Stages are read from a folder that all nodes must see:
on several machines that is shared storage, and `address` the host's own.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfc.ending import heeding
from dfc.errors import DfcError
from dfc.runtime.pipeline.control import Door

_PLACING = 60.0  # seconds for Ray to find room
# Ray's workers have a niceness of 15: beside two busy programs on two cores a rank took 40 s to
# load, and one that gives no sign of life for 3 s is taken for lost.
_NICENESS = {"RAY_worker_niceness": "0"}


class RankActor:
    """The actor: one call that lasts as long as the rank."""

    def serve(
        self, folder: str, rank: int, born: int, host: str, port: int, key: str,
        before: Callable[[], None] | None, device: str,
    ) -> None:  # fmt: skip
        from dfc.runtime.pipeline.worker import serve

        serve(Path(folder), rank, born, (host, port), bytes.fromhex(key), before, device)


@dataclass
class RayHandle:
    """An actor, and the call that it is in."""

    ray: Any
    actor: Any
    call: Any

    def kill(self) -> None:
        self.ray.kill(self.actor, no_restart=True)

    def story(self) -> str:
        """What Ray says of the call."""
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            if self.ray.wait([self.call], timeout=0)[0]:
                break
            time.sleep(0.05)
        return "its actor died"


class RayLauncher:
    """Actors in one placement group, a bundle a rank.

    A cluster that the caller is connected to is used, else one is started on this machine. `before`
    is called in each actor before it reads its stages. Ranks on one CUDA device share a GPU that
    Ray chooses; an actor sees no other one.
    Raises:  DfcError K057 without Ray, or when it has no room for all ranks.
    """

    shares_devices = False

    def __init__(
        self, folder: Path, threads: list[int], devices: Sequence[str] = (),
        before: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        try:
            import ray
            from ray.util.placement_group import placement_group, remove_placement_group
        except ImportError:
            raise DfcError(
                "K057", "Ray is not installed", help="pip install dfc-compiler[ray]", status=7
            ) from None
        self.folder, self.threads, self.before, self._ray = folder, threads, before, ray
        self._gpus = gpu_shares(devices or ["cpu"] * len(threads))
        self._remove, self._group = remove_placement_group, None
        self._started = not ray.is_initialized()
        try:
            if self._started:
                _start(ray)
            self._group = placement_group(
                [{"CPU": n, **({"GPU": share} if share else {})}
                 for n, share in zip(threads, self._gpus, strict=True)], strategy="PACK",
            )  # fmt: skip
            placed = self._group.wait(timeout_seconds=_PLACING)
        except KeyboardInterrupt:
            self.close()
            raise
        if not placed:
            have = ray.cluster_resources()
            self.close()
            wanted = f"ranks of {threads} threads"
            wanted += f" and {sum(self._gpus):.3g} GPUs" if any(self._gpus) else ""
            raise DfcError(
                "K057", f"Ray has no room for {wanted}: it has {have.get('CPU', 0):.0f} CPUs and "
                f"{have.get('GPU', 0):.0f} GPUs",
                help="fewer threads or ranks, or more nodes", status=7,
            )  # fmt: skip

    def start(self, rank: int, born: int, door: Door) -> RayHandle:
        """The actor of a rank, in the bundle of that rank."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        threads = self.threads[rank]
        path = os.pathsep.join(p or str(Path.cwd()) for p in sys.path)
        made = self._ray.remote(RankActor).options(
            num_cpus=threads,
            num_gpus=self._gpus[rank],
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=rank
            ),
            runtime_env={
                "env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), **_NICENESS}
            },
        )
        actor = made.remote()
        host, port = door.address
        device = "cuda:0" if self._gpus[rank] else "cpu"
        call = actor.serve.remote(
            str(self.folder), rank, born, host, port, door.key.hex(), self.before, device
        )
        return RayHandle(self._ray, actor, call)

    def close(self) -> None:
        """Give the room back, or end the cluster if it was started here; once."""
        group, self._group = self._group, None
        started, self._started = self._started, False
        if started:
            _kill_helpers(Path(self._ray.__file__).parent)
            self._ray.shutdown()
        elif group is not None:
            self._remove(group)


def _start(ray: Any) -> None:
    """A cluster on this machine, or the one that Ray itself finds."""
    kept = signal.getsignal(signal.SIGTERM)
    before = set(_children("self"))
    try:
        with heeding():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except KeyboardInterrupt:
        if not ray.is_initialized():  # else it knows what it has started
            _kill_begun(Path(ray.__file__).parent, before)
        raise
    finally:
        if kept is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, kept)  # Ray took it, to print stacks and abort


def _kill_helpers(within: Path) -> None:
    """End the scripts of Ray's package that this process has started: its monitors, its dashboard.

    Why:  `ray.shutdown` ends one after the other, and waits for the first a second, which does not
          heed SIGTERM, before it does the same.
    """
    for pid in _children("self"):
        with suppress(OSError):  # it has ended
            if any(w.endswith(".py") for w in _words_within(within, pid)):
                os.kill(pid, signal.SIGKILL)


def _kill_begun(within: Path, before: set[int]) -> None:
    """End what a start of Ray that was interrupted has begun, with all that came from it.

    Why:  `ray.shutdown` knows nothing of a half-started node, whose processes would look for it
          for a minute.
    """
    until = time.monotonic() + 0.3
    own = Path("/proc/self/cmdline").read_bytes()
    while time.monotonic() < until:  # a child that is forked and not yet Ray's
        new = [pid for pid in _children("self") if pid not in before]
        if all(_cmdline(pid) != own for pid in new):
            break
        time.sleep(0.01)
    found = []
    left = [pid for pid in _children("self") if pid not in before and _words_within(within, pid)]
    while left:
        pid = left.pop()
        with suppress(OSError):  # it has ended
            os.kill(pid, signal.SIGSTOP)  # so that no more come from it
            found.append(pid)
            left += _children(pid)
    for pid in found:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _children(pid: int | str) -> list[int]:
    """Processes that a process has started, those of all its threads."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            found += [int(child) for child in file.read_text(encoding="utf-8").split()]
    return found


def _words_within(folder: Path, pid: int) -> list[str]:
    """Words of a process's command that are files of the folder."""
    words = _cmdline(pid).decode(errors="replace").split("\0")
    return [w for w in words if Path(w).is_relative_to(folder)]


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return b""


def gpu_shares(devices: Sequence[str]) -> list[float]:
    """The part of a GPU that each rank asks for: those on one device share it evenly."""
    return [0.0 if d == "cpu" else 1 / devices.count(d) for d in devices]
