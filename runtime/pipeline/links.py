"""Directed links between processes over gloo, and the messages of a step on them.

Each link is a process group of two with a store prefix of its own: messages of one link never mix
with another's, a link is made anew without the processes that it does not concern, and nothing is
asked of the order in which a backend delivers: both ends post in the order of the sender's program,
and each message has its place in that order for a tag besides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from dfc.planning.actions import Kind
from dfc.planning.stages import HOST
from dfc.runtime.pipeline.messages import Layout, Message, layout_of
from dfc.runtime.pipeline.rank_device import RankDevice, on_host
from dfc.runtime.pipeline.routes import Key, Routes

if TYPE_CHECKING:
    import torch

    from dfc.runtime.pipeline.device_links import DeviceLinks

Pair = tuple[int, int]  # from and to: ranks, or HOST
_AHEAD = 2  # messages of a link for which room is made before they are asked for
_SMALL = 1 << 20  # bytes that small messages may take together, where more of them are under way
_MOST_AHEAD = 32
_HOST_SLOTS = 4  # of edges from and to the host, whose values are all there
FOREVER = 1e6  # seconds; somebody else watches


@dataclass
class Doing:
    """What a member does at the moment, for whoever watches it: F(1,4), RECV(e7, mb4)."""

    what: str = "idle"
    number: int = 0  # the stage, or the edge
    microbatch: int = 0
    count: int = 0  # how often it changed

    def set(self, what: str, number: int = 0, microbatch: int = 0) -> None:
        self.what, self.number, self.microbatch = what, number, microbatch
        self.count += 1

    def __str__(self) -> str:
        if self.what in ("RECV", "SEND"):
            return f"{self.what}(e{self.number}, mb{self.microbatch})"
        if self.what in Kind.__members__:
            return f"{self.what}({self.number},{self.microbatch})"
        return self.what


class Abandoned(Exception):
    """The step is given up: whoever watches has said so."""


class LinkLost(Exception):
    """A message that did not come, or could not be sent."""

    def __init__(self, edge: int, microbatch: int, peer: int, receiving: bool, why: str) -> None:
        self.edge, self.microbatch, self.peer, self.receiving = edge, microbatch, peer, receiving
        super().__init__(f"{self.where}: {why}")

    @property
    def where(self) -> str:
        """The wait that it ended: RECV(e7, mb4)."""
        return f"{'RECV' if self.receiving else 'SEND'}(e{self.edge}, mb{self.microbatch})"


def member(stage: int, placement: Sequence[int]) -> int:
    """The rank of a stage; the host is its own."""
    return HOST if stage == HOST else placement[stage]


def pairs_of(edges: Sequence[Any], placement: Sequence[int]) -> list[Pair]:
    """The links that the edges need, in the order in which every member makes them."""
    found = {(member(e.source, placement), member(e.target, placement)) for e in edges}
    return sorted((a, b) for a, b in found if a != b)


@dataclass(frozen=True)
class Order:
    """The messages of a link in a step, in the order of the sender's program."""

    keys: list[Key]
    place: dict[Key, int]


def orders(routes: Routes, microbatches: Sequence[int]) -> dict[Pair, Order]:
    """The messages of each link, the host's first."""
    kept = tuple(microbatches)
    found = routes.orders.get(kept)
    if found is None:
        routes.orders.clear()  # what follows a loss is not asked for again
        made = {pair: list(keys) for pair, keys in _orders(routes, microbatches).items()}
        found = routes.orders[kept] = {
            pair: Order(keys, {key: i for i, key in enumerate(keys)}) for pair, keys in made.items()
        }
    return found


