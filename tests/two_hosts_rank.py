"""A rank of the tests of two hosts, in words: FOLDER LINKS DEVICE,DEVICE JOB ...; the rest is as
torchrun tells it.

It does one job after another, for starting is what takes long, and writes what it found as JSON.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from dfc.errors import DfcError
from dfc.runtime.pipeline.torchrun import Launched
from dfc.runtime.pipeline.training_ranks import RankTrainer
from dfc.runtime.pipeline.world import World
from tests import test_pipeline, training_models
from tests.training_models import adamw, reference, staged
from tests.two_hosts import SECONDS

RANK = int(os.environ["RANK"])
LINKS, DEVICES = sys.argv[2], sys.argv[3].split(",")


def pipeline(world: World, name: str) -> dict[str, Any]:
    """A model's stages, called with batches of several sizes."""
    model, args, graph = test_pipeline.captured(name)
    away = 0.0
    with Launched(graph, test_pipeline.stages(graph, 2), world, microbatches=3, devices=DEVICES,
                  links=LINKS) as ranks:  # fmt: skip
        if not ranks.leads:
            ranks.serve()
            return {"kind": ranks.link_kind}
        for size in (6, 5, 3, 6, 1, 6):
            given = [a[:size] if a.shape[0] == 6 else a for a in args]
            with torch.no_grad():
                wanted = test_pipeline.leaves(model(*given))
            for x, y in zip(test_pipeline.leaves(ranks(*given)), wanted, strict=True):
                away = max(away, float((x.cpu() - y).abs().max() / y.abs().max()))
        sent = sum(ranks.report().step.bytes.values())
    return {"kind": ranks.link_kind, "away": away, "sent": sent}


def training(world: World, name: str) -> dict[str, Any]:
    """Gradients beside those of one process, and what ties give after some steps."""
    model, args = training_models.captured(name)
    loss, expected = reference(model, args, 4)
    found: dict[str, Any] = {}
    for schedule, stages in (("1f1b", 2), ("zb1p", 2), ("interleaved", 4), ("zb_v", 4)):
        with RankTrainer(staged(name, stages), world=world, schedule=schedule, microbatches=4,
                         optimizer=adamw, deadline=60, devices=DEVICES, links=LINKS,
                         clip=1e6) as trainer:  # fmt: skip
            off = abs(float(trainer.backward(*args)) / float(loss) - 1)
            away = {}
            for n, p in trainer.parameters.items():
                if p.grad is not None:
                    size = torch.linalg.vector_norm(expected[n])
                    away[n] = float(torch.linalg.vector_norm(p.grad.cpu() - expected[n]) / size)
            trainer.zero_grad()
            losses = [float(trainer.step(*args)) for _ in range(5)]
            weights = {n: float(p.detach().double().sum()) for n, p in trainer.parameters.items()}
            found[schedule] = {"kind": trainer.link_kind, "loss": off, "away": away,
                               "losses": losses, "weights": weights}  # fmt: skip
    return found


def killed_when_told(world: World) -> None:
    world.get("killed", 60)
    os.kill(os.getpid(), signal.SIGKILL)


def lost(world: World, name: str) -> dict[str, Any]:
    """The second rank is killed while the first one computes; what that is told."""
    _, args, graph = test_pipeline.captured(name)
    with Launched(graph, test_pipeline.stages(graph, 2), world, microbatches=3, devices=DEVICES,
                  links=LINKS) as ranks:  # fmt: skip
        if not ranks.leads:
            Thread(target=killed_when_told, args=(world,), daemon=True).start()
            ranks.serve()
        ranks(*args)
        ranks.world.put("killed", True)
        try:
            while True:
                ranks(*args)
        except DfcError as e:
            return {"code": e.code, "message": e.message}


def lost_trainer(world: World, name: str) -> dict[str, Any]:
    """The second rank is killed between two steps."""
    _, args = training_models.captured(name)
    trainer = RankTrainer(staged(name, 2), world=world, microbatches=4, optimizer=adamw,
                          devices=DEVICES, links=LINKS)  # fmt: skip
    trainer.step(*args)
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        while True:
            trainer.step(*args)
    except DfcError as e:
        return {"code": e.code, "message": e.message}


def main() -> None:
    faulthandler.dump_traceback_later(SECONDS - 5)
    jobs = {"pipeline": pipeline, "training": training, "lost": lost, "lost_trainer": lost_trainer}
    found, launcher = {}, World.of_launcher()
    for job in sys.argv[4:]:
        what, name = job.split()
        world = World(RANK, 2, PrefixStore(job, launcher.store), hosts=launcher.hosts)
        found[job] = jobs[what](world, name)
        print(job, "done", flush=True)
    (Path(sys.argv[1]) / f"{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
