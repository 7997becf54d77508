"""Layers are shared with threads that come, and done alone while they do not."""

from __future__ import annotations

import ctypes
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dfc.runtime.kernels import build, linear
from dfc.runtime.kernels.library import Library
from tests.kernel_layers import needs_kernels

N, K, GROUP = 512, 256, 32
_TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_PARALLEL = ctypes.CFUNCTYPE(None, _TASK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


class Team:
    """In OpenMP's place: the caller does all the work, and waits for others that come late."""

    def __init__(self) -> None:
        self.asked = 0  # how often
        self.works_s = self.waits_s = 0.0  # before it is done, and after
        self.parallel = _PARALLEL(self._run)

    def _run(self, task: Callable[[Any], None], data: int, threads: int, flags: int) -> None:
        self.asked += 1
        time.sleep(self.works_s)
        task(data)
        time.sleep(self.waits_s)
        self.works_s = self.waits_s = 0.0


class Shared:
    """A layer on a copy of the library, which knows of no threads but a team's."""

    def __init__(self, folder: Path) -> None:
        copy = folder / build.NAME
        shutil.copy(build.FOLDER / build.NAME, copy)
        self.library, self.team = Library(copy), Team()
        self.library.c.dfc_kernels_use_openmp(ctypes.cast(self.team.parallel, ctypes.c_void_p))
        codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
        self.packed = linear.pack_w4(codes, torch.rand(N, K // GROUP), None, K, GROUP)
        self.x = torch.randn(1, K)
        self.want = linear.linear(self.x, self.packed, None, N)

    def run(self) -> Tensor:
        y = torch.full((1, N), torch.nan)
        status = self.library.c.dfc_linear(
            self.packed.data_ptr(), self.packed.numel(), self.x.data_ptr(), K, 1, K, None,
            y.data_ptr(), N, 0, 2, None,
        )  # fmt: skip
        assert status == 0
        return y

    def asks(self, works_s: float = 0.0, waits_s: float = 0.0) -> bool:
        """Whether a run asks the team, which then works and waits for so long."""
        asked = self.team.asked
        self.team.works_s, self.team.waits_s = works_s, waits_s
        assert torch.equal(self.run(), self.want)
        self.team.works_s = self.team.waits_s = 0.0
        return self.team.asked > asked


@pytest.fixture
def shared(tmp_path: Path) -> Shared:
    needs_kernels()
    return Shared(tmp_path)


def test_threads_that_do_not_come_are_left_alone_for_a_while(shared: Shared) -> None:
    assert shared.asks()
    assert shared.asks(waits_s=0.3)  # more than all that was worked before
    assert [shared.asks() for _ in range(5)] == [False] * 5
    time.sleep(1.0)  # the longest while
    assert [shared.asks() for _ in range(5)] == [True] * 5


def test_one_wait_in_much_work_changes_nothing(shared: Shared) -> None:
    for _ in range(200):
        assert shared.asks(works_s=0.001)
    assert shared.asks(waits_s=0.005)
    assert shared.asks()


def test_a_run_in_which_the_core_was_taken_is_not_much_work(shared: Shared) -> None:
    assert shared.asks(works_s=0.3)
    assert shared.asks(waits_s=0.1)
    assert not shared.asks()


def test_threads_may_be_busy_with_what_they_took_last(shared: Shared) -> None:
    for _ in range(3):
        assert shared.asks(works_s=0.1, waits_s=0.15)
    assert shared.asks()
