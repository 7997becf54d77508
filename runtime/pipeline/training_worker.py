"""A process that is one rank of a trainer: it is told what to do by the host that started it.

    python -m dfc.runtime.pipeline.training_worker FOLDER RANK BORN HOST PORT

What it is told: join(name), backward(inputs, of, fresh), update, save(folder), load(folder),
options(changed), link(name), each with a number that the answer repeats: done, failed(error) or
broken(why); and abandon, end. The batch follows `backward` over the link from the host.
"""

from __future__ import annotations

import json
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from dfc.errors import DfcError
from dfc.planning.actions import Program, parse_program
from dfc.planning.stages import HOST
from dfc.runtime.pipeline.control import Message
from dfc.runtime.pipeline.linking import joined
from dfc.runtime.pipeline.links import FOREVER, Doing
from dfc.runtime.pipeline.named_factory import found
from dfc.runtime.pipeline.optimizer_options import apply_options
from dfc.runtime.pipeline.staged_folder import read_staged
from dfc.runtime.pipeline.training import Way
from dfc.runtime.pipeline.training_exchange import Ranks
from dfc.runtime.pipeline.training_ranks import RankTrainer
from dfc.runtime.pipeline.worker import Worker, error_told, main
from dfc.runtime.pipeline.world import World

JOB = "training.json"
_TOLD = 6  # lines of a traceback


class PeerLost(DfcError):
    """Another rank is gone, or the step is given up: the host knows which."""


class _Supervised(Ranks):
    """A rank's row; who is lost is for the host to say."""

    def _lost(self, peer: int, why: str) -> DfcError:
        return PeerLost("K058", f"rank {self.world.rank} waits in {self.doing}: {why}")

    def _leave(self, why: str) -> None:
        self.interrupt()

    def interrupt(self) -> None:
        """Whoever waits in a link of this rank's is told that it is over."""
        self.links.interrupt()
        self.others.interrupt()


class SupervisedTrainer(RankTrainer):
    """A rank's trainer, whose links may be made anew."""

    def __init__(self, *args: Any, doing: Doing, name: str, **options: Any) -> None:
        self._doing = doing
        self._first_name = name
        super().__init__(*args, **options)

    def _start(self, threads: Sequence[int]) -> Way:
        self._name = self._first_name
        self._ranks = _Supervised(self.world, self._name, self.model, self.programs.placement,
                                  self._run, self.deadline, self._links, self.devices,
                                  self.clip is not None)  # fmt: skip
        self._ranks.doing = self._doing
        return self._ranks

    @property
    def ranks(self) -> Ranks:
        return self._ranks

    def relink(self, name: str) -> None:
        """New links, under a name that no others had; the device has done with the old ones'."""
        self._ranks.device.settle()
        self._first_name = name
        self._way = self._start(self._each)


