"""The processes of a pipeline's ranks: started, watched, ended, started again.

What a rank sends, and that it is gone, come as events into one queue; who waits for an event also
looks after everybody's health. A rank is lost when its process ends, when it gives no sign of life,
or when an action takes much longer than predicted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, Queue
from typing import Protocol

from dfc.errors import DfcError
from dfc.planning.actions import Kind
from dfc.runtime.pipeline.control import Channel, Door, Message

SILENT = 3.0  # seconds without a sign of life
LATE = 5.0  # times the predicted duration, and at least
AT_LEAST = 2.0  # seconds
UNKNOWN = 60.0  # seconds for an action of which nothing is known yet
LOADING = 300.0  # seconds to import PyTorch, read the stages and build them
_TICK = 0.05


class Handle(Protocol):
    """A process, wherever it is."""

    def kill(self) -> None:
        """End it now, whatever it is doing, and wait until it is gone."""
        ...

    def story(self) -> str:
        """How it ended, and what it said last."""
        ...


class Launcher(Protocol):
    """Starts the process of a rank, which then knocks at the door.

    `shares_devices` is whether all ranks call the same devices by the same names.
    """

    shares_devices: bool

    def start(self, rank: int, born: int, door: Door) -> Handle: ...

    def close(self) -> None: ...


@dataclass
class Member:
    """What is known of one rank's process. `born` tells it from those before it."""

    rank: int
    born: int
    handle: Handle
    began: float
    channel: Channel | None = None
    loaded: bool = False
    pid: int = 0
    heard: float = 0.0
    changed: float = 0.0  # when it last began with something else
    what: str = "start"
    doing: str = "start"
    count: int = -1

    def hear(self, message: Message, now: float) -> None:
        self.heard = now
        if message.get("count", self.count) != self.count:
            self.changed = now
            self.count = message["count"]
            self.what, self.doing = message["what"], message["doing"]


class RankLost(Exception):
    """Ranks that are gone or of no use any more, with the reason of each."""

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__("; ".join(f"rank {r}: {why}" for r, why in sorted(reasons.items())))
        self.reasons = dict(reasons)


class Crew:
    """All ranks' processes."""

    def __init__(self, ranks: int, launcher: Launcher, address: str = "127.0.0.1") -> None:
        self.launcher = launcher
        self.members: dict[int, Member] = {}
        self.ranks = ranks
        self.expected: dict[tuple[Kind, int], float] = {}  # seconds of an action of a stage
        self._born = 0
        self._starting = threading.Lock()  # nobody is welcomed before it is a member
        self._events: Queue[tuple[int, int, Message | None]] = Queue()
        self._looked = time.monotonic()
        self.door = Door(self._welcome, address)

    def start(self, rank: int) -> None:
        """Start a rank's process; it is one of the members from now on."""
        with self._starting:
            self._born += 1
            handle = self.launcher.start(rank, self._born, self.door)
            now = time.monotonic()
            self.members[rank] = Member(rank, self._born, handle, now, heard=now, changed=now)

    def tell(self, message: Message, ranks: Sequence[int] | None = None) -> None:
        """Send a command; who is gone is found otherwise."""
        for rank in self.members if ranks is None else ranks:
            channel = self.members[rank].channel
            if channel is not None:
                channel.send(message)

    def put(self, source: int, message: Message) -> None:
        """An event of the host's own."""
        self._events.put((source, 0, message))

    def next(self, seconds: float) -> tuple[int, Message] | None:
        """The next thing that a rank or the host has to say, None when nobody spoke in time.

        Raises:  RankLost.
        """
        until = time.monotonic() + seconds
        while True:
            left = until - time.monotonic()
            try:
                rank, born, message = self._events.get(timeout=max(0.0, min(left, _TICK)))
            except Empty:
                self.look()
                if left <= 0:
                    return None
                continue
            found = self._heard(rank, born, message)
            if found is not None:
                return found
            self.look()

    def _heard(self, rank: int, born: int, message: Message | None) -> tuple[int, Message] | None:
        """An event of a process that is still a member."""
        if born == 0:
            assert message is not None
            return rank, message
        member = self.members.get(rank)
        if member is None or member.born != born:
            return None  # of a process that was given up
        if message is None:
            member.handle.kill()  # its connection is closed: the rest follows
            raise RankLost({rank: member.handle.story()})
        if message["did"] == "loaded":
            member.loaded = True
        return rank, message

    def look(self) -> None:
        """Everybody's health.

        Raises:  RankLost.
        """
        now = time.monotonic()
        stalled, self._looked = now - self._looked > 1.0, now
        if stalled:  # it is this process that stood still: it cannot tell who was silent
            for m in self.members.values():
                m.heard = m.changed = now
            return
        lost = {m.rank: why for m in self.members.values() if (why := self._late(m, now))}
        if lost:
            raise RankLost(lost)

    def _late(self, m: Member, now: float) -> str | None:
        if not m.loaded:
            if now - m.began > LOADING:
                return f"it is not ready after {LOADING:.0f} s"
            return None
        if now - m.heard > SILENT:
            return f"no sign of life for {now - m.heard:.1f} s, last in {m.doing}"
        if m.what in Kind.__members__:
            limit, told = self._deadline(m)
            if now - m.changed > limit:
                return f"{m.doing} takes longer than {told}"
        return None

    def _deadline(self, m: Member) -> tuple[float, str]:
        """The seconds that the action a member is in may take."""
        stage = int(m.doing.partition("(")[2].partition(",")[0])
        expected = self.expected.get((Kind[m.what], stage))
        if expected is None:
            return UNKNOWN, f"{UNKNOWN:.0f} s"
        limit = max(AT_LEAST, LATE * expected)
        return limit, f"{limit:.3g} s, {expected:.3g} s were predicted"

    def busy(self) -> bool:
        """Whether any rank computes."""
        return any(m.what in Kind.__members__ for m in self.members.values())

    def quiet(self, since: float) -> float:
        """For how many seconds no rank has begun with anything, since a time of the same clock."""
        return time.monotonic() - max(since, *(m.changed for m in self.members.values()))

    def bury(self, rank: int) -> None:
        """End a rank's process and forget it."""
        member = self.members.pop(rank, None)
        if member is not None:
            member.handle.kill()
            if member.channel is not None:
                member.channel.close()

    def close(self) -> None:
        """End all processes, at once."""
        for rank in list(self.members):
            self.bury(rank)
        self.door.close()
        self.launcher.close()

    def _welcome(self, channel: Channel, hello: Message) -> None:
        """Called by the door, on a thread that then reads what the rank sends."""
        rank, born = hello["rank"], hello["born"]
        with self._starting:
            member = self.members.get(rank)
        if member is None or member.born != born:
            channel.close()
            return
        member.channel, member.pid, member.heard = channel, hello["pid"], time.monotonic()
        while True:
            message = channel.receive()
            if message is not None:
                member.hear(message, time.monotonic())
            if message is None or message["did"] != "alive":
                self._events.put((rank, born, message))
            if message is None:
                return


def lost_error(reasons: Mapping[int, str], waiting: Sequence[str]) -> DfcError:
    """The error that names who is lost and who waits for whom."""
    if not reasons:
        told = " and ".join(waiting) or "no rank computes"
        return DfcError("K058", f"no rank is lost, but a link is, or all wait for others: {told}")
    who = ", ".join(f"rank {r}" for r in sorted(reasons))
    while_ = f" while {' and '.join(waiting)}" if waiting else ""
    why = "; ".join(dict.fromkeys(reasons.values()))
    return DfcError("K058", f"{who} lost{while_}: {why}")
