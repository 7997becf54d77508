"""Training in processes over gloo: gradients and losses of one process, tied copies equal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def run_ranks(folder: Path, size: int, job: str, name: str, seconds: float = 240) -> list[Any]:
    """What each rank wrote; all of them end with the test."""
    command = [sys.executable, "-m", "tests.training_rank"]
    ranks = [
        subprocess.Popen([*command, str(r), str(size), str(folder), job, name], cwd=ROOT,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for r in range(size)
    ]  # fmt: skip
    try:
        for rank in ranks:
            said, _ = rank.communicate(timeout=seconds)
            assert rank.returncode == 0, said
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [json.loads((folder / f"{r}.json").read_text()) for r in range(size)]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    judge(run_ranks(tmp_path, 2, "gradients", "tied"), {"table.weight"})


def judge(found: list[Any], tied: set[str]) -> None:
    """Both ranks' losses, copies and plans."""
    first, second = found
    for schedule, found in first.items():
        other = second[schedule]
        assert found["losses"] == other["losses"]  # every rank is told
        shared = set(found["weights"]) & set(other["weights"])
        assert shared == (set() if schedule == "zb_v" else tied)  # whose ends are on one rank
        assert all(found["weights"][n] == other["weights"][n] for n in shared)  # to the bit
        assert found["program"] == other["program"]  # `auto` decides alike everywhere
        assert len(found["in_flight"]) == len(other["in_flight"]) >= 2
        assert found["losses"] == pytest.approx(first["zb1p"]["losses"], rel=1e-5)


def test_ranks_that_differ_or_fail_are_told_and_none_waits(tmp_path: Path) -> None:
    found = run_ranks(tmp_path, 2, "refused", "mlp")
    for rank, other in ((0, 1), (1, 0)):
        code, message = found[rank]["seed"]
        assert code == "N055" and f"rank {other} has other seed" in message
        assert found[rank]["size"][0] == "N073"
    assert found[1]["failed"][0] == "K050"
    assert "stage 1 failed on microbatch 1" in found[1]["failed"][1]
    code, message = found[0]["failed"]
    assert code == "K055" and "rank 0 is in" in message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied", "unet", "branches", "mlp"])
def test_every_schedule_in_two_processes(tmp_path: Path, name: str) -> None:
    found = run_ranks(tmp_path, 2, "every_schedule", name)
    judge(found, {"table.weight"} if name == "tied" else set())


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "interleaved", "zb_v"])
def test_a_thousand_steps_end(tmp_path: Path, schedule: str) -> None:
    first, second = run_ranks(tmp_path, 2, f"steps:{schedule}", "mlp", seconds=600)
    assert first["losses"] == second["losses"]
    assert len(first["losses"]) == 1000
    assert first["losses"][-1] < first["losses"][0]
