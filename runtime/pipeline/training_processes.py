"""Training in several processes of this machine, from one ordinary script or notebook.

    with ProcessTrainer(graph, plan, optimizer=partial(torch.optim.AdamW, lr=1e-3)) as trainer:
        for x, target in batches:
            loss = trainer.step(x, target)
        trainer.load_into(model)

Each rank is a fresh Python that reads the graph as text and maps its weights; nothing of the script
is run again in it. With `checkpoint=folder, every=100` the trainer saves by itself, keeps the
batches since, and starts all ranks again from there when one is lost: the call goes on, and its
loss is what it would have been.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.planning.actions import Action, Kind, Program, parse_program
from dfc.planning.stages import HOST
from dfc.publish import require_usable
from dfc.runtime.engines import find_engine
from dfc.runtime.pipeline import checkpoint as checkpoints
from dfc.runtime.pipeline.control import Message
from dfc.runtime.pipeline.crew import Launcher
from dfc.runtime.pipeline.differentiated import Differentiated
from dfc.runtime.pipeline.lanes import Span, Step
from dfc.runtime.pipeline.linking import meeting
from dfc.runtime.pipeline.named_factory import told
from dfc.runtime.pipeline.optimizer_options import (
    changed_options,
    options_of,
    take_options,
)
from dfc.runtime.pipeline.programs import AUTO
from dfc.runtime.pipeline.rank_device import on_host
from dfc.runtime.pipeline.spawn import private_folder
from dfc.runtime.pipeline.staged_folder import write_staged
from dfc.runtime.pipeline.staged_model import StagedModel
from dfc.runtime.pipeline.training import Trainer, Way, check_of, no_gradients
from dfc.runtime.pipeline.training_gang import Gang, entry
from dfc.runtime.pipeline.training_report import TrainingReport
from dfc.runtime.pipeline.training_state import (
    Slots,
    State,
    check_state,
    refuse_other,
    refuse_other_optimizer,
    slots_of,
)  # fmt: skip

if TYPE_CHECKING:
    import torch

    from dfc.planning.pipeline import Plan

Batch = tuple[Sequence[Any], int]  # inputs, where they may be wanted again, and of how many batches
T = TypeVar("T")
RESTARTS = 3  # times that ranks may be lost in one call
_JOB = "training.json"


class ProcessTrainer(Trainer):
    """A trainer whose ranks are processes of this machine; the options of `Trainer`, and these.

    `optimizer` travels by its name: a class or function of a module, or a `functools.partial` of
    one with numbers, words and lists. The one in `optimizers` stands for those of the ranks: they
    take over its options, which schedulers of PyTorch's change, before each step, by parameter.
    `checkpoint` is a folder that is written every so many steps; then ranks that are lost are
    started again, `restarts` times in a call at most, and the batches since are repeated from
    copies. `modules` are imported in each rank first: those that declare operators. `links` are
    those of `RankTrainer`. Weights and gradients are in the ranks: see `state_dict`, `load_into`,
    `clip`.
    Ensures: losses and weights are those of `Trainer` with the same options, to the bit; all
             processes end with the trainer, or with this process. A step that fails in the model
             has changed nothing, and the next may follow.
    Raises:  DfcError N077 for an optimizer that cannot travel, D011 for a checkpoint that would
             replace something else, K050 and K057 for what fails in a rank, K058 for a rank that is
             lost for good, N078 for what is in the ranks alone, else as `Trainer`.
    """

    def __init__(
        self,
        graph: Graph | StagedModel,
        stage_of: Mapping[Node, int] | Plan | None = None,
        *,
        optimizer: Callable[..., Any],
        checkpoint: str | os.PathLike[str] | None = None,
        every: int = 100,
        restarts: int = RESTARTS,
        links: str | None = None,
        modules: str | Sequence[str] = (),
        launcher: Callable[[Path, list[int], list[str]], Launcher] = entry,
        **options: Any,
    ) -> None:
        if every < 1 or restarts < 0:
            raise DfcError("N073", "`every` is 1 or more, `restarts` 0 or more", status=2)
        if options.get("sequential"):
            raise DfcError("N073", "ranks in processes are not `sequential`", status=2)
        if checkpoint is not None:
            require_usable(checkpoint, folder=True, force=True)
        self._optimizer = told(optimizer)
        self.checkpoint = None if checkpoint is None else Path(checkpoint).absolute()
        self.every, self.restarts = every, restarts
        self.incidents: list[str] = []
        self._links, self._modules, self._launcher = links, _listed(modules), launcher
        self._engine = str(options.get("engine", "eager"))
        find_engine(self._engine)
        recompute = options.get("recompute")
        self._recompute = (
            recompute
            if recompute is None or isinstance(recompute, (bool, str))
            else sorted(recompute)
        )
        if recompute == AUTO and not (stage_of is None or isinstance(stage_of, Mapping)):
            self._recompute = None  # the plan has chosen
        self._memory = options.get("memory")
        self._closed = False
        self._again: list[Message] = []  # what the ranks said of the last step that was repeated
        self._pending: list[Batch] = []  # whose gradients the ranks have added up
        self._base: Path | None = None  # what ranks that are started again begin with
        self._log: list[tuple[int, str, Any]] = []  # what was done since, with the step before it
        super().__init__(graph, stage_of, optimizer=optimizer, **options)
        del self.parameters  # see __getattr__
        self._options = options_of(self.named_slots())

    _moves = False  # ranks have the weights of their own stages alone

    def __getattr__(self, name: str) -> Any:
        if name != "parameters":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        help = "`state_dict()` and `load_into(model)` read weights, `clip=` shortens gradients"
        raise DfcError("N078", "parameters and gradients are in the ranks", help=help, status=2)

    def _owned(self) -> list[list[torch.nn.Parameter]]:
        """What stands for the parameters of all ranks: their names and shapes, and no numbers."""
        import torch

        names = dict.fromkeys(n for part in self.model.parts for n in part.flow.weights)
        weights = self.model.weights()
        self._stand_ins = {n: torch.nn.Parameter(weights[n].to("meta")) for n in names}
        return [list(self._stand_ins.values())]

    def named_slots(self) -> Iterable[Slots]:
        return slots_of(self._stand_ins, self.optimizers)

    def _mine(self) -> Sequence[Differentiated]:
        return ()  # none of the stages is this process's

    def _start(self, threads: Sequence[int]) -> Way:
        self._folder = private_folder()
        folder, model = Path(self._folder.name), self.model
        met = meeting(self._links, folder, "127.0.0.1")
        schedule = self.programs.schedule
        job = {
            "model": write_staged(folder, model), "threads": list(threads),
            "meeting": met.told, "modules": self._modules,
            "optimizer": self._optimizer,
            "schedule": [str(schedule), schedule.name] if isinstance(schedule, Program)
            else schedule,
            "options": {
                "microbatches": self.microbatches, "reduction": self.reduction,
                "ranks": self.programs.placement, "batch": self.batch, "engine": self._engine,
                "seed": self.seed, "links": self._links, "clip": self.clip,
                "recompute": self._recompute, "memory": self._memory, "devices": self.devices,
            },
        }  # fmt: skip
        (folder / _JOB).write_text(json.dumps(job), encoding="utf-8")
        launcher = self._launcher(folder, list(threads), self.devices)
        self._gang = Gang(len(threads), launcher, met, self._readers())
        self._ended = weakref.finalize(self, _end, self._gang, self._folder)
        try:
            self._gang.start()
        except (DfcError, KeyboardInterrupt) as e:
            self._ended()
            if isinstance(e, DfcError) and e.code == "V010":
                help = 'name the module that declares it: modules=["my_operators"]'
                raise DfcError(e.code, e.message, help=help, status=e.status) from None
            raise
        return _Nowhere()

    def _readers(self) -> list[list[int]]:
        """The ranks that read each of the graph's inputs."""
        placement = self.programs.placement
        found = []
        for v in self.model.graph.inputs:
            own = self.model.inputs[v]
            edges = [e for e in self.model.edges if e.source == HOST and own in e.values]
            found.append(sorted({placement[e.target] for e in edges}))
        return found

    @property
    def pids(self) -> list[int]:
        """The process of each rank."""
        return [m.pid for _, m in sorted(self._gang.crew.members.items())]

    def update(self) -> None:
        """Let the optimizers take a step by the gradients that were added up since the last one.

        Raises:  DfcError N052 where there are none, K057 for an optimizer that fails, K058 for a
                 rank that is lost for good.
        """
        if not self._pending:
            raise no_gradients()
        self._tell_options()
        self._note("step", self._pending)
        self._pending = []
        self.steps += 1  # decided: whoever is lost now is brought here again
        try:
            told = self._mended(lambda again: self._again if again else self._gang.ask("update"))
        except DfcError as e:
            if e.code == "K057":  # the same would happen again
                self.steps -= 1
                self._log = self._log[:-1]
            raise
        self.norm = told[0]["norm"]
        self.optimizers[0].step()  # has no gradients: schedulers see that it is called
        if self.checkpoint is not None and self.steps % self.every == 0:
            self.save(self.checkpoint)

    def backward_flat(self, flat: Sequence[torch.Tensor], of: int = 1) -> torch.Tensor:
        """The loss of a batch, which is sent from this machine's memory; gradients stay in the
        ranks."""
        import torch

        check_of(of)
        flat = on_host(flat)
        fresh = not self._pending
        try:
            found = self._mended(lambda _: self._gang.backward(flat, of, fresh))
        except BaseException:
            self._pending = []
            raise
        again = [x.clone() for x in flat] if self.checkpoint is not None else []
        self._pending.append((again, of))
        self._tell_of(found)
        return torch.tensor(found[0]["loss"], dtype=self.model.loss.tensor_type.dtype.to_torch())

    def zero_grad(self) -> None:
        """Forget the gradients that were added up since the last `update`."""
        self._pending = []

    def _tell_of(self, found: Sequence[Message]) -> None:
        """Keep what the ranks say of a step, for the report."""
        told = found[0]["program"]
        program = parse_program(*told) if told else self.last and self.last[0]
        assert program is not None
        spans = [Span(Action(Kind(k), s, b), rank, start, end)
                 for rank, m in enumerate(found) for k, s, b, start, end in m["spans"]]  # fmt: skip
        edges = dict.fromkeys(self.model.edges, 0)
        for message in found:
            for i, size in message["sent"]:
                edges[self.model.edges[i]] += size
        seconds = max(m["seconds"] for m in found)
        self.last = program, Step([], spans, seconds, edges)
        self._kept = sorted(row for m in found for row in m["kept"])

    def report(self) -> TrainingReport:
        """What the last step took on all ranks, and kept, beside what was predicted.

        Raises:  DfcError N052 before the first step.
        """
        if self.last is None:
            raise DfcError("N052", "the trainer has not taken a step yet")
        program, step = self.last
        _, most, saved, taken, peak = (tuple(column) for column in zip(*self._kept, strict=True))
        allowed = self.programs.limits(program)
        return TrainingReport(program, step, allowed, most, saved, taken, peak, self.compared)

    def set_options(self, **values: Any) -> None:
        """Change options of all optimizers: set_options(lr=1e-4)."""
        super().set_options(**values)
        self._tell_options()

    def _tell_options(self) -> None:
        """Let the ranks have the options of this process's optimizer, which schedulers change."""
        now = options_of(self.named_slots())
        if now == self._options:
            return
        changed = changed_options(self._options, now)
        self._mended(lambda _: self._gang.ask("options", changed=changed))
        self._note("options", changed)
        self._options = now

    def save(self, folder: str | os.PathLike[str]) -> None:
        """As `Trainer.save`."""
        path = Path(folder).absolute()
        self._tell_options()
        self._mended(lambda _: self._gang.ask("save", folder=str(path)))
        if path == self.checkpoint:
            self._base, self._log = path, []

    def load(self, folder: str | os.PathLike[str]) -> None:
        """As `Trainer.load`; with `checkpoint` it is saved there at once."""
        self._load(Path(folder).absolute(), checkpoints.read(Path(folder)))

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer slots and options of the whole model, however it was cut."""
        path = Path(self._folder.name) / "state"
        self.save(path)
        return dict(checkpoints.read(path))

    def load_state_dict(self, state: State) -> None:
        """Go on from a state, made by stages like these or others.

        Raises:  DfcError N075 (exit status 2) for parameters that are missing or of another shape.
        """
        self._refuse(state)
        path = Path(self._folder.name) / "given"
        checkpoints.write(path, state, self.model.graph)
        self._load(path, state)

    def _load(self, path: Path, state: State) -> None:
        self._refuse(state)
        self.zero_grad()
        self._mended(lambda _: self._gang.ask("load", folder=str(path)))
        self.steps, self.seed = int(state["step"]), int(state["seed"])
        take_options(self.named_slots(), state["options"])
        self._options = options_of(self.named_slots())
        if self.checkpoint is not None:
            self._base, self._log = path, []
            if path != self.checkpoint:
                self.save(self.checkpoint)

    def _refuse(self, state: State) -> None:
        check_state(state)
        refuse_other(self.model.read, state["weights"])
        for name, options in state["options"].items():
            refuse_other_optimizer(name, self.optimizers[0], options)

    def _note(self, what: str, value: Any) -> None:
        if self.checkpoint is not None:
            self._log.append((self.steps, what, value))

    def _mended(self, run: Callable[[bool], T]) -> T:
        """Run with ranks that are there; where some were lost on the way, again.

        `run` is told whether the ranks were started again, with all that is in the log.
        """
        lost = 0
        while True:
            try:
                return run(self._ready())
            except DfcError as e:
                if e.code != "K058" or self._closed:
                    raise
                if self.checkpoint is None:
                    help = "checkpoint=FOLDER goes on by itself; else make the trainer again and "
                    raise DfcError("K058", e.message, help=help + "load what was saved") from None
                if lost == self.restarts:
                    raise
                self.incidents.append(e.message)
                lost += 1

    def _ready(self) -> bool:
        """All ranks there and where they were; whether they had to be started for that."""
        if self._closed:
            raise DfcError("K051", "the trainer is closed")
        if self._gang.alive:
            return False
        if self.checkpoint is None:
            raise _ended(self._gang.why)
        self._gang.start()
        at = 0
        if self._base is not None:
            at = self._gang.ask("load", folder=str(self._base))[0]["steps"]
        for step, what, value in self._log:
            if step < at:
                continue  # it was saved, and who saved it was lost before it could say so
            if what == "options":
                self._gang.ask("options", changed=value)
            else:
                self._repeat(value)
                self._again = self._gang.ask("update")
        self._repeat(self._pending)
        return True

    def _repeat(self, batches: Sequence[Batch]) -> None:
        for i, (flat, of) in enumerate(batches):
            self._gang.backward(flat, of, fresh=i == 0)

    def close(self) -> None:
        """End the ranks' processes."""
        self._closed = True
        self._ended()


def _ended(why: DfcError | None) -> DfcError:
    if why is None:
        return DfcError("K058", "the ranks have ended")
    help = "make the trainer again and load what was saved; checkpoint=FOLDER goes on by itself"
    message = f"the ranks have ended, since {why.message}"
    return DfcError(why.code, message, help=help, status=why.status)


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _end(gang: Gang, folder: TemporaryDirectory[str]) -> None:
    """Of a trainer that is closed, or that nobody has any more."""
    gang.close()
    folder.cleanup()


class _Nowhere:
    """No program runs in this process."""

    def step(self, program: Program, given: Sequence[Mapping[Any, Any]]) -> Step:
        raise AssertionError("ranks run programs")

    def close(self) -> None:
        """Nothing is held."""
