"""A pipeline whose ranks were started by torchrun, on one host or many.

    torchrun --nproc-per-node 2 -m dfc.cli run encoder.dfcpkg --pipeline 2 --on torchrun

Each process makes the same `Launched` pipeline. Rank 0 leads: it is called like the model, gives
inputs and takes results; the others serve until it closes. Before anything runs, every rank says
which plan and which versions it has, and all compare. Each writes what it does into the store, so
that a rank that waits too long can tell what its peer did last. torchrun itself ends the others
when one ends, and starts them again with `--max-restarts`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Value
from dfc.planning.actions import Action, Kind, Program, parse_program
from dfc.planning.stages import HOST
from dfc.planning.tiers import Tiers
from dfc.runtime.pipeline.carrying import Carriers
from dfc.runtime.pipeline.control import Message
from dfc.runtime.pipeline.crew import AT_LEAST, LATE, UNKNOWN
from dfc.runtime.pipeline.folder import Stages, assembly, stages_of, versions
from dfc.runtime.pipeline.lanes import Span, Step, Values
from dfc.runtime.pipeline.linking import (
    WorldMeeting,
    device_pairs,
    links_of,
    nccl_is_here,
    places_in,
)
from dfc.runtime.pipeline.links import (
    FOREVER,
    Abandoned,
    Doing,
    Linked,
    LinkLost,
    Traffic,
)
from dfc.runtime.pipeline.local import Pipeline, Runs
from dfc.runtime.pipeline.wiring import Numbered, Wiring
from dfc.runtime.pipeline.world import MEETING, World
from dfc.runtime.tiers.stages import Ranks, plan_data, plan_of, plan_stages

_BEAT = 0.5  # seconds between two notes of what a rank does


class Launched(Pipeline):
    """One graph's stages in the processes of a launcher; made by each of them alike.

    `links` are `local` (sockets of this host) or `gloo`; by default local where all ranks are here,
    and nccl beside it between ranks on two GPUs (`nccl` insists on that).
    Raises:  DfcError N057 for a world of another size than the plan, N055 for ranks with other
             plans or versions, K058 for a rank that does not come or is lost.
    """

    def __init__(
        self,
        graph: Graph,
        stage_of: Mapping[Any, int],
        world: World | None = None,
        *,
        links: str | None = None,
        **options: Any,
    ) -> None:
        self.world = world or World.of_launcher()
        links_of(links, self.world.one_host)  # before anything is split
        self._kind = links
        super().__init__(graph, stage_of, **options)

    def _devices_here(self) -> Sequence[str]:
        return self.devices[self.world.rank : self.world.rank + 1]

    def _start(self) -> Runs:
        self.world.expect(len(self.threads))
        made, numbers = assembly(
            self.stages, self.edges, self.placement, self.engines, self.threads, self.devices,
            self.tiers,
        )  # fmt: skip
        has = {**versions(), "model": self.graph.fingerprint(), "plan": made.digest,
               "microbatches": str(self.microbatches)}  # fmt: skip
        self.world.same(has)
        graphs = {s: self.stages[s].graph for s in stages_of(made, self.world.rank)}
        stages = Stages(made, graphs, self.world.rank)
        wiring = Wiring(self.graph, made, numbers)
        self._ranks = LaunchedRanks(self.world, wiring, stages, self._kind)
        self.link_kind = self._ranks.link_kind
        return self._ranks

    def _planned(
        self, ranks: Ranks, sizes: dict[str, int], given: Mapping[Value, Any] | None
    ) -> list[Tiers]:
        """As rank 0 plans it for all, since measured times differ from rank to rank."""
        if self.world.rank == 0:
            here = replace(ranks, hosts=self.world.hosts)
            return self._told(lambda: plan_stages(here, sizes, given))
        found = self.world.get("tiers", FOREVER)
        if found is None or "code" in found:
            told = found or {"code": "K058", "message": "rank 0 is lost", "status": 1}
            raise DfcError(told["code"], told["message"], status=told["status"])
        return [plan_of(x) for x in found["plans"]]

    def _told(self, make: Callable[[], list[Tiers]]) -> list[Tiers]:
        """What others are to know of it, also where it fails."""
        try:
            found = make()
        except DfcError as e:
            said = {"code": e.code, "message": e.message, "status": e.status}
            self.world.put("tiers", said)
            raise
        self.world.put("tiers", {"plans": [plan_data(x) for x in found]})
        return found

    @property
    def leads(self) -> bool:
        return self.world.rank == 0

    def serve(self) -> None:
        """What every rank but the first does: steps, until the first one closes.

        Raises:  DfcError K050 for an action that fails, K058 for a rank that is lost.
        """
        self._ranks.serve()


class LaunchedRanks:
    """This process's rank, and for rank 0 the host as well."""

    def __init__(self, world: World, wiring: Wiring, stages: Stages, links: str | None) -> None:
        import torch

        self.world, self.wiring, self.stages = world, wiring, stages
        self.doing = Doing()
        self.deadline = UNKNOWN
        self._steps = 0
        self._ended = threading.Event()
        self._rows: list[threading.Thread] = []
        self._failed = False
        torch.set_num_threads(stages.made.threads[world.rank])
        self._types = stages.types(wiring.edges)
        places = places_in(world, stages.made.devices, "pipeline")
        fast = device_pairs(links, wiring.pairs, places, nccl_is_here())
        self._meeting = WorldMeeting(world, links, "pipeline", fast, stages.device.name)
        self.link_kind = "nccl" if fast else self._meeting.kind
        self._links, self._host_links = self._linked()
        world.share("linked", True)  # nothing runs before all are linked
        self._meeting.close()
        self._carriers = Carriers(wiring.pairs) if world.rank == 0 else None
        self._beats = threading.Thread(target=self._beat, name="dfc-beat", daemon=True)
        self._beats.start()

    def step(self, program: Program, given: Sequence[Values]) -> Step:
        """Run a program, on rank 0; `given` holds the host's values for each microbatch.

        Raises:  DfcError K050, K051, K058; N054 for a program that is not of these ranks.
        """
        if self._failed or self._ended.is_set() or self._carriers is None:
            raise DfcError("K051", "the pipeline is closed, or has failed before")
        self.wiring.routes(program, len(given))
        self._steps += 1
        number, began = self._steps, time.perf_counter()
        distinct, size_of = self.wiring.sizes(given)
        order = {"do": "step", "program": str(program), "name": program.name, "sizes": distinct,
                 "size_of": size_of, "deadline": self.deadline}  # fmt: skip
        self.world.put(f"step/{number}", order)
        events: SimpleQueue[Message] = SimpleQueue()
        host = Traffic(
            self._host_links, self.wiring.routes(program, len(given)), range(len(given)),
            self.wiring.types, [distinct[i] for i in size_of], Doing(), self.deadline,
        )  # fmt: skip
        results: list[Numbered] = [{} for _ in given]
        self._carriers.carry(
            host, self.wiring.numbered(given), results,
            lambda: events.put({"did": "came"}),
            lambda e: events.put(self._lost(e, "the host")),
        )  # fmt: skip
        mine = threading.Thread(
            target=lambda: events.put(self._row(number, order)), name="dfc-rank", daemon=True
        )
        mine.start()
        self._rows = [mine]
        self._collect(events, results)
        patience = max(2 * AT_LEAST, time.perf_counter() - began)
        spans, sent, streamed = self._others(number, dict(host.sent), patience)
        seconds = time.perf_counter() - began
        self.deadline = max(AT_LEAST, LATE * seconds)
        edges = self.wiring.by_edge(sent)
        return Step(self.wiring.named(results), spans, seconds, edges, streamed)

    def serve(self) -> None:
        """Steps as rank 0 says, until it closes.

        Raises:  DfcError K050, K058.
        """
        while True:
            self._steps += 1
            order = self.world.get(f"step/{self._steps}", FOREVER)
            if order is None or order["do"] == "end":
                self._ended.set()
                return
            done = self._row(self._steps, order)
            if done["did"] == "failed":
                raise self._first_failure(done)

    def close(self) -> None:
        """Rank 0 lets the others end."""
        if not self._ended.is_set():
            self._ended.set()
            if self.world.rank == 0:
                self.world.put(f"step/{self._steps + 1}", {"do": "end"})
        self._drop()
        for thread in (self._beats, *self._rows):
            thread.join(timeout=AT_LEAST)  # Python must not end while one is in gloo
        if self._carriers is not None:
            self._carriers.close()
        for links in self._both():
            links.close()
        self.stages.close()

    def _row(self, number: int, order: Message) -> Message:
        """This rank's row of the program; what came of it is in the store too."""
        program = self._program(order)
        routes = self.wiring.routes(program, program.microbatches)
        sizes = [order["sizes"][i] for i in order["size_of"]]
        every = range(program.microbatches)
        rank = self.world.rank
        traffic = Traffic(
            self._links, routes, every, self._types, sizes, self.doing, order["deadline"],
            self.stages.device,
        )  # fmt: skip
        try:
            done = self.stages.row(routes, traffic, every, self.doing)
        except DfcError as e:
            said: Message = {"did": "failed", "code": e.code, "message": e.message}
        except (LinkLost, Abandoned) as e:
            said = self._lost(e, f"rank {rank}")
        else:
            spans = [[int(a.kind), a.stage, a.microbatch, s, t] for a, s, t in done.spans]
            said = {"did": "done", "spans": spans, "sent": sorted(done.sent.items()),
                    "streamed": self.stages.brought.rows()}  # fmt: skip
        self.world.put(f"done/{number}/{rank}", said)
        if said["did"] == "failed":
            del traffic
            self._drop()
        return said

    def _drop(self) -> None:
        """Let the links go: whoever waits at the other end of one is told by that."""
        self._failed = not self._ended.is_set()
        for links in self._both():
            links.interrupt()  # threads may wait in them still
            if self._meeting.kind == "gloo":
                links.close()

    def _both(self) -> list[Linked]:
        return [links for links in (self._links, self._host_links) if links is not None]

    _last: tuple[str, Program] | None = None

    def _program(self, order: Message) -> Program:
        if self._last is None or self._last[0] != order["program"]:
            self._last = order["program"], parse_program(order["program"], order["name"])
        return self._last[1]

    def _collect(self, events: SimpleQueue[Message], results: list[Numbered]) -> None:
        """Results, and this process's own row, until all are there.

        Raises:  DfcError K050, K058, of this rank or of another.
        """
        own = False
        wanted = [n for e in self.wiring.edges if e.target == HOST for n in e.values]
        while not own or any(n not in r for r in results for n in wanted):
            try:
                event = events.get(timeout=0.2)
            except Empty:
                continue
            match event["did"]:
                case "came":
                    continue
                case "done":
                    own = True
                case _:
                    self._drop()
                    raise self._first_failure(event)

    def _first_failure(self, event: Message) -> DfcError:
        """What an action raised, wherever it was, comes before what followed from it; and of ranks
        that were lost the one that nobody else explains."""
        until = time.monotonic() + AT_LEAST
        while time.monotonic() < until:
            for rank in range(self.world.size):
                found = self._said(rank)
                if found is not None and found["code"] != "K058":
                    return DfcError(found["code"], found["message"])
            time.sleep(0.05)
        seen: set[Any] = set()
        while (peer := event.get("peer")) not in seen and (found := self._said(peer)) is not None:
            seen.add(peer)
            event = found
        return DfcError(event.get("code", "K058"), event["message"])

    def _said(self, rank: int | None) -> Message | None:
        """Why a rank did not end its step, None for one that did, or has not said so."""
        if rank is None:
            return None
        found: Message | None = self.world.peek(f"done/{self._steps}/{max(rank, 0)}")
        return found if found is not None and found["did"] == "failed" else None

    def _others(
        self, number: int, sent: dict[int, int], patience: float
    ) -> tuple[list[Span], dict[int, int], dict[tuple[int, int], int]]:
        """Times and bytes of all ranks, which have only to write them when the results are there.

        Raises:  DfcError K058.
        """
        spans, streamed = [], {}
        for rank in range(self.world.size):
            found = self.world.get(f"done/{number}/{rank}", patience)
            if found is None or found["did"] != "done":
                raise DfcError("K058", f"rank {rank} is lost: it did not end its step")
            for kind, stage, b, start, end in found["spans"]:
                spans.append(Span(Action(Kind(kind), stage, b), rank, start, end))
            sent.update({int(e): n for e, n in found["sent"]})
            streamed.update({(s, hop): n for s, hop, n in found["streamed"]})
        return spans, sent, streamed

    def _lost(self, e: LinkLost | Abandoned, me: str) -> Message:
        """Who is lost, in which wait, and what it did last."""
        said: Message = {"did": "failed", "code": "K058", "message": "the step was given up"}
        if isinstance(e, LinkLost):
            waits = f"{me} waits in {e.where}"
            said |= {"peer": e.peer, "message": f"the host, rank 0, is lost while {waits}"}
            if e.peer != HOST:
                last = self.world.peek(f"doing/{e.peer}")
                told = f", it last did {last}" if last else ""
                said["message"] = f"rank {e.peer} is lost, or too slow, while {waits}{told}"
        return said

    def _beat(self) -> None:
        """What this rank does, for others to read."""
        last = ""
        while not self._ended.wait(_BEAT):
            now = str(self.doing)
            if now != last:
                self.world.put(f"doing/{self.world.rank}", now)
                last = now

    def _linked(self) -> tuple[Linked, Any]:
        """The rank's links, and for rank 0 the host's: both ends of some are in this process."""
        made: dict[int, Linked] = {}
        failed: list[str] = []

        def link(me: int) -> None:
            try:
                made[me] = self._meeting.links(me, self.wiring.pairs, "links")
            except RuntimeError as e:
                failed.append(str(e))

        members = [self.world.rank, *([HOST] if self.world.rank == 0 else [])]
        threads = [threading.Thread(target=link, args=(m,), daemon=True) for m in members]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        if failed:
            raise DfcError(
                "K058", f"the links of rank {self.world.rank} cannot be made: {failed[0]}"
            )
        return made[self.world.rank], made.get(HOST)


def agreed_stages(world: World, graph: Graph, make: Callable[[], Mapping[Any, int]]) -> Any:
    """Stages that rank 0 chooses for all, since measured times differ from rank to rank."""
    nodes = list(graph.nodes)
    if world.rank == 0:
        chosen = make()
        world.put("stages", [chosen[n] for n in nodes])
        return chosen
    found = world.get("stages", MEETING)
    if found is None or len(found) != len(nodes):
        raise DfcError("N055", "rank 0 has another model, or chose no stages")
    return dict(zip(nodes, found, strict=True))
