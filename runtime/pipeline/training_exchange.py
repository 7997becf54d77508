"""One rank of a training program, and what the ranks tell each other after it.

Boundary tensors travel over the links of the program's edges. Then the loss's rank tells the
losses, and whoever shares a tied weight its gradients. A rank that fails or finds another one gone
says so in the store before it lets its links go, so that all name the one that was lost first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import permutations
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError
from dfc.ir.graph import Value
from dfc.ir.interpret import bind_inputs
from dfc.planning.actions import Program
from dfc.planning.stages import HOST
from dfc.runtime.pipeline.differentiated import Differentiated, Gradient
from dfc.runtime.pipeline.lanes import Run, Span, Step
from dfc.runtime.pipeline.linking import WorldMeeting, device_pairs, nccl_is_here, places_in
from dfc.runtime.pipeline.links import Doing, LinkLost, Pair, Traffic, pairs_of
from dfc.runtime.pipeline.rank import run_rank
from dfc.runtime.pipeline.rank_device import RankDevice
from dfc.runtime.pipeline.routes import Routes, routes
from dfc.runtime.pipeline.staged_model import StagedModel
from dfc.runtime.pipeline.world import World

if TYPE_CHECKING:
    import torch

_UNKNOWN = 60.0  # seconds for a message while nothing is known of how long a step takes
_LATE = 5.0  # times the last step's duration, and at least
_AT_LEAST = 5.0  # seconds
_NORMS = 1  # a tag: losses have 0, gradients of tied weights have numbers from the stages' count on
_LAST_WORDS = 1.0  # seconds in which one that is not lost says why it went

Told = tuple[str, int]  # a tied weight, and the stage that has a gradient of it


class Ranks:
    """Runs this rank's row of a program, and says to the others what they need after it.

    `name` is a prefix in the store that no other trainer has. A message may take `deadline`
    seconds, else five times the last step. `links` are `local` (sockets of this host) or `gloo`;
    by default local where all ranks are on one host, and nccl beside it between ranks on two GPUs
    (`nccl` insists on that). `devices` are where the ranks compute. With `norms` all tell each
    other those of their gradients.
    Raises:  DfcError K058 for a rank that does not come, N059 for links that there are not.
    """

    def __init__(
        self, world: World, name: str, model: StagedModel, placement: Sequence[int], run: Run,
        deadline: float | None, links: str | None, devices: Sequence[str], norms: bool = False,
    ) -> None:  # fmt: skip
        self.world, self.name, self.model = world, name, model
        device = devices[world.rank]
        self.device = RankDevice(device)
        self.run = self.device.paced(run, len(placement))
        self.edges, self.placement = tuple(model.edges), tuple(placement)
        self.types = {
            i: [v.value.type if isinstance(v, Gradient) else v.type for v in e.values]
            for i, e in enumerate(self.edges)
        }
        self.last = next(e.source for e in self.edges if e.target == HOST)
        self.owners = tied(model.parts)
        self._norms = norms
        self.doing = Doing()
        self._routes: dict[int, tuple[Program, Routes]] = {}
        self._fixed = deadline
        self._deadline = deadline or _UNKNOWN
        pairs = [p for p in pairs_of(self.edges, self.placement) if HOST not in p]
        tensors = sorted({*pairs, *self._pairs_of_tied()})
        places = places_in(world, devices, name)
        fast = device_pairs(links, tensors, places, nccl_is_here())
        self._meeting = WorldMeeting(world, links, f"{name}/links", fast, device)
        self.link_kind = "nccl" if fast else self._meeting.kind
        try:
            self.links = self._meeting.links(world.rank, pairs, "step")
            self.others = self._meeting.host_links(world.rank, self._pairs_after(), "after")
            world.share(f"{name}/linked", True)  # nothing runs before all are linked
            self._meeting.close()
        except RuntimeError as e:
            raise DfcError("K058", f"the links of rank {world.rank} cannot be made: {e}") from e

    def _pairs_after(self) -> list[Pair]:
        """From the loss's rank to each other one, and between those that share a weight."""
        loss, every = self.placement[self.last], range(self.world.size)
        found = {(loss, r) for r in every if r != loss} | self._pairs_of_tied()
        if self._norms:
            found |= set(permutations(every, 2))
        return sorted(found)

    def _pairs_of_tied(self) -> set[Pair]:
        """Between those that share a weight."""
        found: set[Pair] = set()
        for stages in self.owners.values():
            found |= set(permutations({self.placement[s] for s in stages}, 2))
        return found

    def step(self, program: Program, given: Sequence[Mapping[Any, Any]]) -> Step:
        """This rank's row; the losses are in every rank's results.

        Raises:  DfcError K050 for an action that fails here, K058 for a rank that is lost.
        """
        if id(program) not in self._routes:
            self._routes[id(program)] = program, routes(program, self.edges)
        began = time.perf_counter()
        results: list[dict[Any, Any]] = [{} for _ in given]
        every = range(len(given))
        traffic = _OwnHost(
            self.links, self._routes[id(program)][1], every, self.types, self._sizes(given),
            self.doing, self._deadline, self.device, given=given, results=results,
        )  # fmt: skip
        try:
            with self.device.step():
                done = run_rank(
                    self.world.rank, traffic.routes, self.run, traffic, every, self.doing
                )
        except LinkLost as e:
            raise self._lost(e.peer, str(e)) from e
        except DfcError as e:
            self._leave(f"rank {self.world.rank} failed: {e.message}")
            raise
        self._tell_losses(results)
        seconds = time.perf_counter() - began
        if self._fixed is None:
            self._deadline = max(_AT_LEAST, _LATE * seconds)
        timed = self.device.timed(done.spans)
        spans = [Span(a, self.world.rank, start, end) for a, start, end in timed]
        sent = {e: done.sent.get(i, 0) for i, e in enumerate(self.edges)}
        return Step(results, spans, seconds, sent)

    def _sizes(self, given: Sequence[Mapping[Any, Any]]) -> list[Mapping[str, Any]]:
        """The sizes of each microbatch; equal ones are one object, whose layouts are kept."""
        model = self.model
        found: dict[str, Mapping[str, Any]] = {}
        sizes = []
        for part in given:
            own = bind_inputs(model.graph, [part[model.inputs[v]] for v in model.graph.inputs])
            sizes.append(found.setdefault(str(own), own))
        return sizes

    def _tell_losses(self, results: Sequence[dict[Any, Any]]) -> None:
        import torch

        loss: Value = self.model.loss
        me, rank = self.world.rank, self.placement[self.last]
        self.doing.set("LOSS")
        if me == rank:
            block = torch.stack([r[loss] for r in results]).to("cpu")
            others = [r for r in range(self.world.size) if r != me]
            self._wait([self._post((me, r), block, 0) for r in others])
        else:
            block = torch.empty(len(results), dtype=loss.tensor_type.dtype.to_torch())
            self._wait([self._post((rank, me), block, 0)])
            for r, x in zip(results, block, strict=True):
                r[loss] = x
        self.doing.set("idle")

    def exchange(
        self, told: Mapping[Told, torch.Tensor], like: Mapping[str, torch.Tensor]
    ) -> dict[Told, torch.Tensor]:
        """The gradients of tied weights that other ranks' stages have, for what this one has: on
        its device where they come from another one, else in this machine's memory.

        Ensures: all ranks send and wait in one order, so that none waits for one that waits for it.
        Raises:  DfcError K058 for a rank that is lost.
        """
        import torch

        me, fast = self.world.rank, self.links.fast
        own = {k: x.contiguous() for k, x in told.items()}
        works, flying, found, coming = [], [], {}, []
        self.doing.set("ALLREDUCE")
        for pair, key, tag in self._messages_of_tied():
            sends = pair[0] == me
            if pair not in fast:
                if sends:
                    block = own[key] = own[key].to("cpu")
                else:
                    block = found[key] = torch.empty(like[key[0]].shape, dtype=like[key[0]].dtype)
                works.append(self._post(pair, block, tag))
                continue
            # a head beside it: a rank that is lost is noticed by that, and a device not asked
            works.append(self._post(pair, torch.zeros(1, dtype=torch.uint8), tag))
            if sends:
                flying.append((pair[1], self._of_device(pair, fast[pair].send, [own[key]])))
            else:
                coming.append((pair, key))
        self._wait(works)
        for pair, key in coming:
            x = like[key[0]]
            block = self._of_device(pair, fast[pair].receive, x.nbytes, self._patience)
            found[key] = block.view(x.dtype).view(x.shape)
        self._wait(flying)
        for pair, _ in coming:
            self._of_device(pair, lambda pair, timeout: fast[pair].settle(timeout), self._patience)
        self.doing.set("idle")
        return found

    def _messages_of_tied(self) -> Iterator[tuple[Pair, Told, int]]:
        """From and to this rank: each with what it has, and its tag."""
        me = self.world.rank
        for tag, (name, stages) in enumerate(self.owners.items(), 1):
            ranks = sorted({self.placement[s] for s in stages})
            for i, s in enumerate(stages):
                source = self.placement[s]
                for r in ranks:
                    if r != source and me in (source, r):
                        yield (source, r), (name, s), tag * len(self.placement) + i

    def tell_norms(self, mine: Mapping[str, float]) -> dict[str, float]:
        """The norm of each gradient, of all ranks, given those that this one has.

        Raises:  DfcError K058 for a rank that is lost.
        """
        import torch

        named: list[list[str]] = [[] for _ in range(self.world.size)]
        for name, rank in homes(self.model.parts, self.placement).items():
            named[rank].append(name)
        me = self.world.rank
        self.doing.set("NORMS")
        blocks = [torch.empty(len(names), dtype=torch.float64) for names in named]
        blocks[me] = torch.tensor([mine[n] for n in named[me]], dtype=torch.float64)
        others = [r for r in range(self.world.size) if r != me]
        works = [self._post((me, r), blocks[me], _NORMS) for r in others if named[me]]
        works += [self._post((r, me), blocks[r], _NORMS) for r in others if named[r]]
        self._wait(works)
        self.doing.set("idle")
        return {n: x for names, block in zip(named, blocks, strict=True)
                for n, x in zip(names, block.tolist(), strict=True)}  # fmt: skip

    def _post(self, pair: Pair, block: torch.Tensor, tag: int) -> tuple[int, Any]:
        """Begin a message after the step; whom it is from or for, and what is waited for."""
        peer = pair[1] if pair[0] == self.world.rank else pair[0]
        try:
            return peer, self.others.post(pair, block.detach(), tag)
        except RuntimeError as e:
            raise self._lost(peer, str(e)) from e

    def _of_device(self, pair: Pair, do: Callable[..., Any], *given: Any) -> Any:
        """What a link of this rank's device does, with the rank at its other end."""
        try:
            return do(pair, *given)
        except RuntimeError as e:
            raise self._lost(pair[pair[0] == self.world.rank], str(e)) from e

    def _wait(self, works: Sequence[tuple[int, Any]]) -> None:
        for peer, work in works:
            try:
                work.wait(self._patience)
            except RuntimeError as e:
                raise self._lost(peer, str(e)) from e

    @property
    def _patience(self) -> timedelta:
        return timedelta(seconds=self._deadline)

    def _lost(self, peer: int, why: str) -> DfcError:
        """Names the rank that was lost first, which need not be the one that was waited for."""
        waits = f"rank {self.world.rank} waits in {self.doing}"
        found = self._last_words(peer) or f"rank {peer} is lost, or too slow, while {waits}: {why}"
        self._leave(found)
        return DfcError(
            "K058", found, help="start all ranks again and `load` what was saved last; torchrun "
            "--max-restarts 3 starts them again by itself",
        )  # fmt: skip

    def _last_words(self, rank: int) -> str | None:
        """Why a rank that is not lost went, None for one that is (or whose store is)."""
        try:
            found: str | None = self.world.get(f"{self.name}/gone/{rank}", _LAST_WORDS)
        except RuntimeError:
            return None
        return found

    def _leave(self, why: str) -> None:
        """Say why, then let the links go: whoever waits for this rank is told by that."""
        with suppress(RuntimeError):  # the store may be the lost rank's: nobody can be told then
            self.world.put(f"{self.name}/gone/{self.world.rank}", why)
        self.close()

    def close(self) -> None:
        """Let the links go."""
        self.links.close()
        self.others.close()


