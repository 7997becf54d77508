"""`--devices`, and the devices of a plan: on which device of this machine each rank computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dfc.counting import counted
from dfc.errors import DfcError
from dfc.planning.torch_device import check_device

if TYPE_CHECKING:
    from dfc.planning.pipeline import Plan

_ALL_HERE = "--devices cpu runs every stage on this processor"


def rank_devices(
    given: str | None,
    device: str,
    plan: Plan | None,
    placement: Sequence[int],
    hosts: Sequence[int] | None = None,
    here: int = 0,
) -> list[str]:
    """`--devices` for all stages or for each, else the plan's, else `--device` for all.

    `hosts` are those of the ranks, this one unless it is said: devices are looked for where they
    are to be.
    Raises:  DfcError Q007, K004 for a stage's device that is not here; N053 for another number of
             them, or two for one rank.
    """
    host_of = [hosts[r] if hosts else here for r in placement]
    if given is not None:
        stages = [d.strip() for d in given.split(",")]
        if len(stages) not in (1, len(placement)):
            message = f"{len(stages)} devices are given for {counted(len(placement), 'stage')}"
            raise DfcError("N053", message, status=2)
        stages = stages * len(placement) if len(stages) == 1 else stages
        told = [f"stage {stage} is to run on {d}" for stage, d in enumerate(stages)]
    elif plan is not None:
        stages = _of_plan(plan, host_of)
        told = [f"stage {s.index} is planned on {s.device}, which would be {d} here"
                for s, d in zip(plan.stages, stages, strict=True)]  # fmt: skip
    else:
        return _by_rank([device] * len(placement), placement)  # it has been looked for
    for d, what, host in zip(stages, told, host_of, strict=True):
        if host == here:
            _check(d, what)
    return _by_rank(stages, placement)


def _of_plan(plan: Plan, hosts: Sequence[int]) -> list[str]:
    """Each host's devices for the plan's: its GPUs in their order, its processors as one.

    Of several hosts each has the GPUs that its own stages are on.
    """
    gpus = [d.name for d in plan.machine.devices if d.kind == "cuda"]
    used = {(s.device, h) for s, h in zip(plan.stages, hosts, strict=True)}
    alone = len(set(hosts)) == 1
    of_host = {h: [g for g in gpus if alone or (g, h) in used] for h in set(hosts)}
    return [
        f"cuda:{of_host[h].index(s.device)}" if s.device in gpus else "cpu"
        for s, h in zip(plan.stages, hosts, strict=True)
    ]


def _check(device: str, told: str) -> None:
    """
    Raises:  DfcError Q007, K004.
    """
    try:
        check_device(device)
    except DfcError as e:
        raise DfcError(e.code, f"{told}: {e.message}", help=_ALL_HERE, status=e.status) from None


def _by_rank(stages: Sequence[str], placement: Sequence[int]) -> list[str]:
    found: dict[int, str] = {}
    for stage, (device, rank) in enumerate(zip(stages, placement, strict=True)):
        if found.setdefault(rank, device) != device:
            message = f"stage {stage} is to run on {device}, and its rank {rank} on {found[rank]}"
            help = "stages of one rank share its device"
            raise DfcError("N053", message, help=help, status=2)
    return [found[r] for r in range(len(found))]
