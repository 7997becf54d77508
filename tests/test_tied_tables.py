"""A table that is looked up and, transposed, multiplied with stays one through all that is done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dfc
from dfc.ir.graph import Graph, Node
from dfc.ir.interpret import interpret
from dfc.rewrite.pass_ import KEPT, Context, find_pass
from tests.tiny_models import run_step

ROWS, WIDTH = 100, 32
VIEW = "it is a view of !table.weight, which others read too: a copy would store it twice"


class Transformer(nn.Module):
    """Its output layer is the product with the table's transposition, as papers write it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True)
        self.scale = nn.Parameter(torch.ones(ROWS))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = self.layer(self.table(ids)), self.table.weight.T
        return x @ weight, x[:, 0] @ (weight.T[:8] * self.scale[:8, None]).T


def model() -> tuple[nn.Module, tuple[Tensor]]:
    torch.manual_seed(0)
    return Transformer().eval(), (torch.randint(0, ROWS, (2, 7)),)


def tables(graph: Graph) -> list[str]:
    """The parameters that hold as many numbers as the table."""
    found = graph.parameters.items()
    return [name for name, p in found if p.tensor_type.numel == ROWS * WIDTH]


def test_folding_leaves_the_table_one_and_says_why(tmp_path: Path) -> None:
    net, args = model()
    compiled = dfc.compile(net, args, engine="eager")
    assert tables(compiled.graph) == ["table.weight"]
    folded = [n for n in compiled.graph.parameters if n.startswith("folded.")]
    assert len(folded) == 1  # what is computed from a view of it is a constant all the same
    compiled.save(tmp_path / "m.dfcpkg")
    size = (tmp_path / "m.dfcpkg" / "weights.safetensors").stat().st_size
    own = sum(4 * p.numel() for p in net.parameters())
    assert own < size < own + ROWS * WIDTH * 4 / 2
    for a, b in zip(dfc.load(tmp_path / "m.dfcpkg")(*args), net(*args), strict=True):
        torch.testing.assert_close(a, b)

    told = dfc.explain(dfc.trace(net, args), pass_="fold_constants").data["decisions"]
    assert VIEW in [d["reason"] for d in told if d["outcome"] == KEPT]


def test_a_parameter_that_only_a_view_reads_is_folded() -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w.T

    graph = dfc.compile(Once(), (torch.randn(2, 4),), engine="eager").graph
    assert [n.op for n in graph.nodes] == ["aten.matmul.default"]
    assert len(graph.parameters) == 1


def test_two_views_of_the_whole_do_not_double_it() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.w.T).relu() @ self.w.reshape(4, 16).reshape(8, 8).transpose(0, 1)

    graph = dfc.trace(Twice(), (torch.randn(2, 8),))
    find_pass("fold_constants").run(graph, Context())
    find_pass("dce").run(graph, Context())
    assert list(graph.parameters) == ["w"]


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantizing_stores_the_table_once(bits: str) -> None:
    net, args = model()
    step = f"quantize {bits} with group=32, smallest=0, scheme=weights"
    recipe = f'dfc 1\nimport "std/simplify.dfc"\nrecipe small {{\n  apply simplify\n  {step}\n}}'
    compiled = dfc.compile(net, args, recipe=recipe, engine="eager")
    codes = [p for p in compiled.graph.parameters.values() if p.name.startswith("table.weight")]
    assert [p.name for p in codes] == ["table.weight.codes", "table.weight.scale"]
    assert not tables(compiled.graph) or bits == "int8"
    ops = [n.op for n in compiled.graph.nodes if codes[0] in n.operands]
    short = bits.replace("int", "w")
    assert ops == [f"dfc.embedding_{short}", f"dfc.linear_{short}"]


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(48, 96) / 10)
        self.out = nn.Parameter(torch.randn(96, 64) / 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.w).relu()
        return F.linear(F.linear(hidden, self.w.t()), self.out.t())


def test_a_weight_that_is_read_both_ways_says_so_and_a_turned_one_becomes_codes() -> None:
    graph = dfc.trace(Autoencoder(), (torch.randn(4, 96),))
    small, changes, ctx = run_step(graph, "quantize int8 with scheme=weights")
    assert changes == 1
    kept = [d.reason for d in ctx.decisions if d.outcome == KEPT]
    assert kept == ["!w is read both as it lies and transposed"] * 2
    assert [n.op for n in small.nodes].count("dfc.linear_w8") == 1
    assert "out" not in small.parameters and not any(n.op == "aten.t.default" for n in last(small))
    x = torch.randn(4, 96)
    (y,), (want,) = interpret(small, [x]), interpret(graph, [x])
    assert 0 < float((y - want).norm() / want.norm()) < 0.01


def last(graph: Graph) -> list[Node]:
    """The last layer and what stands right before it."""
    return list(graph.nodes)[-2:]