def _orders(routes: Routes, microbatches: Sequence[int]) -> dict[Pair, list[Key]]:
    edges, placement = routes.edges, routes.program.placement
    found: dict[Pair, list[Key]] = {}
    for b in microbatches:
        for e, edge in enumerate(edges):
            if edge.source == HOST:
                found.setdefault((HOST, member(edge.target, placement)), []).append((e, b))
    some = set(microbatches)
    for rank, tasks in enumerate(routes.ranks):
        for task in tasks:
            if task.action.microbatch in some:
                for e in task.gives:
                    to = member(edges[e].target, placement)
                    if to != rank:
                        found.setdefault((rank, to), []).append((e, task.action.microbatch))
    return found


class Receiving(Protocol):
    """A message that will come; its block is there once it has been waited for."""

    block: torch.Tensor | None

    def wait(self, timeout: timedelta) -> Any: ...


class Linked(Protocol):
    """The links of one member, whatever they are made of."""

    me: int

    @property
    def fast(self) -> Mapping[Pair, DeviceLinks]:
        """The links that have a device's beside them, for their tensors."""
        ...

    def post(self, pair: Pair, block: torch.Tensor, tag: int) -> Any:
        """Begin to send or to receive a block; what is returned is waited for."""
        ...

    def send(self, pair: Pair, message: Message, tag: int) -> Any:
        """Begin to send what `post` or `receive` receives as a block."""
        ...

    def receive(self, pair: Pair, nbytes: int, tag: int) -> Receiving:
        """Begin to receive a block of the link's choice."""
        ...

    def interrupt(self) -> None:
        """Whoever waits in a link is told that it is over, where that can be done."""
        ...

    def close(self) -> None: ...


class Links:
    """The links of one member. They end with the object: whoever waits at the other end is told.

    Needs:   every member makes those it has part in, of the same pairs under the same name.
    Raises:  RuntimeError when the other end does not come in time.
    """

    def __init__(
        self, me: int, pairs: Sequence[Pair], store: Any, name: str, device: Any, seconds: float
    ) -> None:
        from torch.distributed import PrefixStore, ProcessGroupGloo  # type: ignore[attr-defined]

        self.me = me
        self.fast: dict[Pair, DeviceLinks] = {}
        self.groups: dict[Pair, Any] = {}
        for a, b in pairs:
            if me in (a, b):
                options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
                options._devices, options._threads = [device], 1
                options._timeout = timedelta(seconds=seconds)
                prefix = PrefixStore(f"{name}/{a}>{b}", store)
                self.groups[a, b] = ProcessGroupGloo(prefix, int(me == b), 2, options)

    def post(self, pair: Pair, block: torch.Tensor, tag: int) -> Any:
        """Begin to send or to receive a block; what is returned is waited for."""
        group = self.groups[pair]
        if pair[0] == self.me:
            return group.send([block], 1, tag)
        return group.recv([block], 0, tag)

    def send(self, pair: Pair, message: Message, tag: int) -> Any:
        return self.post(pair, message.block(), tag)

    def receive(self, pair: Pair, nbytes: int, tag: int) -> _Posted:
        """Begin to receive a message; what is returned is waited for, and has it as its block."""
        import torch

        block = torch.empty(nbytes, dtype=torch.uint8)
        return _Posted(self.post(pair, block, tag), block)

    def interrupt(self) -> None:
        """Nothing: who waits in gloo is told when the other end lets go."""

    def close(self) -> None:
        self.groups.clear()


@dataclass
class _Posted:
    """A block that gloo fills."""

    work: Any
    block: torch.Tensor | None

    def wait(self, timeout: timedelta) -> None:
        self.work.wait(timeout)


def gloo_device(address: str = "127.0.0.1") -> Any:
    """One thread and one address for all links of a process."""
    import torch.distributed as dist

    return dist.ProcessGroupGloo.create_device(hostname=address)


@dataclass
class _Incoming:
    """One link's messages, those with room in memory, and how many were asked for."""

    order: Order
    posted: int = 0
    waiting: dict[Key, Receiving] = field(default_factory=dict)
    fetched: int = 0  # of a link that has a device's beside it
    arrived: dict[Key, list[Any]] = field(default_factory=dict)


