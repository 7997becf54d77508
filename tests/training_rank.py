"""A rank of the tests of training in processes, in words: RANK SIZE FOLDER JOB ...

It meets the others by a file, does one job after another, for starting is what takes long, and
writes what it found as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import FileStore, PrefixStore  # type: ignore[attr-defined]

import dfc
from dfc.errors import DfcError
from dfc.planning.machine import Wire
from dfc.planning.model import Wish
from dfc.planning.pipeline import plan
from dfc.runtime.pipeline.training_ranks import RankTrainer
from dfc.runtime.pipeline.world import World
from tests.test_looped_plans import machine
from tests.training_models import B, adamw, captured, close, evenly, reference, staged, traced

STAGES = {"1f1b": 2, "zb1p": 2, "auto": 2, "gpipe": 2, "interleaved": 4, "interleaved_zb": 4,
          "breadth_first": 4, "zb_v": 4, "dualpipe_v": 4}  # fmt: skip


def trainer_of(
    world: World, name: str, schedule: str, links: str | None = None, **options: Any
) -> RankTrainer:
    return RankTrainer(
        staged(name, STAGES[schedule]), world=world, schedule=schedule, microbatches=4,
        optimizer=adamw, threads=1, deadline=90, links=links, **options,
    )  # fmt: skip


def gradients(
    world: World,
    name: str,
    schedules: Sequence[str] = ("1f1b", "zb1p", "auto"),
    links: str | None = None,
) -> dict[str, Any]:
    """Each schedule's gradients beside those of plain PyTorch; curves of losses."""
    model, args = captured(name)
    loss, expected = reference(model, args, 4)
    found = {}
    for schedule in schedules:
        with trainer_of(world, name, schedule, links) as trainer:
            assert links in (None, trainer.link_kind)
            torch.testing.assert_close(trainer.backward(*args), loss)
            own = {n: p.grad for n, p in trainer.parameters.items() if p.grad is not None}
            close(own, {n: expected[n] for n in own})
            if schedule == schedules[0]:
                with trainer_of(world, name, schedule, links, recompute=True) as other:
                    torch.testing.assert_close(other.backward(*args), loss)
                    same = [torch.equal(other.parameters[n].grad, g) for n, g in own.items()]
                    assert same and all(same), "recomputing changes gradients"
                    kept, again = trainer.report().peak_bytes, other.report().peak_bytes
                    assert sum(again) < sum(kept)
            trainer.zero_grad()
            for _ in range(2):
                trainer.backward(*args, of=2)
            twice = {n: p.grad for n, p in trainer.parameters.items() if p.grad is not None}
            close(twice, {n: expected[n] for n in own})
            trainer.zero_grad()
            losses = [float(trainer.step(*args)) for _ in range(3)]
            report = trainer.report()
            state = trainer.state_dict()
            digest = {n: float(x.double().sum()) for n, x in state["weights"].items()}
            found[schedule] = {"losses": losses, "weights": digest, "program": str(report.program),
                               "in_flight": report.in_flight}  # fmt: skip
    return found


def between_devices(world: World, name: str) -> dict[str, Any]:
    """As `gradients`, with gloo for nccl and the processor for two devices."""
    from dfc.runtime.pipeline import device_links, training_exchange
    from tests.test_device_links import Gloo

    with pytest.MonkeyPatch.context() as stand_in:
        stand_in.setattr(device_links, "Nccl", Gloo)
        stand_in.setattr(training_exchange, "nccl_is_here", lambda: True)
        stand_in.setattr(
            training_exchange, "places_in", lambda *_: [(0, str(r)) for r in range(world.size)]
        )
        return gradients(world, name, links="nccl")


def several(world: World, name: str) -> dict[str, Any]:
    """Four stages, and what `auto` finds for where they are by default, and for a V."""
    model, args = captured(name)
    loss, expected = reference(model, args, 4)
    options: dict[str, Any] = {"world": world, "microbatches": 4, "optimizer": adamw, "threads": 1,
                               "deadline": 90}  # fmt: skip
    found = {}
    asked: list[tuple[str, str, Any]] = [
        ("zb1p", "interleaved_zb", 2), ("loops", "auto", None), ("zb_v", "auto", [0, 1, 1, 0])
    ]  # fmt: skip
    for what, schedule, ranks in asked:
        with RankTrainer(staged(name, 4), schedule=schedule, ranks=ranks, **options) as trainer:
            torch.testing.assert_close(trainer.backward(*args), loss)
            own = {n: p.grad for n, p in trainer.parameters.items() if p.grad is not None}
            close(own, {n: expected[n] for n in own})
            losses = [float(trainer.step(*args)) for _ in range(2)]
            report = trainer.report()
            assert report.program.placement == ((0, 1, 1, 0) if what == "zb_v" else (0, 1, 0, 1))
            digest = {n: float(p.detach().double().sum()) for n, p in trainer.parameters.items()}
            found[what] = {"losses": losses, "weights": digest, "program": str(report.program),
                           "in_flight": report.in_flight}  # fmt: skip
    return found


