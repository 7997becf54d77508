"""A process that is one rank: it connects to its host, loads its stages, and does as it is told.

    python -m dfc.runtime.pipeline.worker FOLDER RANK BORN HOST PORT

The key of the control channel is in DFC_RANK_KEY. The process ends with its host, whatever it is
doing. What it is told and what it answers:

    link(name, meeting)                    linked, unlinked(why)
    program(text, name)
    step(number, microbatches, sizes)      done(spans, sent, streamed), failed(error), broken(doing)
    abandon                                abandoned
    end
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn

from dfc.errors import DfcError
from dfc.runtime.pipeline.control import BEAT, Channel, Message, knock
from dfc.runtime.pipeline.spawn import owner_is_gone

Before = Callable[[], None]


class Worker:
    """One rank's process: commands come on a thread of their own, so that it is never deaf."""

    def __init__(
        self, folder: Path, rank: int, channel: Channel, before: Before | None, device: str
    ) -> None:
        from dfc.runtime.pipeline.links import Doing

        self.folder, self.rank, self.channel = folder, rank, channel
        self.before, self.device = before, device
        self.doing = Doing("load")
        self.commands: SimpleQueue[Message] = SimpleQueue()
        self.traffic: Any = None
        self.links: Any = None
        self.meeting: Any = None
        self.routes: Any = None

    def serve(self) -> None:
        """Until the host says so, or is gone."""
        threading.Thread(target=self._listen, name="dfc-control", daemon=True).start()
        if not self._load():
            return
        while True:
            command = self.commands.get()
            match command["do"]:
                case "link":
                    self._link(command)
                case "program":
                    self._program(command)
                case "step":
                    self._step(command)
                case "abandon":
                    self._drop()
                    self._tell("abandoned")  # and in what
                    self.doing.set("idle")  # else what it was in takes too long
                case _:
                    return

    def _listen(self) -> None:
        """Commands to the queue, and a sign of life several times a second."""
        due = time.monotonic()
        while True:
            if self.channel.has_message(max(0.0, due - time.monotonic())):
                command = self.channel.receive()
                if command is None:
                    self._orphaned()
                if command["do"] == "abandon":
                    self._interrupt()
                self.commands.put(command)
            if time.monotonic() >= due:
                self._tell("alive")
                due = time.monotonic() + BEAT

    def _interrupt(self) -> None:
        """End what the rank waits for, if it waits."""
        traffic, links = self.traffic, self.links
        if traffic is not None:
            traffic.abandoned = True
        if links is not None:
            links.interrupt()

    def _orphaned(self) -> NoReturn:
        """The host is gone: nobody wants what this process does, nor the folder it left behind."""
        _leave(self.folder)

    def _tell(self, did: str, **more: Any) -> None:
        doing = self.doing
        self.channel.send(
            {"did": did, "what": doing.what, "doing": str(doing), "count": doing.count, **more}
        )

    def _load(self) -> bool:
        import torch

        from dfc.runtime.pipeline.folder import Stages, read_assembly, read_graph, stages_of

        began = time.perf_counter()
        try:
            if self.before is not None:
                self.before()
            self.made = made = read_assembly(self.folder)
            torch.set_num_threads(made.threads[self.rank])
            self.edges = made.routed()
            mine = stages_of(made, self.rank)
            held = not made.tiers  # what is streamed stays in its file
            graphs = {s: read_graph(self.folder, made.weights, s, copied=held) for s in mine}
            self.stages = Stages(made, graphs, self.rank, self.device)
        except DfcError as e:
            self._tell("failed", number=0, **error_told(e))
            return False
        self.types = self.stages.types(self.edges)
        self.doing.set("idle")
        self._tell("loaded", seconds=time.perf_counter() - began, digest=made.digest)
        return True

    def _link(self, command: Message) -> None:
        from dfc.runtime.pipeline.linking import joined
        from dfc.runtime.pipeline.links import pairs_of

        self.doing.set("link")
        pairs = pairs_of(self.edges, self.made.placement)
        try:
            if self.meeting is None:
                self.meeting = joined(
                    command["meeting"], self.folder, self.channel.address, self.stages.device.name
                )
            self.links = self.meeting.links(self.rank, pairs, command["name"])
        except RuntimeError as e:
            self._tell("unlinked", name=command["name"], why=str(e))
        else:
            self._tell("linked", name=command["name"])
        self.doing.set("idle")

    def _program(self, command: Message) -> None:
        from dfc.planning.actions import parse_program
        from dfc.runtime.pipeline.routes import routes

        self.routes = routes(parse_program(command["text"], command["name"]), self.edges)

    def _step(self, command: Message) -> None:
        from dfc.runtime.pipeline.links import Abandoned, LinkLost, Traffic

        number, microbatches = command["number"], command["microbatches"]
        sizes = [command["sizes"][i] for i in command["size_of"]]
        self.traffic = Traffic(
            self.links, self.routes, microbatches, self.types, sizes, self.doing,
            device=self.stages.device,
        )  # fmt: skip
        self.stages.brought.since()  # of a step that was given up
        try:
            done = self.stages.row(self.routes, self.traffic, microbatches, self.doing)
        except DfcError as e:
            self._drop()
            self._tell("failed", number=number, **error_told(e))
        except LinkLost as e:
            self._drop()
            self._tell("broken", number=number, peer=e.peer, why=str(e))
        except Abandoned:
            self._drop()
        else:
            self.traffic = None
            spans = [[int(a.kind), a.stage, a.microbatch, s, e] for a, s, e in done.spans]
            streamed = self.stages.brought.rows()
            sent = sorted(done.sent.items())
            self._tell("done", number=number, spans=spans, sent=sent, streamed=streamed)

    def _drop(self) -> None:
        """Let the links go: whoever waits at the other end of one is told by that."""
        if self.links is not None:
            self.links.close()
        self.links = self.traffic = None


def _leave(folder: Path) -> NoReturn:
    """End, and take away what a host that was killed left behind."""
    until = time.monotonic() + 0.5  # a process that dies closes its files first
    while not (gone := owner_is_gone(folder)) and time.monotonic() < until:
        time.sleep(0.02)
    if gone:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(3)


def error_told(e: DfcError) -> dict[str, Any]:
    first = e.diagnostics[0]
    return {"code": e.code, "message": e.message, "help": first.help, "status": e.status}


def serve(
    folder: Path, rank: int, born: int, host: tuple[str, int], key: bytes,
    before: Before | None = None, device: str = "", kind: type[Worker] = Worker,
) -> None:  # fmt: skip
    """Be a rank for the host at that address, until it says that it is over.

    `before` is called before stages are read: it loads what they may name. `device` is what the
    rank's is called here, where not as in the folder.
    """
    try:
        channel = knock(host, key)
    except OSError:  # the host ended while this process started
        _leave(folder)
    channel.send({"did": "hello", "rank": rank, "born": born, "pid": os.getpid()})
    kind(folder, rank, channel, before, device).serve()


def main(before: Before | None = None, kind: type[Worker] = Worker) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the host decides what an interrupt means
    folder, rank, born, host, port = sys.argv[1:6]
    key = bytes.fromhex(os.environ.pop("DFC_RANK_KEY"))
    serve(Path(folder), int(rank), int(born), (host, int(port)), key, before, kind=kind)
    os._exit(0)  # threads of libraries are not waited for


if __name__ == "__main__":
    main()
