"""Ranks as actors of Ray, in its local mode; skipped where Ray is not installed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.test_pipeline import stages
from tests.test_processes import alive, equal, gone, heavy, struck


def test_actors_run_the_same_ranks_and_are_replaced() -> None:
    ray = pytest.importorskip("ray")
    from dfc.runtime.pipeline.processes import Processes
    from dfc.runtime.pipeline.ray_ import RayLauncher

    graph, args = heavy()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with Processes(
            graph, stages(graph, 2), microbatches=16, threads=2, launcher=RayLauncher
        ) as pipeline:
            equal(pipeline, args)
            before = pipeline.pids
            assert len(set(before) | {os.getpid()}) == 3
            own = os.getpriority(os.PRIO_PROCESS, 0)
            assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in before] == [own, own]
            told = struck(pipeline, 1, signal.SIGKILL, args)
            equal(pipeline, args)  # a rank that had no more to do is started again for it
            replaced = [a != b for a, b in zip(pipeline.pids, before, strict=True)]
            assert replaced == [False, True], pipeline.incidents
            assert "rank 1 lost" in told
            ranks = pipeline.pids
        assert gone(ranks, 60)
        assert ray.is_initialized()  # the caller's own cluster is left alone
    finally:
        ray.shutdown()


def test_a_cluster_that_is_started_here_leaves_sigterm_to_the_program(tmp_path: Path) -> None:
    """Ray's own handler would print stacks, and abort."""
    pytest.importorskip("ray")
    from dfc.runtime.pipeline.ray_ import RayLauncher

    caught: list[int] = []
    kept = signal.signal(signal.SIGTERM, lambda number, _: caught.append(number))
    try:
        launcher = RayLauncher(tmp_path, [1])
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            assert caught == [signal.SIGTERM]
        finally:
            launcher.close()
    finally:
        signal.signal(signal.SIGTERM, kept)


def test_what_ends_the_cluster_waits_for_no_helper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted as it waits for room: Ray's monitor would take a second to end."""
    ray = pytest.importorskip("ray")
    from ray.util.placement_group import PlacementGroup

    from dfc.runtime.pipeline import ray_

    shutdown, kill = ray.shutdown, ray_._kill_helpers
    killed: list[int] = []
    calls: list[str] = []

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def helpers(within: Path) -> None:
        before = set(children())
        kill(within)
        killed.extend(p for p in before if gone([p], 5))
        calls.append("helpers")

    monkeypatch.setattr(PlacementGroup, "wait", interrupted)
    monkeypatch.setattr(ray_, "_kill_helpers", helpers)
    monkeypatch.setattr(ray, "shutdown", lambda: (calls.append("shutdown"), shutdown()))
    own = set(children())
    with pytest.raises(KeyboardInterrupt):
        ray_.RayLauncher(tmp_path, [1])
    assert calls == ["helpers", "shutdown"] and len(killed) >= 2  # monitor, log monitor
    assert not ray.is_initialized() and set(children()) <= own


def test_a_start_that_is_interrupted_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the script connects to a node of which `ray.shutdown` knows nothing yet."""
    ray = pytest.importorskip("ray")
    import ray._private.worker as worker

    from dfc.runtime.pipeline import ray_

    own = set(children())
    begun: list[int] = []

    def interrupted(*_: object, **__: object) -> None:
        left = [p for p in children() if p not in own]
        while left:
            begun.append(left.pop())
            left += ray_._children(begun[-1])
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "connect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ray_.RayLauncher(tmp_path, [1])
    assert len(begun) >= 4 and gone(begun, 5)  # gcs_server, raylet, two monitors
    assert not ray.is_initialized()


def children() -> list[int]:
    """Processes that this one has started, and that run."""
    found = Path("/proc/self/task").glob("*/children")
    return [int(p) for file in found for p in file.read_text().split() if alive(int(p))]


def test_ranks_on_one_device_share_a_gpu() -> None:
    from dfc.runtime.pipeline.ray_ import gpu_shares

    assert gpu_shares(["cpu", "cuda:0", "cuda:1", "cuda:0"]) == [0.0, 0.5, 1.0, 0.5]
