"""What needs a CUDA device: run by benchmarks/gpu.sh on a machine that has one."""

from __future__ import annotations

import pytest
import torch

import dfc

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def _model():
    torch.manual_seed(0)
    return torch.nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True).eval()


@pytest.mark.parametrize("engine", ["eager", "inductor", "onnxruntime"])
def test_engine_on_cuda_gives_the_models_results(engine):
    model, x = _model(), torch.randn(2, 10, 64)
    compiled = dfc.compile(model, (x,), engine=engine, device="cuda")
    got = compiled(x.cuda())
    assert got.is_cuda
    torch.testing.assert_close(got.cpu(), model(x), rtol=1e-3, atol=1e-4)


def test_onnxruntime_keeps_cuda_tensors_on_the_device():
    model, x = _model(), torch.randn(2, 10, 64)
    compiled = dfc.compile(model, (x,), engine="onnxruntime", device="cuda")
    on_device = x.cuda()
    compiled(on_device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        compiled(on_device)
    copies = [e for e in trace.events() if "Memcpy HtoD" in e.name or "Memcpy DtoH" in e.name]
    assert not copies
