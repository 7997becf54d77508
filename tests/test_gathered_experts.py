"""Experts whose weights are gathered for each row are experts of rows in runs, and quantized so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfc
from dfc.compress.gathered_experts import group_gathered
from dfc.emit.onnx import build_onnx
from dfc.emit.onnx_run import Session
from dfc.errors import DfcError
from dfc.ir.graph import Graph
from dfc.ir.interpret import interpret
from dfc.ir.verify import verify
from tests.test_experts import relative
from tests.tiny_models import run_step

STEP = "quantize int4 with smallest=1, scheme=weights"


class Gathered(nn.Module):
    """Three experts of both layouts, with a bias as GPT-OSS has it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(3, 48, 40) / 6)
        self.down = nn.Parameter(torch.randn(3, 48, 32) / 6)
        self.bias = nn.Parameter(torch.randn(3, 48))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        h = torch.bmm(self.up[ids], x.unsqueeze(-1)).squeeze(-1) + self.bias[ids]
        return torch.bmm(h.relu().unsqueeze(1), self.down[ids]).squeeze(1)


def traced() -> tuple[Graph, list[list[Any]]]:
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    chosen = ([2, 0, 2, 1, 0], [1, 1, 1, 1, 1], [-1, 0, -3, 2, 1])
    given = [[x, torch.tensor(ids)] for ids in chosen]
    return dfc.trace(Gathered(), tuple(given[0])), given


def test_rows_in_runs_give_the_same() -> None:
    graph, given = traced()
    runs = graph.copy()
    assert group_gathered(runs, lambda n: True) == 2
    verify(runs)
    assert not any(n.op == "aten.bmm.default" for n in runs.nodes)
    assert sum(n.op == "aten.sort.default" for n in runs.nodes) == 2
    assert group_gathered(runs, lambda n: True) == 0
    for inputs in given:
        (y,), (want,) = interpret(runs, inputs), interpret(graph, inputs)
        torch.testing.assert_close(y, want)


@pytest.mark.parametrize("to", ["int4", "int8"])
def test_gathered_experts_become_codes(to: str) -> None:
    graph, given = traced()
    small, changes, _ = run_step(graph, STEP.replace("int4", to))
    assert changes == 2
    assert sum(n.op == f"dfc.grouped_linear_w{to[-1]}" for n in small.nodes) == 2
    session = Session(build_onnx(small, opset=21), small, threads=1)
    for inputs in given:
        (y,), (want,) = interpret(small, inputs), interpret(graph, inputs)
        assert 0 < relative(y, want) < {"int4": 0.15, "int8": 0.02}[to]
        assert relative(session.run(inputs)[0], y) < 1e-5


def test_what_the_step_leaves_out_stays_as_it_was() -> None:
    graph, _ = traced()
    with pytest.raises(DfcError, match=r"nothing is left|no linear layer"):
        run_step(graph, 'quantize int4 except "**" with smallest=1')
    before = str(graph)
    assert group_gathered(graph, lambda n: False) == 0 and str(graph) == before


def test_a_gathered_matrix_that_others_read_stays() -> None:
    class Twice(Gathered):
        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            y = torch.bmm(self.up[ids], x.unsqueeze(-1))
            return y.squeeze(-1) + y.sum()

    graph = dfc.trace(Twice(), tuple(traced()[1][0]))
    assert group_gathered(graph, lambda n: True) == 0


def test_a_mixture_of_transformers_in_batches_is_calibrated() -> None:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, num_experts=4, num_experts_per_tok=2,
        use_cache=False, eos_token_id=1,
    )  # fmt: skip
    model = OlmoeForCausalLM(config).eval()
    model.set_experts_implementation("batched_mm")
    tokens = [
        torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3)
    ]
    graph = dfc.trace(model, (tokens[0],))
    step = "quantize int4 using calib with method=gptq, smallest=1, embeddings=no, scheme=weights"
    small, changes, ctx = run_step(graph, step, tokens[:2])
    assert changes == 8 and sum("grouped_linear_w4" in n.op for n in small.nodes) == 2
    assert sum("4 of 4 experts on" in d.reason for d in ctx.decisions) == 2
    (y,), (want,) = interpret(small, [tokens[2]]), interpret(graph, [tokens[2]])
    assert 0 < relative(y, want) < 0.2
