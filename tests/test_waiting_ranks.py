"""Ranks that wait while another one is started again: they are well, and stay."""

from __future__ import annotations

import signal
from functools import partial

import torch

import dfc
from dfc.runtime.pipeline.processes import Processes
from dfc.runtime.pipeline.spawn import Spawner
from tests.test_processes import B, Heavy, equal, struck


def test_a_rank_that_computes_as_another_is_lost_waits_for_it_without_a_deadline() -> None:
    """It gives up between two actions, and was taken to be in the first as long as it waited."""
    args = (torch.randn(64, 160, 512),)
    graph = dfc.trace(Heavy().eval(), args, dynamic_shapes=({0: B},))
    last = list(graph.nodes)[-1]
    placed = {n: int(n is last) for n in graph.nodes}
    late = partial(Spawner, entry=("tests.late_rank",))
    # Each takes some 0.3 s on rank 0, which is in the first of them when rank 1 is killed.
    with Processes(graph, placed, microbatches=2, threads=1, launcher=late) as pipeline:
        equal(pipeline, args)
        before = pipeline.pids
        assert "rank 1 lost" in struck(pipeline, 1, signal.SIGKILL, args)
        equal(pipeline, args)
        replaced = [a != b for a, b in zip(pipeline.pids, before, strict=True)]
        assert replaced == [False, True], pipeline.incidents