def planned(world: World, name: str) -> dict[str, Any]:
    """Stages, schedule and microbatches of a plan with two stages a rank, gradients beside those of
    plain PyTorch."""
    model, args = captured(name)
    graph = traced(name)[2]
    found = plan(graph, machine(2, wire=Wire(1e12, 0.0)), schedule="interleaved_zb",
                 stages_per_device=2, wish=Wish(microbatches=4, trains=True))  # fmt: skip
    loss, expected = reference(model, args, 4)
    with RankTrainer(graph, found, world=world, optimizer=adamw, threads=1, deadline=90) as trainer:
        torch.testing.assert_close(trainer.backward(*args), loss)
        own = {n: p.grad for n, p in trainer.parameters.items() if p.grad is not None}
        close(own, {n: expected[n] for n in own})
        report = trainer.report()
        made = [p.number for p in trainer.model.parts if "whole" in vars(p)]
        assert made == [t.stage.number for t in trainer.trained], "others' stages too"
        return {"same": report.program == found.program, "mine": sorted(own),
                "stages": len(report.in_flight), "all": sorted(expected)}  # fmt: skip


def cut_elsewhere(world: World, name: str) -> dict[str, Any]:
    """Each rank measured another cut; then each made another model."""
    model, args, graph = traced(name)
    loss, expected = reference(deepcopy(model), args, 4)
    nodes = list(graph.nodes)
    options: dict[str, Any] = {"world": world, "microbatches": 4, "optimizer": adamw, "threads": 1}
    cut = {n: int(i > len(nodes) // 2 + world.rank) for i, n in enumerate(nodes)}
    with RankTrainer(graph, cut, **options) as trainer:
        torch.testing.assert_close(trainer.backward(*args), loss)
        own = {n: p.grad for n, p in trainer.parameters.items() if p.grad is not None}
        close(own, {n: expected[n] for n in own})
        stages = [len(p.stage.graph) for p in trainer.model.parts]
    torch.manual_seed(world.rank)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    other = dfc.trace(model, args, dynamic_shapes=({0: B}, {0: B}))
    try:
        RankTrainer(other, evenly(other, 2), **options)
    except DfcError as e:
        return {"mine": sorted(own), "all": sorted(expected), "stages": stages,
                "code": e.code, "help": e.diagnostics[0].help}  # fmt: skip
    return {}


def refused(world: World, name: str) -> dict[str, Any]:
    """Ranks that differ, and a rank that fails while the other waits."""
    (_, args), found = captured(name), {}
    options: dict[str, Any] = {"world": world, "optimizer": adamw, "threads": 1, "deadline": 30,
                               "microbatches": 2}  # fmt: skip
    for what, more in (("seed", {"seed": world.rank}), ("size", {"schedule": "interleaved"})):
        try:
            RankTrainer(staged(name, 3 if what == "size" else 2), **options, **more)
        except DfcError as e:
            found[what] = [e.code, e.message]
    bad = args[1].clone()
    bad[-1] = 99
    with RankTrainer(staged(name, 2), **options) as trainer:
        try:
            trainer.step(args[0], bad)
        except DfcError as e:
            found["failed"] = [e.code, e.message]
    return found


def steps(world: World, name: str, schedule: str) -> dict[str, Any]:
    """A thousand steps."""
    _, args = captured(name)
    with trainer_of(world, name, schedule) as trainer:
        return {"losses": [float(trainer.step(*args)) for _ in range(1000)]}


def lost(world: World, name: str) -> dict[str, Any]:
    """The last rank is killed; what the others are told."""
    _, args = captured(name)
    trainer = RankTrainer(staged(name, world.size), world=world, microbatches=4, optimizer=adamw,
                          threads=1)  # fmt: skip
    trainer.step(*args)
    if world.rank == world.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        while True:
            trainer.step(*args)
    except DfcError as e:
        return {"code": e.code, "message": e.message, "help": str(e)}


def done(world: World, job: str) -> dict[str, Any]:
    """`what model`, or `what:how model`."""
    what, name = job.split()
    what, _, how = what.partition(":")
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        "gradients": lambda: gradients(world, name, links=how or None),
        "between_devices": lambda: between_devices(world, name),
        "every_schedule": lambda: gradients(world, name, list(STAGES)),
        "several": lambda: several(world, name),
        "planned": lambda: planned(world, name),
        "refused": lambda: refused(world, name),
        "cut_elsewhere": lambda: cut_elsewhere(world, name),
        "steps": lambda: steps(world, name, how),
        "lost": lambda: lost(world, name),
    }
    return jobs[what]()


def main() -> None:
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store, found = FileStore(str(folder / "store"), size), {}
    for job in sys.argv[4:]:
        found[job] = done(World(rank, size, PrefixStore(job, store)), job)
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