class _OwnHost(Traffic):
    """Messages of a step whose caller is this process itself: inputs are at hand, results stay."""

    def __init__(
        self, *args: Any, given: Sequence[Mapping[Any, Any]], results: Sequence[dict[Any, Any]]
    ) -> None:
        super().__init__(*args)
        self.given, self.results = given, results

    def send(self, edge: int, microbatch: int, values: Sequence[Any]) -> None:
        e = self.routes.edges[edge]
        if e.target == HOST:
            self.results[microbatch].update(zip(e.values, values, strict=True))
            return
        super().send(edge, microbatch, values)

    def receive(self, edge: int, microbatch: int) -> list[Any]:
        e = self.routes.edges[edge]
        if e.source == HOST:
            given = [self.given[microbatch][v] for v in e.values]
            return given if self.device is None else self.device.here(given)
        return super().receive(edge, microbatch)


def tied(parts: Sequence[Differentiated]) -> dict[str, list[int]]:
    """The weights that several stages have gradients of, with those stages in order."""
    found: dict[str, list[int]] = {}
    for part in parts:
        for name in part.flow.weights:
            found.setdefault(name, []).append(part.number)
    return {name: stages for name, stages in found.items() if len(stages) > 1}


def homes(parts: Sequence[Differentiated], placement: Sequence[int]) -> dict[str, int]:
    """The rank of each weight's first stage that has a gradient of it."""
    found: dict[str, int] = {}
    for part in parts:
        for name in part.flow.weights:
            found.setdefault(name, placement[part.number])
    return found
