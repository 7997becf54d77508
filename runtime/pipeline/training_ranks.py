"""Training in several processes: the same program, edges and stages, a rank in each.

    torchrun --nproc-per-node 2 train.py         # which makes a `RankTrainer` and calls step()

Every process makes the same trainer from the same graph and calls the same steps; it has the
weights and optimizers of its own stages alone, and takes only what those read of a batch. Boundary
tensors travel over the links of the program's edges. After a step, whoever shares a tied weight is
told the gradients of the others and adds them up in the order of stages, so that all copies stay
equal to the bit; the last stage's rank tells the loss.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node, Value
from dfc.ir.interpret import bind_inputs
from dfc.planning.actions import Program
from dfc.planning.stages import HOST
from dfc.runtime.pipeline.differentiated import Differentiated, Gradient
from dfc.runtime.pipeline.lanes import Span, Step
from dfc.runtime.pipeline.links import (
    Abandoned,
    Doing,
    LinkLost,
    Links,
    Pair,
    Traffic,
    gloo_device,
    pairs_of,
)
from dfc.runtime.pipeline.rank import run_rank
from dfc.runtime.pipeline.routes import Routes, routes
from dfc.runtime.pipeline.staged_model import StagedModel
from dfc.runtime.pipeline.training import Trainer, Way
from dfc.runtime.pipeline.training_report import TrainingReport

if TYPE_CHECKING:
    import torch

MEETING = 120.0  # seconds for all ranks to come
UNKNOWN = 60.0  # seconds for a message while nothing is known of how long a step takes
LATE = 5.0  # times the last step's duration, and at least
AT_LEAST = 5.0  # seconds


@dataclass
class Group:
    """This process among its like, and a store that all of them know."""

    rank: int
    size: int
    store: Any
    device: Any = field(default_factory=gloo_device)
    trainers: int = 0  # that were made of it: each has links of its own

    @staticmethod
    def of_environment() -> Group:
        """As torchrun says.

        Raises:  DfcError N056 for a process that no launcher started.
        """
        from torch.distributed import rendezvous  # type: ignore[attr-defined]

        if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
            raise DfcError(
                "N056", "this process was not started by torchrun: RANK and WORLD_SIZE are not set",
                help="torchrun --nproc-per-node 2 train.py", status=2,
            )  # fmt: skip
        wait = timedelta(seconds=MEETING)
        store, rank, size = next(rendezvous("env://", timeout=wait))
        return Group(rank, size, store)

    def name(self, key: str) -> str:
        """A key of the store that no other trainer has."""
        return f"dfc/{self.trainers}/{key}"

    def share(self, key: str, mine: Any) -> list[Any]:
        """What every rank says under a key, in the order of ranks: all must call it."""
        names = [f"{self.name(key)}/{r}" for r in range(self.size)]
        self.store.set(names[self.rank], json.dumps(mine))
        self.store.wait(names, timedelta(seconds=MEETING))
        return [json.loads(self.store.get(name)) for name in names]


class RankTrainer(Trainer):
    """This process's rank of a trainer; made and called alike in each process.

    `deadline` is how many seconds a message may take: five times the last step, and five seconds at
    least, where it is not given. `parameters`, `optimizers` and `state_dict()` are those of this
    rank's stages; the states of all ranks together are the model's.
    Raises:  DfcError N056 for another number of processes than ranks, N055 for ranks with other
             models or plans, K055 for a rank that is lost, else as `Trainer`.
    """

    def __init__(
        self,
        graph: Graph | StagedModel,
        stage_of: Mapping[Node, int] | None = None,
        *,
        group: Group | None = None,
        deadline: float | None = None,
        **options: Any,
    ) -> None:
        self.group = group or Group.of_environment()
        self.group.trainers += 1
        self.deadline = deadline
        super().__init__(graph, stage_of, **options)

    def _mine(self) -> Sequence[Differentiated]:
        placement, size = self.programs.placement, self.group.size
        if 1 + max(placement) != size:
            raise DfcError(
                "N056", f"the plan has {1 + max(placement)} ranks, but there are {size} processes",
                help=f"torchrun --nproc-per-node {1 + max(placement)}", status=2,
            )  # fmt: skip
        self._compare()
        return [p for p in self.model.parts if placement[p.number] == self.group.rank]

    def _compare(self) -> None:
        """Every rank says what it has, before anything is linked."""
        import torch

        stages = [[p.joint.graph.fingerprint(), p.number] for p in self.model.parts]
        mine = {"torch": torch.__version__, "schedule": str(self.programs.schedule),
                "microbatches": self.microbatches, "seed": self.seed, "stages": stages}  # fmt: skip
        for rank, other in enumerate(self.group.share("has", mine)):
            for what, x in mine.items():
                if other[what] != x:
                    raise DfcError(
                        "N055", f"rank {rank} has other {what} than rank {self.group.rank}",
                        help="all ranks need the same model, plan and versions",
                    )  # fmt: skip

    def _threads(self, total: int) -> list[int]:
        import torch

        torch.set_num_threads(total)
        return [total] * self.group.size

    def _start(self, threads: Sequence[int]) -> Way:
        self._ranks = _Ranks(self)
        return self._ranks

    def _gather(self) -> None:
        owners = self._ranks.owners
        told = {}
        for name, stages in owners.items():
            told.update({(name, s): self._by_stage[s].gradients[name]
                         for s in stages if s in self._by_stage})  # fmt: skip
        told.update(self._ranks.exchange(told, self.parameters))
        for name, parameter in self.parameters.items():
            if name not in owners:
                held = [t.gradients[name] for t in self.trained if name in t.gradients]
                parameter.grad = held[0] if held else None
                continue
            total = told[name, owners[name][0]].clone()
            for s in owners[name][1:]:
                total.add_(told[name, s])
            parameter.grad = total

    def _measured(
        self, given: Sequence[Mapping[Any, Any]], repeats: int
    ) -> tuple[dict[tuple[int, int], float], dict[int, int]]:
        times, saved = super()._measured(given, repeats)
        mine = [[[*k, x] for k, x in times.items()], [[*x] for x in saved.items()]]
        every = self.group.share(f"measured/{self.steps}", mine)
        return (
            {(kind, s): x for found, _ in every for kind, s, x in found},
            {s: x for _, found in every for s, x in found},
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of a whole model, of which this rank takes its part.

        Raises:  DfcError N075 (exit status 2) for parameters that are missing or of another shape.
        """
        mine = {n: x for n, x in state["weights"].items() if n in self.parameters}
        super().load_state_dict({**state, "weights": mine})

    def report(self) -> TrainingReport:
        """What the last step took, on all ranks: all of them must call it.

        Raises:  DfcError N052 before the first step.
        """
        mine = super().report()
        kept = [[t.stage.number, t.most, t.saved_bytes] for t in self.trained]
        rows = [[int(s.action.kind), s.action.stage, s.action.microbatch, s.rank, s.start, s.end]
                for s in mine.step.spans]  # fmt: skip
        every = self.group.share(f"report/{self.steps}", [kept, rows, mine.step.seconds])
        stages = sorted(row for kept, _, _ in every for row in kept)
        spans = [_span(row) for _, rows, _ in every for row in rows]
        seconds = max(seconds for _, _, seconds in every)
        step = Step(mine.step.results, spans, seconds, mine.step.bytes)
        return TrainingReport(
            mine.program, step, mine.allowed, tuple(s[1] for s in stages),
            tuple(s[2] for s in stages),
        )  # fmt: skip


