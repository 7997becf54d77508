"""Training of a partitioned model in one process: any program of the schedules, thread by rank.

    with Trainer(graph, stage_of, schedule="zb1p", microbatches=8,
                 optimizer=lambda params: torch.optim.AdamW(params, 1e-3)) as trainer:
        for x, target in batches:
            loss = trainer.step(x, target)

A plan made with `train=True` takes the place of `stage_of`, schedule and microbatches:
`Trainer(graph, plan, optimizer=...)`.

Gradients of several batches are added up by as many calls of `backward` before `update`:

    for batch in four:
        trainer.backward(*batch, of=4)   # its loss counts a quarter
    trainer.update()

Each stage is differentiated by itself. Gradients are those of one process with the same
microbatches: within a stage they are added in the order of the program, over the stages of a tied
weight in the order of stages.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dfc.calling import flat_inputs
from dfc.ending import noticed
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.ir.types import TensorType
from dfc.planning.actions import Action, Program
from dfc.planning.microbatches import batch_dims, checked_batch, no_batch, parts_of
from dfc.planning.simulate import Costs
from dfc.planning.torch_device import check_device
from dfc.runtime.allocation import keep_pages
from dfc.runtime.pipeline.clipping import norms, shorten, together
from dfc.runtime.pipeline.differentiated import Differentiated
from dfc.runtime.pipeline.dropout import Mask
from dfc.runtime.pipeline.faithful import compare as compare_with_model
from dfc.runtime.pipeline.given_microbatches import given_to, shares_of
from dfc.runtime.pipeline.homes import Homes
from dfc.runtime.pipeline.lanes import Step
from dfc.runtime.pipeline.local import Computing, one_each, rank_threads
from dfc.runtime.pipeline.optimizer_options import set_options
from dfc.runtime.pipeline.programs import AUTO, Programs, Shared
from dfc.runtime.pipeline.resumable import Resumable
from dfc.runtime.pipeline.sequential import Sequential
from dfc.runtime.pipeline.stage_costs import Measured, measured, stage_costs
from dfc.runtime.pipeline.staged_model import StagedModel
from dfc.runtime.pipeline.streams import device_names
from dfc.runtime.pipeline.trained import TrainedStage, builder
from dfc.runtime.pipeline.training_choices import (
    check_devices,
    check_numbers,
    check_optimizer,
    made_optimizer,
    staged_model,
    stages_of_plan,
    what_recomputes,
)
from dfc.runtime.pipeline.training_report import TrainingReport

if TYPE_CHECKING:
    import torch

    from dfc.planning.pipeline import Plan

    MakeOptimizer = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


class Way(Protocol):
    """How a program is run: `Lanes`, `Sequential`, or processes."""

    def step(self, program: Program, given: Sequence[Mapping[Any, Any]]) -> Step: ...

    def close(self) -> None: ...


class Trainer(Resumable):
    """A partitioned model with its optimizers; `step` takes a whole batch.

    `graph` may be a `StagedModel`, which several trainers can share: then it has stages and loss.
    `loss` is a function of the model's outputs and of the targets, whose types are `targets`
    (["i64[B]"]); without it the model returns the loss. With `reduction="mean"` a microbatch counts
    for its part of the batch's items, with "sum" it counts whole. `stage_of` gives each node its
    stage, or is a plan. `schedule` is a name, a program, or "auto": the best for the stages' times,
    measured in the first step, of those that have the stages on these ranks; by default a plan's,
    else "1f1b" with 8 microbatches. `ranks` is how many there are, or the rank of each stage: with
    4 stages 2 puts them in loops (0, 1, 0, 1) or in a V (0, 1, 1, 0), whichever the schedule has
    and "auto" finds best. By default they are a plan's for "auto", else one for each of `devices`,
    else one for each stage, or `chunks` stages each in schedules that allow any number. `devices`
    are those of the ranks, or of all: `cpu`, `cuda:0`, ...; weights, gradients and optimizers'
    slots lie there; where they differ, "auto" leaves stages in loops.
    A stage that recomputes keeps of each microbatch what other stages gave it, and runs its forward
    again before its backward pass: `recompute` is True, or the stages that do. With "selective" all
    stages keep what leaves cheap operators alone to run again, in the fewest bytes. With "auto" as
    few recompute, each by the better of both ways, as leave each rank no more than `memory` bytes
    of activations ("2GiB"), as measured in the first step. By default a plan's.
    `clip` is how long all gradients together may be: longer ones are shortened before the
    optimizers' step, as `clip_grad_norm_` does; `norm` is what they were.
    Before anything is trained the graph and the model that it was captured from run forward and
    backward on two items of its example: `compared` says what came out. Dropout drops nothing
    meanwhile. `compare=False` leaves it out.
    What the model writes to its buffers (batch norm's statistics) is what its microbatches leave
    one after the other, and is taken over by `update`.
    Needs:   convex stages.
    Ensures: dropout is drawn by counters (`seed`, step, operator, microbatch): masks do not depend
             on stages or schedule. Other random operators are refused.
    Raises:  DfcError N050 for stages, N07x for what cannot be trained, T010 for a graph that trains
             something else than its model, N001.. for schedules, N053 for devices, K004 (status 7)
             for one that is not there.
    """

    def __init__(
        self,
        graph: Graph | StagedModel,
        stage_of: Mapping[Node, int] | Plan | None = None,
        *,
        optimizer: MakeOptimizer,
        schedule: str | Program | None = None,
        microbatches: int | None = None,
        loss: Callable[..., Any] | None = None,
        targets: Sequence[TensorType | str] = (),
        reduction: str = "mean",
        chunks: int = 2,
        ranks: Shared = None,
        batch: str | None = None,
        engine: str = "eager",
        threads: int | None = None,
        devices: str | Sequence[str] = "cpu",
        seed: int = 0,
        sequential: bool = False,
        recompute: bool | Collection[int] | str | None = None,
        memory: int | str | None = None,
        clip: float | None = None,
        compare: bool = True,
    ) -> None:
        import torch

        check_numbers(microbatches, clip, reduction)
        check_optimizer(optimizer)
        self.clip = clip
        self.norm: float | None = None
        keep_pages()
        if recompute == AUTO and stage_of is not None and not isinstance(stage_of, Mapping):
            recompute = None  # the plan has chosen
        asked = microbatches or 1  # a plan's are of a size that it knows
        if stage_of is not None and not isinstance(stage_of, Mapping):
            if schedule == AUTO and ranks is None:
                ranks = stage_of.program.placement
            stage_of, schedule, microbatches = stages_of_plan(
                stage_of, graph, schedule, microbatches
            )
        schedule = schedule or "1f1b"
        self.model = model = staged_model(graph, stage_of, loss, targets)
        self.reduction = reduction
        self.compared = self._compared(graph) if compare and isinstance(graph, Graph) else None
        self.batch = checked_batch(model.graph, batch)
        if self.batch is None and asked > 1:
            raise no_batch(model.graph, asked)
        microbatches = microbatches or (1 if self.batch is None else 8)
        self.microbatches, self.seed = microbatches, seed
        some, room = what_recomputes(recompute, memory, len(model.parts))
        if ranks is None and schedule == AUTO:
            ranks = self._ranks_of(devices)
        alike = isinstance(devices, str) or len(set(devices)) == 1
        self.programs = Programs(schedule, len(model.parts), microbatches, chunks, some, room,
                                 ranks, alike and self._moves and not sequential)  # fmt: skip
        self._dims = batch_dims(model.graph, self.batch, microbatches)
        count = 1 + max(self.programs.placement)
        self.devices = device_names(one_each(devices, count, "devices", "ranks"))
        check_devices(self.devices, sequential)
        for device in self._devices_here():
            check_device(device)
        mine = self._mine()
        self._homes = Homes(model.weights(), mine, [self.device_of(p) for p in mine])
        self.parameters = self._homes.parameters
        self._each = each = self._threads(threads or torch.get_num_threads())
        self.trained = self._trained(mine, engine, each)
        self._by_stage = {t.stage.number: t for t in self.trained}
        self.optimizers = [made_optimizer(optimizer, owned) for owned in self._owned() if owned]
        self._way: Way = Sequential(model.edges, self._run) if sequential else self._start(each)
        self._placed = self.programs.placement
        self.steps = 0
        self._gathered: dict[str, tuple[torch.Tensor, int]] = {}  # gradients, as they were then
        self._added = 0  # microbatches whose gradients are added up since the last update
        self.last: tuple[Program, Step] | None = None

    # what differs where ranks are processes

    def _compared(self, graph: Graph) -> str:
        """What can be said of the graph and the model that it was captured from."""
        return compare_with_model(graph, self.reduction)

    _moves = True  # whether stages may change ranks once they are measured

    def _ranks_of(self, devices: str | Sequence[str]) -> int | None:
        """How many ranks there are where nobody says so: None is one for each stage."""
        return None if isinstance(devices, str) else len(devices)

    def _devices_here(self) -> Sequence[str]:
        """The devices of this machine that are asked for."""
        return self.devices

    def _mine(self) -> Sequence[Differentiated]:
        """The stages of this process."""
        return self.model.parts

    def _threads(self, total: int) -> list[int]:
        """The threads of each rank's kernels."""
        return rank_threads(total, self.programs.placement, self.devices)

    def _start(self, threads: Sequence[int]) -> Way:
        placement = self.programs.placement
        return Computing(self.model.edges, self._run, threads, placement, self.devices)

    # stages

    def device_of(self, part: Differentiated) -> str:
        """The device of a stage."""
        return self.devices[self.programs.placement[part.number]]

    def _trained(
        self, parts: Sequence[Differentiated], engine: str, threads: Sequence[int]
    ) -> list[TrainedStage]:
        found, buffers = [], self.model.buffers()
        for part in parts:
            rank, device = self.programs.placement[part.number], self.device_of(part)
            build, weights = builder(engine, threads[rank], device), self._homes.on(device)
            again = self.programs.first.ways.get(part.number)
            readers, kinds, drawn = self.model.readers, self.programs.kinds, self.model.masks
            state = {v: (name, buffers[name].to(device, copy=True))
                     for name, v in self.model.state.items() if v in part.stage.gives}  # fmt: skip
            found.append(TrainedStage(part, weights, readers, build, kinds, again, drawn, state,
                                      self.model.checks))  # fmt: skip
        return found

    def measure(self, given: Sequence[Mapping[Any, Any]], repeats: int = 2) -> Costs:
        """What the actions of each stage take here, and the bytes that each keeps; where stages are
        to be chosen that recompute, also what they do selectively."""
        program = self.programs.to_measure(len(given))
        selective = self.programs.recompute is None
        return stage_costs(
            self.model, program, lambda p, n: self._measured(given, p, n), repeats, selective
        )

    def _measured(
        self, given: Sequence[Mapping[Any, Any]], program: Program, repeats: int
    ) -> Measured:
        def run() -> Step:
            return self._compute(program, given)

        return measured(self.trained, run, repeats, keep=bool(self._added))

    # a step

    def step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One optimizer step on a batch, `backward` and `update`; the loss before it.

        Raises:  DfcError K010.. for arguments that do not fit, K050 for a stage that fails.
        """
        loss = self.backward(*args, **kwargs)
        self.update()
        return loss

    def update(self) -> None:
        """Let the optimizers take a step by the gradients that were added up since the last one.

        Raises:  DfcError N052 where there are none.
        """
        if not self._added:
            raise no_gradients()
        if self.clip is not None:
            self.norm = together(self._norms().values())
            shorten(self.parameters.values(), self.norm, self.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        for stage in self.trained:
            stage.commit()
        self.steps += 1
        self._added = 0

    def zero_grad(self) -> None:
        """Forget the gradients that were added up since the last `update`."""
        self._added = 0
        for parameter in self.parameters.values():
            parameter.grad = None

    def _norms(self) -> Mapping[str, float]:
        """The norm of each parameter's gradient, of all stages."""
        return norms(self.parameters)

    def backward(self, *args: Any, of: int = 1, **kwargs: Any) -> torch.Tensor:
        """The loss of a batch, with every parameter's `grad`, and no optimizer step.

        Gradients are added to those since the last `update` or `zero_grad`, as PyTorch does: as if
        the microbatches of all these batches were one step's. Of a batch that is one `of` several
        the loss counts for that part, as `(loss / of).backward()`.
        Raises:  DfcError K010.. and K050 as `step`: what was added up is then forgotten.
        """
        try:
            return self.backward_flat(flat_inputs(self.model.graph, args, kwargs), of)
        except KeyboardInterrupt:
            noticed()
            raise

    def backward_flat(self, flat: Sequence[torch.Tensor], of: int = 1) -> torch.Tensor:
        """As `backward`, of the graph's inputs in order."""
        check_of(of)
        if self.parameters and all(p.grad is None for p in self.parameters.values()):
            self._added = 0  # by the optimizers' own `zero_grad`
        self._homes.changed()
        if self._added:
            self._take_changed_gradients()
        parts = parts_of(self.model.graph, self.batch, flat, self._dims, self.microbatches)
        shares = shares_of(parts, self._dims, self.reduction)
        given = given_to(
            self.model, parts, [share / of for share in shares], self._added, self.draw
        )
        try:
            program = self.programs.of(len(given), lambda: self.measure(given))
            self.last = program, self._compute(program, given, fresh=not self._added)
            self._gather()
            self._gathered = {
                n: (p.grad, p.grad._version)
                for n, p in self.parameters.items() if p.grad is not None
            }  # fmt: skip
        except BaseException:
            self._added = 0
            raise
        self._added += len(given)
        found = [r[self.model.loss] for r in self.last[1].results]
        total: torch.Tensor = found[0] * shares[0]
        for x, share in zip(found[1:], shares[1:], strict=True):
            total = total + x * share
        return total

    def _compute(
        self, program: Program, given: Sequence[Mapping[Any, Any]], fresh: bool = True
    ) -> Step:
        if program.placement != self._placed:  # all ranks are on one device
            self._way.close()
            self._way, self._placed = self._start(self._each), program.placement
        limits, ways = self.programs.limits(program), program.ways
        for number, stage in self._by_stage.items():
            if stage.recomputes != ways.get(number):
                stage.recompute(ways.get(number))
            stage.start(limits[number], fresh)
        return self._way.step(program, given)

    def _run(self, action: Action, values: Mapping[Any, Any]) -> dict[Any, Any]:
        return self._by_stage[action.stage].run(action, values)

    def draw(self, mask: Mask, microbatch: int, sizes: Mapping[str, int]) -> torch.Tensor:
        """The mask of a dropout in the step that comes or is under way."""
        return mask.draw(self.seed, self.steps, microbatch, sizes)

    def _gather(self) -> None:
        """The gradient of each parameter; a tied weight's is the sum over its stages, in order."""
        for name, parameter in self.parameters.items():
            held = [t.gradients[name] for t in self.trained if name in t.gradients]
            total = held[0] if held else None
            if held[1:]:
                total = held[0].clone()  # the stage goes on adding to its own
            for other in held[1:]:
                total = total.add_(other.to(total.device))  # type: ignore[union-attr]
            if not parameter.requires_grad:  # the caller froze it
                total = None
            parameter.grad = None if total is None else total.to(parameter.device)

    def _take_changed_gradients(self) -> None:
        """Go on from what the caller has made of gradients since they were added up."""
        for name, parameter in self.parameters.items():
            own, before = parameter.grad, self._gathered.get(name)
            if own is None and before is None:
                continue
            if own is not None and before and own is before[0] and own._version == before[1]:
                continue
            first = self._first_reader(name)
            for t in self.trained:
                if name in t.gradients:
                    t.set_gradient(name, own if t.stage.number == first else None)

    def _first_reader(self, name: str) -> int:
        """The first stage that has a gradient of a weight."""
        return next(t.stage.number for t in self.trained if name in t.gradients)

    def _owned(self) -> list[list[torch.nn.Parameter]]:
        """The parameters of each stage's optimizer: a tied one belongs to its first stage."""
        seen: set[str] = set()
        found: list[list[torch.nn.Parameter]] = []
        for t in self.trained:
            names = [n for n in t.stage.cut.weight_gradients if n not in seen]
            seen.update(names)
            found.append([self.parameters[n] for n in names])
        return found

    # what was made

    def set_options(self, **values: Any) -> None:
        """Change options of all optimizers: set_options(lr=1e-4).

        Raises:  DfcError N073 (exit status 2) for an option that they do not have.
        """
        set_options(self.optimizers, values)

    def report(self) -> TrainingReport:
        """What the last step took and kept, beside what was predicted.

        Raises:  DfcError N052 before the first step.
        """
        if self.last is None:
            raise DfcError("N052", "the trainer has not taken a step yet")
        program, step = self.last
        return TrainingReport(
            program, step, self.programs.limits(program), tuple(t.most for t in self.trained),
            tuple(t.saved_bytes for t in self.trained),
            tuple(t.taken_bytes for t in self.trained), tuple(t.most_bytes for t in self.trained),
            self.compared,
        )  # fmt: skip

    def close(self) -> None:
        """End the ranks' threads."""
        self._way.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        noticed(kind)
        self.close()


def no_gradients() -> DfcError:
    return DfcError("N052", "there are no gradients: `backward` makes them")


def check_of(of: int) -> None:
    """Raises:  DfcError N073 for a number that no batch is one of."""
    if of < 1:
        raise DfcError("N073", f"a batch is one of 1 or more, not of {of}", status=2)
