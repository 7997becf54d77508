"""Training in processes: gradients and losses of one process, tied copies equal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dfc.runtime.pipeline.training import Trainer
from tests.training_models import adamw, captured, reference, staged

ROOT = Path(__file__).parent.parent


def run_ranks(
    folder: Path, size: int, *jobs: str, seconds: float = 240, lost: Collection[int] = ()
) -> dict[str, list[Any]]:
    """What each rank found in each job but the lost ones; all of them end with the test."""
    command = [sys.executable, "-m", "tests.training_rank"]
    ranks = [
        subprocess.Popen([*command, str(r), str(size), str(folder), *jobs], cwd=ROOT,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for r in range(size)
    ]  # fmt: skip
    try:
        for r, rank in enumerate(ranks):
            said, _ = rank.communicate(timeout=seconds)
            assert rank.returncode == (-signal.SIGKILL if r in lost else 0), said
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    wrote = [json.loads((folder / f"{r}.json").read_text()) for r in range(size) if r not in lost]
    return {job: [found[job] for found in wrote] for job in jobs}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What two ranks found, that are started once."""
    jobs = ("planned mlp", "gradients:local tied", "gradients:gloo tied", "between_devices tied",
            "refused mlp", "cut_elsewhere mlp")  # fmt: skip
    return run_ranks(tmp_path_factory.mktemp("ranks"), 2, *jobs)


@pytest.mark.parametrize("links", ["local", "gloo"])
def test_two_processes_train_as_one(found: dict[str, list[Any]], links: str) -> None:
    judge(found[f"gradients:{links} tied"], {"table.weight"})


def test_devices_exchange_what_processors_do(found: dict[str, list[Any]]) -> None:
    judge(found["between_devices tied"], {"table.weight"})
    for fast, plain in zip(
        found["between_devices tied"], found["gradients:gloo tied"], strict=True
    ):
        for schedule in ("1f1b", "zb1p"):  # `auto` goes by what it measures
            assert fast[schedule] == plain[schedule]  # to the bit


def judge(found: list[Any], tied: set[str]) -> None:
    """Both ranks' losses, copies and plans."""
    first, second = found
    for schedule, found in first.items():
        other = second[schedule]
        assert found["losses"] == other["losses"]  # every rank is told
        shared = set(found["weights"]) & set(other["weights"])
        one_rank = schedule in ("zb_v", "dualpipe_v")  # has both ends
        assert shared == (set() if one_rank else tied)
        assert all(found["weights"][n] == other["weights"][n] for n in shared)  # to the bit
        assert found["program"] == other["program"]  # `auto` decides alike everywhere
        assert len(found["in_flight"]) == len(other["in_flight"]) >= 2
        assert found["losses"] == pytest.approx(first["zb1p"]["losses"], rel=1e-5)


def test_ranks_follow_a_plan_with_several_stages_each(found: dict[str, list[Any]]) -> None:
    planned = found["planned mlp"]
    assert all(f["same"] and f["stages"] == 4 for f in planned)
    assert sorted(n for f in planned for n in f["mine"]) == planned[0]["all"]


def test_the_first_rank_says_where_a_graph_is_cut(found: dict[str, list[Any]]) -> None:
    first, second = found["cut_elsewhere mlp"]
    assert first["stages"] == second["stages"] and len(first["stages"]) == 2
    assert sorted([*first["mine"], *second["mine"]]) == first["all"]
    for told in (first, second):  # weights that nobody seeded
        assert told["code"] == "N055" and "torch.manual_seed" in told["help"]


def test_ranks_that_differ_or_fail_are_told_and_none_waits(found: dict[str, list[Any]]) -> None:
    refused = found["refused mlp"]
    for rank, other in ((0, 1), (1, 0)):
        code, message = refused[rank]["seed"]
        assert code == "N055"
        assert f"rank {other} has seed {other}, rank {rank} has {rank}" in message
        assert refused[rank]["size"][0] == "N073"
    assert refused[1]["failed"][0] == "K050"
    assert "stage 1 failed on microbatch 1" in refused[1]["failed"][1]
    code, message = refused[0]["failed"]
    assert code == "K058" and "rank 1 failed: stage 1 failed on microbatch 1" in message


def test_a_lost_rank_is_named_by_all(tmp_path: Path) -> None:
    """The first one waits for the second, which waits for the third, which is killed."""
    for told in run_ranks(tmp_path, 3, "lost mlp", lost=[2])["lost mlp"]:
        assert told["code"] == "K058" and "rank 2 is lost" in told["message"]
        assert "while rank 1 waits in" in told["message"]
        assert "`load` what was saved last" in told["help"]


_SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from dfc.runtime.pipeline.training_ranks import RankTrainer
from tests.training_models import adamw, captured, staged
torch.set_num_threads(1)
folder, (_, args) = Path(sys.argv[1]), captured("tied")
trainer = RankTrainer(staged("tied", 2), microbatches=4, optimizer=adamw, threads=1)
if folder.exists():
    trainer.load(folder)
while trainer.steps < 6:
    trainer.step(*args)
    if trainer.steps % 2 == 0:
        trainer.save(folder)
    if trainer.steps == 3 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if trainer.world.rank:
            os.kill(os.getpid(), signal.SIGKILL)
print(f"rank {trainer.world.rank} ends at {trainer.steps}", flush=True)
"""


def test_torchrun_starts_training_again_where_it_was_saved(tmp_path: Path) -> None:
    """A rank is killed once; the weights are those of training in one process, bit for bit."""
    (tmp_path / "train.py").write_text(_SCRIPT)
    last = tmp_path / "last"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts",
         "1", "--monitor-interval", "0.1", str(tmp_path / "train.py"), str(last)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, cwd=ROOT,
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ends = re.findall(r"rank \d ends at \d+", done.stdout)  # both write at once: lines may mix
    assert sorted(ends) == ["rank 0 ends at 6", "rank 1 ends at 6"]
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["last"]  # no rank's own part
    model, args = captured("tied")
    model.load_state_dict(load_file(last / "model.safetensors"))  # plain PyTorch's, all names
    with Trainer(staged("tied", 2), schedule="1f1b", microbatches=4, optimizer=adamw,
                 threads=1) as trainer:  # fmt: skip
        for _ in range(6):
            trainer.step(*args)
        for name, p in trainer.parameters.items():
            assert torch.equal(p, model.get_parameter(name)), name
        trainer.load(last)  # what several processes wrote goes on in one
        assert trainer.steps == 6
        loss, _ = reference(model, args, 4)
        torch.testing.assert_close(trainer.step(*args), loss, rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied", "unet", "branches", "mlp"])
def test_every_schedule_in_two_processes(tmp_path: Path, name: str) -> None:
    (found,) = run_ranks(tmp_path, 2, f"every_schedule {name}").values()
    judge(found, {"table.weight"} if name == "tied" else set())


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "interleaved", "zb_v"])
def test_a_thousand_steps_end(tmp_path: Path, schedule: str) -> None:
    (found,) = run_ranks(tmp_path, 2, f"steps:{schedule} mlp", seconds=600).values()
    first, second = found
    assert first["losses"] == second["losses"]
    assert len(first["losses"]) == 1000
    assert first["losses"][-1] < first["losses"][0]
