"""The host's side of a pipeline in processes: it gives inputs, takes results, and mends losses.

A rank that is lost is started again, links are made anew, and the microbatches whose results have
not come are run again from their inputs, which the host keeps: every stage is a function of what it
takes, so that they come out the same. A result is taken once.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from dfc.errors import DfcError
from dfc.planning.actions import Action, Kind, Program
from dfc.planning.stages import HOST
from dfc.runtime.pipeline.carrying import Carriers
from dfc.runtime.pipeline.control import Message
from dfc.runtime.pipeline.crew import AT_LEAST, LATE, Crew, RankLost, lost_error
from dfc.runtime.pipeline.lanes import Span, Step, Values
from dfc.runtime.pipeline.linking import Meeting
from dfc.runtime.pipeline.links import Doing, Linked, Traffic
from dfc.runtime.pipeline.routes import Routes
from dfc.runtime.pipeline.wiring import Numbered, Wiring

FRUITLESS = 3  # times that ranks may be lost without any result between


@dataclass
class _Attempt:
    """A step, or what is left of it, under way; its results are its own."""

    number: int
    routes: Routes
    given: Sequence[Values]
    microbatches: list[int]
    results: list[Numbered]
    began: float
    late: float = 0.0  # seconds from the step's begin to this attempt's
    spans: list[Span] = field(default_factory=list)
    sent: dict[int, int] = field(default_factory=dict)
    streamed: dict[tuple[int, int], int] = field(default_factory=dict)


class ProcessLanes:
    """Runs programs as `Lanes` does, by the processes of a crew.

    `restarts` is how often ranks may be lost without any new result.
    """

    def __init__(
        self, wiring: Wiring, crew: Crew, meeting: Meeting, restarts: int = FRUITLESS
    ) -> None:
        self.wiring, self.crew, self.meeting, self.restarts = wiring, crew, meeting, restarts
        self.incidents: list[str] = []
        self._links: Linked | None = None
        self._carriers: Carriers | None = None
        self._linked = 0  # how often links were made
        self._broken = False  # whether they must be made anew
        self._steps = 0
        self._told: Program | None = None  # the program that the ranks know
        self._lock = threading.Lock()
        self._closed = False

    def step(self, program: Program, given: Sequence[Values]) -> Step:
        """Run a program; `given` holds the host's values for each microbatch.

        Raises:  DfcError K050 for an action that fails, K051 once closed, K058 for a rank that is
                 lost for good, N054 for a program that is not of these ranks.
        """
        with self._lock:
            if self._closed:
                raise DfcError("K051", "the pipeline is closed")
            found = self.wiring.routes(program, len(given))
            began = time.perf_counter()
            results: list[Numbered] = [{} for _ in given]
            spans: list[Span] = []
            sent: dict[int, int] = {}
            streamed: Counter[tuple[int, int]] = Counter()
            left, fruitless = list(range(len(given))), 0
            while left:
                attempt = _Attempt(0, found, given, left, [{} for _ in given], began)
                try:
                    self._run(attempt)
                except RankLost as lost:
                    whole = self._whole(attempt)
                    fruitless = 0 if whole else fruitless + 1
                    self._mourn(lost, raises=fruitless > self.restarts or not self.restarts)
                else:
                    whole = self._whole(attempt)
                    self._learn(attempt)
                for b in whole:
                    results[b] = attempt.results[b]
                spans += attempt.spans
                sent.update(attempt.sent)
                streamed.update(attempt.streamed)
                left = [b for b in left if b not in whole]
            seconds = time.perf_counter() - began
            edges = self.wiring.by_edge(sent)
            return Step(self.wiring.named(results), spans, seconds, edges, dict(streamed))

    def close(self) -> None:
        """End the processes. They have nothing to lose."""
        self._closed = True
        self.crew.close()
        self._unlink()

    def ready(self) -> None:
        """Every rank there, loaded and linked.

        Raises:  DfcError K058, K056.
        """
        tries = 0
        while True:
            try:
                for rank in range(self.crew.ranks):
                    if rank not in self.crew.members:
                        self.crew.start(rank)
                self._await(lambda: all(m.loaded for m in self.crew.members.values()), {})
                if self._broken:
                    self._unlink()
                if self._links is None:
                    self._link()
                return
            except RankLost as lost:
                tries += 1
                self._mourn(lost, raises=tries > self.restarts)

    def _link(self) -> None:
        """New links between all members."""
        self._linked += 1
        name = f"links{self._linked}"
        self._told = None
        self.crew.tell({"do": "link", "name": name, "meeting": self.meeting.told})
        made: list[Linked] = []

        def mine() -> None:
            try:
                made.append(self.meeting.links(HOST, self.wiring.pairs, name))
                self.crew.put(HOST, {"did": "linked", "name": name})
            except RuntimeError as e:
                self.crew.put(HOST, {"did": "unlinked", "name": name, "why": str(e)})

        threading.Thread(target=mine, name="dfc-link", daemon=True).start()
        linked: set[int] = set()

        def hear(source: int, message: Message) -> None:
            if message.get("name") == name:
                if message["did"] == "unlinked":
                    why = f"its links cannot be made: {message['why']}"
                    raise RankLost({source: why} if source != HOST else {})
                linked.add(source)

        everybody = {HOST, *range(self.crew.ranks)}
        self._await(lambda: linked == everybody, {"linked": hear, "unlinked": hear})
        self._links = made[0]
        self._carriers = Carriers(self.wiring.pairs)

    def _unlink(self) -> None:
        """Let the host's links go, and the threads that wait in them."""
        if self._links is not None:
            self._links.interrupt()
        if self._carriers is not None:
            self._carriers.close()
        if self._links is not None:
            self._links.close()
        self._links, self._carriers, self._broken = None, None, False

    def _await(
        self, ready: Callable[[], bool], heard: Mapping[str, Callable[[int, Message], None]]
    ) -> None:
        """Listen until something is so.

        Raises:  RankLost; DfcError of a rank that says that it cannot.
        """
        while not ready():
            found = self.crew.next(1.0)
            if found is None:
                continue
            source, message = found
            if message["did"] == "failed" and message["number"] == 0:  # not of a step gone by
                raise DfcError(
                    message["code"], message["message"], help=message["help"],
                    status=message["status"],
                )  # fmt: skip
            hear = heard.get(message["did"])
            if hear is not None:
                hear(source, message)

    def _run(self, attempt: _Attempt) -> None:
        """Run what is left of a step.

        Raises:  RankLost; DfcError K050.
        """
        self.ready()
        assert self._links is not None and self._carriers is not None
        self._steps += 1
        attempt.number = self._steps
        program = attempt.routes.program
        if self._told is not program:
            self.crew.tell({"do": "program", "text": str(program), "name": program.name})
            self._told = program
        distinct, size_of = self.wiring.sizes(attempt.given)
        attempt.late = time.perf_counter() - attempt.began
        self.crew.tell({
            "do": "step", "number": attempt.number, "microbatches": attempt.microbatches,
            "sizes": distinct, "size_of": size_of,
        })  # fmt: skip
        traffic = Traffic(
            self._links, attempt.routes, attempt.microbatches, self.wiring.types,
            [distinct[i] for i in size_of], Doing(),
        )  # fmt: skip
        number = attempt.number
        self._carriers.carry(
            traffic, self.wiring.numbered(attempt.given), attempt.results,
            lambda: self._put("came", number), lambda e: self._put("broken", number, why=str(e)),
        )  # fmt: skip
        try:
            self._collect(attempt)
        except (RankLost, DfcError):
            traffic.abandoned = True
            raise
        except KeyboardInterrupt:  # the ranks are told to stop what they do
            traffic.abandoned = self._broken = True
            self.crew.tell({"do": "abandon"})
            raise
        attempt.sent.update(traffic.sent)

    def _put(self, did: str, number: int, **more: Any) -> None:
        self.crew.put(HOST, {"did": did, "number": number, **more})

    def _collect(self, attempt: _Attempt) -> None:
        """Results and times, until all are there."""
        began = time.monotonic()
        done: set[int] = set()
        broken_since: float | None = None
        while len(done) < self.crew.ranks or len(self._whole(attempt)) < len(attempt.microbatches):
            found = self.crew.next(0.2)
            if found is not None and found[1].get("number") in (attempt.number, None):
                source, message = found
                match message["did"]:
                    case "done":
                        done.add(source)
                        self._note(attempt, source, message)
                    case "failed":
                        self._give_up({})
                        raise DfcError(message["code"], message["message"], help=message["help"])
                    case "broken":
                        broken_since = broken_since or time.monotonic()
            if broken_since is not None and time.monotonic() - broken_since > AT_LEAST:
                raise RankLost({})  # a link broke, though everybody is there
            if not self.crew.busy() and self.crew.quiet(began) > self._patience():
                raise RankLost({})

    def _patience(self) -> float:
        """For how long everybody may wait for somebody else."""
        return max(2 * AT_LEAST, LATE * max(self.crew.expected.values(), default=0.0))

    def _note(self, attempt: _Attempt, rank: int, message: Message) -> None:
        for kind, stage, b, start, end in message["spans"]:
            action = Action(Kind(kind), stage, b)
            attempt.spans.append(Span(action, rank, start + attempt.late, end + attempt.late))
        attempt.sent.update({int(e): n for e, n in message["sent"]})
        attempt.streamed.update({(s, hop): n for s, hop, n in message["streamed"]})

    def _whole(self, attempt: _Attempt) -> set[int]:
        """The microbatches of which every result has come."""
        wanted = {n for e in self.wiring.edges if e.target == HOST for n in e.values}
        return {b for b in attempt.microbatches if wanted <= attempt.results[b].keys()}

    def _learn(self, attempt: _Attempt) -> None:
        """What actions take, for the deadlines of the next step."""
        times: dict[tuple[Kind, int], list[float]] = {}
        for s in attempt.spans:
            times.setdefault((s.action.kind, s.action.stage), []).append(s.end - s.start)
        self.crew.expected.update({k: median(t) for k, t in times.items()})

    def _mourn(self, lost: RankLost, raises: bool) -> None:
        """End lost ranks, let all others give up, and tell what happened.

        Raises:  DfcError K058.
        """
        if self._closed:
            raise DfcError("K051", "the pipeline is closed")
        waiting = self._give_up(lost.reasons)
        error = lost_error(lost.reasons, waiting)
        self.incidents.append(error.message)
        if raises:
            raise error

    def _give_up(self, lost: Mapping[int, str]) -> list[str]:
        """Every rank gives up the step, or is ended. What each of them waited for."""
        for rank in lost:
            self.crew.bury(rank)
        asked = {r: m for r, m in self.crew.members.items() if m.loaded}
        self.crew.tell({"do": "abandon"}, list(asked))
        waiting: dict[int, str] = {}
        until = time.monotonic() + self._patience()
        while asked and time.monotonic() < until:
            try:
                found = self.crew.next(0.2)
            except RankLost as more:
                for rank in more.reasons:
                    self.crew.bury(rank)
                    asked.pop(rank, None)
                continue
            if found is not None and found[1]["did"] == "abandoned":
                rank, message = found
                asked.pop(rank, None)
                if message["what"] in ("RECV", "SEND"):
                    waiting[rank] = f"rank {rank} waits in {message['doing']}"
        for rank in asked:
            self.crew.bury(rank)  # deaf: it is started again
        self._unlink()
        return [waiting[rank] for rank in sorted(waiting)]
