"""Seconds in which this machine did what it was asked to: a loaded or halted one has fewer."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

_TICK = 0.02  # seconds
_STALL = 0.5  # seconds between two ticks: this process, or the machine, stood still


class FairClock:
    """What a promise in seconds is held to, with a machine of its own for whoever made it.

    A second counts less where more tasks want to run than there are cores, and a wait begins anew
    after a stall. On an idle machine it is the clock on the wall.
    """

    def __enter__(self) -> FairClock:
        self.now, self._stalled = 0.0, -1.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="fair clock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def since(self, begin: float) -> float:
        """Fair seconds since a time of this clock, or since the last stall after it."""
        return self.now - max(begin, self._stalled)

    def _tick(self) -> None:
        last = time.monotonic()
        while not self._over.wait(_TICK):
            now = time.monotonic()
            self.now += min(now - last, _STALL) / crowd()
            if now - last > _STALL:
                self._stalled = self.now
            last = now


def crowd() -> float:
    """How many tasks want each core now, at least one."""
    try:
        stat = Path("/proc/stat").read_text()
    except OSError:
        return 1.0
    running = next(int(x.split()[1]) for x in stat.splitlines() if x.startswith("procs_running"))
    return max(1.0, running / (os.cpu_count() or 1))
