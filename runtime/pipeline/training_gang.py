"""The processes of a trainer, as one thing that is told what to do and answers, or is lost."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError
from dfc.planning.actions import Kind
from dfc.planning.stages import HOST
from dfc.runtime.pipeline.control import Message
from dfc.runtime.pipeline.crew import AT_LEAST, LATE, Crew, Launcher, RankLost, lost_error
from dfc.runtime.pipeline.linking import Meeting
from dfc.runtime.pipeline.links import Linked

if TYPE_CHECKING:
    import torch

_STANDING = 10.0  # seconds for which all ranks may wait for others, at least
_WRITING = 1800.0  # seconds for anything else than a step
_HEARD = 0.6  # seconds after a loss in which the others say what they wait for


class Gang:
    """Ranks that are started together, and end together when one is lost.

    `readers` are the ranks that read each of the graph's inputs.
    """

    def __init__(
        self, ranks: int, launcher: Launcher, meeting: Meeting, readers: Sequence[Sequence[int]]
    ) -> None:
        self.crew = Crew(ranks, launcher)
        self.meeting, self.readers = meeting, readers
        self.alive = False
        self.why: DfcError | None = None  # they have ended
        self._links: Linked | None = None
        self._number = self._linked = 0
        self._abandoned = False

    def start(self) -> None:
        """All ranks, loaded and linked.

        Raises:  DfcError K058 for one that is lost, or what a rank says that is wrong.
        """
        try:
            for rank in range(self.crew.ranks):
                self.crew.start(rank)
            self._listen(0, "loaded", _WRITING)
            self.alive = True
            self._linked += 1
            name = f"host{self._linked}"
            number = self._tell("join", name=name)
            pairs = [(HOST, r) for r in range(self.crew.ranks)]
            self._links = self.meeting.links(HOST, pairs, name)
            self._listen(number, "done", _WRITING)
        except RuntimeError as e:
            self.end()
            raise lost_error({}, [str(e)]) from e
        except (DfcError, KeyboardInterrupt):
            self.end()
            raise

    def end(self) -> None:
        """End all processes, at once."""
        for rank in list(self.crew.members):
            self.crew.bury(rank)
        if self._links is not None:
            self._links.close()
        self._links, self.alive, self._abandoned = None, False, False

    def close(self) -> None:
        self.end()
        self.crew.close()

    def backward(
        self, flat: Sequence[torch.Tensor], of: int = 1, fresh: bool = True
    ) -> list[Message]:
        """A batch's gradients, which is one `of` several, up to the optimizers: what each rank says
        of it. They are added to those before, unless they are `fresh`.

        Raises:  DfcError K050 for an action that fails: nothing has changed then; K058.
        """
        self._mend()
        assert self._links is not None
        inputs = [[list(x.shape), str(x.dtype).removeprefix("torch."), list(readers)]
                  for x, readers in zip(flat, self.readers, strict=True)]  # fmt: skip
        try:
            number = self._tell("backward", inputs=inputs, of=of, fresh=fresh)
            works = []
            for tag, (x, readers) in enumerate(zip(flat, self.readers, strict=True)):
                block = x.detach().contiguous()
                if block.nbytes:
                    works += [self._links.post((HOST, r), block, tag) for r in readers]
        except RuntimeError:
            works = []  # somebody is gone: it is told who
        except KeyboardInterrupt:
            self.end()  # half a batch is under way
            raise
        try:
            found = self._listen(number, "done", None)
            for work in works:
                work.wait(timedelta(seconds=_STANDING))
        except RuntimeError as e:
            raise self._lost(RankLost({})) from e
        except (DfcError, KeyboardInterrupt):
            self._abandon()
            raise
        self._learn(found)
        return found

    def ask(self, do: str, **more: Any) -> list[Message]:
        """Tell all ranks something, and wait until it is done.

        One that fails ends all, since the others have done it; but what cannot be written is not
        written by any.
        Raises:  DfcError K058 for a rank that is lost, or what a rank says that is wrong.
        """
        self._mend()
        number = self._tell(do, **more)
        try:
            return self._listen(number, "done", _WRITING)
        except DfcError as e:
            if do != "save" or e.code == "K058":
                self.end()
                self.why = e
            raise

    def _tell(self, do: str, **more: Any) -> int:
        self._number += 1
        self.crew.tell({"do": do, "number": self._number, **more})
        return self._number

    def _abandon(self) -> None:
        """Whoever waits gives up; `_mend` makes links anew."""
        if self.alive:
            self._abandoned_at = self._tell("abandon")
            self._abandoned = True

    def _mend(self) -> None:
        """After a step that was given up: everybody has done so, and is linked again."""
        if not self._abandoned:
            return
        try:
            self._listen(self._abandoned_at, "done", _WRITING)
            self._linked += 1
            number = self._tell("link", name=f"links{self._linked}")
            self._listen(number, "done", _WRITING)
        except (DfcError, KeyboardInterrupt):
            self.end()
            raise
        self._abandoned = False

    def _listen(self, number: int, wanted: str, limit: float | None) -> list[Message]:
        """The answers of all ranks, in their order; without a limit ranks have their deadlines."""
        found: dict[int, Message] = {}
        began = time.monotonic()
        broken: float | None = None
        try:
            while len(found) < self.crew.ranks:
                heard = self.crew.next(0.2)
                rank, message = heard or (HOST, {"did": "", "number": None})
                if message["did"] == wanted and message.get("number", 0) == number:
                    found[rank] = message
                elif message["did"] == "failed" and message["number"] == number:
                    raise _failed(rank, message)
                elif message["did"] == "broken" and message["number"] == number:
                    broken = broken or time.monotonic()
                if broken is not None and time.monotonic() - broken > AT_LEAST:
                    raise RankLost({})
                if self._stand_still(began, limit):
                    raise RankLost({})
        except RankLost as e:
            raise self._lost(e) from None
        return [found[r] for r in range(self.crew.ranks)]

    def _stand_still(self, began: float, limit: float | None) -> bool:
        if limit is not None:
            return time.monotonic() - began > limit
        patience = max(_STANDING, LATE * max(self.crew.expected.values(), default=0.0))
        return not self.crew.busy() and self.crew.quiet(began) > patience

    def _lost(self, lost: RankLost) -> DfcError:
        """Who is lost, and what the others wait for; all of them are ended."""
        reasons = dict(lost.reasons)
        until = time.monotonic() + _HEARD
        while reasons and time.monotonic() < until:
            try:
                self.crew.next(until - time.monotonic())
            except RankLost:  # they go because the first one did
                break
        waiting = [
            f"rank {m.rank} waits in {m.doing}"
            for m in self.crew.members.values()
            if m.rank not in reasons and m.what in ("RECV", "SEND", "LOSS", "ALLREDUCE", "NORMS")
        ]
        self.end()
        return lost_error(reasons, waiting)

    def _learn(self, found: Sequence[Message]) -> None:
        """What actions take, for the deadlines of the next step."""
        times: dict[tuple[Kind, int], list[float]] = {}
        for message in found:
            for kind, stage, _, start, end in message["spans"]:
                times.setdefault((Kind(kind), stage), []).append(end - start)
        self.crew.expected.update({k: median(t) for k, t in times.items()})


def _failed(rank: int, message: Mapping[str, Any]) -> DfcError:
    text = f"rank {rank}: {message['message']}"
    return DfcError(message["code"], text, help=message["help"], status=message["status"])


def entry(folder: Path, threads: list[int], devices: list[str]) -> Launcher:
    """Processes of this machine that train."""
    from dfc.runtime.pipeline.spawn import Spawner

    return Spawner(folder, threads, devices, entry=("dfc.runtime.pipeline.training_worker",))