def _span(row: Sequence[Any]) -> Span:
    from dfc.planning.actions import Action, Kind

    kind, stage, b, rank, start, end = row
    return Span(Action(Kind(kind), stage, b), rank, start, end)


class _Ranks:
    """Runs this rank's row of a program, and says to the others what they need after it."""

    def __init__(self, trainer: RankTrainer) -> None:
        self.trainer, self.group = trainer, trainer.group
        model, placement = trainer.model, trainer.programs.placement
        self.edges, self.placement = tuple(model.edges), placement
        self.types = {
            i: [v.value.type if isinstance(v, Gradient) else v.type for v in e.values]
            for i, e in enumerate(self.edges)
        }
        self.last = next(e.source for e in self.edges if e.target == HOST)
        self.owners = tied(model.parts)
        self.doing = Doing()
        self._routes: dict[int, tuple[Program, Routes]] = {}
        self._deadline = trainer.deadline or UNKNOWN
        pairs = [p for p in pairs_of(self.edges, placement) if HOST not in p]
        self._after = self._pairs_after()
        try:
            self.links = self._linked(pairs, "step")
            self.others = self._linked(self._after, "after")
        except RuntimeError as e:
            raise self._lost(f"the links cannot be made: {e}") from e

    def _linked(self, pairs: Sequence[Pair], name: str) -> Links:
        g = self.group
        return Links(g.rank, pairs, g.store, g.name(name), g.device, MEETING)

    def _pairs_after(self) -> list[Pair]:
        """From the loss's rank to each other one, and between those that share a weight."""
        loss = self.placement[self.last]
        found = {(loss, r) for r in range(self.group.size)}
        for stages in self.owners.values():
            ranks = {self.placement[s] for s in stages}
            found |= {(a, b) for a in ranks for b in ranks}
        return sorted((a, b) for a, b in found if a != b)

    def step(self, program: Program, given: Sequence[Mapping[Any, Any]]) -> Step:
        """This rank's row; the losses are in every rank's results.

        Raises:  DfcError K050 for an action that fails here, K055 for a rank that is lost.
        """
        if id(program) not in self._routes:
            self._routes[id(program)] = program, routes(program, self.edges)
        began = time.perf_counter()
        results: list[dict[Any, Any]] = [{} for _ in given]
        every = range(len(given))
        traffic = _OwnHost(
            self.links, self._routes[id(program)][1], every, self.types, self._sizes(given),
            self.doing, self._deadline, given=given, results=results,
        )  # fmt: skip
        try:
            done = run_rank(
                self.group.rank, traffic.routes, self.trainer._run, traffic, every, self.doing
            )
            self._tell_losses(results)
        except (LinkLost, Abandoned, RuntimeError) as e:
            self.close()
            raise self._lost(str(e)) from e
        except DfcError:
            self.close()  # whoever waits for this rank is told by that
            raise
        seconds = time.perf_counter() - began
        if self.trainer.deadline is None:
            self._deadline = max(AT_LEAST, LATE * seconds)
        spans = [Span(a, self.group.rank, start, end) for a, start, end in done.spans]
        sent = {e: done.sent.get(i, 0) for i, e in enumerate(self.edges)}
        return Step(results, spans, seconds, sent)

    def _sizes(self, given: Sequence[Mapping[Any, Any]]) -> list[Mapping[str, Any]]:
        """The sizes of each microbatch; equal ones are one object, whose layouts are kept."""
        model = self.trainer.model
        found: dict[str, Mapping[str, Any]] = {}
        sizes = []
        for part in given:
            own = bind_inputs(model.graph, [part[model.inputs[v]] for v in model.graph.inputs])
            sizes.append(found.setdefault(str(own), own))
        return sizes

    def _tell_losses(self, results: Sequence[dict[Any, Any]]) -> None:
        import torch

        loss: Value = self.trainer.model.loss
        rank = self.placement[self.last]
        if self.group.rank == rank:
            block = torch.stack([r[loss] for r in results])
            self._wait([self._post((rank, r), block, 0) for r in range(self.group.size)
                        if r != rank])  # fmt: skip
            return
        block = torch.empty(len(results), dtype=loss.tensor_type.dtype.to_torch())
        self._wait([self._post((rank, self.group.rank), block, 0)])
        for r, x in zip(results, block, strict=True):
            r[loss] = x

    def exchange(
        self, told: Mapping[tuple[str, int], torch.Tensor], like: Mapping[str, torch.Tensor]
    ) -> dict[tuple[str, int], torch.Tensor]:
        """The gradients of tied weights that other ranks' stages have, for what this one has.

        Raises:  DfcError K055 for a rank that is lost.
        """
        import torch

        me, works, found = self.group.rank, [], {}
        self.doing.set("ALLREDUCE")
        try:
            for tag, (name, stages) in enumerate(self.owners.items(), 1):
                ranks = sorted({self.placement[s] for s in stages})
                for i, s in enumerate(stages if me in ranks else ()):
                    number = tag * len(self.placement) + i
                    if self.placement[s] != me:
                        found[name, s] = torch.empty_like(like[name])
                        works.append(self._post((self.placement[s], me), found[name, s], number))
                        continue
                    block = told[name, s].contiguous()
                    works += [self._post((me, r), block, number) for r in ranks if r != me]
            self._wait(works)
        except RuntimeError as e:
            self.close()
            raise self._lost(str(e)) from e
        self.doing.set("idle")
        return found

    def _post(self, pair: Pair, block: torch.Tensor, tag: int) -> Any:
        return self.others.post(pair, block.detach(), tag)

    def _wait(self, works: Sequence[Any]) -> None:
        for work in works:
            work.wait(timedelta(seconds=self._deadline))

    def _lost(self, why: str) -> DfcError:
        me = f"rank {self.group.rank}"
        return DfcError("K055", f"a rank is lost or too slow while {me} is in {self.doing}: {why}",
                        help="start all ranks again from the last state")  # fmt: skip

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
            return [self.given[microbatch][v] for v in e.values]
        return super().receive(edge, microbatch)


def tied(parts: Sequence[Differentiated]) -> dict[str, list[int]]:
    """The weights that several stages have gradients of, with those stages in order."""
    found: dict[str, list[int]] = {}
    for part in parts:
        for name in part.cut.weight_gradients:
            found.setdefault(name, []).append(part.number)
    return {name: stages for name, stages in found.items() if len(stages) > 1}
