"""Training in several processes: the same program, edges and stages, a rank in each.

    torchrun --nproc-per-node 2 train.py         # which makes a `RankTrainer` and calls step()

Every process makes the same trainer from the same graph and calls the same steps; it has the
weights and optimizers of its own stages alone, and takes only what those read of a batch. After a
step, whoever shares a tied weight is told the gradients of the others and adds them up in the order
of stages, so that all copies stay equal to the bit; the last stage's rank tells the loss.

When a rank is lost, every other one ends with an error that names it. A script that saves now and
then, and loads what is there when it starts, goes on by itself under torchrun:

    torchrun --nproc-per-node 2 --max-restarts 3 train.py

    trainer = RankTrainer(graph, stage_of, optimizer=torch.optim.AdamW)
    if Path("last").exists():
        trainer.load("last")
    while trainer.steps < 10_000:
        trainer.step(*batch(trainer.steps))
        if trainer.steps % 100 == 0:
            trainer.save("last")
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.planning.actions import Action, Kind, Program
from dfc.runtime.pipeline import checkpoint
from dfc.runtime.pipeline.differentiated import Differentiated
from dfc.runtime.pipeline.lanes import Span, Step
from dfc.runtime.pipeline.stage_costs import Measured
from dfc.runtime.pipeline.staged_model import StagedModel
from dfc.runtime.pipeline.training import Trainer, Way
from dfc.runtime.pipeline.training_exchange import Ranks
from dfc.runtime.pipeline.training_report import TrainingReport
from dfc.runtime.pipeline.training_state import State, check_state, on_host
from dfc.runtime.pipeline.world import World

if TYPE_CHECKING:
    from dfc.planning.pipeline import Plan

_COMPARING = 600.0  # seconds in which rank 0 has run the model
_numbers = count(1)  # of the trainers of this process: all processes make the same


class RankTrainer(Trainer):
    """This process's rank of a trainer; made and called alike in each process.

    `deadline` is how many seconds a message may take: five times the last step, and five seconds at
    least, where it is not given. `links` are `local` (sockets of this host and memory that both
    ends see) or `gloo`; by default local where all ranks are on one host, and nccl beside it
    between ranks on two GPUs (`nccl` insists on that; `link_kind` tells). `parameters`,
    `optimizers` and `state_dict()` are those of this rank's stages; the states of all ranks
    together are the model's.
    Stages that are given as a mapping are those of rank 0 everywhere: `balanced` measures.
    Raises:  DfcError N057 for another number of processes than ranks, N055 for ranks with other
             models or plans, N059 for links that there are not, K058 for a rank that is lost, else
             as `Trainer`.
    """

    def __init__(
        self,
        graph: Graph | StagedModel,
        stage_of: Mapping[Node, int] | Plan | None = None,
        *,
        world: World | None = None,
        deadline: float | None = None,
        links: str | None = None,
        **options: Any,
    ) -> None:
        self.world = world or World.of_launcher()
        self.deadline, self._links = deadline, links
        self._name = f"trainer{next(_numbers)}"  # its part of the store
        self._saves, self._measures = count(), count()
        if isinstance(stage_of, Mapping) and isinstance(graph, Graph):
            stage_of = self._of_first(graph, stage_of)
        super().__init__(graph, stage_of, **options)

    def _of_first(self, graph: Graph, stage_of: Mapping[Node, int]) -> Mapping[Node, int]:
        """Rank 0's stages of the same graph, for all.

        Why:  where to cut is measured, by each process anew, and does not come out alike.
        """
        nodes = list(graph.nodes)
        mine = [graph.fingerprint(), [stage_of.get(n) for n in nodes]]
        of_graph, stages = self.world.share(f"{self._name}/stages", mine)[0]
        if of_graph != mine[0]:
            return stage_of  # what differs is told when all is compared
        return {n: s for n, s in zip(nodes, stages, strict=True) if s is not None}

    def _compared(self, graph: Graph) -> str:
        """Rank 0 compares, for all.

        Raises:  DfcError T010 on every rank.
        """
        told: list[Any] = []
        if not self.world.rank:
            try:
                told = [super()._compared(graph)]
            except DfcError as e:
                told = [e.code, e.message, e.diagnostics[0].help, e.status]
        first = self.world.share(f"{self._name}/compared", told, _COMPARING)[0]
        if len(first) > 1:
            raise DfcError(first[0], first[1], help=first[2], status=first[3])
        return str(first[0])

    _moves = False  # ranks have the weights of their own stages alone

    def _ranks_of(self, devices: str | Sequence[str]) -> int | None:
        return self.world.size

    def _devices_here(self) -> Sequence[str]:
        return self.devices[self.world.rank : self.world.rank + 1]

    def _mine(self) -> Sequence[Differentiated]:
        placement = self.programs.placement
        self.world.expect(1 + max(placement))
        self._compare()
        return [p for p in self.model.parts if placement[p.number] == self.world.rank]

    def _compare(self) -> None:
        """Every rank says what it has, before anything is linked."""
        import torch

        parts = [f"{p.stage.graph.fingerprint()} {p.flow}" for p in self.model.parts]
        has = {"torch": torch.__version__, "model": self.model.graph.fingerprint(),
               "schedule": self.programs.schedule, "microbatches": self.microbatches,
               "seed": self.seed,
               "ranks": self.programs.placement, "clip": self.clip,
               "recompute": [self.programs.recompute, self.programs.room],
               "stages": sha256("".join(parts).encode()).hexdigest()}  # fmt: skip
        self.world.same({what: str(x) for what, x in has.items()}, f"{self._name}/has")

    def _threads(self, total: int) -> list[int]:
        import torch

        torch.set_num_threads(total)
        return [total] * self.world.size

    def _start(self, threads: Sequence[int]) -> Way:
        self._ranks = Ranks(
            self.world,
            self._name,
            self.model,
            self.programs.placement,
            self._run,
            self.deadline,
            self._links,
            self.devices,
            self.clip is not None,
        )
        return self._ranks

    @property
    def link_kind(self) -> str:
        """What this rank sends over: local, gloo, or nccl beside either."""
        return self._ranks.link_kind

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
                parameter.grad = held[0] if held and parameter.requires_grad else None
                continue
            total = told[name, owners[name][0]].clone()
            for s in owners[name][1:]:
                total.add_(told[name, s].to(total.device))
            parameter.grad = total.to(parameter.device) if parameter.requires_grad else None

    def _first_reader(self, name: str) -> int:
        owners = self._ranks.owners
        return int(owners[name][0]) if name in owners else super()._first_reader(name)

    def _norms(self) -> Mapping[str, float]:
        return self._ranks.tell_norms(super()._norms())

    def _measured(
        self, given: Sequence[Mapping[Any, Any]], program: Program, repeats: int
    ) -> Measured:
        times, saved = super()._measured(given, program, repeats)
        mine = [[[*k, x] for k, x in times.items()], [[s, *x] for s, x in saved.items()]]
        every = self.world.share(f"{self._name}/measured/{next(self._measures)}", mine)
        return (
            {(kind, s): x for found, _ in every for kind, s, x in found},
            {s: (kept, taken) for _, found in every for s, kept, taken in found},
        )

    def load_state_dict(self, state: State) -> None:
        """Go on from the state of a whole model, of which this rank takes its part.

        Raises:  DfcError N075 (exit status 2) for parameters that are missing or of another shape.
        """
        check_state(state)
        mine = {n: x for n, x in state["weights"].items() if n in self.parameters}
        super().load_state_dict({**state, "weights": mine})

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the state of all ranks as one folder, as `Trainer.save`: all of them must call it.

        Needs:   a folder that all ranks see.
        """
        key = f"{self._name}/saved/{next(self._saves)}"
        state, model = on_host(self._state()), self.model.graph
        checkpoint.write_together(Path(folder), state, model, self.world, key)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Go on from what `save` wrote, of which this rank takes its part.

        Raises:  as `Trainer.load`.
        """
        self.load_state_dict(checkpoint.read(Path(folder), self.parameters))

    def report(self) -> TrainingReport:
        """What the last step took, on all ranks: all of them must call it.

        Raises:  DfcError N052 before the first step.
        """
        mine = super().report()
        kept = [[t.stage.number, t.most, t.saved_bytes, t.taken_bytes, t.most_bytes]
                for t in self.trained]  # fmt: skip
        rows = [[int(s.action.kind), s.action.stage, s.action.microbatch, s.rank, s.start, s.end]
                for s in mine.step.spans]  # fmt: skip
        told = [kept, rows, mine.step.seconds]
        every = self.world.share(f"{self._name}/report/{self.steps}", told)
        rows_of = zip(*sorted(row for kept, _, _ in every for row in kept), strict=True)
        _, most, saved, taken, peak = (tuple(column) for column in rows_of)
        spans = [_span(row) for _, rows, _ in every for row in rows]
        seconds = max(seconds for _, _, seconds in every)
        step = Step(mine.step.results, spans, seconds, mine.step.bytes)
        return TrainingReport(mine.program, step, mine.allowed, most, saved, taken, peak,
                              mine.compared)  # fmt: skip


def _span(row: Sequence[Any]) -> Span:
    kind, stage, b, rank, start, end = row
    return Span(Action(Kind(kind), stage, b), rank, start, end)
