"""How the processes of a pipeline find each other to make links, anew whenever one was lost.

local   Unix sockets in the pipeline's folder, for ranks of this host
gloo    process groups of `torch.distributed`, made by way of a store, wherever ranks are
nccl    beside either of them, between ranks on two CUDA devices: what is in tensors
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from dfc.errors import DfcError
from dfc.planning.stages import HOST
from dfc.runtime.pipeline.device_links import DeviceLinks, MixedLinks
from dfc.runtime.pipeline.links import Linked, Links, Pair, gloo_device
from dfc.runtime.pipeline.local_links import LocalLinks
from dfc.runtime.pipeline.rank_device import device_identity
from dfc.runtime.pipeline.spawn import private_folder
from dfc.runtime.pipeline.world import MEETING, World

LINKING = 20.0  # seconds for both ends of a link to come
KINDS = ("local", "gloo", "nccl")

Place = tuple[int, str]  # the host of a rank, and its device there


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

    `fast` links have nccl beside them, from and to this rank's `device`. `key` is a part of their
    store that nothing else has. Sockets are in a folder of the first rank's, which tells the others
    where it is.
    Raises:  DfcError N059 for links that there are not, K058 when the first rank does not come.
    """

    def __init__(
        self, world: World, kind: str | None, key: str, fast: Sequence[Pair] = (), device: str = ""
    ) -> None:
        self.world, self.kind, self._key = world, links_of(kind, world.one_host), key
        self._fast, self._device = list(fast), device
        self._folder: Any = None  # of the first rank
        self._at = ""
        if self.kind == "local":
            if world.rank == 0:
                self._folder = private_folder(world.folder)
                world.put(f"{key}/sockets", self._folder.name)
            self._at = world.get(f"{key}/sockets", MEETING)
            if self._at is None:
                raise DfcError("K058", f"rank 0 did not come in {MEETING:.0f} s")

    def links(self, me: int, pairs: Sequence[Pair], name: str) -> Linked:
        """
        Raises:  RuntimeError when another member does not come in time.
        """
        base, prefix = self.host_links(me, pairs, name), f"{self._key}/{name}"
        return _with_device(base, self._fast, self.world.store, prefix, self._device, MEETING)

    def host_links(self, me: int, pairs: Sequence[Pair], name: str) -> Linked:
        """As `links`, of the hosts' memory alone."""
        if self.kind == "local":
            return LocalLinks(me, pairs, Path(self._at), name, MEETING)
        w, prefix = self.world, f"{self._key}/{name}"
        return w.waiting(lambda: Links(me, pairs, w.store, prefix, w.device, MEETING))

    def close(self) -> None:
        """Take the folder away, when all are linked: nobody looks for sockets any more, and a rank
        that is killed leaves nothing behind."""
        if self._folder is not None:
            self._folder.cleanup()


class DeviceMeeting:
    """As another one, and at a store for the devices of the ranks of some pairs.

    `device` is that of the rank that comes; the host has none, and has the store.
    """

    def __init__(
        self, base: Meeting, pairs: Sequence[Pair], address: str, device: str = "",
        at: tuple[str, int] | None = None,
    ) -> None:  # fmt: skip
        self.base, self.pairs, self.device = base, list(pairs), device
        self._store = _joined(*at) if at else None
        if self._store is None:
            self._store, at = _store(address)
        self.told = ["nccl", *(at or ()), [list(p) for p in pairs], *base.told]

    def links(self, me: int, pairs: Sequence[Pair], name: str) -> Linked:
        base = self.base.links(me, pairs, name)
        return _with_device(base, self.pairs, self._store, name, self.device, LINKING)


def _with_device(
    base: Linked, fast: Sequence[Pair], store: Any, name: str, device: str, seconds: float
) -> Linked:
    """Links, and those of the rank's device that are to be beside them."""
    mine = [p for p in fast if base.me in p]
    if not mine:
        return base
    with ExitStack() as failing:
        failing.callback(base.close)
        made = MixedLinks(base, DeviceLinks(base.me, mine, store, name, device, seconds))
        failing.pop_all()
    return made


def device_pairs(
    kind: str | None, pairs: Sequence[Pair], places: Sequence[Place], available: bool
) -> list[Pair]:
    """The links whose tensors go over nccl: where it is not ruled out, and ranks are on two GPUs.

    Why:     a communicator refuses two ranks on one device.
    Raises:  DfcError N059 where nccl is asked for and there is none, or nothing for it to do.
    """
    found = [
        (a, b) for a, b in pairs
        if HOST not in (a, b) and "cpu" not in (places[a][1], places[b][1])
        and places[a] != places[b]
    ]  # fmt: skip
    if kind == "nccl" and not (found and available):
        why = "no two linked ranks have CUDA devices of their own" if available else "no nccl here"
        help = "leave --links out: the best that there is is taken"
        raise DfcError("N059", f"ranks cannot be linked by nccl: {why}", help=help, status=2)
    return found if available and kind in (None, "nccl") else []


def places_in(world: World, devices: Sequence[str], key: str) -> list[Place]:
    """The host of each rank, and which of its devices it has, as every rank says under a key."""
    if all(d == "cpu" for d in devices):
        return list(zip(world.hosts, devices, strict=True))
    mine = device_identity(devices[world.rank])
    return list(zip(world.hosts, world.share(f"{key}/device", mine), strict=True))


def nccl_is_here() -> bool:
    import torch.distributed as dist

    return bool(dist.is_available() and dist.is_nccl_available())


def meeting(
    kind: str | None, folder: Path, address: str, fast: Sequence[Pair] = ()
) -> Meeting:  # fmt: skip
    """The host's: as asked for, or what suits its address; `fast` links have nccl beside them.

    Raises:  DfcError N059 for links that there are not.
    """
    local = links_of(kind, address == "127.0.0.1") == "local"
    base = LocalMeeting(folder) if local else GlooMeeting(address)
    return DeviceMeeting(base, fast, address) if fast else base


def links_of(kind: str | None, one_host: bool) -> str:
    """The kind of links of the host's memory: as asked for, else sockets where all ranks are here.

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
    if kind in ("local", "gloo"):
        return kind
    return "local" if possible else "gloo"


def joined(told: Sequence[Any], folder: Path, address: str, device: str = "cpu") -> Meeting:
    """A rank's, which is on that device."""
    kind, *at = told
    if kind == "nccl":
        host, port, pairs, *rest = at
        base = joined(rest, folder, address)
        fast = [(a, b) for a, b in pairs]
        return DeviceMeeting(base, fast, address, device, (host, port))
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