class TrainingWorker(Worker):
    """Commands come on a thread of their own, so that it is never deaf."""

    trainer: SupervisedTrainer | None = None
    _told: Program | None = None
    _host: Any = None

    def serve(self) -> None:
        """Until the host says so, or is gone."""
        threading.Thread(target=self._listen, name="dfc-control", daemon=True).start()
        try:
            self._make()
        except DfcError as e:
            self._tell("failed", number=0, **error_told(e))
            self.commands.get()  # the host ends this process
            return
        self.doing.set("idle")
        self._tell("loaded")
        while (command := self.commands.get())["do"] != "end":
            self._obey(command)

    def _interrupt(self) -> None:
        if self.trainer is not None and isinstance(self.trainer.ranks, _Supervised):
            self.trainer.ranks.interrupt()

    def _obey(self, command: Message) -> None:
        number = command["number"]
        try:
            found = getattr(self, f"_do_{command['do']}")(command)
        except PeerLost as e:
            self._tell("broken", number=number, why=e.message)
        except DfcError as e:
            self._tell("failed", number=number, **error_told(e))
        else:
            self.doing.set("idle")
            self._tell("done", number=number, **(found or {}))

    def _make(self) -> None:
        job = json.loads((self.folder / JOB).read_text(encoding="utf-8"))
        ranks = len(job["threads"])
        torch.set_num_threads(job["threads"][self.rank])
        with _user("what the ranks import cannot be loaded"):
            for name in job["modules"]:
                import_module(name)
            optimizer = found(job["optimizer"])
        model = read_staged(self.folder, job["model"])
        schedule = job["schedule"]
        if not isinstance(schedule, str):
            schedule = parse_program(*schedule)
        self.meeting = joined(job["meeting"], self.folder, "127.0.0.1")
        # all ranks are started together, and again together
        birth = (int(sys.argv[3]) - 1) // ranks
        store = FileStore(str(self.folder / f"store{birth}"), ranks)

        def made(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
            with _user("the optimizer cannot be made"):
                own: torch.optim.Optimizer = optimizer(parameters)
                return own

        self.trainer = SupervisedTrainer(
            model, world=World(self.rank, ranks, store, folder=self.folder), deadline=FOREVER,
            schedule=schedule, optimizer=made, threads=job["threads"][self.rank],
            doing=self.doing, name=f"birth{birth}", **job["options"],
        )  # fmt: skip

    @property
    def _own(self) -> SupervisedTrainer:
        assert self.trainer is not None
        return self.trainer

    def _do_join(self, command: Message) -> None:
        try:
            self._host = self.meeting.links(self.rank, [(HOST, self.rank)], command["name"])
        except RuntimeError as e:
            raise PeerLost("K058", str(e)) from e

    def _do_backward(self, command: Message) -> Message:
        self.doing.set("BATCH")
        flat = self._batch(command["inputs"])
        self.doing.set("idle")
        if command["fresh"]:
            self._own.zero_grad()
        loss = self._own.backward_flat(flat, command["of"])
        assert self._own.last is not None
        program, step = self._own.last
        told = None if program is self._told else [str(program), program.name]
        self._told = program
        edges = self._own.model.edges
        return {
            "loss": float(loss), "program": told, "seconds": step.seconds,
            "spans": [[int(s.action.kind), s.action.stage, s.action.microbatch, s.start, s.end]
                      for s in step.spans],
            "sent": [[i, step.bytes[e]] for i, e in enumerate(edges) if step.bytes.get(e)],
            "kept": [[t.stage.number, t.most, t.saved_bytes, t.taken_bytes, t.most_bytes]
                     for t in self._own.trained],
        }  # fmt: skip

    def _batch(self, inputs: Sequence[Any]) -> list[torch.Tensor]:
        """The tensors that this rank reads; of others it knows the shape alone."""
        found, works = [], []
        for tag, (shape, dtype, readers) in enumerate(inputs):
            kind = getattr(torch, dtype)
            if self.rank not in readers:
                found.append(torch.zeros((), dtype=kind).expand(shape))
                continue
            found.append(torch.empty(shape, dtype=kind))
            if found[-1].nbytes:
                works.append(self._host.post((HOST, self.rank), found[-1], tag))
        try:
            for work in works:
                work.wait(timedelta(seconds=FOREVER))
        except RuntimeError as e:
            raise PeerLost("K058", f"the batch does not come: {e}") from e
        return found

    def _do_update(self, command: Message) -> Message:
        self.doing.set("UPDATE")
        with _user("the optimizer failed"):
            self._own.update()
        return {"norm": self._own.norm}

    def _do_options(self, command: Message) -> None:
        apply_options(self._own.named_slots(), command["changed"])

    def _do_save(self, command: Message) -> None:
        self.doing.set("SAVE")
        self._own.save(command["folder"])

    def _do_load(self, command: Message) -> Message:
        self.doing.set("LOAD")
        self._own.load(command["folder"])
        return {"steps": self._own.steps}

    def _do_abandon(self, command: Message) -> None:
        self._own.ranks.close()

    def _do_link(self, command: Message) -> None:
        self._own.relink(command["name"])


@contextmanager
def _user(what: str) -> Iterator[None]:
    """Code of the user's: its error is told with where it came from.

    Raises:  DfcError K057.
    """
    try:
        yield
    except DfcError:
        raise
    except Exception as e:  # whatever that code raises
        lines = "".join(traceback.format_exception(e)).rstrip().splitlines()[-_TOLD:]
        told = "\n".join(f"  {line}" for line in lines)
        raise DfcError("K057", f"{what}: {type(e).__name__}: {e}\n{told}") from e


if __name__ == "__main__":
    main(kind=TrainingWorker)
