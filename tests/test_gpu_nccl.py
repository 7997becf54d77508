"""Ranks on CUDA devices that send over nccl: on two GPUs, or on one that both hosts have.

nccl refuses two ranks on one device, unless NCCL_HOSTID tells it that they are on two hosts; then
it takes sockets between them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.two_hosts import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICES = "cuda:0,cuda:1" if torch.cuda.device_count() > 1 else "cuda:0,cuda:0"
PIPELINES = ("chain", "unet", "tied")
TRAINED = ("tied", "unet")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks found, that are started once."""
    jobs = [*(f"pipeline {n}" for n in PIPELINES), *(f"training {n}" for n in TRAINED)]
    return run_ranks(tmp_path_factory.mktemp("nccl"), "nccl", DEVICES, *jobs)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_gives_what_the_model_gives(found: list[dict[str, Any]], name: str) -> None:
    first, second = (f[f"pipeline {name}"] for f in found)
    assert first["kind"] == second["kind"] == "nccl"
    assert first["away"] < 1e-4 and first["sent"] > 0


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_are_those_of_one_process(found: list[dict[str, Any]], name: str) -> None:
    first, second = (f[f"training {name}"] for f in found)
    for schedule, one in first.items():
        other = second[schedule]
        assert one["kind"] == other["kind"] == "nccl"
        assert one["loss"] < 1e-5 and one["losses"] == other["losses"]
        assert one["losses"][-1] < one["losses"][0]
        assert all(off < 1e-4 for off in [*one["away"].values(), *other["away"].values()])
        shared = set(one["weights"]) & set(other["weights"])
        assert {n: one["weights"][n] for n in shared} == {n: other["weights"][n] for n in shared}
        if name == "tied" and schedule != "zb_v":  # whose first rank has both ends
            assert shared == {"table.weight"}


@pytest.mark.parametrize("job", ["lost chain", "lost_trainer tied"])
def test_a_rank_that_is_lost_is_named(tmp_path: Path, job: str) -> None:
    (first,) = run_ranks(tmp_path, "nccl", DEVICES, job, lost=[1])
    assert first[job]["code"] == "K058" and "rank 1 is lost" in first[job]["message"]
