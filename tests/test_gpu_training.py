"""Training of partitioned models on CUDA devices, alone and together with the processor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dfc.runtime.pipeline.training import Trainer
from tests.training_models import adamw, captured, reference, staged

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
                trainer.zero_grad()
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


@pytest.mark.parametrize("mask", [None, "causal", "added"])
@pytest.mark.parametrize(("m", "n", "width"), [(8, 8, 8), (37, 45, 20), (64, 64, 64), (1, 5, 3)])
def test_attention_has_the_processors_meaning(mask: str | None, m: int, n: int, width: int) -> None:
    from dfc.runtime.kernels import attention

    attention.register()
    if mask == "causal":
        n = m
    make = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(2, 3, s, width, generator=make) for s in (m, n, n, m))
    added = torch.randn(m, n, generator=make) if mask == "added" else None
    aten, causal = torch.ops.aten, mask == "causal"
    found = []
    for device in ("cpu", "cuda"):
        a, b, c, d = (x.to(device) for x in (q, k, v, g))
        bias = added if added is None else added.to(device)
        out, sums = aten._scaled_dot_product_flash_attention_for_cpu(
            a, b, c, 0.0, causal, attn_mask=bias
        )
        back = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d, a, b, c, out, sums, 0.0, causal, attn_mask=bias
        )
        found.append([x.cpu() for x in (out, sums, *back)])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)
