"""What needs a CUDA device: run by benchmarks/gpu.sh on a machine that has one."""

from __future__ import annotations

import pytest
import torch

import dfc
from dfc.ir.interpret import interpret
from dfc.rewrite.pass_ import Context, find_pass

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
FUSED = ["canonicalize", "remove_noops", "fuse", "cse", "dce"]


def _onnxruntime_has_cuda() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def _model():
    torch.manual_seed(0)
    return torch.nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True).eval()


class SpelledOut(torch.nn.Module):
    """An RMS norm and attention written in primitives, as models write them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(64, dtype=dtype) + 0.5)
        self.project = torch.nn.Linear(64, 192, dtype=dtype)

    def forward(self, x):
        x = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        b, t, _ = x.shape
        q, k, v = self.project(x).view(b, t, 3, 4, 16).permute(2, 0, 3, 1, 4)
        scores = torch.matmul(q, k.transpose(-2, -1)) * 0.25
        return torch.matmul(torch.softmax(scores, dim=-1), v).transpose(1, 2).reshape(b, t, 64)


@pytest.mark.parametrize(
    "engine", ["eager", "inductor", "onnxruntime", "eager:cuda_graph", "inductor:cuda_graph"]
)
def test_engine_on_cuda_gives_the_models_results(engine):
    if engine == "onnxruntime" and not _onnxruntime_has_cuda():
        pytest.skip("this ONNX Runtime has no CUDA provider")
    model, x = _model(), torch.randn(2, 10, 64)
    compiled = dfc.compile(model, (x,), engine=engine, device="cuda")
    got = compiled(x.cuda())
    assert got.is_cuda
    torch.testing.assert_close(got.cpu(), model(x), rtol=1e-3, atol=1e-4)


def test_onnxruntime_keeps_cuda_tensors_on_the_device():
    if not _onnxruntime_has_cuda():
        pytest.skip("this ONNX Runtime has no CUDA provider")
    model, x = _model(), torch.randn(2, 10, 64)
    compiled = dfc.compile(model, (x,), engine="onnxruntime", device="cuda")
    on_device = x.cuda()
    compiled(on_device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        compiled(on_device)
    copies = [e for e in trace.events() if "Memcpy HtoD" in e.name or "Memcpy DtoH" in e.name]
    assert not copies


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_a_model_on_the_device_is_compiled_for_it(engine, tmp_path):
    model, x = _model().cuda(), torch.randn(2, 10, 64, device="cuda")
    compiled = dfc.compile(model, (x,), engine=engine)
    assert compiled.device == "cuda:0" and compiled.report.proved
    for given in (x, x.cpu()):
        torch.testing.assert_close(compiled(given), model(x), rtol=1e-3, atol=1e-4)
    compiled.save(tmp_path / "m.dfcpkg")
    again = dfc.load(tmp_path / "m.dfcpkg", device="cuda")
    torch.testing.assert_close(again(x), model(x), rtol=1e-3, atol=1e-4)
    compiled.export(tmp_path / "m.onnx")


@pytest.mark.parametrize("engine", ["eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_fused_graphs_are_proved_and_run_on_cuda(engine, dtype):
    """The rules apply, the driver proves them on probes, and the engine agrees on the device."""
    torch.manual_seed(0)
    model = SpelledOut(dtype).eval()
    x = torch.randn(2, 12, 64, dtype=dtype)
    compiled = dfc.compile(model, (x,), passes=FUSED, engine=engine, device="cuda", strict=True)
    ops = {n.op for n in compiled.graph.nodes}
    assert "aten.scaled_dot_product_attention.default" in ops
    assert not any("softmax" in op for op in ops)
    got, want = compiled(x.cuda()), model.double()(x.double())
    tolerance = 1e-4 if dtype is torch.float32 else 3e-2
    assert got.is_cuda and got.dtype is dtype
    torch.testing.assert_close(got.cpu().double(), want, rtol=tolerance, atol=tolerance)


def test_a_fused_graph_is_the_same_on_both_devices():
    """What was proved on the CPU holds on the device: same graph, same inputs, close results."""
    torch.manual_seed(0)
    model = SpelledOut(torch.float32).eval()
    x = torch.randn(3, 7, 64)
    on_cpu = dfc.compile(model, (x,), passes=FUSED, engine="eager")
    on_cuda = dfc.compile(on_cpu.graph, (x,), passes=[], engine="eager", device="cuda")
    torch.testing.assert_close(on_cuda(x.cuda()).cpu(), on_cpu(x), rtol=1e-3, atol=1e-4)


def test_rules_write_only_what_cuda_runs():
    """Every op that the shipped rules put into a graph has a way to run on the device."""
    torch.manual_seed(0)
    model = SpelledOut(torch.float32).eval()
    x = torch.randn(2, 8, 64)
    graph = dfc.trace(model, (x,))
    count = find_pass("fuse").run(graph, Context())
    assert count
    from dfc.runtime.engines import find_engine

    run = find_engine("eager").build(graph, "cuda")
    (got,) = run([x.cuda()])
    torch.testing.assert_close(got.cpu(), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_layers_in_eight_bit_floats_run_on_tensor_cores(dtype):
    from dfc.emit.fx import to_fx
    from dfc.runtime.kernels.cuda import FIRST_FLOAT8
    from dfc.runtime.kernels.graph import kernels

    if torch.cuda.get_device_capability() < FIRST_FLOAT8:
        pytest.skip("this device does not multiply eight-bit floats")
    torch.manual_seed(0)
    model, x = torch.nn.Linear(128, 64, dtype=dtype).eval(), torch.randn(3, 5, 128, dtype=dtype)
    graph = dfc.trace(model, (x,))
    find_pass("quantize", {"to": "fp8", "scheme": "dynamic"}).run(graph, Context())
    module = to_fx(graph, "cuda", kernels("cuda"))
    assert any(n.target is torch.ops.dfc.linear_cuda.default for n in module.graph.nodes)
    (got,), (want,) = module(x.cuda()), interpret(graph, [x.float()], double=True)
    assert float((got.cpu().double() - want).norm() / want.norm()) <= 1e-2  # of ties of rounding


# CUDA graphs


def test_a_recorded_graph_is_replayed_for_each_set_of_sizes_and_results_are_the_callers():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()).eval()
    dim = torch.export.Dim("B", min=1, max=4096)
    compiled = dfc.compile(
        model, (torch.randn(4, 64),), dynamic_shapes=({0: dim},), engine="eager:cuda_graph",
        device="cuda",
    )  # fmt: skip
    kept = []
    with torch.no_grad():
        for size in (4, 7, 4, 1, 33, 7, 4):
            x = torch.randn(size, 64)
            kept.append((compiled(x.cuda()), model(x)))
    for got, want in kept:  # none was written over by a later call
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)


def test_recordings_are_few_and_the_oldest_are_given_up():
    from dfc.runtime import cuda_graph
    from dfc.runtime.engines import find_engine

    graph = dfc.trace(
        torch.nn.Linear(8, 8), (torch.randn(2, 8),),
        dynamic_shapes=({0: torch.export.Dim("B", min=1, max=4096)},),
    )  # fmt: skip
    made = find_engine("eager:cuda_graph").inner.build(graph, "cuda")
    run = cuda_graph.Replayed(made, "eager:cuda_graph", "cuda")
    for size in range(1, cuda_graph.RECORDED + 4):
        run([torch.randn(size, 8, device="cuda")])
    assert len(run._recorded) == cuda_graph.RECORDED


def test_what_waits_for_the_device_is_not_recorded():
    class Chosen(torch.nn.Module):
        def forward(self, x):
            return x[x > 0].sum()

    with pytest.raises(dfc.DfcError, match="cuda_graph` cannot"):
        dfc.compile(Chosen(), (torch.randn(8),), engine="eager:cuda_graph", device="cuda")
    got = dfc.compile(Chosen(), (torch.randn(8),), engine="eager", device="cuda")(
        torch.ones(8, device="cuda")
    )
    assert float(got) == 8


def test_auto_tries_recorded_and_compiled_kernels():
    model, x = _model(), torch.randn(2, 10, 64)
    compiled = dfc.compile(model, (x,), device="cuda")
    tried = {e.name for e in compiled.report.engines if e.p50_ms is not None}
    assert {"eager", "eager:cuda_graph", "inductor:cuda_graph"} <= tried
    torch.testing.assert_close(compiled(x.cuda()).cpu(), model(x), rtol=1e-3, atol=1e-4)


def test_a_run_takes_as_long_in_turns_as_alone():
    """What the device still has to do of the run before is no part of the next one's time."""
    from dfc.runtime.measure import measure

    x = torch.randn(8192, 8192, device="cuda")  # milliseconds of work for one launch

    def run(inputs):
        return [inputs[0] @ inputs[0]]

    alone = measure({"a": run}, [x], seconds=0.5)["a"].p50_ms
    turns = measure({"a": run, "b": run}, [x], seconds=0.5)
    assert max(t.p50_ms for t in turns.values()) < 1.5 * alone


