"""Training of partitioned models on CUDA devices, alone and together with the processor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dfc.runtime.pipeline.training import Trainer
from tests.test_pipeline_training import adamw, captured, reference, staged

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PLACES = [["cuda:0", "cuda:0"], ["cuda:0", "cpu"], ["cpu", "cuda:0"], ["cuda:0", "cuda:1"]]


def _there(devices: list[str]) -> None:
    if "cuda:1" in devices and torch.cuda.device_count() < 2:
        pytest.skip("one device")


@pytest.mark.parametrize("devices", PLACES, ids=",".join)
@pytest.mark.parametrize("name", ["mlp", "tied", "unet", "branches"])
def test_gradients_are_those_of_one_process(name: str, devices: list[str]) -> None:
    _there(devices)
    model, args = captured(name)
    loss, expected = reference(model, args, 4)
    for schedule in ("gpipe", "1f1b", "zb1p"):
        with Trainer(staged(name, 2), schedule=schedule, microbatches=4, optimizer=adamw,
                     devices=devices) as trainer:  # fmt: skip
            for given in (args, tuple(x.to("cuda:0") for x in args)):
                found = trainer.backward(*given)
                torch.testing.assert_close(found.cpu(), loss, rtol=1e-5, atol=1e-6)
                for n, p in trainer.parameters.items():
                    assert p.grad is not None and p.grad.device == p.device
                    away = torch.linalg.vector_norm(p.grad.cpu() - expected[n])
                    assert away <= 1e-4 * torch.linalg.vector_norm(expected[n]) + 1e-7, n


@pytest.mark.parametrize("schedule", ["interleaved", "interleaved_zb", "zb_v", "dualpipe_v"])
def test_several_stages_of_a_device(schedule: str) -> None:
    _, args = captured("tied")
    losses = []
    for devices in ("cpu", "cuda:0"):
        with Trainer(staged("tied", 4), schedule=schedule, microbatches=4, optimizer=adamw,
                     devices=devices) as trainer:  # fmt: skip
            losses.append([float(trainer.step(*args)) for _ in range(5)])
            if devices == "cuda:0":
                spans = trainer.report().step.spans
                assert all(0 <= s.start <= s.end for s in spans)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_many_steps_with_the_table_on_two_devices() -> None:
    """The copy of a tied weight is written after each step of its optimizer, before it is read."""
    _, args = captured("tied")
    losses = []
    for devices in (["cpu", "cpu"], ["cuda:0", "cpu"], ["cuda:0", "cuda:0"]):
        with Trainer(staged("tied", 2), microbatches=4, optimizer=adamw, devices=devices) as t:
            losses.append([float(t.step(*args)) for _ in range(30)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] == pytest.approx(losses[0], rel=1e-3)


def test_training_goes_on_from_the_processor_to_the_device_and_back(tmp_path: Path) -> None:
    _, args = captured("mlp")
    with Trainer(staged("mlp", 2), microbatches=4, optimizer=adamw) as whole:
        expected = [float(whole.step(*args)) for _ in range(9)]
    found = []
    for devices in ("cpu", "cuda:0", "cpu"):
        with Trainer(staged("mlp", 2), microbatches=4, optimizer=adamw, devices=devices) as t:
            if (tmp_path / "last").exists():
                t.load(tmp_path / "last")
            found += [float(t.step(*args)) for _ in range(3)]
            assert all(p.device.type == devices.partition(":")[0] for p in t.parameters.values())
            t.save(tmp_path / "last")
    assert found == pytest.approx(expected, rel=1e-4)
