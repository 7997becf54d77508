"""Ranks on two hosts, which send over gloo: the same results, and a lost rank is named by all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.two_hosts import run_ranks


def test_ranks_on_two_hosts_give_what_the_model_gives(tmp_path: Path) -> None:
    jobs = "pipeline chain", "pipeline tied", "training tied"
    first, second = run_ranks(tmp_path, "gloo", "cpu,cpu", *jobs)
    for job in jobs[:2]:
        assert first[job]["kind"] == second[job]["kind"] == "gloo"
        assert first[job]["away"] < 1e-6 and first[job]["sent"] > 0
    for schedule, one in first["training tied"].items():
        other = second["training tied"][schedule]
        assert one["kind"] == "gloo" and one["losses"] == other["losses"]
        assert one["loss"] < 1e-6 and all(off < 1e-6 for off in one["away"].values())


@pytest.mark.parametrize("job", ["lost chain", "lost_trainer tied"])
def test_a_rank_that_is_lost_is_named(tmp_path: Path, job: str) -> None:
    """By the host's links too, which may be the first to notice."""
    (first,) = run_ranks(tmp_path, "gloo", "cpu,cpu", job, lost=[1])
    assert first[job]["code"] == "K058" and "rank 1 is lost" in first[job]["message"]
