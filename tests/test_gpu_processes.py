"""Ranks in processes of one host, on CUDA devices and the processor."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from dfc.runtime.pipeline.processes import Processes
from dfc.runtime.pipeline.training import Trainer
from dfc.runtime.pipeline.training_processes import ProcessTrainer
from tests import training_models
from tests.test_pipeline import captured, leaves, stages
from tests.training_models import staged

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="no CUDA device")]
TWO = pytest.mark.skipif(GPUS < 2, reason="one device")
PLACES = [("cpu", "cuda:0"), ("cuda:0", "cpu"), ("cuda:0", "cuda:0")]


def on_devices(devices: tuple[str, str], links: str | None) -> None:
    model, args, graph = captured("chain")
    with Processes(
        graph, stages(graph, 2), microbatches=3, devices=devices, links=links
    ) as pipeline:
        for _ in range(3):
            for x, y in zip(leaves(pipeline(*args)), leaves(model(*args)), strict=True):
                assert x.device.type == "cpu"
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("devices", PLACES, ids=",".join)
def test_ranks_compute_on_their_devices(devices: tuple[str, str]) -> None:
    on_devices(devices, None)


@TWO
@pytest.mark.parametrize("links", ["nccl", "local", "gloo"])
def test_two_gpus_give_what_one_processor_gives(links: str) -> None:
    on_devices(("cuda:0", "cuda:1"), links)


@pytest.mark.parametrize(
    "devices", [*PLACES[1:], pytest.param(("cuda:0", "cuda:1"), marks=TWO)], ids=",".join
)
def test_processes_train_on_devices_as_threads_do_on_the_processor(
    devices: tuple[str, str],
) -> None:
    _, args = training_models.captured("tied")
    options: dict[str, Any] = {"microbatches": 4, "threads": 2}
    made = partial(torch.optim.SGD, lr=1e-2, momentum=0.9)  # Adam makes steps of gradients' noise
    with Trainer(staged("tied", 2), optimizer=made, **options) as threads:
        expected = [float(threads.step(*args)) for _ in range(5)]
        weights = threads.state_dict()["weights"]
    with ProcessTrainer(
        staged("tied", 2), optimizer=made, devices=list(devices), **options
    ) as trainer:
        found = [float(trainer.step(*args)) for _ in range(5)]
        assert found == pytest.approx(expected, rel=1e-4)
        for name, x in trainer.state_dict()["weights"].items():
            torch.testing.assert_close(x.cpu(), weights[name], rtol=1e-3, atol=1e-4)