# Pipelines over streams


class _Skips(torch.nn.Module):
    """Layers whose first result is read again by the last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x = torch.relu(self.layers[0](x))
        for layer in list(self.layers)[1:]:
            x = torch.relu(layer(x))
        return x + first


def _pipelined(devices, engine="eager", microbatches=4):
    from dfc.runtime.pipeline.local import Pipeline

    model = _Skips().eval()
    dim = torch.export.Dim("B", min=1, max=4096)
    graph = dfc.trace(model, (torch.randn(8, 64),), dynamic_shapes=({0: dim},))
    nodes = list(graph.nodes)
    each = -(-len(nodes) // len(devices))
    placed = {n: i // each for i, n in enumerate(nodes)}
    made = Pipeline(graph, placed, devices=devices, engine=engine, microbatches=microbatches)
    return model, made


@pytest.mark.parametrize(
    "devices",
    [["cuda:0"] * 4, ["cpu", "cuda:0"], ["cuda:0", "cpu", "cuda:0"], ["cuda:0", "cuda:1"]],
    ids=",".join,
)
def test_ranks_on_streams_give_what_the_model_gives(devices):
    if "cuda:1" in devices and torch.cuda.device_count() < 2:
        pytest.skip("one device")
    model, pipeline = _pipelined(devices)
    with pipeline, torch.no_grad():
        for size in (4, 33, 1024, 7):
            x = torch.randn(size, 64)
            for given in (x, x.to("cuda:0")):
                torch.testing.assert_close(pipeline(given).cpu(), model(x), rtol=1e-4, atol=1e-4)
        report = pipeline.report()
        assert all(0 <= s.start <= s.end for s in report.step.spans)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_steps_of_one_device_are_recorded_whole(microbatches):
    from dfc.runtime.pipeline.recorded import RECORDED, RecordedSteps

    model, pipeline = _pipelined(["cuda:0"] * 3, "eager:cuda_graph", microbatches)
    with pipeline, torch.no_grad():
        assert isinstance(pipeline._lanes, RecordedSteps)
        earlier = []
        for size in (8, 33, 8, 8, 64, 5, 4, 16, 8):
            x = torch.randn(size, 64)
            for given in (x, x.to("cuda:0")):
                earlier.append((pipeline(given), model(x)))
            spans = pipeline.report().step.spans
            assert len(spans) == 3 * min(microbatches, size)
            assert all(0 <= s.start <= s.end for s in spans)
        for found, want in earlier:  # results are the caller's: later steps leave them alone
            torch.testing.assert_close(found.cpu(), want, rtol=1e-4, atol=1e-4)
        assert len(pipeline._lanes._recorded) == RECORDED


def test_a_recorded_step_waits_for_the_stream_before_it():
    model, pipeline = _pipelined(["cuda:0"] * 2, "eager:cuda_graph")
    x = torch.randn(512, 64, device="cuda:0")
    with pipeline, torch.no_grad():
        want = model.to("cuda:0")(x)
        pipeline(x)
        for _ in range(4):
            with torch.cuda.stream(torch.cuda.Stream()):
                found = pipeline(x)
            other = pipeline(x + 1)
            torch.cuda.synchronize()
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
            assert not torch.equal(found, other)


def test_a_value_on_one_device_is_handed_over_where_it_lies():
    from dfc.runtime.pipeline.streams import Streams

    streams, x = Streams(["cuda:0", "cuda:0"]), torch.randn(8, device="cuda:0")
    with streams.step():
        parcel = streams.send(0, 1, {"x": x})
        assert parcel.values["x"].data_ptr() == x.data_ptr() and len(parcel.ready) == 1


def test_onnxruntime_stages_on_cuda_keep_order_with_streams():
    if not _onnxruntime_has_cuda():
        pytest.skip("this ONNX Runtime has no CUDA provider")
    model, pipeline = _pipelined(["cuda:0", "cuda:0"], ["eager", "onnxruntime"])
    with pipeline, torch.no_grad():
        for _ in range(5):
            x = torch.randn(256, 64)
            torch.testing.assert_close(pipeline(x).cpu(), model(x), rtol=1e-2, atol=1e-2)
