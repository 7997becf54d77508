"""Pipelines whose ranks a launcher started: the same results, and what is wrong told before."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dfc
from dfc.cli import main
from dfc.errors import DfcError
from dfc.runtime.pipeline.torchrun import Launched
from dfc.runtime.pipeline.world import World
from tests.kept_graph import keep
from tests.served_store import served_store
from tests.test_pipeline import captured, stages
from tests.test_processes import heavy

ROOT = Path(__file__).resolve().parent.parent


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]


def launched(launcher: list[str], given: list[str], folder: Path) -> dict[str, Any]:
    """What the command tells of a pipeline when a launcher starts it."""
    ran = subprocess.run(
        [sys.executable, *launcher, "-m", "dfc.cli", *given, "--json"],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return dict(json.loads(ran.stdout)["pipeline"])  # under torchrun of rank 0 alone


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs a package as a pipeline."""
    _, _, graph = captured("chain")
    package = tmp_path_factory.mktemp("torchrun") / "chain.dfcpkg"
    dfc.compile(graph, [torch.randn(6, 8)], engine="eager").save(package)
    return ["run", str(package), "--size", "B=11", "--pipeline", "2", "-m", "3"]


def test_the_command_runs_under_torchrun_as_on_threads(given: list[str], tmp_path: Path) -> None:
    outputs = [str(tmp_path / f"{place}.safetensors") for place in ("threads", "torchrun")]
    assert main([*given, "-o", outputs[0]]) == 0
    told = launched(TORCHRUN, [*given, "--on", "torchrun", "-o", outputs[1]], tmp_path)
    assert told["on"] == "torchrun" and [s["rank"] for s in told["stages"]] == [0, 1]
    assert told["links"][0]["bytes"] > 0
    assert told["link_kind"] == "local"  # sockets: all ranks are on one host
    a, b = (load_file(path) for path in outputs)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_command_runs_in_processes(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "step.json"
    assert main([*given, "--on", "processes", "--trace", str(trace), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["pipeline"]
    assert told["on"] == "processes" and told["incidents"] == [] and told["link_kind"] == "local"
    assert told["links"][0]["bytes"] > 0 and told["predicted_seconds"] < told["step_seconds"]
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(e["ph"] == "X" and e["pid"] == 0 for e in events) == 2 * 3


def test_without_ray_the_command_says_how_to_get_it(
    given: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it fails
    assert main([*given, "--on", "ray"]) == 7
    assert "pip install dfc-compiler[ray]" in capsys.readouterr().err


USED = """
import torch

@torch.library.custom_op("used_rank::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2

@twice.register_fake
def _(x):
    return torch.empty_like(x)

class Model(torch.nn.Module):
    def forward(self, x):
        return torch.relu(twice(torch.relu(x)) + 1)

def build():
    return Model(), (torch.randn(6, 8),), {}, ({0: torch.export.Dim("B", min=1, max=64)},)
"""


@pytest.mark.parametrize(
    "on", [pytest.param(on, marks=pytest.mark.slow) for on in ("processes", "ray")] + ["torchrun"]
)
def test_ranks_load_what_is_used(on: str, tmp_path: Path) -> None:
    """The op exists in the file alone: a rank that does not load it cannot run its stage."""
    if on == "ray":
        pytest.importorskip("ray")
    (tmp_path / "twice.py").write_text(USED)
    x = torch.randn(11, 8)
    save_file({"x": x}, tmp_path / "x.safetensors")
    given = ["run", "twice.py:build", "x.safetensors", "--use", "twice.py", "--pipeline", "2",
             "-m", "3", "--on", on, "-o", "out.safetensors"]  # fmt: skip
    if on == "torchrun":
        told = launched(TORCHRUN, [*given, "--links", "gloo"], tmp_path)
        assert told["link_kind"] == "gloo"
    else:
        told = launched([], given, tmp_path)
    assert told["on"] == on
    (found,) = load_file(tmp_path / "out.safetensors").values()
    assert torch.equal(found, torch.relu(torch.relu(x) * 2 + 1))


def test_what_a_rank_cannot_load_is_told_once(tmp_path: Path) -> None:
    """The rank says it, and is not started again."""
    from functools import partial

    from dfc.cli.options import load_used
    from dfc.runtime.pipeline.processes import Processes
    from dfc.runtime.pipeline.spawn import Spawner

    missing = str(tmp_path / "missing.py")
    _, _, graph = captured("chain")
    with pytest.raises(DfcError, match="D050") as error:
        load_used([missing])
    launcher = partial(Spawner, entry=("dfc.cli.used_rank", missing, "--"))
    with pytest.raises(DfcError) as told:
        Processes(graph, stages(graph, 2), launcher=launcher)
    assert (told.value.code, told.value.message) == (error.value.code, error.value.message)


@pytest.mark.parametrize(
    "given, told",
    [
        (["--pipeline", "2", "--on", "proceses"], "did you mean `processes`?"),
        (["--on", "processes"], "--on is for pipelines"),
        (["--pipeline", "2", "--on", "torchrun"], "was not started by torchrun"),
        (["--pipeline", "2", "--links", "gloo"], "--links is for ranks in processes"),
        (["--pipeline", "2", "--on", "processes", "--links", "glo"], "did you mean `gloo`?"),
        (["--devices", "cpu,cpu"], "--devices is for pipelines"),
    ],
)
def test_what_does_not_go_together_is_told_before_anything_is_loaded(
    given: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(["run", "nothing.dfcpkg", *given]) == 2
    assert told in capsys.readouterr().err


def test_a_world_of_another_size_is_told_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["run", "nothing.dfcpkg", "--pipeline", "2", "--on", "torchrun"]) == 2
    err = capsys.readouterr().err
    assert "N057" in err and "the plan has 2 ranks, but there are 4 processes" in err


@pytest.mark.parametrize("differs", ["plan", "torch"])
def test_ranks_with_other_plans_or_versions_are_told_apart(differs: str) -> None:
    store = torch.distributed.HashStore()
    has = {"torch": "2.13", "plan": "a" * 64}
    told: list[str] = []

    def meet(rank: int, what: dict[str, str]) -> None:
        try:
            World(rank, 2, store).same(what)
        except DfcError as e:
            told.append(f"{e.code} {e.message}")

    ranks = [
        threading.Thread(target=meet, args=(0, has)),
        threading.Thread(target=meet, args=(1, {**has, differs: "other"})),
    ]
    for t in ranks:
        t.start()
    for t in ranks:
        t.join(timeout=60)
    mine = has[differs][:16]
    assert sorted(told) == [
        f"N055 rank 0 has {differs} {mine}, rank 1 has other",
        f"N055 rank 1 has {differs} other, rank 0 has {mine}",
    ]


def test_ranks_that_would_cut_a_batch_otherwise_are_told_before_they_are_linked() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)).eval()
    graph = dfc.trace(model, (torch.ones(4, 8),), dynamic_shapes=({0: torch.export.Dim("B")},))
    stages = {node: i for i, node in enumerate(graph.nodes)}
    store = torch.distributed.HashStore()
    told: list[str] = []

    def start(rank: int) -> None:
        with pytest.raises(DfcError) as caught:
            Launched(graph, stages, World(rank, 2, store), microbatches=2 + rank, threads=1)
        told.append(f"{caught.value.code} {caught.value.message}")

    ranks = [threading.Thread(target=start, args=(rank,)) for rank in range(2)]
    for t in ranks:
        t.start()
    for t in ranks:
        t.join(timeout=60)
    assert sorted(told) == [
        "N055 rank 0 has microbatches 2, rank 1 has 3",
        "N055 rank 1 has microbatches 3, rank 0 has 2",
    ]


def test_ranks_that_are_given_inputs_of_other_sizes_are_told(
    given: list[str], tmp_path: Path
) -> None:
    """Each says what it has: torchrun ends the other one when the first of them has."""
    command = shlex.join([sys.executable, "-m", "dfc.cli", *given, "--on", "torchrun"])
    command = command.replace("B=11", "B=$((RANK + 7))")
    ran = subprocess.run(
        [sys.executable, *TORCHRUN, "--no-python", "sh", "-c", command],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode != 0 and not ran.stdout
    first = "rank 0 has input `input` of size 7x8, rank 1 has 8x8"
    second = "rank 1 has input `input` of size 8x8, rank 0 has 7x8"
    assert f"error[N055]: {first}" in ran.stderr or f"error[N055]: {second}" in ran.stderr
    assert "or the same --size" in ran.stderr


_SCRIPT = """
import sys, torch
from dfc.ir.interpret import interpret
from dfc.runtime.pipeline.torchrun import Launched
from tests.kept_graph import kept
graph, stages = kept(sys.argv[1])
args = (torch.randn(64, 40, 512),)
with Launched(graph, stages, microbatches=16, threads=2) as pipeline:
    if pipeline.leads:
        parts = [interpret(graph, [part[v] for v in graph.inputs]) for part in pipeline.cut(args)]
        for found, pieces in zip(pipeline(*args), zip(*parts)):
            assert torch.equal(found, torch.cat(pieces))
        print("equal", flush=True)
        while True:
            pipeline(*args)
    pipeline.serve()
"""


def test_a_lost_rank_is_named_by_those_that_wait(tmp_path: Path) -> None:
    """Without torchrun, which would end the others: the ranks themselves notice."""
    graph, _ = heavy()
    keep(tmp_path, graph, stages(graph, 2))
    with served_store() as store, tempfile.TemporaryDirectory() as own:  # names must be short
        _lose_a_rank(tmp_path, store, own)


def _lose_a_rank(folder: Path, store: dict[str, str], own: str) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, str(folder)], cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
            env=environment(RANK=str(r), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", TMPDIR=own,
                            **store),
        )
        for r in range(2)
    ]  # fmt: skip
    try:
        assert ranks[0].stdout is not None
        assert ranks[0].stdout.readline() == "equal\n"
        assert not list(Path(own).glob("dfc-*"))  # of sockets: who is killed leaves nothing
        time.sleep(0.3)
        ranks[1].send_signal(signal.SIGKILL)
        _, err = ranks[0].communicate(timeout=300)
        assert ranks[0].returncode == 1
        assert "K058" in err and "lost" in err and "rank 1" in err, err
    finally:
        for r in ranks:
            r.kill()
            r.communicate(timeout=10)
