"""Plans run by `torch.distributed.pipelining`: two processes over gloo on this host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import dfc
from dfc.errors import DfcError
from dfc.planning.machine import Device, Machine, Wire
from dfc.planning.pipeline import Plan
from tests.served_store import served_store

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300


class Deep(nn.Module):
    def __init__(self, skip: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.skip = skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for layer in self.layers:
            y = torch.tanh(layer(y))
        return y + x if self.skip else y


def machine(n: int) -> Machine:
    devices = tuple(Device(f"d{i}", "cpu", 1e9, 1e9, {"f32": 1e9}) for i in range(n))
    wires = {(i, j): Wire(1e9, 1e-6) for i in range(n) for j in range(n) if i != j}
    return Machine("test", devices, wires)


def planned(model: nn.Module, **options: object) -> Plan:
    args = (torch.zeros(2, 16),)
    return dfc.plan(model, machine(2), args, microbatches=4, **options)  # type: ignore[arg-type]


def worker() -> None:
    """One rank: the forward pass, then a training step, each beside the model itself."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x = torch.linspace(-1, 1, 8 * 16).reshape(8, 16)
    target = torch.zeros(8, 16)
    model = Deep().eval()
    with torch.no_grad():
        _, schedule, _ = planned(model).to_torch_pipelining()
        found = schedule.eval(x) if rank == 0 else schedule.eval()
        if rank == 1:
            expected = torch.cat([model(part) for part in x.chunk(4)])
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for name in ("1f1b", "zb1p", "interleaved", "zb_v"):
        plan = planned(Deep(), train=True, schedule=name)
        stages, schedule, modules = plan.to_torch_pipelining(loss_fn=nn.functional.mse_loss)
        several = name in ("interleaved", "zb_v")
        assert len(stages) == (2 if several else 1) and len(plan.stages) == 2 * len(stages)
        args = (x,) if any(s.is_first for s in stages) else ()
        if any(s.is_last for s in stages):
            losses: list[torch.Tensor] = []
            schedule.step(*args, target=target, losses=losses)
            assert len(losses) == 4
        else:
            schedule.step(*args)
        whole = Deep()
        for part, wanted in zip(x.chunk(4), target.chunk(4), strict=True):
            (nn.functional.mse_loss(whole(part), wanted) / 4).backward()
        own = dict(whole.named_parameters())
        mine = {k: w for module in modules for k, w in module.weights().items()}
        assert mine and set(mine) <= set(own)
        for key, weight in mine.items():
            torch.testing.assert_close(weight.grad, own[key].grad, rtol=1e-5, atol=1e-7)
    print(f"rank {rank} agrees", flush=True)
    dist.destroy_process_group()


def test_two_ranks_run_a_plan_forward_and_train_it() -> None:
    with served_store() as store:
        said = _said_by_ranks(os.environ | store)
    assert all(f"rank {r} agrees" in text for r, text in enumerate(said)), "\n".join(said)


def _said_by_ranks(environment: dict[str, str]) -> list[str]:
    env = environment | {
        "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    code = "from tests.test_torch_pipelining import worker; worker()"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=env | {"RANK": str(r)}, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for r in range(2)
    ]  # fmt: skip
    try:
        return [p.communicate(timeout=SECONDS)[0] for p in ranks]
    finally:
        for p in ranks:
            p.kill()


def test_a_plan_that_is_no_chain_is_named() -> None:
    found = planned(Deep(skip=True).eval())
    assert len(found.stages) == 2
    with pytest.raises(DfcError, match=r"N055.*stage 1 reads %x of the model's inputs"):
        found.to_torch_pipelining()


def test_an_output_in_the_middle_is_no_chain() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.a(x)
            return y, self.b(y)

    with pytest.raises(DfcError, match=r"N055.*output %.* is made by a stage before the last"):
        planned(Two().eval()).to_torch_pipelining()


def test_groups_and_schedules_that_do_not_match_are_told() -> None:
    with pytest.raises(DfcError, match=r"N056.*2 stages.*not initialised"):
        planned(Deep().eval()).to_torch_pipelining()
