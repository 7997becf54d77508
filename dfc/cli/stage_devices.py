"""`--devices`, and the devices of a plan: on which device of this machine each rank computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dfc.cli.engines import check_device
from dfc.errors import DfcError

if TYPE_CHECKING:
    from dfc.planning.pipeline import Plan

_ALL_HERE = "--devices cpu runs every stage on this processor"


def rank_devices(
    given: str | None, device: str, plan: Plan | None, placement: Sequence[int], on: str
) -> list[str]:
    """`--devices` for all stages or for each, else the plan's, else `--device` for all.

    Raises:  DfcError Q007, K004 for a stage's device that is not here; N053 for another number of
             them, or two for one rank; Q006 for ranks that are not threads.
    """
    if given is not None:
        stages = [d.strip() for d in given.split(",")]
        if len(stages) not in (1, len(placement)):
            message = f"{len(stages)} devices are given for {len(placement)} stages"
            raise DfcError("N053", message, status=2)
        stages = stages * len(placement) if len(stages) == 1 else stages
        for stage, d in enumerate(stages):
            _check(d, f"stage {stage} is to run on {d}")
    elif plan is not None:
        stages = _of_plan(plan)
    else:
        stages = [device] * len(placement)
    away = next((s for s, d in enumerate(stages) if d != "cpu"), None)
    if away is not None and on != "threads":
        message = f"stage {away} is to run on {stages[away]}, and ranks in {on} have the processor"
        raise DfcError("Q006", message, help=f"--on threads; {_ALL_HERE}")
    return _by_rank(stages, placement)


def _of_plan(plan: Plan) -> list[str]:
    """This machine's devices for the plan's: its GPUs in their order, its processors as one."""
    kinds = {d.name: d.kind for d in plan.machine.devices}
    gpus = [name for name in kinds if kinds[name] == "cuda"]
    found = []
    for s in plan.stages:
        here = f"cuda:{gpus.index(s.device)}" if s.device in gpus else "cpu"
        _check(here, f"stage {s.index} is planned on {s.device}, which would be {here} here")
        found.append(here)
    return found


def _check(device: str, told: str) -> None:
    """
    Raises:  DfcError Q007, K004.
    """
    try:
        check_device(device)
    except DfcError as e:
        raise DfcError(e.code, f"{told}: {e.message}", help=_ALL_HERE, status=e.status) from None
    kind, _, index = device.partition(":")
    if index and not (kind == "cuda" and index.isdigit()):
        raise DfcError("Q007", f"{told}: that is no device", help="write cpu, cuda or cuda:1")
    if index:
        import torch

        count = torch.cuda.device_count()
        if int(index) >= count:
            devices = "one CUDA device" if count == 1 else f"{count} CUDA devices"
            raise DfcError("K004", f"{told}: torch sees {devices}", help=_ALL_HERE, status=7)


def _by_rank(stages: Sequence[str], placement: Sequence[int]) -> list[str]:
    found: dict[int, str] = {}
    for stage, (device, rank) in enumerate(zip(stages, placement, strict=True)):
        if found.setdefault(rank, device) != device:
            message = f"stage {stage} is to run on {device}, and its rank {rank} on {found[rank]}"
            help = "stages of one rank share its device"
            raise DfcError("N053", message, help=help, status=2)
    return [found[r] for r in range(len(found))]
