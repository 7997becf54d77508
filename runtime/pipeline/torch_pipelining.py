"""A chain-shaped plan as stages and schedules of `torch.distributed.pipelining`.

There a stage reads what the one before it gives, and nothing else; dfc's own runtimes run any plan.
A rank has the stages that the plan's device has.

N055  a plan that is no chain, or has a schedule that torch lacks
N056  a group of processes that is not the plan's
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import pipelining

from dfc.emit.trainable import TrainableGraph
from dfc.errors import DfcError
from dfc.ir.graph import Parameter, Value
from dfc.planning.pipeline import Plan, stage_of
from dfc.planning.stages import HOST, StageGraph, passed_through, split

# A plan's schedule -> torch's class, and whether it takes a list of stages.
_SCHEDULES: dict[str, tuple[Any, bool]] = {
    "forward": (pipelining.ScheduleGPipe, False),
    "gpipe": (pipelining.ScheduleGPipe, False),
    "1f1b": (pipelining.Schedule1F1B, False),
    "zb1p": (pipelining.ScheduleInterleavedZeroBubble, True),
    "interleaved": (pipelining.ScheduleInterleaved1F1B, True),
    "breadth_first": (pipelining.ScheduleLoopedBFS, True),
    "interleaved_zb": (pipelining.ScheduleInterleavedZeroBubble, True),
    "zb_v": (pipelining.ScheduleZBVZeroBubble, True),
    "dualpipe_v": (pipelining.ScheduleDualPipeV, True),
}
_INSTEAD = "dfc's own runtimes run any plan"


class TorchPipeline(NamedTuple):
    """This rank's part: `schedule.step(...)` trains, `schedule.eval(...)` runs forward only."""

    stages: list[pipelining.PipelineStage]
    schedule: Any
    modules: list[TrainableGraph]


def torch_pipelining(
    plan: Plan,
    *,
    loss_fn: Callable[..., Any] | None = None,
    device: str | torch.device = "cpu",
    group: Any = None,
) -> TorchPipeline:
    """This rank's stages of a plan, and its schedule.

    Needs:   `torch.distributed` is initialised, with a rank for each device of the plan; weights.
    Raises:  DfcError N055, N056.
    """
    stages = chain(plan)
    placement = plan.program.placement
    count = 1 + max(placement)
    size = dist.get_world_size(group) if dist.is_initialized() else 0
    if size != count:
        found = f"{size} ranks" if size else "torch.distributed is not initialised"
        told = f"the plan has {len(stages)} stages, a rank each"
        if count < len(stages):
            told = f"the plan has {len(stages)} stages on {count} ranks"
        raise DfcError("N056", f"{told}: {found}",
                       help=f"torchrun --nproc-per-node={count} ...")  # fmt: skip
    make, several = _schedule(plan.schedule, count < len(stages))
    if plan.program.recomputes:
        raise DfcError("N055", "torch.distributed.pipelining does not recompute: the plan does",
                       help="plan with recompute=\"never\"", status=2)  # fmt: skip
    if plan.wish.trains:
        _check_untied(plan)
    place, made, modules = torch.device(device), [], []
    for s in (s for s, r in enumerate(placement) if r == dist.get_rank(group)):
        modules.append(_Stage(stages, s, plan))
        modules[-1].move(place)
        made.append(pipelining.PipelineStage(modules[-1], s, len(stages), place, group=group))
    given = made if several else made[0]
    schedule = make(given, plan.wish.microbatches, loss_fn=loss_fn)
    return TorchPipeline(made, schedule, list(modules))


def _schedule(name: str, shared: bool) -> tuple[Any, bool]:
    """`shared` says that ranks have several stages."""
    if shared and name == "forward":  # `eval` computes the forward actions alone
        name = "breadth_first"
    found = _SCHEDULES.get(name)
    if found is None:
        known = ", ".join(_SCHEDULES)
        message = f"torch.distributed.pipelining has no schedule `{name}`"
        raise DfcError("N055", message, help=f"plan with schedule= one of {known}; {_INSTEAD}")
    return found


def chain(plan: Plan) -> list[StageGraph]:
    """The stages of a plan, each of which reads the one before it alone.

    Raises:  DfcError N055 that names what else is read, or given.
    """
    stages = split(plan.graph, stage_of(plan))
    for s, stage in enumerate(stages):
        for value, source in zip(stage.takes, stage.sources, strict=True):
            wanted = s - 1 if s else HOST
            if source != wanted:
                where = "the model's inputs" if source == HOST else f"stage {source}"
                raise _no_chain(f"stage {s} reads %{value.name} of {where}")
    last = len(stages) - 1
    for out in plan.graph.outputs:
        if out in passed_through(plan.graph):
            raise _no_chain(f"the output %{out.name} is made by no stage")
        if out not in stages[last].gives:
            raise _no_chain(f"the output %{out.name} is made by a stage before the last one")
    return stages


def _no_chain(what: str) -> DfcError:
    return DfcError("N055", f"the plan is no chain: {what}", help=_INSTEAD)


def _check_untied(plan: Plan) -> None:
    stage = stage_of(plan)
    for p in plan.graph.parameters.values():
        at = sorted({stage[u] for u in p.users if u in stage})
        if len(at) > 1:
            message = f"stages {' and '.join(map(str, at))} share !{p.name}, whose gradients "
            help = f"keep its readers together, or train it with dfc: {_INSTEAD}"
            raise DfcError("N055", f"{message}torch would not add up", help=help)


class _Stage(TrainableGraph):
    """One stage, which gives what the next one reads, in its order."""

    def __init__(self, stages: Sequence[StageGraph], index: int, plan: Plan) -> None:
        without = next((p for p in stages[index].graph.parameters.values() if p.data is None), None)
        if without is not None:
            raise DfcError("K021", f"the model has no weights (`{without.name}`)", status=2)
        super().__init__(stages[index].graph)
        mine = stages[index].gives
        later: Sequence[Value] = plan.graph.outputs
        if index + 1 < len(stages):
            later = stages[index + 1].takes
        self._dfc_order = [mine.index(v) for v in later if not isinstance(v, Parameter)]

    def move(self, device: torch.device) -> None:
        """Move weights and constants."""
        self.to(device)
        self._dfc_run[0].to(device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = super().forward(*args, **kwargs)
        picked = tuple(given[i] for i in self._dfc_order)
        return picked[0] if len(picked) == 1 else picked
