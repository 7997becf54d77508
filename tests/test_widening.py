"""A graph of 16 bits without its casts, and OpenVINO told of the type: `openvino:hint`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import dfc
from dfc.cli.command import app
from dfc.compress.widening import half_of_products, widened
from dfc.ir.graph import Graph
from dfc.ir.types import TensorType
from dfc.ir.verify import verify
from dfc.recipe.bench import forms
from dfc.recipe.tuning import tune
from dfc.runtime.engines import find_engine


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 192), nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.one(x).chunk(3, -1)
        return self.norm(x + self.two(nn.functional.scaled_dot_product_attention(q, k, v)))


def model() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    return Attends().eval(), (torch.randn(2, 16, 64),)


def compiled(engine: str, dtype: str = "bf16") -> dfc.Compiled:
    net, args = model()
    recipe = f"dfc 1\nrecipe half {{\n  apply simplify\n  autocast {dtype}\n}}\n"
    return dfc.compile(net, args, recipe=recipe, engine=engine)


def halves(graph: Graph) -> int:
    values = [*graph.parameters.values(), *(r for n in graph.nodes for r in n.results)]
    return sum(isinstance(v.type, TensorType) and v.type.dtype.bits == 16 for v in values)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_what_autocast_cast_is_f32_again(dtype: str) -> None:
    made = compiled("eager", dtype)
    assert half_of_products(made.graph) == dtype
    before = str(made.graph)
    wide = widened(made.graph)
    verify(wide)
    assert str(made.graph) == before and halves(made.graph) > 0
    assert halves(wide) == 0 and half_of_products(wide) is None
    assert not [n for n in wide.nodes if n.op == "aten._to_copy.default"]
    net, (x,) = model()
    (found,) = find_engine("eager").build(wide)([x])
    torch.testing.assert_close(found, net(x), rtol=0.02, atol=0.02)


def test_inputs_outputs_and_what_reads_bits_keep_their_types() -> None:
    graph = dfc.parse(
        "dfc 1\ngraph @f(%x: bf16[4, 4], %y: f32[4, 4]) -> (bf16[4, 4], f32[4, 4], i16[4, 4]) {\n"
        "  %z: bf16[4, 4] = aten._to_copy.default(%y, dtype=bf16)\n"
        "  %m: bf16[4, 4] = aten.mm.default(%x, %z)\n"
        "  %b: i16[4, 4] = aten.view.dtype(%z, dtype=i16)\n"
        "  return (%m, %y, %b)\n}\n"
    )
    wide = widened(graph)
    verify(wide)
    assert [v.type for v in wide.outputs] == [v.type for v in graph.outputs]
    given = [torch.randn(4, 4).bfloat16(), torch.randn(4, 4)]
    now, before = (find_engine("eager").build(g)(given) for g in (wide, graph))
    torch.testing.assert_close(now[0], before[0], rtol=0.02, atol=0.02)
    assert torch.equal(now[1], before[1]) and torch.equal(now[2], before[2])


def test_weights_stored_in_16_bits_alone_are_no_reason_for_a_hint() -> None:
    assert half_of_products(compiled("eager", "bf16 with only_weights=yes").graph) is None


def test_the_hint_reaches_openvino_and_is_read_back() -> None:
    pytest.importorskip("openvino")
    made = compiled("openvino:hint")
    (row,) = made.report.engines
    assert (row.name, row.verdict) == ("openvino:hint", "chosen")
    assert row.reason.startswith("without the graph's casts, asked for bf16")
    import openvino

    can = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert made._runner.precision == ("bf16" if can else "f32")  # type: ignore[attr-defined]
    assert ("computes in f32" in row.reason) != can


def test_a_graph_of_f32_is_built_as_by_openvino() -> None:
    pytest.importorskip("openvino")
    net, args = model()
    made = dfc.compile(net, args, engine="openvino:hint")
    assert made.report.engines[0].reason == ""
    torch.testing.assert_close(made(*args), net(*args), rtol=1e-4, atol=1e-4)


def test_auto_offers_it_and_a_package_keeps_it(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    auto = compiled("auto")
    found = {e.name: e for e in auto.report.engines}
    assert found["openvino:hint"].verdict in ("chosen", "slower")
    assert found["openvino:hint"].p50_ms is not None
    assert forms(auto.graph, "cpu") == ["openvino:hint"]
    made, (_, args) = compiled("openvino:hint"), model()
    made.save(tmp_path / "m.dfcpkg")
    again = dfc.load(tmp_path / "m.dfcpkg")
    assert again.engine.name == "openvino:hint"
    assert torch.equal(again(*args), made(*args))
    tuned = tune(tmp_path / "m.dfcpkg", ["eager", "openvino"], seconds=0.05)
    rows = {e.name: e for e in tuned.engines}
    assert rows["openvino:hint"].reason.startswith("without the graph's casts")


def test_a_package_of_16_bits_is_verified_by_what_its_passes_promised(tmp_path: Path) -> None:
    path = tmp_path / "m.dfcpkg"
    compiled("eager").save(path)
    assert CliRunner().invoke(app, ["verify", str(path)]).exit_code == 0
    assert dfc.load(path).report.rtol == 16 * 2.0**-7
