"""Pipelines of real models in threads: equal to the model, bounded, and stopped by a failure."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import dfc
from dfc.errors import DfcError
from dfc.ir.graph import Graph, Node
from dfc.planning.actions import Action
from dfc.planning.machine import Device, Machine, Wire
from dfc.planning.microbatches import joined
from dfc.planning.pipeline import plan, stage_of
from dfc.planning.stages import split
from dfc.runtime.pipeline.lanes import Values
from dfc.runtime.pipeline.local import Pipeline
from dfc.runtime.pipeline.processes import Processes

B = torch.export.Dim("B", min=1, max=64)


class UNet(nn.Module):
    """Down and up again, with skips over the stages between."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(c, 2 * c, 3, padding=1) for c in (2, 4, 8))
        self.up = nn.ModuleList(nn.Conv2d(3 * c, c, 3, padding=1) for c in (8, 4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for layer in self.down:
            skips.append(x)
            x = torch.nn.functional.max_pool2d(torch.relu(layer(x)), 2)
        for layer in self.up:
            x = torch.nn.functional.interpolate(x, scale_factor=2.0)
            x = layer(torch.cat([x, skips.pop()], 1))
        return x


class Tied(nn.Module):
    """A transformer whose head is its table; the mask goes to every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0) for _ in range(4)
        )

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x, src_mask=mask)
        return {"hidden": x, "logits": x @ self.table.weight.T}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.b = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a(x) + self.b(x), self.b(x) * x.shape[0]


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...], Any]]] = {
    "unet": lambda: (UNet(), (torch.randn(6, 2, 16, 16),), ({0: B},)),
    "tied": lambda: (
        Tied(), (torch.randint(40, (6, 5)), torch.zeros(5, 5)), ({0: B}, None)),
    "branches": lambda: (Branches(), (torch.randn(6, 8),), ({0: B},)),
    "chain": lambda: (
        nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))), (torch.randn(6, 8),), ({0: B},)),
}  # fmt: skip


def captured(name: str) -> tuple[nn.Module, tuple[Any, ...], Graph]:
    model, args, graph = traced(name)
    return model, args, graph.copy()


@cache
def traced(name: str) -> tuple[nn.Module, tuple[Any, ...], Graph]:
    torch.manual_seed(0)
    model, args, shapes = MODELS[name]()
    model.eval()
    return model, args, dfc.trace(model, args, dynamic_shapes=shapes)


def stages(graph: Graph, count: int) -> dict[Node, int]:
    device = Device("cpu", "cpu", 1e9, 1e10, {"f32": 1e10})
    wires = {(i, j): Wire(1e9, 0.0) for i in range(count) for j in (i - 1, i + 1) if 0 <= j < count}
    devices = tuple(replace(device, name=f"cpu{i}") for i in range(count))
    return stage_of(plan(graph, Machine("threads", devices, wires), sizes={"B": 2}))


def one_by_one(graph: Graph, pipeline: Pipeline, inputs: list[Any]) -> list[Any]:
    """The whole graph on each microbatch in turn, in this thread."""
    from dfc.ir.interpret import interpret

    found = [interpret(graph, [part[v] for v in graph.inputs]) for part in pipeline.cut(inputs)]
    return [torch.cat(pieces) for pieces in zip(*found, strict=True)]


def leaves(x: Any) -> list[torch.Tensor]:
    return list(x.values()) if isinstance(x, dict) else list(x) if isinstance(x, tuple) else [x]


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"branches"}))
@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_pipeline_gives_what_the_model_gives(name: str, count: int) -> None:
    model, args, graph = captured(name)
    with Pipeline(graph, stages(graph, count), microbatches=4) as pipeline, torch.no_grad():
        expected = leaves(model(*args))
        found = leaves(pipeline(*args))
        exact = one_by_one(graph, pipeline, list(args))
        for e, f, x in zip(expected, found, exact, strict=True):
            torch.testing.assert_close(f, e)
            assert torch.equal(f, x)  # the same kernels on the same microbatches


def test_a_size_that_a_stage_needs_reaches_it() -> None:
    """`x.shape[0]` is the batch of the microbatch, which the last stage multiplies by."""
    _, args, graph = captured("branches")
    with Pipeline(graph, stages(graph, 3), microbatches=2) as pipeline:
        found = pipeline(*args)
        for f, x in zip(found, one_by_one(graph, pipeline, list(args)), strict=True):
            assert torch.equal(f, x)


def test_a_size_that_is_no_line_of_the_batch_reaches_a_stage() -> None:
    """Pairs that are taken apart again: `B // (B // 2)`, which is no number for a batch of 0."""

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pairs = self.inner(x).reshape(-1, 2, 2).transpose(0, 1)
            taken = pairs.reshape(2, -1, 4).transpose(0, 1).reshape(-1, 4)
            y: torch.Tensor = self.outer(taken)
            return y

    model, x = Pairs().eval(), torch.randn(8, 4)
    graph = dfc.trace(model, (x,), dynamic_shapes=({0: torch.export.Dim("B", min=2, max=64)},))
    _, last = (n for n in graph.nodes if n.op == "aten.linear.default")
    stage_of = {n: int(n is last) for n in graph.nodes}
    (taken, *_) = split(graph, stage_of)[1].graph.inputs
    assert "//" in str(taken.type)
    for engine in ("eager", "onnxruntime"):
        with Pipeline(graph, stage_of, microbatches=1, engine=engine) as pipeline:
            torch.testing.assert_close(pipeline(x), model(x).detach())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "bool", "complex64"])
def test_parts_of_outputs_are_put_together_as_they_were(dtype: str) -> None:
    pieces = [torch.randn(n, 3, 4, 5).to(getattr(torch, dtype)) for n in (2, 1)]
    for dim, parts in ((0, pieces), (2, pieces[:1] * 3)):
        found = joined(parts, dim)
        assert found.dtype == parts[0].dtype
        for x, y in zip(found.split([p.shape[dim] for p in parts], dim), parts, strict=True):
            assert x.tolist() == y.tolist()
    last = [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last) for _ in range(2)]
    assert joined(last, 0).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [1, 3, 7, 8])
def test_the_last_microbatch_may_be_smaller(size: int) -> None:
    model, _, graph = captured("chain")
    x = torch.randn(size, 8)
    with Pipeline(graph, stages(graph, 2), microbatches=4) as pipeline, torch.no_grad():
        torch.testing.assert_close(pipeline(x), model(x))
        assert len(pipeline.cut([x])) <= 4


@pytest.mark.parametrize("size, parts", [(2, [2]), (5, [3, 2]), (8, [2, 2, 2, 2])])
def test_a_microbatch_is_no_smaller_than_the_batch_may_be(size: int, parts: list[int]) -> None:
    """`squeeze` would take the dimension of one item away, which the graph knows nothing of."""

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weigh, self.map = nn.Linear(4, 1), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.map(x) * self.weigh(x).squeeze().unsqueeze(-1)
            return y

    model, x = Weighted().eval(), torch.randn(size, 4)
    batch = torch.export.Dim("B", min=2, max=64)
    graph = dfc.trace(model, (torch.randn(8, 4),), dynamic_shapes=({0: batch},))
    with Pipeline(graph, stages(graph, 2), microbatches=8) as pipeline, torch.no_grad():
        assert [len(v) for part in pipeline.cut([x]) for v in part.values()] == parts
        torch.testing.assert_close(pipeline(x), model(x))


def test_skips_go_straight_to_their_stage() -> None:
    _, _, graph = captured("unet")
    parts = split(graph, stages(graph, 4))
    far = [i - s for i, p in enumerate(parts) for s in p.sources if s >= 0]
    assert max(far) > 1


def test_hundreds_of_steps_end_and_threads_with_them() -> None:
    _, args, graph = captured("chain")
    before = threading.active_count()
    with Pipeline(graph, stages(graph, 3), microbatches=6) as pipeline:
        first = pipeline(*args)
        for _ in range(300):
            assert torch.equal(pipeline(*args), first)
        report = pipeline.report()
        assert len(report.busy) == 3 and 0 < report.predicted <= report.seconds
    assert threading.active_count() == before
    with pytest.raises(DfcError, match="K051"):
        pipeline(*args)


def test_a_stage_that_fails_is_named_and_nothing_hangs() -> None:
    _, args, graph = captured("chain")
    with Pipeline(graph, stages(graph, 3), microbatches=6) as pipeline:
        whole = pipeline._lanes.lanes.run

        def fails(action: Action, values: Values) -> Values:
            if (action.stage, action.microbatch) == (1, 2):
                raise RuntimeError("out of luck")
            return whole(action, values)

        pipeline._lanes.lanes.run = fails
        with pytest.raises(DfcError, match="stage 1 failed on microbatch 2: out of luck"):
            pipeline(*args)
        pipeline._lanes.lanes.run = whole
        pipeline(*args)  # it goes on


def test_other_engines_run_stages_too() -> None:
    model, args, graph = captured("tied")
    with (
        Pipeline(graph, stages(graph, 2), engine="onnxruntime", microbatches=2) as pipeline,
        torch.no_grad(),
    ):
        for f, e in zip(leaves(pipeline(*args)), leaves(model(*args)), strict=True):
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_a_pipeline_says_why() -> None:
    _, _, graph = captured("chain")
    nodes = list(graph.nodes)
    with pytest.raises(DfcError, match=r"N050.*a later stage makes"):
        split(graph, {n: len(nodes) - 1 - i for i, n in enumerate(nodes)})
    with pytest.raises(DfcError, match=r"N050.*has no stage"):
        split(graph, {})
    with pytest.raises(DfcError, match=r"(?s)N050.*one of type Plan.*stage_of\(plan\)"):
        split(graph, dfc.plan(graph, Machine("one", (Device("a", "cpu", 1e9, 1e9, {"f32": 1e9}),))))  # type: ignore[arg-type]
    for count in (0, 1.5, "3"):
        with pytest.raises(DfcError, match=r"N053.*`microbatches` is a number of at least 1"):
            Pipeline(graph, stages(graph, 2), microbatches=count)  # type: ignore[arg-type]
    with pytest.raises(DfcError, match=r"N051.*no input has the batch `N`: they have B"):
        Pipeline(graph, stages(graph, 2), batch="N")
    with pytest.raises(DfcError, match=r"N053.*0 are no threads"):
        Pipeline(graph, stages(graph, 2), threads=0)
    with pytest.raises(DfcError, match=r"K004.*torch sees|K004.*is not there") as e:
        Pipeline(graph, stages(graph, 2), devices=["cpu", "cuda:99"])
    assert e.value.status == 7
    with pytest.raises(DfcError, match=r"K004.*torch sees|K004.*is not there"):
        Processes(graph, stages(graph, 2), devices=["cpu", "cuda:99"])

    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x).sum()

    graph = dfc.trace(Mean(), (torch.randn(4, 3),), dynamic_shapes=({0: B},))
    with (
        Pipeline(graph, stages(graph, 1), microbatches=2) as pipeline,
        pytest.raises(DfcError, match=r"N051.*has no dimension `B`"),
    ):
        pipeline(torch.randn(4, 3))


class Contrast(nn.Module):
    """Two towers, and how near each item of one is to each of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(5, 6)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.a(x)) @ torch.relu(self.b(y)).T


def test_a_batch_in_two_sizes_cannot_be_cut_and_one_microbatch_need_not_be() -> None:
    args = (torch.randn(4, 4), torch.randn(4, 5))
    graph = dfc.trace(Contrast(), args, dynamic_shapes=({0: B}, {0: B}))
    with (
        Pipeline(graph, stages(graph, 2), microbatches=2) as pipeline,
        pytest.raises(DfcError, match=r"N051.*\[B, B\] has the batch `B` in 2 of its sizes"),
    ):
        pipeline(*args)
    with Pipeline(graph, stages(graph, 2), microbatches=1) as pipeline:
        assert torch.equal(pipeline(*args), one_by_one(graph, pipeline, list(args))[0])

    class Pairs(nn.Module):
        def forward(self, x: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
            return torch.relu(x) + pairs.reshape(-1, 2, 3).sum(1)

    pairs = (torch.randn(4, 3), torch.randn(8, 3))
    graph = dfc.trace(Pairs(), pairs, dynamic_shapes=({0: B}, {0: 2 * B}))
    with pytest.raises(DfcError, match=r"N051.*a size of which the batch `B` is a part"):
        Pipeline(graph, stages(graph, 2), batch="B")
    with Pipeline(graph, stages(graph, 2), batch="B", microbatches=1) as pipeline:
        assert torch.equal(pipeline(*pairs), Pairs()(*pairs))


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = torch.relu(self.a(x))
        return {"plain": y, "centred": y - y.mean(0)}


def test_the_command_tells_of_outputs_that_are_not_the_unsplit_models(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from dfc.cli import main

    torch.manual_seed(0)
    package = str(tmp_path / "centred.dfcpkg")
    dfc.compile(Centred().eval(), (torch.randn(6, 4),), dynamic_shapes=({0: B},),
                engine="eager").save(package)  # fmt: skip
    given = ["run", package, "--size", "B=6", "--pipeline", "2", "-m"]
    assert main([*given, "3"]) == 0
    out = capsys.readouterr().out
    assert "note: `centred` differs from the unsplit model's by" in out and "`plain`" not in out
    assert main([*given, "1"]) == 0
    assert "differs" not in capsys.readouterr().out


def test_the_command_runs_a_pipeline_and_says_what_it_took(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    from dfc.cli import main

    _, _, graph = captured("chain")
    package = tmp_path / "chain.dfcpkg"
    dfc.compile(graph, [torch.randn(6, 8)], engine="eager").save(package)
    trace = tmp_path / "step.json"
    given = ["run", str(package), "--size", "B=12", "--pipeline", "2", "-m", "3"]
    assert main([*given, "--trace", str(trace), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["pipeline"]
    assert len(data["stages"]) == 2 and data["predicted_seconds"] <= data["step_seconds"]
    events = json.loads(trace.read_text())["traceEvents"]
    lanes = [sum(e["ph"] == "X" and e["pid"] == pid for e in events) for pid in (0, 1)]
    assert lanes == [2 * 3, 2 * 3]  # measured and predicted
    assert [(x["from"], x["to"], x["bytes"]) for x in data["links"]] == [(0, 1, 12 * 8 * 4)]
    assert data["unsplit_seconds"] > 0
    assert main([*given, "--engine", "eager,onnxruntime"]) == 0
    out = capsys.readouterr().out
    assert "the step of 3 microbatches took" in out and "the model unsplit, on 1 thread" in out
    assert main([*given, "--engine", "eager,onnxruntime,eager"]) == 2
    assert "N053" in capsys.readouterr().err
    assert main(["run", str(package), "--size", "B=12", "--pipeline", "50"]) == 0
    assert "stages, not 50" in capsys.readouterr().out
    assert main(["run", str(package), "--size", "B=1", "--pipeline", "2", "-m", "3"]) == 0
    out = capsys.readouterr().out
    assert "the step of 1 microbatch took" in out
    assert "1 microbatch, not 3: each has 1 or more of the batch `B`" in out
    fixed = tmp_path / "fixed.dfcpkg"
    dfc.compile(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval(), (torch.randn(6, 8),),
                engine="eager").save(fixed)  # fmt: skip
    assert main(["run", str(fixed), "--random", "--pipeline", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["pipeline"]["fewer_microbatches"]
    assert told.startswith("1 microbatch, not 8: the model has no batch of a size that varies")


PAIR = "cpu(cores=1, mem=1GB, bw=1GB/s, peak=1GFLOPS)"
GPU = "cuda(mem=1GB, bw=1GB/s, peak=2GFLOPS, launch=1us)"


def staged(first: str, second: str, microbatches: int = 3) -> Any:
    recipe = (
        f"dfc 1\n\ntarget two {{\n  device a : {first}\n  device b : {second}\n"
        "  link a <-> b : pcie(bw=1GB/s, latency=1us)\n}\n\nrecipe r for two {\n"
        f"  partition on a, b with microbatches={microbatches}\n}}\n"
    )
    _, args, graph = captured("chain")
    return dfc.compile(graph, args, recipe=recipe, engine="eager")


@pytest.mark.parametrize(
    ("given", "status", "told"),
    [
        ("cpu,cpu,cpu", 2, "3 devices are given for 2 stages"),
        ("cpu,tpu", 2, "stage 1 is to run on tpu: unknown device `tpu`"),
        ("cpu:x", 2, "stage 0 is to run on cpu:x: `cpu:x` is no device"),
        ("cpu,cuda:99", 7, "stage 1 is to run on cuda:99: torch sees"),
    ],
)
def test_a_stage_whose_device_is_not_here_is_named(given: str, status: int, told: str) -> None:
    from dfc.cli.stage_devices import rank_devices

    with pytest.raises(DfcError) as error:
        rank_devices(given, "cpu", None, [0, 1])
    assert told in error.value.message and error.value.status == status


@pytest.mark.parametrize("on", ["threads", "processes", "ray", "torchrun"])
def test_a_missing_device_is_told_wherever_stages_run(
    on: str, tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dfc.cli import main

    _, _, graph = captured("chain")
    package = str(tmp_path / "chain.dfcpkg")
    dfc.compile(graph, [torch.randn(6, 8)], engine="eager").save(package)
    launched = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "0"}  # fmt: skip
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    given = ["run", package, "--size", "B=12", "--pipeline", "1", "--devices", "cuda:99"]
    assert main([*given, "--on", on]) == 7
    told = capsys.readouterr().err
    assert "K004" in told and "stage 0 is to run on cuda:99: torch sees" in told
    assert "--devices cpu runs every stage on this processor" in told


def test_devices_are_those_asked_for_else_the_plans(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dfc.cli import main
    from dfc.cli.stage_devices import rank_devices

    compiled = staged(PAIR, GPU)
    package = str(tmp_path / "chain.dfcpkg")
    compiled.save(package)
    if torch.cuda.is_available():
        assert rank_devices(None, "cpu", compiled.plan, [0, 1]) == ["cpu", "cuda:0"]
    else:
        assert main(["run", package, "--size", "B=12", "--pipeline", "plan"]) == 7
        told = capsys.readouterr().err
        assert "stage 1 is planned on b, which would be cuda:0 here" in told
        assert "--devices cpu" in told
    assert rank_devices("cpu", "cpu", compiled.plan, [0, 1]) == ["cpu", "cpu"]
    given = ["run", package, "--size", "B=12", "--pipeline", "plan", "--devices", "cpu", "--json"]
    assert main(given) == 0
    import json

    told_of = json.loads(capsys.readouterr().out)["pipeline"]
    assert told_of["devices"] == ["cpu", "cpu"] and told_of["microbatches"] == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert rank_devices(None, "cpu", compiled.plan, [0, 1]) == ["cpu", "cuda:0"]
    assert rank_devices("cuda:1", "cpu", None, [0, 0, 1]) == ["cuda:1"] * 2
    with pytest.raises(DfcError, match=r"N053.*stage 2 is to run on cpu, and its rank 0"):
        rank_devices("cuda:0,cpu,cpu", "cpu", None, [0, 1, 0])
    hosts = [0, 0, 1, 1]  # of each only its own devices are looked for
    with pytest.raises(DfcError, match=r"K004.*stage 1 is to run on cuda:2"):
        rank_devices("cpu,cuda:2,cpu,cuda:0", "cpu", None, [0, 1, 2, 3], hosts, here=0)
    found = rank_devices("cpu,cuda:2,cpu,cuda:0", "cpu", None, [0, 1, 2, 3], hosts, here=1)
    assert found == ["cpu", "cuda:2", "cpu", "cuda:0"]


def test_each_host_of_a_plan_counts_its_own_gpus() -> None:
    from dfc.cli.stage_devices import _of_plan

    plan = staged(GPU, GPU).plan
    assert _of_plan(plan, [0, 0]) == ["cuda:0", "cuda:1"]
    assert _of_plan(plan, [0, 1]) == ["cuda:0", "cuda:0"]


def test_a_device_that_there_is_not_is_told_with_its_rank() -> None:
    _, _, graph = captured("chain")
    with pytest.raises(DfcError, match="rank 1 is to run on `gpu`"):
        Pipeline(graph, stages(graph, 2), devices=["cpu", "gpu"])
