"""The processes of one job, this one among them, and the store through which they agree."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from dfc.errors import DfcError
from dfc.runtime.pipeline.links import gloo_device
from dfc.runtime.pipeline.waiting import Waiting

_REMEDIES = {
    "model": "every process makes the same model with the same weights: call torch.manual_seed "
    "before it is made, or load one file"
}
MEETING = 120.0  # seconds for all ranks to come


class World:
    """`rank` of `size`; without a store they meet at the address that the launcher gave.

    `hosts` says on which host each rank is; where all are on one they listen on loopback alone.
    In `folder` they may leave what somebody else takes away, whatever becomes of them.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: Any = None,
        *,
        hosts: Sequence[int] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.rank, self.size, self.folder = rank, size, folder
        self.hosts = list(hosts or [0] * size)
        self.one_host = len(set(self.hosts)) == 1
        self._first = store
        self.waiting = Waiting()
        self._own = threading.local()

    @staticmethod
    def of_launcher() -> World:
        """As torchrun says; nothing is connected yet.

        Raises:  DfcError N057 for a process that torchrun did not start.
        """
        try:
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            hosts = [r // local for r in range(size)]  # torchrun numbers host by host
        except (KeyError, ValueError, ZeroDivisionError):
            raise DfcError(
                "N057", "this process was not started by torchrun: RANK and WORLD_SIZE are not set",
                help="torchrun --nproc-per-node 2 train.py, or -m dfc.cli run MODEL --pipeline 2 "
                "--on torchrun", status=2,
            ) from None  # fmt: skip
        return World(rank, size, hosts=hosts)

    @property
    def store(self) -> Any:
        """The store, under a prefix of dfc's own and of this start of the job.

        Why:  each thread has its own connection: one that waits would make all others wait.
        """
        from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

        if self._first is None:
            wait = timedelta(seconds=MEETING)
            self._first, _, _ = next(rendezvous("env://", self.rank, self.size, timeout=wait))
        if not hasattr(self._own, "store"):
            born = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._own.store = PrefixStore(f"dfc/{born}", self._first.clone())
        return self._own.store

    @cached_property
    def device(self) -> Any:
        """Loopback when all ranks are on one host, else the interface that gloo is told."""
        if self.one_host:
            return gloo_device()
        from torch.distributed import ProcessGroupGloo

        interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
        if interface:
            return ProcessGroupGloo.create_device(interface=interface)
        return ProcessGroupGloo.create_default_device()

    def put(self, key: str, message: Any) -> None:
        self.store.set(key, json.dumps(message))

    def get(self, key: str, seconds: float) -> Any:
        """A message of the store, None when nobody wrote it in time."""

        def found() -> Any:
            try:
                self.store.wait([key], timedelta(seconds=seconds))
            except RuntimeError:
                return None
            return json.loads(self.store.get(key))

        return self.waiting(found)

    def peek(self, key: str) -> Any:
        """A message of the store, None when it is not there yet."""
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def share(self, key: str, mine: Any, seconds: float = MEETING) -> list[Any]:
        """What every rank says under a key, in the order of ranks: all must call it.

        Raises:  DfcError K058 for a rank that does not.
        """
        self.put(f"{key}/{self.rank}", mine)
        found = []
        for rank in range(self.size):
            found.append(self.get(f"{key}/{rank}", seconds))
            if found[-1] is None:
                raise DfcError("K058", f"rank {rank} did not come in {seconds:.0f} s")
        return found

    def expect(self, ranks: int) -> None:
        """
        Raises:  DfcError N057 for another number of processes than the plan has ranks.
        """
        if ranks != self.size:
            raise DfcError(
                "N057", f"the plan has {ranks} ranks, but there are {self.size} processes",
                help=f"torchrun --nproc-per-node {ranks}, or --nnodes times --nproc-per-node",
                status=2,
            )  # fmt: skip

    def same(self, what: Mapping[str, str], key: str = "has", help: str | None = None) -> None:
        """Compare what every rank has; `help` is for one that differs.

        Raises:  DfcError N055 that names the first that differs; K058 for one that did not come.
        """
        for rank, found in enumerate(self.share(key, dict(what))):
            for name, mine in what.items():
                if found.get(name) != mine:
                    raise DfcError(
                        "N055",
                        f"rank {rank} has {name} {_short(found.get(name))}, "
                        f"rank {self.rank} has {_short(mine)}",
                        help=help
                        or _REMEDIES.get(name, "all ranks need the same model, plan and versions"),
                    )


def _short(x: Any) -> str:
    return str(x)[:16]
