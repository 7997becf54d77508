"""A clock for what is measured: time passes as runners say, not as the machine has it."""

from __future__ import annotations

import pytest

_LOOK = 1e-5  # seconds that anything takes


class WorkClock:
    """Stands for the module `time` where runners are measured; they `sleep` for what they take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, busy_until: float = 0.0) -> None:
        self.now = 0.0
        self.busy_until = busy_until  # till then, other threads of the process work
        monkeypatch.setattr("dfc.runtime.measure.time", self)

    def perf_counter(self) -> float:
        self.now += _LOOK
        return self.now

    def process_time(self) -> float:
        return min(self.now, self.busy_until)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
