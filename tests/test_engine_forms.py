"""Forms of the eager engine that are tried on GPUs, and engines that fail while they run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dfc
from dfc.emit.fx import to_fx
from dfc.ir.graph import Graph
from dfc.ir.types import DTYPES, TensorType
from dfc.ops.codes import pack4
from dfc.recipe.bench import Bench, forms
from dfc.runtime.engines import find_engine
from dfc.runtime.kernels import cuda
from dfc.runtime.kernels.graph import kernels, unpacked_kernels
from tests.customs import MODEL, forgotten

UNPACKED = ["eager:floats", "eager:floats:cuda_graph"]


def layer(activations: str) -> Graph:
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (8, 64), generator=random, dtype=torch.uint8)
    graph = Graph("layer")
    x = graph.add_input("x", TensorType(DTYPES["f32"], (3, 64)))
    held = [graph.add_constant("w", pack4(codes)), graph.add_constant("s", torch.rand(8, 2))]
    attributes = {"activations": activations, "group": 32}
    node = graph.add("dfc.linear_w4", [x, *held, None, None], attributes)
    graph.set_outputs([node.result])
    return graph


def test_unpacked_weights_are_tried_on_gpus_where_they_meet_floats() -> None:
    assert forms(layer("float"), "cuda") == ["eager:cuda_graph", *UNPACKED]
    assert forms(layer("float"), "cuda:1") == ["eager:cuda_graph", *UNPACKED]
    assert forms(layer("int8"), "cuda") == ["eager:cuda_graph"]
    assert forms(layer("float"), "cpu") == []
    bench = Bench(layer("float"), None, device="cuda")
    assert set(UNPACKED) < set(bench.candidates())
    assert [find_engine(n).name for n in UNPACKED] == UNPACKED


def test_the_form_multiplies_floats_where_the_engine_reads_codes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "kind", lambda device: cuda.Kind(True, True, ""))
    cuda.register()

    def called(graph: Graph, how: Any) -> set[Any]:
        return {n.target for n in to_fx(graph, "cpu", how("cuda")).graph.nodes}

    stored, floats = torch.ops.dfc.linear_cuda, torch.ops.aten.linear.default
    assert stored.default in called(layer("float"), kernels)
    assert floats in called(layer("float"), unpacked_kernels)
    assert stored.default not in called(layer("float"), unpacked_kernels)
    assert stored.default in called(layer("int8"), unpacked_kernels)


def test_the_form_gives_what_the_engine_gives() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    for activations in ("float", "int8"):
        graph = layer(activations)
        (want,), (got,) = (find_engine(n).build(graph)([x]) for n in ("eager", "eager:floats"))
        torch.testing.assert_close(got, want)


@pytest.fixture
def failing() -> Iterator[None]:
    """The engines `breaks`, whose runner fails, `narrow`, whose runner fails for more than twelve
    numbers, and `stumbles`, which fails to build.
    """
    with forgotten():

        @dfc.engine
        class Breaks:
            name = "breaks"
            devices = ("cpu",)

            def supports(self, node: Any) -> None:
                return None

            def build(self, graph: Graph, device: str = "cpu", threads: int | None = None) -> Any:
                def run(inputs: Any) -> Any:
                    raise RuntimeError("\nillegal instruction\nat line 7")

                return run

        @dfc.engine
        class Stumbles(Breaks):
            name = "stumbles"

            def build(self, graph: Graph, device: str = "cpu", threads: int | None = None) -> Any:
                raise NotImplementedError

        @dfc.engine
        class Narrow(Breaks):
            name = "narrow"

            def build(self, graph: Graph, device: str = "cpu", threads: int | None = None) -> Any:
                inner = find_engine("eager").build(graph)

                def run(inputs: Any) -> Any:
                    if inputs[0].numel() > 12:
                        raise RuntimeError("no room")
                    return inner(inputs)

                return run

        yield


def test_engines_that_fail_are_left_out_with_what_they_say(failing: None) -> None:
    compiled = dfc.compile(*MODEL, engine="breaks,stumbles,eager")
    assert compiled.engine.name == "eager"
    told = {e.name: (e.verdict, e.reason) for e in compiled.report.engines}
    assert told["breaks"] == ("refused", "engine `breaks` fails: illegal instruction")
    assert told["stumbles"] == ("refused", "engine `stumbles` fails: NotImplementedError")


def test_an_engine_that_fails_alone_ends_the_compilation_with_what_it_says(failing: None) -> None:
    with pytest.raises(dfc.DfcError, match="illegal instruction") as e:
        dfc.compile(*MODEL, engine="breaks")
    assert (e.value.code, e.value.status) == ("K023", 8)


def test_an_engine_that_fails_on_what_is_measured_is_left_out(failing: None) -> None:
    """What is measured on may be larger than the probes that engines are judged by."""
    compiled = dfc.compile(*MODEL, engine="eager")
    larger = (torch.ones(30, 4),)
    bench = Bench(compiled.graph, compiled.standard(), "narrow", example=larger)
    with pytest.raises(dfc.DfcError, match="engine `narrow` fails: no room"):
        bench.ready(compiled.graph, "narrow")
    assert bench.ready(compiled.graph, "eager").wrong is None
