"""What a trainer is asked for, made into what it goes by: stages, a program, what is recomputed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import Parameter, signature
from numbers import Integral
from typing import TYPE_CHECKING, Any

from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.ir.types import TensorType
from dfc.lang.units import byte_count
from dfc.planning.actions import FULL, SELECTIVE, Program
from dfc.runtime.pipeline.programs import AUTO
from dfc.runtime.pipeline.staged_model import StagedModel

if TYPE_CHECKING:
    import torch

    from dfc.planning.pipeline import Plan


def staged_model(
    graph: Graph | StagedModel, stage_of: Mapping[Node, int] | None,
    loss: Callable[..., Any] | None, targets: Sequence[TensorType | str],
) -> StagedModel:  # fmt: skip
    if isinstance(graph, StagedModel):
        if stage_of is not None or loss is not None:
            raise DfcError("N073", "a staged model has its stages and its loss", status=2)
        return graph
    if stage_of is None:
        raise DfcError("N073", "`stage_of` is missing: the stage of each node", status=2)
    return StagedModel(graph, stage_of, loss, targets)


def stages_of_plan(
    plan: Plan, graph: Graph | StagedModel, schedule: str | Program | None, microbatches: int | None
) -> tuple[Mapping[Node, int], str | Program, int]:
    """The stages of a plan, and its program where nothing else is asked for.

    Raises:  DfcError N073 for a plan of another graph, or one that does not train.
    """
    if plan.graph is not graph:
        raise DfcError("N073", "the plan is of another graph than the one to be trained", status=2)
    if schedule is None and not plan.program.trains:
        help = "plan with train=True, or give schedule="
        raise DfcError("N073", "the plan has no backward passes", help=help, status=2)
    found = dict(zip(plan.graph.nodes, plan.partition.stage, strict=True))
    return found, schedule or plan.program, microbatches or plan.wish.microbatches


def what_recomputes(
    wanted: bool | Collection[int] | str | None, memory: int | str | None, stages: int
) -> tuple[Mapping[int, str] | None, float]:
    """The stages that recompute, and how, None where they are chosen, and the bytes that ranks may
    hold.

    Raises:  DfcError N073 for what is no choice.
    """
    if (wanted == AUTO) != (memory is not None):
        help = '`recompute="auto"` goes with `memory`: the bytes of activations a rank may hold'
        raise DfcError("N073", "`recompute` and `memory` do not agree", help=help, status=2)
    if wanted == AUTO:
        assert memory is not None
        return None, float(byte_count(memory))
    if wanted == SELECTIVE:
        return dict.fromkeys(range(stages), SELECTIVE), float("inf")
    if wanted is None or isinstance(wanted, bool):
        return dict.fromkeys(range(stages) if wanted else (), FULL), float("inf")
    if isinstance(wanted, str) or not set(wanted) <= set(range(stages)):
        help = 'it is True, False, "selective", "auto", or stages by number'
        raise DfcError("N073", f"`recompute` is {wanted!r}, there are {stages} stages", help=help,
                       status=2)  # fmt: skip
    return dict.fromkeys(sorted(wanted), FULL), float("inf")


def check_numbers(microbatches: int | None, clip: float | None, reduction: str) -> None:
    """Raises:  DfcError N073 for what a step cannot have."""
    wrong = ""
    if reduction not in ("mean", "sum"):
        wrong = f"reduction is `mean` or `sum`, not `{reduction}`"
    elif clip is not None and not clip > 0:
        wrong = f"`clip` is more than 0, not {clip}"
    elif microbatches is not None and not (isinstance(microbatches, Integral) and microbatches > 0):
        wrong = f"`microbatches` is a number of at least 1, not {microbatches!r}"
    if wrong:
        raise DfcError("N073", wrong, status=2)


def check_optimizer(optimizer: object) -> None:
    """Raises:  DfcError N073 for what makes no optimizer: one that is made already, a name."""
    if not callable(optimizer):
        help = "give its class, or functools.partial(torch.optim.SGD, lr=0.1)"
        is_text = isinstance(optimizer, str)
        got = repr(optimizer) if is_text else f"one of type {type(optimizer).__name__}"
        message = f"`optimizer` is what makes one for each stage's parameters, got {got}"
        raise DfcError("N073", message, help=help, status=2)


def made_optimizer(
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    parameters: list[torch.nn.Parameter],
) -> torch.optim.Optimizer:
    """What `optimizer` makes of a stage's parameters.

    Raises:  DfcError N073 where that is no optimizer, or one whose step computes losses itself.
    """
    import torch

    made = optimizer(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        message = f"`optimizer` made one of type {type(made).__name__}, which is no optimizer"
        raise DfcError("N073", message, status=2)
    closure = signature(type(made).step).parameters.get("closure")
    if closure is not None and closure.default is Parameter.empty:
        message = f"a step of {type(made).__name__} computes losses itself, a stage cannot"
        raise DfcError("N073", message, help="take one like torch.optim.AdamW", status=2)
    return made


def check_devices(devices: Sequence[str], sequential: bool) -> None:
    if sequential and set(devices) != {"cpu"}:
        raise DfcError("N053", "`sequential` computes on the processor alone", status=2)
