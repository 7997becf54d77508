"""How the processes of a pipeline find each other to make links, anew whenever one was lost.

local   Unix sockets in the pipeline's folder, for ranks of this host
gloo    process groups of `torch.distributed`, made by way of a store, wherever ranks are
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from dfc.errors import DfcError
from dfc.runtime.pipeline.links import Linked, Links, Pair, gloo_device
from dfc.runtime.pipeline.local_links import LocalLinks
from dfc.runtime.pipeline.spawn import private_folder
from dfc.runtime.pipeline.world import MEETING, World

LINKING = 20.0  # seconds for both ends of a link to come
KINDS = ("local", "gloo")


class Meeting(Protocol):
    """Where the members of a pipeline meet; `told` is what one that comes has to know."""

    told: list[Any]

    def links(self, me: int, pairs: Sequence[Pair], name: str) -> Linked:
        """
        Raises:  RuntimeError when another member does not come in time.
        """
        ...


class LocalMeeting:
    """In a folder of this host."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.told = folder, ["local"]

    def links(self, me: int, pairs: Sequence[Pair], name: str) -> Linked:
        return LocalLinks(me, pairs, self.folder, name, LINKING)


class GlooMeeting:
    """At a store, which the one without `at` has; `address` is where others reach this process."""

    def __init__(self, address: str, at: tuple[str, int] | None = None) -> None:
        self._device = gloo_device(address)
        self._store = _joined(*at) if at else None
        if self._store is None:
            self._store, at = _store(address)
        self.told = ["gloo", *(at or ())]

    def links(self, me: int, pairs: Sequence[Pair], name: str) -> Linked:
        return Links(me, pairs, self._store, name, self._device, LINKING)


class WorldMeeting:
    """Of the processes of a launcher, each of which is a rank: all make it, and in the same order.

    `key` is a part of their store that nothing else has. Sockets are in a folder of the first
    rank's, which tells the others where it is.
    Raises:  DfcError N059 for links that there are not, K058 when the first rank does not come.
    """

    def __init__(self, world: World, kind: str | None, key: str) -> None:
        self.world, self.kind, self._key = world, links_of(kind, world.one_host), key
        self._folder: Any = None  # of the first rank
        self._at = ""
        if self.kind == "local":
            if world.rank == 0:
                self._folder = private_folder()
                world.put(f"{key}/sockets", self._folder.name)
            self._at = world.get(f"{key}/sockets", MEETING)
            if self._at is None:
                raise DfcError("K058", f"rank 0 did not come in {MEETING:.0f} s")

    def links(self, me: int, pairs: Sequence[Pair], name: str) -> Linked:
        """
        Raises:  RuntimeError when another member does not come in time.
        """
        if self.kind == "local":
            return LocalLinks(me, pairs, Path(self._at), name, MEETING)
        w = self.world
        return Links(me, pairs, w.store, f"{self._key}/{name}", w.device, MEETING)

    def close(self) -> None:
        """Take the folder away."""
        if self._folder is not None:
            self._folder.cleanup()


def meeting(kind: str | None, folder: Path, address: str) -> Meeting:
    """The host's: as asked for, or what suits its address.

    Raises:  DfcError N059 for links that there are not.
    """
    local = links_of(kind, address == "127.0.0.1") == "local"
    return LocalMeeting(folder) if local else GlooMeeting(address)


def links_of(kind: str | None, one_host: bool) -> str:
    """The kind of links: as asked for, else sockets where all ranks are here and there are any.

    Raises:  DfcError N059 for links that there are not, or not between these ranks.
    """
    if kind not in (None, *KINDS):
        raise DfcError("N059", f"there are no links `{kind}`: {', '.join(KINDS)}", status=2)
    possible = one_host and hasattr(socket, "AF_UNIX")
    if kind == "local" and not possible:
        why = "the ranks are on several hosts" if not one_host else "this system has none"
        help = "links over gloo go wherever ranks are"
        raise DfcError(
            "N059", f"ranks cannot be linked by Unix sockets: {why}", help=help, status=2
        )
    return kind or ("local" if possible else "gloo")


def joined(told: Sequence[Any], folder: Path, address: str) -> Meeting:
    """A rank's."""
    kind, *at = told
    return LocalMeeting(folder) if kind == "local" else GlooMeeting(address, (at[0], at[1]))


def _store(host: str) -> tuple[Any, tuple[str, int]]:
    """A store for links to be made, at that address alone, and where it is."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    with socket.socket() as listener:
        listener.bind((host, 0))
        listener.listen(128)
        port = listener.getsockname()[1]
        store = TCPStore(
            host, port, is_master=True, wait_for_workers=False,
            timeout=timedelta(seconds=LINKING), master_listen_fd=listener.detach(),
        )  # fmt: skip
    return store, (host, port)


def _joined(host: str, port: int) -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=LINKING))