class Traffic:
    """The messages of one member in one step.

    `sizes[b]` are those of microbatch b; `types` those of each edge that the member has part in.
    A sender that is as far ahead as an edge has slots waits for the oldest message; messages that
    are small have more slots. What is received lies on `device`, else in this machine's memory.
    """

    def __init__(
        self,
        links: Linked,
        routes: Routes,
        microbatches: Sequence[int],
        types: Mapping[int, Sequence[Any]],
        sizes: Sequence[Mapping[str, Any]],
        doing: Doing,
        seconds: float = FOREVER,
        device: RankDevice | None = None,
    ) -> None:
        self.links, self.routes, self.doing, self.device = links, routes, doing, device
        self.types, self.sizes = types, sizes
        self.timeout = timedelta(seconds=seconds)
        self.abandoned = False
        self.sent: dict[int, int] = {}
        self.orders = orders(routes, microbatches)
        self._layouts: dict[tuple[int, int], Layout] = {}
        self._under_way: dict[int, deque[tuple[int, Any, Any]]] = {}
        self._incoming = {p: _Incoming(o) for p, o in self.orders.items() if p[1] == links.me}

    def send(self, edge: int, microbatch: int, values: Sequence[Any]) -> None:
        """Hand values to the link; they may be read further, and are not to be written to.

        Raises:  LinkLost, Abandoned.
        """
        self._go_on()
        pair = self._pair(edge)
        layout = self._layout(edge, microbatch)
        fast = self.links.fast.get(pair)
        if fast is None:
            message = layout.message(on_host(values))
            nbytes = message.nbytes
        else:
            values = fast.ready(values)
            message = layout.head(values)
            nbytes = message.nbytes + sum(getattr(x, "nbytes", 0) for x in values)
        tag = 2 * self.orders[pair].place[edge, microbatch]
        slots = max(self.routes.slots[edge] or _HOST_SLOTS, _that_are_small(nbytes))
        under_way = self._under_way.setdefault(edge, deque())
        self.doing.set("SEND", edge, microbatch)
        try:
            if pair[1] == HOST:  # who gets results believes them
                self._settle()
            if layout.nbytes is None and fast is None:
                length = _length(message.nbytes)
                under_way.append((microbatch, self.links.post(pair, length, tag + 1), length))
            work = self.links.send(pair, message, tag)
            if fast is not None:
                work = _Both(work, fast.send(pair, values))
            under_way.append((microbatch, work, message))
            while len(under_way) > slots:
                under_way[0][1].wait(self.timeout)
                under_way.popleft()
        except (RuntimeError, KeyError) as e:
            raise LinkLost(edge, microbatch, pair[1], False, str(e)) from e
        self.sent[edge] = self.sent.get(edge, 0) + nbytes

    def receive(self, edge: int, microbatch: int) -> list[Any]:
        """The values of a message.

        Raises:  LinkLost, Abandoned.
        """
        self._go_on()
        pair = self._pair(edge)
        incoming = self._incoming[pair]
        key = edge, microbatch
        place = incoming.order.place[key]
        self.doing.set("RECV", edge, microbatch)
        try:
            while incoming.posted <= place:
                self._post_next(pair, incoming)
            if pair in self.links.fast:
                return self._fetched(pair, incoming, key)
            work = incoming.waiting.pop(key)
            work.wait(self.timeout)
            block = work.block
            assert block is not None
            ahead = max(_AHEAD, _that_are_small(block.nbytes))
            if incoming.posted <= place + ahead // 2:
                self._post_ahead(pair, incoming, place + ahead)
        except (RuntimeError, KeyError) as e:
            raise LinkLost(edge, microbatch, pair[0], True, str(e)) from e
        values = self._layout(edge, microbatch).unpack(block)
        return values if self.device is None else self.device.here(values)

    def _fetched(self, pair: Pair, incoming: _Incoming, key: Key) -> list[Any]:
        """Values whose tensors lie on the device; those that were sent before them come first."""
        fast = self.links.fast[pair]
        while incoming.fetched <= incoming.order.place[key]:
            next_ = incoming.order.keys[incoming.fetched]
            head = incoming.waiting.pop(next_)
            head.wait(self.timeout)
            assert head.block is not None
            incoming.arrived[next_] = self._layout(*next_).placed(
                head.block, lambda nbytes: fast.receive(pair, nbytes, self.timeout)
            )
            incoming.fetched += 1
        return incoming.arrived.pop(key)

    def finish(self, edges: Collection[int] | None = None) -> None:
        """Wait until everything sent along these edges, or all, has arrived.

        Raises:  LinkLost.
        """
        for edge in list(self._under_way) if edges is None else edges:
            under_way = self._under_way.get(edge, deque())
            while under_way:
                microbatch, work, _ = under_way[0]
                self.doing.set("SEND", edge, microbatch)
                try:
                    work.wait(self.timeout)
                except RuntimeError as e:
                    raise LinkLost(edge, microbatch, self._pair(edge)[1], False, str(e)) from e
                under_way.popleft()

    def settle(self) -> None:
        """Wait until what devices are to receive is there.

        Raises:  LinkLost.
        """
        try:
            self._settle()
        except RuntimeError as e:
            pair = next(iter(self.links.fast))
            edge = next(e for e in range(len(self.routes.edges)) if self._pair(e) == pair)
            receiving = pair[1] == self.links.me
            raise LinkLost(edge, 0, pair[not receiving], receiving, str(e)) from e

    def _settle(self) -> None:
        for fast in dict.fromkeys(self.links.fast.values()):
            fast.settle(self.timeout)

    def _go_on(self) -> None:
        if self.abandoned:
            raise Abandoned

    def _post_ahead(self, pair: Pair, incoming: _Incoming, until: int) -> None:
        """Room for messages that will come, while their lengths are known."""
        while incoming.posted < min(until, len(incoming.order.keys)):
            edge, b = incoming.order.keys[incoming.posted]
            if self._awaited(pair, edge, b) is None:
                return
            self._post_next(pair, incoming)

    def _post_next(self, pair: Pair, incoming: _Incoming) -> None:
        edge, b = key = incoming.order.keys[incoming.posted]
        nbytes = self._awaited(pair, edge, b)
        tag = 2 * incoming.posted
        if nbytes is None:
            length = _length(0)
            self.links.post(pair, length, tag + 1).wait(self.timeout)
            nbytes = int(length)
        incoming.waiting[key] = self.links.receive(pair, max(nbytes, 8), tag)
        incoming.posted += 1

    def _awaited(self, pair: Pair, edge: int, microbatch: int) -> int | None:
        """The bytes of a message, None where they have to be told first."""
        layout = self._layout(edge, microbatch)
        return layout.head_bytes if pair in self.links.fast else layout.nbytes

    def _pair(self, edge: int) -> Pair:
        placement = self.routes.program.placement
        e = self.routes.edges[edge]
        return member(e.source, placement), member(e.target, placement)

    def _layout(self, edge: int, microbatch: int) -> Layout:
        sizes = self.sizes[microbatch]
        key = edge, id(sizes)
        found = self._layouts.get(key)
        if found is None:
            found = self._layouts[key] = layout_of(tuple(self.types[edge]), tuple(sizes.items()))
        return found


@dataclass
class _Both:
    """A head, and the tensors that go with it."""

    head: Any
    tensors: Any

    def wait(self, timeout: timedelta) -> None:
        self.head.wait(timeout)
        self.tensors.wait(timeout)


def _that_are_small(nbytes: int) -> int:
    """How many messages of a size may be under way for what they cost in memory.

    Why:  a sender of small messages would wait for its reader more often than it computes.
    """
    return min(_MOST_AHEAD, _SMALL // nbytes)


def _length(n: int) -> torch.Tensor:
    import torch

    return torch.tensor([n], dtype=torch.int64)
