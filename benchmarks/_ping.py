"""Messages around a ring of three processes, with nothing of dfc but the links: what they cost.

As many are under way as in a pipeline, and each member only passes on what it gets, so that a lap
of the ring is what a microbatch's three messages take when nothing is computed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import deque
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from dfc.runtime.pipeline.linking import joined, meeting
from dfc.runtime.pipeline.links import Linked

MEMBERS = 3
AHEAD = 8
_PAIRS = [(i, (i + 1) % MEMBERS) for i in range(MEMBERS)]
_WAIT = timedelta(seconds=60)


class Member:
    """One of the ring: it asks for some messages ahead, as a rank does."""

    def __init__(self, links: Linked, nbytes: int) -> None:
        self.links, self.nbytes = links, nbytes
        self.before = (links.me - 1) % MEMBERS, links.me
        self.after = links.me, (links.me + 1) % MEMBERS
        self._asked: deque[tuple[Any, torch.Tensor]] = deque()
        self._sent: deque[tuple[Any, torch.Tensor]] = deque()

    def ask(self, count: int = 1) -> None:
        for _ in range(count):
            block = torch.empty(self.nbytes, dtype=torch.uint8)
            self._asked.append((self.links.post(self.before, block, 0), block))

    def get(self) -> torch.Tensor:
        work, block = self._asked.popleft()
        work.wait(_WAIT)
        return block

    def put(self, block: torch.Tensor) -> None:
        self._sent.append((self.links.post(self.after, block, 0), block))
        if len(self._sent) > AHEAD:
            self._sent.popleft()[0].wait(_WAIT)


class Ring:
    """The first member, with the others as processes that end with it."""

    def __init__(self, kind: str, nbytes: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        where = meeting(kind, Path(self._folder.name), "127.0.0.1")
        told = [str(x) for x in (self._folder.name, nbytes, *where.told)]
        self._others = [
            subprocess.Popen([sys.executable, __file__, str(me), *told])
            for me in range(1, MEMBERS)
        ]  # fmt: skip
        try:
            self._member = Member(where.links(0, _PAIRS, "ring"), nbytes)
        except RuntimeError:
            self.close()
            raise

    def laps(self, count: int) -> None:
        """So many messages once around."""
        member, block = self._member, torch.zeros(self._member.nbytes, dtype=torch.uint8)
        for i in range(count + AHEAD):
            if i >= AHEAD:
                member.get()
            if i < count:
                member.ask()
                member.put(block)

    def close(self) -> None:
        for process in self._others:
            process.kill()
            process.wait()
        self._folder.cleanup()

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def main() -> None:
    torch.set_num_threads(1)
    me, folder, nbytes, kind, *at = sys.argv[1:]
    where = joined([kind, *at[:1], *map(int, at[1:])], Path(folder), "127.0.0.1")
    member = Member(where.links(int(me), _PAIRS, "ring"), int(nbytes))
    member.ask(AHEAD)
    with suppress(RuntimeError):  # the others are gone
        while True:
            block = member.get()
            member.ask()
            member.put(block)


if __name__ == "__main__":
    main()
